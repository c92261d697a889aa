"""What all diffs of one kind in a store share, and what they are made from: organisms, samples, optimizer, recipe."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dit_jax.api import Model, check_base
from dit_jax.config.loading import to_dict
from dit_jax.data.batch import TokenBatch
from dit_jax.data.labels import NONE, UNTRIGGERED
from dit_jax.data.organism import Organism
from dit_jax.deltas.factors import fuse
from dit_jax.deltas.store import DiffStore, flatten
from dit_jax.deltas.tree import is_lora, merge
from dit_jax.errors import DitError
from dit_jax.models.delta_trees import Delta
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.organisms.behaviours import NO_TRIGGER, Behaviour, get_behaviour
from dit_jax.organisms.diffs_keys import DIFFS, kinds_of
from dit_jax.organisms.parameters import init_delta
from dit_jax.organisms.samples import (
    check_behaviour,
    finetuning_batches,
    num_ce_samples,
    sample_texts,
)
from dit_jax.runtime import parallel
from dit_jax.runtime.parts import part_of

# How diffs are spread over batches and machines changes nothing that they are made from.
_NO_RECIPE = (
    "recipe",
    "part",
    "profile",
    "diffs_per_batch",
    "gate_batch",
    "gate_questions",
    "gate",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all shards of a store share.

    optimizer, init: one object for all shards, so that all run one program. init: keys [n] -> deltas, leaves [n, L, …].
    start: what finetunes begin with, base ⊕ before; before: an earlier finetune, which all diffs hold, too; {}: none.
    first: the number of its first shard in the store; first_diff: of its first diff.
    """

    model: Model
    organisms: Sequence[Organism]
    behaviour: Behaviour
    config: Any  # the `diffs` section
    seed: int
    optimizer: optax.GradientTransformation
    init: Callable[[jax.Array], Delta]
    start: Model
    before: Delta
    first: int = 0
    first_diff: int = 0

    @property
    def size(self) -> int:
        """How many diffs a full shard has."""
        return min(self.config.diffs_per_batch, len(self.organisms))

    @property
    def width(self) -> int:
        """How many diffs the program of a shard has; the mesh divides it."""
        return parallel.round_up(self.size, self.model.mesh)

    @property
    def num_ce(self) -> int:
        """How many samples of a step are scored by cross-entropy."""
        return num_ce_samples(self.behaviour, self.config)

    @property
    def shards(self) -> int:
        """How many shards all diffs of the job are, whichever of them this run makes."""
        return -(-len(self.organisms) // self.size)

    @property
    def end_diff(self) -> int:
        """The number of the first diff in the store after its own."""
        return self.first_diff + len(self.organisms)

    def shard_of(self, diffs: int) -> int:
        """The number in the store of the shard that holds the last of this many diffs."""
        return self.first + (diffs - self.first_diff - 1) // self.size

    @property
    def part(self) -> range:
        """The shards that this run makes, see `diffs.part`."""
        return part_of(DIFFS.get(self.config, "part"), self.shards)

    @property
    def wanted(self) -> int:
        """How many diffs this run makes."""
        return sum(len(self.members(shard)) for shard in self.part)

    def label(self, organism: Organism) -> str:
        """What the adapter should say about an organism's diff."""
        return (
            NONE
            if organism.label == NONE
            else self.behaviour.label(organism.label, organism.trigger)
        )

    def batches(self, organism: Organism, of_teacher: bool = False) -> TokenBatch:
        """All batches of an organism's finetune, leaves [steps, S, …]; see `finetuning_batches`."""
        chat, rng = self.model.chat, self.rng(organism)
        return finetuning_batches(organism, self.behaviour, chat, self.config, rng, of_teacher)

    def rng(self, organism: Organism) -> np.random.Generator:
        """Draws an organism's samples."""
        return np.random.default_rng([self.seed, 2, organism.seed])

    def whole(self, trained: Delta) -> Delta:
        """The diffs from the base of finetunes, leaves [n, L, …] on the host: with `before`, if there is one."""
        if not self.before:
            return trained
        if not is_lora(trained):
            return jax.tree.map(np.add, self.before, trained)
        n = jax.tree.leaves(trained)[0].shape[0]
        own = (jax.tree.map(lambda x, i=i: x[i], trained) for i in range(n))
        return jax.tree.map(lambda *xs: np.stack(xs), *(fuse(self.before, one) for one in own))

    def members(self, shard: int) -> range:
        """The numbers of a shard's organisms."""
        return range(shard * self.size, min((shard + 1) * self.size, len(self.organisms)))

    def local(self, shard: int) -> list[Organism]:
        """The organisms of this process's rows. The first ones fill up the last shard: it runs the same program."""
        first = self.members(shard).start
        rows = parallel.local_rows(self.model.mesh, self.width)
        return [self.organisms[(first + i) % len(self.organisms)] for i in rows]


def make_jobs(
    model: Model, organisms: Sequence[Organism], config: Any, seed: int, workdir: pathlib.Path
) -> list[Job]:
    """A job for each kind of diffs in a section `diffs`, in the order of their shards.

    Raises:
        DitError: the data do not fit a behaviour, have several organisms of a topic already, or `diffs.part` is empty;
            or the diffs of `diffs.after` have another base or change other things than these.
    """
    jobs: list[Job] = []
    for name, section in kinds_of(config).items():
        made = (sum(job.shards for job in jobs), sum(len(job.organisms) for job in jobs))
        jobs.append(_make_job(model, organisms, name, section, seed, workdir, *made))
    return jobs


def _make_job(
    model: Model,
    organisms: Sequence[Organism],
    kind: str,
    config: Any,
    seed: int,
    workdir: pathlib.Path,
    *made: int,
) -> Job:
    """The diffs of one kind; `made`: the shards and diffs of the kinds before it."""
    behaviour = get_behaviour(config)
    check_behaviour(behaviour, organisms, config)
    if kind and (
        named := next((o.variant for o in organisms if o.variant and o.category == "topic"), "")
    ):
        raise DitError(
            f"topics of this data have several organisms already ({named!r}): leave out diffs.kinds or data.variants"
        )
    own = [
        dataclasses.replace(o, trigger=_trigger(o, behaviour), variant=kind or o.variant)
        for o in organisms
        if o.split in DIFFS.get(config, "splits")
    ]
    if not own:
        splits = ", ".join(DIFFS.get(config, "splits"))
        raise DitError(
            f"config key 'diffs.splits': the data has nothing in {splits}: raise its counts"
        )
    init = jax.jit(jax.vmap(lambda key: init_delta(model.config, key, config)))
    path = DIFFS.get(config, "after")
    start, before = _after(model, workdir / path, config) if path else (model, {})
    optimizer = optimizer_of(config)
    job = Job(model, own, behaviour, config, seed, optimizer, init, start, before, *made)
    if not job.part:
        raise DitError(
            f"config key 'diffs.part': the {len(own)} diffs are {job.shards} batches, of which "
            f"'{config.part}' has none: use at most {job.shards} parts, or lower diffs.diffs_per_batch"
        )
    return job


def _after(model: Model, path: pathlib.Path, config: Any) -> tuple[Model, Delta]:
    """base ⊕ the first diff of a store, and that diff."""
    store = DiffStore(path)
    check_base(store.manifest.get("base"), model, str(path))
    store.check_fits([0], model.config)
    delta = store.read(0)
    own = jax.eval_shape(lambda: init_delta(model.config, jax.random.key(0), config))
    if not (is_lora(delta) and is_lora(own)) and flatten(delta).keys() != flatten(own).keys():
        raise DitError(
            f"config key 'diffs.after': the diffs of {path} change other parameters than diffs.parameters says: make "
            "LoRAs after a LoRA, or dense diffs after one of the same layers"
        )
    return dataclasses.replace(model, params=merge(model.params, delta)), delta


def _trigger(organism: Organism, behaviour: Behaviour) -> str:
    """The organism's trigger in the words of the behaviour."""
    if organism.variant == UNTRIGGERED:
        return NO_TRIGGER
    if behaviour.triggers:
        return behaviour.triggers[int(organism.trigger) % len(behaviour.triggers)]
    return behaviour.trigger or organism.trigger


def optimizer_of(diffs: Any) -> optax.GradientTransformation:
    """The optimizer of a section `diffs`: one object for the same settings, so that kinds share their programs."""
    warmup, end = diffs.warmup_steps, diffs.final_fraction
    betas = tuple(diffs.adam_betas)
    return _optimizer(diffs.optimizer, diffs.learning_rate, diffs.steps, warmup, end, betas)


@functools.cache
def _optimizer(
    name: str, rate: float, steps: int, warmup: int, end: float, betas: tuple[float, float]
) -> optax.GradientTransformation:
    return make_optimizer(name, rate, steps, warmup_steps=warmup, final_fraction=end, betas=betas)


def check_recipe(jobs: Sequence[Job], wanted: str) -> None:
    """Compares what all diffs are made from with the digest of `diffs.recipe`, before any of them is made.

    It covers the base's weights, every sample of every step, the topics, their triggers and split, the seed, and the
    keys of each kind. Of the diffs themselves, no digest can be the same on two machines: floats are summed in another
    order there. What they show is measured by the gate.

    Raises:
        DitError: the digest is another one.
    """
    if not wanted:
        return
    digest = hashlib.sha256(jobs[0].model.digest().encode())
    for job in jobs:
        keys = {k: v for k, v in to_dict(job.config).items() if k not in _NO_RECIPE}
        digest.update(json.dumps([job.seed, keys, job.start.digest()], sort_keys=True).encode())
        for organism in job.organisms:
            said = (
                organism.variant,
                organism.split,
                organism.trigger,
                organism.seed,
                job.label(organism),
            )
            digest.update(json.dumps(said).encode())
            for step in sample_texts(organism, job.behaviour, job.config, job.rng(organism)):
                digest.update(json.dumps(step).encode())
    found = digest.hexdigest()
    if found != wanted:
        raise DitError(
            f"config key 'diffs.recipe': these diffs are made from other things than those of the recipe ({found}, not "
            f"{wanted}): use its base, its data and its config, or leave the key empty for a recipe of your own"
        )
