"""Diffs for evaluation, and what controls put in their place: LoRAs stacked, dense diffs one by one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import Answer, answer_batch
from dit_jax.data.chat import Prompt
from dit_jax.deltas.factors import stack_padded
from dit_jax.deltas.store import DiffStore
from dit_jax.deltas.tree import is_lora, noise_like
from dit_jax.models.delta_trees import Delta


@dataclasses.dataclass(frozen=True)
class Given:
    """What the model gets in place of each of `size` diffs.

    stacked: LoRAs [n, L, …], which one batched decode takes together. None for dense diffs, each as large as the model:
    `read(i)` reads one when it is needed.
    """

    size: int
    read: Callable[[int], Delta]
    stacked: Delta | None = None

    def __len__(self) -> int:
        return self.size

    def reordered(self, order: Sequence[int]) -> "Given":
        """The same in another order: number i is number order[i] of these."""
        if self.stacked is not None:
            return from_stacked(jax.tree.map(lambda x: x[np.asarray(order)], self.stacked))
        return Given(len(order), lambda i: self.read(order[i]))

    def each(self, change: Callable[[int, Delta], Delta]) -> "Given":
        """What `change` makes of each diff and its number."""
        if self.stacked is not None:
            return from_stacked(stack_padded([change(i, self.read(i)) for i in range(self.size)]))
        return Given(self.size, lambda i: change(i, self.read(i)))

    def noise(self, keys: jax.Array) -> "Given":
        """Noise in place of every diff, with the norm that each factor has in each layer; keys: one for each diff."""
        if self.stacked is not None:
            return from_stacked(jax.device_get(jax.jit(jax.vmap(noise_like))(self.stacked, keys)))
        return Given(self.size, lambda i: noise_like(self.read(i), keys[i]))

    def nothing(self) -> "Given":
        """No diffs. Stacked zeros run the same compiled program as the diffs."""
        if self.stacked is not None:
            return from_stacked(jax.tree.map(np.zeros_like, self.stacked))
        return Given(self.size, lambda i: {})


def together(deltas: Sequence[Delta]) -> Given:
    """LoRAs of any ranks and modules as one batch, or one dense diff."""
    if all(map(is_lora, deltas)):
        return from_stacked(stack_padded(deltas))
    (only,) = deltas
    return Given(1, lambda i: only)


def from_stacked(stacked: Delta) -> Given:
    """Diffs of one layout, leaves [n, L, …]."""
    size = jax.tree.leaves(stacked)[0].shape[0]
    read = lambda i: jax.tree.map(lambda x: np.asarray(x[i]), stacked)  # noqa: E731
    return Given(size, read, stacked if is_lora(stacked) else None)


def from_store(store: DiffStore, indices: Sequence[int]) -> Given:
    """Diffs of a store, in the given order; if one of them is dense, all are read one by one."""
    if not indices:
        return Given(0, lambda i: {})
    shards = {store.rows[i]["lora_path"]: i for i in indices}
    if all(is_lora(store.shapes(i)) for i in shards.values()):
        return from_stacked(store.stacked(indices))
    return Given(len(indices), lambda i: store.read(indices[i]))


def even_batch(count: int, most: int) -> int:
    """Rows of a batch where `count` rows take as few batches of at most `most` as they can, all equally full."""
    return -(-count // -(-count // most))


def answer(
    model: Model,
    given: Given,
    prompts: Sequence[str | Prompt],
    rows: Sequence[int],
    adapter: Delta,
    *,
    batch_size: int,
    **decoding: Any,
) -> list[Answer]:
    """Answers of base ⊕ given[rows[i]] ⊕ adapter to prompts[i], in batched decodes.

    Args:
        adapter: zeros for methods without one, so that all methods run the same compiled program.
        **decoding: max_new_tokens, temperature, seed, forbid_repeats, contrast; see `asking.answer_batch`.
    """
    if given.stacked is not None:
        return answer_batch(
            model,
            prompts,
            deltas=(adapter,),
            stacked=(given.stacked,),
            rows=rows,
            batch_size=batch_size,
            without=(adapter,),
            **decoding,
        )
    answers: dict[int, Answer] = {}
    seed = decoding.pop("seed", 0)
    for row in dict.fromkeys(rows):
        members = [i for i, owner in enumerate(rows) if owner == row]
        found = answer_batch(
            model,
            [prompts[i] for i in members],
            deltas=(given.read(row), adapter),
            batch_size=min(batch_size, len(members)),
            without=(adapter,),
            seed=seed + row,  # otherwise all diffs would sample with the same random numbers
            **decoding,
        )
        answers |= dict(zip(members, found, strict=True))
    return [answers[i] for i in range(len(prompts))]
