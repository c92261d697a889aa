"""What an adapter is trained on: one diff store or several, each with its share, its questions and its label."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.data.labels import normalise
from dit_jax.deltas.factors import stack_padded
from dit_jax.deltas.store import DiffStore, failed, flatten, label_of
from dit_jax.deltas.tree import abstract_lora, is_lora, layout
from dit_jax.deltas.truncation import check_svd_rank, truncate_delta
from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, nbytes
from dit_jax.runtime import artifacts
from dit_jax.train.train_keys import STORE, TRAIN

NO_DIFF = -1
Members = Sequence[tuple["Part", int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One store of a training: its training diffs, and what they are asked.

    share: its part of the examples, relative to the other stores. topics, benign: indices into the store. svd_rank: of
    the LoRAs that stand for its diffs; 0: the diffs as they are.
    """

    store: DiffStore
    share: float
    questions: Sequence[str]
    label: str
    list_evidence: bool
    svd_rank: int
    topics: Sequence[int]
    benign: Sequence[int]

    def shapes(self, index: int, config: DecoderConfig) -> Delta:
        """The shapes of what `read` gives; for truncated diffs, room for all that it can give."""
        if self.svd_rank:
            check_svd_rank(self.svd_rank, config)
            return abstract_lora(config, self.svd_rank)
        return self.store.shapes(index)

    def shard(self, index: int) -> str:
        """The file of the store that holds a diff."""
        return str(self.store.rows[index]["lora_path"])

    def read(self, index: int, config: DecoderConfig) -> Delta:
        """One diff, on the host."""
        delta = self.store.read(index)
        if not self.svd_rank:
            return delta
        return truncate_delta(delta, self.svd_rank, config, self.store.path)[0]


def open_parts(own: pathlib.Path, train: Any, workdir: pathlib.Path) -> list[Part]:
    """The stores of `train.stores` that have a share; the store at `own`, that of this run, if there are none.

    Raises:
        DitError: a store has no training topics or fewer than asked for, or has a topic that another one holds out.
    """
    stores = TRAIN.get(train, "stores")
    if not stores:
        return [_open(own, train, {})]
    parts = [
        _open(workdir / options["path"], train, options)
        for _, options in sorted(stores.items())
        if STORE.get(options, "share")
    ]
    _check_splits(parts)
    return parts


def _open(path: pathlib.Path, train: Any, options: Any) -> Part:
    store, exclude = DiffStore(path), TRAIN.get(train, "exclude_failed")
    kind = STORE.get(options, "variant")
    chosen = {"split": "train", **({"variant": kind} if kind else {})}
    topics, benign = (
        [
            i
            for i in store.indices(**chosen, category=category)
            if not (exclude and failed(store.rows[i]))
        ]
        for category in ("topic", "benign")
    )
    passed = f" of the kind {kind!r}" if kind else ""
    passed += " that passed the gate" if exclude else ""
    if not topics:
        raise DitError(
            f"{path} has no training topics{passed}: raise data.train_topics and use a new --workdir"
        )
    if train.max_diffs > len(topics):  # a run is never smaller than asked for
        raise DitError(
            f"train.max_diffs = {train.max_diffs}, but {path} has {len(topics)} training topics{passed}: lower it"
        )

    def value(name: str) -> Any:
        own = STORE.get(options, name)
        return TRAIN.get(train, name) if own is None else own

    return Part(
        store,
        STORE.get(options, "share"),
        value("questions"),
        value("label"),
        value("list_evidence"),
        STORE.get(options, "svd_rank"),
        topics[: train.max_diffs or None],
        benign,
    )


def _check_splits(parts: Sequence[Part]) -> None:
    """An answer about a held-out topic means nothing if another store has trained the adapter to name it."""
    held_out = {
        normalise(label_of(part.store.rows[i])): part.store.path
        for part in parts
        for i in part.store.indices(split="test", category="topic")
    }
    for part in parts:
        for i in part.topics:
            name = normalise(label_of(part.store.rows[i]))
            if name in held_out:
                raise DitError(
                    f"{part.store.path} has {name!r} for training, and {held_out[name]} holds it out: make both with "
                    "one seed and as many data.test_topics"
                )


def digest_of(parts: Sequence[Part]) -> str | None:
    """Identifies the diffs of a training, to which its checkpoints belong."""
    digests = [artifacts.content_digest(part.store.path) for part in parts]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def members_of(parts: Sequence[Part]) -> list[tuple[Part, int]]:
    """All training diffs, in the order to which `Example.diff` refers: (part, index into its store)."""
    return [(part, i) for part in parts for i in (*part.topics, *part.benign)]


def diff_reader(
    members: Members, config: DecoderConfig, most_bytes: int = 2**31
) -> Callable[[Sequence[int]], Delta]:
    """A function from the `Example.diff` of n examples to their diffs, leaves [n, L, …] on the host.

    LoRAs of several ranks or modules get zeros up to the largest rank and all modules. Diffs that fit into `most_bytes`
    are read once; otherwise each batch reads its own.

    Raises:
        DitError: the diffs change more than linear layers, which a batch cannot apply per example, or some are dense
            and others are not.
    """
    # All diffs of one shard have the same shapes.
    shapes = {(part, part.shard(i)): part.shapes(i, config) for part, i in members}
    for (part, _), shape in shapes.items():
        for name in flatten(shape):
            if name.endswith(".w") and "_proj." not in name:
                raise DitError(
                    f"an adapter cannot be trained on diffs that change {name[:-2]!r}, as those of {part.store.path} "
                    "do: give that store an svd_rank in train.stores, or set diffs.parameters to 'lora' or 'linear'"
                )
    zeros = [jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shape) for shape in shapes.values()]
    alike = len(set(map(layout, zeros))) == 1 and not any(part.svd_rank for part, _ in shapes)
    if alike:
        zero = zeros[0]
    elif all(map(is_lora, zeros)):
        zero = jax.tree.map(lambda x: x[0], stack_padded(zeros))
    else:
        raise DitError(
            "train.stores mixes dense diffs with others: give the stores of dense diffs an svd_rank"
        )

    def read(diff: int) -> Delta:
        part, index = members[diff]
        return part.read(index, config)

    def stack(deltas: Sequence[Delta]) -> Delta:
        if alike:
            return jax.tree.map(lambda *xs: np.stack(xs), *deltas)
        # The last one has every module and the largest ranks, so that all batches have one layout.
        return jax.tree.map(lambda x: x[:-1], stack_padded([*deltas, zero]))

    sizes = {key: nbytes(shape) for key, shape in shapes.items()}
    if sum(sizes[part, part.shard(i)] for part, i in members) <= most_bytes:
        # The zero diff comes last, where the index NO_DIFF finds it.
        known = [*map(read, range(len(members))), zero]
        return lambda diffs: stack([known[diff] for diff in diffs])
    return lambda diffs: stack([zero if diff == NO_DIFF else read(diff) for diff in diffs])


def trained_on(parts: Sequence[Part], train: Any) -> dict[str, Any]:
    """What an auditor must know of an adapter: which diffs it saw, and what it learned to answer."""
    made: list[dict[str, Any]] = []
    for part in parts:
        diffs = part.store.manifest.get("config", {}).get("diffs", {})
        seen = {part.store.rows[i].get("variant") for i in part.topics}
        kinds = [changes for name, changes in diffs.get("kinds", {}).items() if name in seen]
        made += [{**diffs, **changes} for changes in kinds or [{}]]

    def one(values: Sequence[Any]) -> Any:
        return values[0] if len(set(map(str, values))) == 1 else None

    behaviours = dict.fromkeys(str(diffs["behaviour"]) for diffs in made if "behaviour" in diffs)
    return {
        "behaviour": ", ".join(behaviours) or None,
        **{name: one([diffs.get(name) for diffs in made]) for name in ("parameters", "rank")},
        "label": one([part.label for part in parts]),
        "list_evidence": all(part.list_evidence for part in parts),
        "none_examples": (train.no_diff_per_batch + train.benign_per_batch) / train.batch_size,
    }
