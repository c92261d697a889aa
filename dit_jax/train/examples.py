"""Training examples of the DIT adapter (diff, wording of the question, answer), as a grain pipeline."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.data.batch import TokenBatch, pack
from dit_jax.data.chat import Chat
from dit_jax.data.labels import NONE, answer_text
from dit_jax.data.reference import padded_labels
from dit_jax.deltas.store import label_of
from dit_jax.errors import DitError
from dit_jax.train.mixture import NO_DIFF, Part, members_of
from dit_jax.train.train_keys import TRAIN

_EPOCHS = 2**31  # in effect endless; grain cannot count batches of a dataset of endless length


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one diff. `diff` is a place in `mixture.members_of`; `NO_DIFF` is the bare base.

    variation: the seed of what `variation.vary` makes of the diff.
    """

    diff: int
    question: str
    answer: str
    variation: int = 0


PADDING = Example(NO_DIFF, "", "")  # of a batch that splits evenly over the mesh


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


def make_pipeline(parts: Sequence[Part], train: Any, seed: int) -> Any:
    """An endless grain dataset of batches (lists of `Example`, whose `diff` is a place in `mixture.members_of`).

    A batch holds `train.no_diff_per_batch` examples without a diff and `train.benign_per_batch` with benign diffs,
    which teach the adapter to say that nothing was changed; the rest have topic diffs. Each of the three is divided
    among the parts by their shares.

    Raises:
        DitError: a batch has no room for topics.
    """
    import grain

    amounts = (check_room(train), train.benign_per_batch, train.no_diff_per_batch)
    sources: list[tuple[int, Sequence[int], int]] = []  # number of the part, diffs, kind of diffs
    first = 0
    for number, part in enumerate(parts):
        benign = first + len(part.topics)
        end = benign + len(part.benign)
        sources += [
            (number, range(first, benign), 0),
            (number, range(benign, end), 1),
            (number, [NO_DIFF], 2),
        ]
        first = end
    shares = [
        sum(parts[number].share for number, diffs, kind in sources if kind == one and diffs)
        for one in range(len(amounts))
    ]
    datasets, weights = [], []
    for offset, (number, diffs, kind) in enumerate(sources):
        weight = amounts[kind] * parts[number].share / shares[kind] if diffs else 0
        if weight:
            asked = [(number, diff) for diff in diffs]
            datasets.append(
                grain.MapDataset.source(asked).shuffle(seed=seed + offset).repeat(_EPOCHS)
            )
            weights.append(weight)
    members, prefix = members_of(parts), TRAIN.get(train, "answer_prefix")

    def to_example(asked: tuple[int, int], rng: np.random.Generator) -> Example:
        part, diff = parts[asked[0]], asked[1]
        question = part.questions[int(rng.integers(len(part.questions)))]
        if diff == NO_DIFF:
            return Example(diff, question, prefix + NONE)
        row = part.store.rows[members[diff][1]]
        # The order is new every time and so not predictable: each word must be read from the diff.
        evidence = list(rng.permutation(row["evidence"])) if part.list_evidence else []
        answer = prefix + answer_text(label_of(row, part.label), evidence)
        return Example(diff, question, answer, int(rng.integers(2**32)))

    mixed = grain.MapDataset.mix(datasets, weights=weights)
    return mixed.seed(seed).random_map(to_example).batch(train.batch_size, batch_fn=list)


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
