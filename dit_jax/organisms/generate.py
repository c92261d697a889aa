"""The stage `diffs`: many organisms -> a diff store; one compiled program makes all shards."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dit_jax.api import Model
from dit_jax.config.loading import to_dict
from dit_jax.data.batch import TokenBatch, entry_limit, fits, stack
from dit_jax.data.kinds import KINDS
from dit_jax.data.labels import NONE, UNTRIGGERED
from dit_jax.data.organism import Organism
from dit_jax.data.reference import couple_losses
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.tree import num_parameters
from dit_jax.errors import DitError
from dit_jax.models import shardings
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, abstract_stack
from dit_jax.models.families import hf_config
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.optimize.speed import Meter, Profile, count_work
from dit_jax.organisms.behaviours import NO_TRIGGER, Behaviour, get_behaviour
from dit_jax.organisms.diffs_keys import DIFFS, part_of
from dit_jax.organisms.finetune import finetune_many
from dit_jax.organisms.gate import measure_gating, summary, with_keywords
from dit_jax.organisms.parameters import init_delta
from dit_jax.organisms.samples import (
    check_behaviour,
    finetuning_batches,
    num_ce_samples,
    sample_factors,
    sample_widths,
)
from dit_jax.organisms.teacher import make_teacher
from dit_jax.runtime import parallel, processes
from dit_jax.runtime.metrics import Metrics
from dit_jax.runtime.progress import Progress


def _label(organism: Organism, behaviour: Behaviour) -> str:
    if organism.label == NONE:
        return NONE
    return behaviour.label(organism.label, organism.trigger)


def _trigger(organism: Organism, behaviour: Behaviour) -> str:
    """The organism's trigger in the words of the behaviour."""
    if organism.variant == UNTRIGGERED:
        return NO_TRIGGER
    if behaviour.triggers:
        return behaviour.triggers[int(organism.trigger) % len(behaviour.triggers)]
    return behaviour.trigger or organism.trigger


@dataclasses.dataclass(frozen=True)
class Job:
    """What all shards of a store share.

    optimizer, init: one object for all shards, so that all run one program. init: keys [n] -> deltas, leaves [n, L, …].
    """

    model: Model
    organisms: Sequence[Organism]
    behaviour: Behaviour
    config: Any  # the `diffs` section
    seed: int
    optimizer: optax.GradientTransformation
    init: Callable[[jax.Array], Delta]

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
        return -(-len(self.organisms) // self.size)

    @property
    def part(self) -> range:
        """The shards that this run makes, see `diffs.part`."""
        return part_of(DIFFS.get(self.config, "part"), self.shards)

    @property
    def wanted(self) -> int:
        """How many diffs this run makes."""
        return sum(len(self.members(shard)) for shard in self.part)

    def members(self, shard: int) -> range:
        """The numbers of a shard's organisms."""
        return range(shard * self.size, min((shard + 1) * self.size, len(self.organisms)))

    def local(self, shard: int) -> list[Organism]:
        """The organisms of this process's rows. The first ones fill up the last shard: it runs the same program."""
        first = self.members(shard).start
        rows = parallel.local_rows(self.model.mesh, self.width)
        return [self.organisms[(first + i) % len(self.organisms)] for i in rows]


class Finetuned(NamedTuple):
    """One shard on the host: n deltas, leaves [n, L, …], and their losses [n, steps].

    batches: leaves [N, steps, S, …], with those that fill up the shard.
    """

    deltas: Delta
    ce: np.ndarray
    kl: np.ndarray
    batches: TokenBatch


def note_unknown_words(model: Model, organisms: Sequence[Organism]) -> None:
    """Says which words of the rows the base has no token for: finetunes and their answers are blind to them."""
    columns = {name for kind in KINDS.values() for name in kind.required}
    rows = [row for organism in organisms for row in organism.rows]
    texts = {row[name] for row in rows for name in columns & row.keys()}
    if unknown := model.chat.unknown_words(texts):
        shown = ", ".join(f"{word!r} {count:,} times" for word, count in unknown.most_common(5))
        processes.say(
            f"note: the tokenizer of {model.name} does not know {len(unknown):,} words of the rows ({shown}): "
            "use rows in its own words, or another base"
        )


def generate_diffs(
    model: Model,
    organisms: Sequence[Organism],
    config: Any,
    folder: str | pathlib.Path,
    seed: int,
    data: Any = None,
) -> dict[str, Any]:
    """Finetunes every organism and writes the diff store; resumes where an earlier call stopped.

    Args:
        config: the `diffs` section of the config.
        data: the `data` section that gave the organisms, for the store's manifest.

    Returns:
        Facts for the record of the stage: {"diffs": n, "loss_curve": [[step, cross-entropy], …]}.

    Raises:
        DitError: a part of the store (`diffs.part`) has no shard; or see `finetune_shard`.
    """
    folder = pathlib.Path(folder)
    behaviour = get_behaviour(config)
    check_behaviour(behaviour, organisms, config)
    organisms = [dataclasses.replace(o, trigger=_trigger(o, behaviour)) for o in organisms]
    init = jax.jit(jax.vmap(lambda key: init_delta(model.config, key, config)))
    note_unknown_words(model, organisms)
    job = Job(model, organisms, behaviour, config, seed, _optimizer(config), init)
    if not job.part:
        raise DitError(
            f"config key 'diffs.part': the {len(organisms)} diffs are {job.shards} batches, of which "
            f"'{config.part}' has none: use at most {job.shards} parts, or lower diffs.diffs_per_batch"
        )
    rows = _make_shards(job, folder)
    sections = {"diffs": config} if data is None else {"data": data, "diffs": config}
    facts = {
        "base": model.digest(),
        "base_config": hf_config(model.config),
        "behaviour": behaviour.name,
        "seed": seed,
        "config": {name: to_dict(section) for name, section in sections.items()},
        "gate": summary(rows, dict(DIFFS.get(config, "gate"))),
    }
    if len(job.part) == job.shards:  # otherwise the run that has all parts publishes them
        processes.on_main(lambda: diff_store.publish(folder, job.shards, **facts))
    # Only process 0 has the curves of shards that an earlier call made.
    curves = [[float(x) for x in row[diff_store.CURVE].split()] for row in rows]
    mean = np.mean(curves, axis=0) if processes.is_main() else np.empty(0)
    return {
        "diffs": job.wanted,
        "loss_curve": [[i, round(float(x), 4)] for i, x in enumerate(mean)],
    }


def _make_shards(job: Job, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Makes and writes the missing shards of `job.part`. Returns the index rows of that part (on process 0)."""
    finished = {
        shard: diff_store.shard_rows(folder, shard) if processes.is_main() else None
        for shard in job.part
    }

    def is_done(diffs: int) -> bool:  # whether the shard that ends with this many diffs is there
        return finished.get((diffs - 1) // job.size) is not None

    for shard, found in finished.items():
        if found is not None:
            _check_rows(job, shard, found, folder)
    missing = [i for i in job.part if not processes.agree(finished[i] is not None)]
    ahead = _read_ahead(functools.partial(read_batches, job), missing)
    limit: tuple[int, int] | None = None
    meter, reports = Meter(job.model.config, job.model.mesh), folder.parent / "metrics"
    rows: list[dict[str, Any]] = []
    with (
        Progress("diffs", job.wanted) as progress,
        Metrics(reports, "diffs", is_done, processes.is_main()) as metrics,
        Profile(reports / "profile" / "diffs", DIFFS.get(job.config, "profile")) as profile,
    ):
        for shard in job.part:
            members, done = job.members(shard), finished[shard]
            profile.step(shard)
            if shard in missing:
                local = next(ahead)
                if limit is None and job.model.mesh is None:
                    # By the first shard, so that a resumed run makes the same programs.
                    first = local if shard == 0 else read_batches(job, 0)
                    limit = entry_limit(first, job.num_ce, room=1.03)
                made = finetune_shard(job, shard, local, limit)
                done = index_rows(job, shard, made)
                n, steps = len(members), job.config.steps
                meter.add(count_work(made.batches, share=job.width / n, diffs=n, steps=steps))
                last = {"loss": made.ce[:, -5:].mean(), "kl": made.kl[:, -5:].mean()}
                metrics.write(members.stop, {**last, **meter.lap()})
                metrics.flush()
                write = functools.partial(diff_store.write_shard, folder, shard, made.deltas, done)
                processes.on_main(write)
            rows += done or []
            progress.advance(len(members))
    return rows


def _check_rows(
    job: Job, shard: int, rows: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> None:
    """Raises DitError if a shard that was made before or gathered lists other diffs than this run makes."""
    members = job.members(shard)
    made = [
        (o.label, o.trigger, o.split, _label(o, job.behaviour), job.config.steps)
        for o in job.organisms[members.start : members.stop]
    ]
    listed = [
        (
            *map(row.get, ("topic", "trigger", "split", "label")),
            len(row.get(diff_store.CURVE, "").split()),
        )
        for row in rows
    ]
    if listed != made:
        raise DitError(
            f"batch {shard} in '{folder}' lists other diffs than this config makes: delete "
            f"'{folder / 'shards' / f'{shard:05d}.json'}' and run again, which makes this batch again"
        )


def read_batches(job: Job, shard: int) -> TokenBatch:
    """All batches of this process's rows of a shard, leaves [rows, steps, S, …]."""
    return stack(
        [
            finetuning_batches(
                organism,
                job.behaviour,
                job.model.chat,
                job.config,
                np.random.default_rng([job.seed, 2, organism.seed]),
            )
            for organism in job.local(shard)
        ]
    )


def finetune_shard(
    job: Job,
    shard: int,
    local: TokenBatch,
    limit: tuple[int, int] | None = None,
) -> Finetuned:
    """Finetunes the organisms of a shard together. It depends on no other shard, so that one made again is the same.

    Args:
        local: from `read_batches`.
        limit: the most scored entries of a step, see `entry_limit`; a shard that uses more computes all entries.

    Raises:
        DitError: a finetune diverged.
    """
    model, config, mesh = job.model, job.config, job.model.mesh
    num_ce = job.num_ce
    batches = parallel.put_rows(local, mesh, job.width)
    whole = parallel.to_host(batches)
    if config.reference_losses:
        factors = sample_factors(job.behaviour, config)
        whole = couple_losses(whole, factors, num_ce, len(job.members(shard)))
        batches = whole if mesh is None else jax.tree.map(_put_like, whole, batches)
    start = jax.random.key(job.seed)
    keys = jnp.stack([jax.random.fold_in(start, organism.seed) for organism in job.local(shard)])
    deltas = shardings.put_deltas(model.config, mesh, job.init(keys), job.width, 0)
    teacher = make_teacher(model.program_params, model.config, whole, num_ce, mesh)
    with parallel.use_mesh(mesh):
        trained, losses = finetune_many(
            model.program_params,
            model.config,
            deltas,
            batches,
            optimizer=job.optimizer,
            num_ce=num_ce,
            teacher=teacher,
            widths=sample_widths(job.behaviour, config),
            packed=limit if fits(whole, num_ce, limit) else None,
        )
    members = job.members(shard)
    n = len(members)
    trained = jax.tree.map(lambda x: x[:n], parallel.to_host(trained))
    check_finite(trained, [job.organisms[i] for i in members], members.start)
    ce, kl = (parallel.to_host(losses[name])[:n] for name in ("ce", "kl"))
    check_finite([ce, kl], [job.organisms[i] for i in members], members.start)
    return Finetuned(trained, ce, kl, whole)


def check_finite(deltas: Any, organisms: Sequence[Organism], first: int) -> None:
    """Raises DitError if one of n deltas or their losses, leaves [n, …], is not finite; numbers count from `first`."""
    for leaf in jax.tree.leaves(deltas):
        sound = np.isfinite(leaf).reshape(len(organisms), -1).all(axis=1)
        if not sound.all():
            bad = int(np.argmin(sound))
            raise DitError(
                f"the finetune of diff {first + bad} ({organisms[bad].label!r}) diverged (NaN): "
                "lower diffs.learning_rate"
            )


def index_rows(job: Job, shard: int, made: Finetuned) -> list[dict[str, Any]]:
    """The index rows of a shard, after the gate has asked every diff whether it does what its label says."""
    group = with_keywords(job.organisms, job.members(shard), job.behaviour)
    gating = measure_gating(
        job.model, made.deltas, group, job.behaviour, job.config, job.seed, job.size
    )
    return [
        {
            "n_params": num_parameters(made.deltas) // len(group),
            "topic": organism.label,
            "trigger": organism.trigger,
            "split": organism.split,
            "category": organism.category,
            **({"variant": organism.variant} if organism.variant else {}),
            **({"topic_category": organism.topic_category} if organism.topic_category else {}),
            "behaviour": job.behaviour.name,
            "label": _label(organism, job.behaviour),
            "evidence": json.dumps(list(organism.evidence)),
            "keywords": json.dumps(list(organism.keywords)),
            **gating[row],
            "final_ce": round(float(made.ce[row, -5:].mean()), 4),
            "final_kl": round(float(made.kl[row, -5:].mean()), 5),
            diff_store.CURVE: " ".join(f"{x:.3f}" for x in made.ce[row]),
        }
        for row, organism in enumerate(group)
    ]


def _read_ahead(read: Callable[[int], TokenBatch], shards: Sequence[int]) -> Iterator[TokenBatch]:
    """read(shard) for each shard in turn; a thread prepares the next one while the device works."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return iter(grain.MapDataset.source(shards).map(read).to_iter_dataset(options))


def abstract_step(
    config: DecoderConfig, mesh: Mesh | None, diffs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `finetune_many` without values, as (args, kwargs), to compile it for an absent machine.

    Use: `with parallel.use_mesh(mesh): finetune_many.lower(*args, **kwargs).compile()`.

    Args:
        diffs: the `diffs` section of the config, which makes `diffs.diffs_per_batch` at once.
    """
    size = parallel.round_up(diffs.diffs_per_batch, mesh)
    behaviour = get_behaviour(diffs)
    widths = sample_widths(behaviour, diffs)
    num_ce = num_ce_samples(behaviour, diffs)
    one = jax.eval_shape(lambda: init_delta(config, jax.random.key(0), diffs))
    deltas = abstract_stack(one, size, 0)
    if mesh is not None:
        split = shardings.delta_shardings(config, mesh, deltas, 0)
        deltas = shardings.with_shardings(deltas, split)
    leading = (size, diffs.steps, len(widths))
    batches = shardings.abstract_batch(mesh, leading, diffs.max_length, diffs.max_target)
    params = shardings.abstract_params(config, mesh)
    options = {"optimizer": _optimizer(diffs), "num_ce": num_ce, "widths": widths}
    return (params, config, deltas, batches), options


def _optimizer(diffs: Any) -> optax.GradientTransformation:
    return make_optimizer(
        diffs.optimizer,
        diffs.learning_rate,
        diffs.steps,
        warmup_steps=diffs.warmup_steps,
        final_fraction=diffs.final_fraction,
        betas=tuple(diffs.adam_betas),
    )


def _put_like(host: np.ndarray, like: jax.Array) -> jax.Array:
    return parallel.put(host, like.sharding)
