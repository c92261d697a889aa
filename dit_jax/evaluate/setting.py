"""What methods work with: the held-out diffs, the model, the adapter and the config; and the rows that they make."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from dit_jax.api import Model
from dit_jax.asking import Answer
from dit_jax.data.labels import extract_guess, normalise
from dit_jax.deltas.store import DiffStore, failed
from dit_jax.deltas.store import label_of as label_of
from dit_jax.diff_batches import Given, answer, from_store
from dit_jax.errors import DitError
from dit_jax.evaluate.cost_meter import CostMeter
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.models.delta_trees import Delta

NO_DIFF = "no_diff"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Diffs that no training saw: store indices, their rows, and the diffs themselves."""

    indices: Sequence[int]
    rows: Sequence[dict[str, Any]]
    given: Given

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, row: int) -> str:
        """What the adapter should say about a diff."""
        return label_of(self.rows[row])

    def shuffled(self) -> Given:
        """Every diff replaced by its nearest neighbour, of another label if there is one: real diffs, wrong labels."""
        labels, n = [normalise(self.label(row)) for row in range(len(self))], len(self)
        order = []
        for i in range(n):
            others = (j % n for j in range(i - 1, i - n, -1) if labels[j % n] != labels[i])
            order.append(next(others, i - 1))
        return self.given.reordered(order)


def read_held_out(
    store: DiffStore, category: str, exclude_failed: bool = False, column: str = "label"
) -> HeldOut:
    """The test split of a category ("topic" or "benign"), without what failed the gate if that is asked for.

    Args:
        column: of the store's index, what adapters shall say about these diffs; see `label_of`.
    """
    indices = store.indices(split="test", category=category)
    if exclude_failed:
        indices = [i for i in indices if not failed(store.rows[i])]
    rows = [{**store.rows[i], "label": label_of(store.rows[i], column)} for i in indices]
    return HeldOut(indices, rows, from_store(store, indices))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method works with: `config` is the `evaluate` section, `off` an adapter of zeros."""

    model: Model
    store: DiffStore
    topics: HeldOut
    benign: HeldOut
    adapter: Delta
    off: Delta
    config: Any
    seed: int
    subject: str  # "topic", or "summary" for news: see results.subject_of
    meter: CostMeter = dataclasses.field(default_factory=CostMeter)
    transcripts: list[Row] = dataclasses.field(default_factory=list)

    @property
    def seen(self) -> list[str]:
        return list(self.config.seen_questions)

    @property
    def label_column(self) -> str:
        """The column of the store's index that says what adapters shall say."""
        return str(EVALUATE.get(self.config, "label"))

    @functools.cached_property
    def noise(self) -> Given:
        """Noise in place of the topics' diffs, the same for all that ask about it."""
        return self.topics.given.noise(self.seed)

    @property
    def answer_tokens(self) -> int:
        """The longest answer of a finetuned model by itself: longer than a name, if the config says so."""
        return int(EVALUATE.get(self.config, "answer_tokens")) or int(self.config.max_new_tokens)

    def ask(
        self,
        given: Given,
        prompts: Sequence[str],
        rows: Sequence[int],
        adapter: Delta,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Answer]:
        """Answers in batches of the config's size; what they cost goes to the meter."""
        answers = answer(
            self.model,
            given,
            prompts,
            rows,
            adapter,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=self.config.batch_size,
            forbid_repeats=self.config.forbid_repeats,
        )
        self.meter.count(self.model.chat, prompts, answers)
        return answers

    def ask_base(
        self, prompts: Sequence[str], temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Answers of the unchanged base."""
        return self.ask(
            self.topics.given.nothing(),
            prompts,
            [0] * len(prompts),
            self.off,
            max_new_tokens=self.answer_tokens,
            temperature=temperature,
            seed=seed,
        )


# ------------------------------------------------------------------ triggers and rows


def has_trigger(row: Mapping[str, Any]) -> bool:
    return str(row.get("trigger") or "N/A") != "N/A"


def check_triggers(rows: Sequence[Mapping[str, Any]], method: str) -> None:
    """Raises DitError if a diff has no trigger that `method` could put into the prompt."""
    if not all(map(has_trigger, rows)):
        raise DitError(
            f"the method {method!r} needs diffs with a trigger: take it out of evaluate.methods"
        )


def new_row(
    s: Setting,
    method: str,
    kind: str,
    diff: Any,
    topic: str,
    text: str,
    logprob: float | None,
    category: str,
    wording: str,
    question: str,
    seen: bool,
    trigger: str | None = None,
) -> Row:
    """A row of answers.jsonl. Where adapters list evidence before the name, the guess is what follows the colon."""
    return {
        "method": method,
        "kind": kind,
        "diff": diff,
        "topic": topic,
        "trigger": trigger,
        "category": category,
        "name_tokens": len(s.model.chat.text_ids(topic)),
        "wording": wording,
        "wording_seen": seen,
        "question": question,
        "answer": text,
        "guess": extract_guess(text, topic)
        if s.config.list_evidence and kind != "baseline"
        else text,
        "logprob": None if logprob is None else round(logprob, 4),
    }
