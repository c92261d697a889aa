"""What methods work with: the held-out diffs, the model, the adapter and the config; and what asking costs."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import Answer
from dit_jax.data.labels import normalise
from dit_jax.deltas.store import DiffStore, failed, gradable_label, label_of
from dit_jax.diff_batches import Given, answer, from_store
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.models.delta_trees import Delta


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Diffs that no training saw: their indices in the store, and their rows."""

    store: DiffStore
    indices: Sequence[int]
    rows: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.indices)

    @functools.cached_property
    def given(self) -> Given:
        """The diffs themselves, which are read when somebody asks for them."""
        return from_store(self.store, self.indices)

    def of_block(self, number: int, count: int) -> range:
        """The rows of the number-th of `count` blocks of neighbouring diffs, which together are all."""
        return range(*(len(self) * i // count for i in (number, number + 1)))

    def block(self, number: int, count: int) -> "HeldOut":
        """The diffs of a block, see `of_block`."""
        rows = self.of_block(number, count)
        return self if len(rows) == len(self) else self.some(rows)

    def some(self, rows: Sequence[int]) -> "HeldOut":
        """These of the diffs."""
        return HeldOut(self.store, [self.indices[i] for i in rows], [self.rows[i] for i in rows])

    def label(self, row: int) -> str:
        """What the adapter should say about a diff."""
        return label_of(self.rows[row])

    def shuffled(self, rows: Iterable[int]) -> Given:
        """Diffs replaced by their nearest neighbours, of another label if there is one: real diffs, wrong labels."""
        labels, n = [normalise(self.label(row)) for row in range(len(self))], len(self)
        order = []
        for i in rows:
            others = (j % n for j in range(i - 1, i - n, -1) if labels[j % n] != labels[i])
            order.append(next(others, i - 1))
        return from_store(self.store, [self.indices[i] for i in order])


def read_held_out(
    store: DiffStore, category: str, exclude_failed: bool = False, column: str = "label"
) -> HeldOut:
    """The test split of a category ("topic" or "benign"); `exclude_failed` leaves out what failed the gate.

    Args:
        column: of the store's index, what adapters should say about these diffs; see `gradable_label`.
    """
    indices = store.indices(split="test", category=category)
    if exclude_failed:
        indices = [i for i in indices if not failed(store.rows[i])]
    rows = [{**store.rows[i], "label": gradable_label(store.rows[i], column)} for i in indices]
    return HeldOut(store, indices, rows)


class CostMeter:
    """`with meter.measure("dit"): … meter.add(tokens=7)`; `costs["dit"]` then has its seconds, answers and tokens."""

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, float]] = {}
        self._current: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """What happens inside is the cost of `name`, compilation included."""
        start = time.monotonic()
        self._current = {"seconds": 0.0, "answers": 0, "prompt_tokens": 0, "tokens": 0}
        yield
        self._current["seconds"] = round(time.monotonic() - start, 3)
        self.costs[name] = self._current

    def add(self, **counts: int) -> None:
        """Adds to `answers`, `prompt_tokens` or `tokens`, those that were generated."""
        for name, count in counts.items():
            self._current[name] += count


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method works with: `config` is the `evaluate` section, `off` an adapter of zeros.

    topics, benign: the held-out diffs that it asks, one of `blocks` blocks of all of them.
    """

    model: Model
    store: DiffStore
    all_topics: HeldOut
    all_benign: HeldOut
    adapter: Delta
    off: Delta
    config: Any
    seed: int
    subject: str  # "topic", or "summary" for news: see questions.subject_of
    number: int = 0
    blocks: int = 1
    meter: CostMeter = dataclasses.field(default_factory=CostMeter)
    transcripts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def topics(self) -> HeldOut:
        """The diffs of this block that have something to name."""
        return self.all_topics.block(self.number, self.blocks)

    @functools.cached_property
    def benign(self) -> HeldOut:
        """The benign diffs of this block."""
        return self.all_benign.block(self.number, self.blocks)

    @functools.cached_property
    def shuffled(self) -> Given:
        """Diffs of other topics in place of the topics' own."""
        return self.all_topics.shuffled(self._rows)

    @property
    def seen(self) -> list[str]:
        """Wordings of the question that the adapter was trained on."""
        return list(self.config.seen_questions)

    @property
    def label_column(self) -> str:
        """The column of the store's index that holds what adapters should say."""
        return str(EVALUATE.get(self.config, "label"))

    @functools.cached_property
    def noise(self) -> Given:
        """Noise in place of the topics' diffs, the same whoever asks about it."""
        keys = jax.random.split(jax.random.key(self.seed), len(self.all_topics))
        return self.topics.given.noise(keys[np.asarray(self._rows)])

    @property
    def _rows(self) -> range:
        return self.all_topics.of_block(self.number, self.blocks)

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
        **decoding: Any,
    ) -> list[Answer]:
        """Answers in batches of the config's size; the meter counts what they cost.

        Args:
            **decoding: max_new_tokens, temperature, seed, contrast; see `diff_batches.answer`.
        """
        size, no_repeats = self.config.batch_size, self.config.forbid_repeats
        answers = answer(
            self.model, given, prompts, rows, adapter, batch_size=size, forbid_repeats=no_repeats, **decoding
        )  # fmt: skip
        self.meter.add(
            answers=len(answers),
            prompt_tokens=sum(len(self.model.chat.prompt_ids(prompt)) for prompt in prompts),
            tokens=sum(one.generated for one in answers),
        )
        return answers

    def ask_base(self, prompts: Sequence[str], **sampling: Any) -> list[Answer]:
        """Answers of the unchanged base. `sampling`: temperature, seed."""
        nothing, rows = self.topics.given.nothing(), [0] * len(prompts)
        tokens = self.answer_tokens
        return self.ask(nothing, prompts, rows, self.off, max_new_tokens=tokens, **sampling)
