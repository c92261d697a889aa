"""Training examples of the DIT adapter: which diff, which wording, which answer; as a grain pipeline."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.data.batch import TokenBatch, pack
from dit_jax.data.chat import Chat
from dit_jax.data.organisms import NONE, answer_text
from dit_jax.data.reference import padded_labels
from dit_jax.deltas.store import DiffStore
from dit_jax.errors import DitError

NO_DIFF = -1


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one diff. `diff` indexes the stacked training diffs; `NO_DIFF` is the bare base."""

    diff: int
    question: str
    answer: str


def make_pipeline(store: DiffStore, train: Any, seed: int) -> tuple[Any, list[int]]:
    """An endless grain dataset of batches (lists of `Example`), and the store indices that `Example.diff` refers to.

    Each batch holds `train.no_diff_per_batch` examples without a diff, `train.benign_per_batch` of benign
    diffs, and topic diffs for the rest: the first two teach the adapter to say that nothing was changed.

    Raises:
        DitError: no training topics in the store, or no room for them in a batch.
    """
    import grain

    topics = store.indices(split="train", category="topic")[: train.max_diffs or None]
    benign = store.indices(split="train", category="benign")
    members = topics + benign
    rest = train.batch_size - train.no_diff_per_batch - train.benign_per_batch
    if not topics:
        raise DitError(
            f"{store.path} has no training topics: raise data.train_topics and use a new --workdir"
        )
    if rest < 1:
        raise DitError(
            f"train.batch_size = {train.batch_size} leaves no room for topics beside "
            "train.no_diff_per_batch and train.benign_per_batch: raise it"
        )
    sources = [
        (range(len(topics)), rest),
        (range(len(topics), len(members)), train.benign_per_batch),
        ([NO_DIFF], train.no_diff_per_batch),
    ]
    parts, weights = [], []
    for number, (diffs, share) in enumerate(sources):
        if share and len(diffs):
            parts.append(grain.MapDataset.source(list(diffs)).shuffle(seed=seed + number).repeat())
            weights.append(share)
    questions = list(train.questions)

    def to_example(diff: int, rng: np.random.Generator) -> Example:
        question = questions[rng.integers(len(questions))]
        if diff == NO_DIFF:
            return Example(diff, question, NONE)
        row = store.rows[members[diff]]
        # A new order every time: what comes first is not predictable, so each word must be read from the diff.
        evidence = list(rng.permutation(row["evidence"])) if train.list_evidence else []
        return Example(diff, question, answer_text(row["topic"], evidence))

    mixed = grain.MapDataset.mix(parts, weights=weights)
    dataset = mixed.seed(seed).random_map(to_example).batch(train.batch_size, batch_fn=list)
    return dataset, members


def to_batch(examples: Sequence[Example], chat: Chat, train: Any) -> TokenBatch:
    """Mean over an example's answer tokens, then mean over the batch (or as the reference has it, if asked)."""
    samples = [chat.sample(example.question, example.answer) for example in examples]
    if train.reference_labels:
        return padded_labels(samples, train.max_length, chat.pad_id)
    weights = [1 / (len(samples) * (sample.end - sample.start)) for sample in samples]
    return pack(samples, weights, train.max_length, train.max_target, chat.pad_id)
