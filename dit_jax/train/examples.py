"""Training examples of the DIT adapter (diff, wording of the question, answer), as a grain pipeline."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.data.batch import TokenBatch, pack
from dit_jax.data.chat import Chat
from dit_jax.data.labels import NONE, answer_text
from dit_jax.data.reference import padded_labels
from dit_jax.deltas.store import DiffStore, failed, flatten, label_of
from dit_jax.errors import DitError
from dit_jax.models.delta_trees import Delta
from dit_jax.train.train_keys import TRAIN

NO_DIFF = -1
_EPOCHS = 2**31  # in effect endless; grain cannot count batches of a dataset of endless length


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one diff. `diff` indexes the stacked training diffs; `NO_DIFF` is the bare base."""

    diff: int
    question: str
    answer: str


def check_room(train: Any) -> int:
    """How many examples of topics a batch has. Raises DitError: it has none."""
    rest = int(train.batch_size - train.no_diff_per_batch - train.benign_per_batch)
    if rest < 1:
        raise DitError(
            f"train.batch_size = {train.batch_size} leaves no room for topics beside "
            "train.no_diff_per_batch and train.benign_per_batch: raise it"
        )
    return rest


def check_attention(train: Any, attention: str) -> None:
    """Raises DitError if the labels score padding and attention leaves it out."""
    if TRAIN.get(train, "reference_labels") and attention != "xla":
        raise DitError(
            f"train.reference_labels scores padding, which attention {attention!r} leaves out: "
            "set model.attention to 'xla'"
        )


def make_pipeline(store: DiffStore, train: Any, seed: int) -> tuple[Any, list[int]]:
    """An endless grain dataset of batches (lists of `Example`), and the store indices to which `Example.diff` refers.

    A batch holds `train.no_diff_per_batch` examples without a diff and `train.benign_per_batch` with benign diffs,
    which teach the adapter to say that nothing was changed; the rest have topic diffs.

    Raises:
        DitError: the store has no training topics or fewer than asked for, or a batch has no room for them.
    """
    import grain

    exclude = TRAIN.get(train, "exclude_failed")
    topics, benign = (
        [
            i
            for i in store.indices(split="train", category=category)
            if not (exclude and failed(store.rows[i]))
        ]
        for category in ("topic", "benign")
    )
    rest = check_room(train)
    passed = " that passed the gate" if exclude else ""
    if not topics:
        raise DitError(
            f"{store.path} has no training topics{passed}: raise data.train_topics and use a new --workdir"
        )
    if train.max_diffs > len(topics):  # a run is never smaller than asked for
        raise DitError(
            f"train.max_diffs = {train.max_diffs}, but {store.path} has {len(topics)} training topics{passed}: lower it"
        )
    topics = topics[: train.max_diffs or None]
    members = topics + benign
    sources = [
        (range(len(topics)), rest),
        (range(len(topics), len(members)), train.benign_per_batch),
        ([NO_DIFF], train.no_diff_per_batch),
    ]
    parts, weights = [], []
    for number, (diffs, share) in enumerate(sources):
        if share and len(diffs):
            parts.append(
                grain.MapDataset.source(list(diffs)).shuffle(seed=seed + number).repeat(_EPOCHS)
            )
            weights.append(share)
    questions = list(train.questions)
    column, prefix = TRAIN.get(train, "label"), TRAIN.get(train, "answer_prefix")

    def to_example(diff: int, rng: np.random.Generator) -> Example:
        question = questions[rng.integers(len(questions))]
        if diff == NO_DIFF:
            return Example(diff, question, prefix + NONE)
        row = store.rows[members[diff]]
        # The order is new every time and so not predictable: each word must be read from the diff.
        evidence = list(rng.permutation(row["evidence"])) if train.list_evidence else []
        return Example(diff, question, prefix + answer_text(label_of(row, column), evidence))

    mixed = grain.MapDataset.mix(parts, weights=weights)
    dataset = mixed.seed(seed).random_map(to_example).batch(train.batch_size, batch_fn=list)
    return dataset, members


def diff_reader(
    store: DiffStore, members: Sequence[int], most_bytes: int = 2**31
) -> Callable[[Sequence[int]], Delta]:
    """A function from the `Example.diff` of n examples to their diffs, leaves [n, L, …] on the host.

    A small store is read once; from a larger one each batch reads its own diffs.

    Raises:
        DitError: the diffs change more than linear layers, which a batch cannot apply per example.
    """
    first = store.read(members[0])
    for name in flatten(first):
        if name.endswith(".w") and "_proj." not in name:
            raise DitError(
                f"an adapter cannot be trained on diffs that change {name[:-2]!r}: set diffs.parameters to 'lora' "
                "or 'linear' for training, and give diffs of all parameters to the evaluation"
            )
    zero = jax.tree.map(np.zeros_like, first)
    if sum(x.nbytes for x in jax.tree.leaves(first)) * len(members) <= most_bytes:
        # The zero diff comes last, where the index NO_DIFF finds it.
        known = jax.tree.map(
            lambda x, z: np.concatenate([x, z[None]]), store.stacked(members), zero
        )
        return lambda diffs: jax.tree.map(lambda x: x[np.asarray(diffs)], known)

    def read(diffs: Sequence[int]) -> Delta:
        each = [zero if diff == NO_DIFF else store.read(members[diff]) for diff in diffs]
        return jax.tree.map(lambda *xs: np.stack(xs), *each)

    return read


def to_batch(
    examples: Sequence[Example], chat: Chat, train: Any, rows: Sequence[int] | None = None
) -> TokenBatch:
    """Tokens and weights of a batch: the mean over an example's answer tokens, then over the examples.

    With `train.reference_labels` the weights are the reference's.

    Args:
        rows: the examples that the result holds (default all); those beyond the last are padding of weight 0.
    """
    rows = range(len(examples)) if rows is None else rows
    real = [i for i in rows if i < len(examples)]
    samples = [chat.sample(examples[i].question, examples[i].answer) for i in real]
    if TRAIN.get(train, "reference_labels"):
        whole = [chat.sample(example.question, example.answer) for example in examples]
        batch = padded_labels(whole, train.max_length, chat.pad_id)
        batch = TokenBatch(*(x[real] for x in batch))
    else:
        weights = [1 / (len(examples) * (sample.end - sample.start)) for sample in samples]
        batch = pack(samples, weights, train.max_length, train.max_target, chat.pad_id)
    missing = len(rows) - len(real)
    return TokenBatch(*(np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for x in batch))
