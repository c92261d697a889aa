"""The stage `diffs`: many organisms -> a diff store; one compiled program makes all shards."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.api import Model
from dit_jax.config.loading import to_dict
from dit_jax.data.batch import TokenBatch, entry_limit, fits, stack
from dit_jax.data.kinds import KINDS
from dit_jax.data.organism import Organism
from dit_jax.data.reference import couple_losses
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.tree import num_parameters
from dit_jax.errors import DitError
from dit_jax.models import shardings
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, abstract_stack
from dit_jax.models.families import hf_config
from dit_jax.optimize.speed import Meter, Profile, count_work
from dit_jax.organisms.behaviours import get_behaviour
from dit_jax.organisms.diffs_keys import DIFFS, LIMITS
from dit_jax.organisms.finetune import finetune_many
from dit_jax.organisms.gate import measure_gating, summary, with_keywords
from dit_jax.organisms.job import Job, check_recipe, make_jobs, optimizer_of
from dit_jax.organisms.parameters import init_delta
from dit_jax.organisms.samples import (
    num_ce_samples,
    preference_beta,
    sample_factors,
    sample_widths,
)
from dit_jax.organisms.teacher import make_teacher
from dit_jax.runtime import parallel, processes
from dit_jax.runtime.metrics import Metrics
from dit_jax.runtime.progress import Progress


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
    note_unknown_words(model, organisms)
    jobs = make_jobs(model, organisms, config, seed, folder.parent)
    sections = {"diffs": config} if data is None else {"data": data, "diffs": config}
    check_recipe(jobs, DIFFS.get(config, "recipe"))
    rows = _make_shards(jobs, folder)
    facts = {
        "base": model.digest(),
        "base_config": hf_config(model.config),
        "behaviour": jobs[0].behaviour.name,
        "seed": seed,
        "config": {name: to_dict(section) for name, section in sections.items()},
        "gate": summary(sum(rows, []), dict(DIFFS.get(config, "gate"))),
    }
    # Otherwise the run that has all parts publishes them.
    if all(len(job.part) == job.shards for job in jobs):
        shards = sum(job.shards for job in jobs)
        processes.on_main(lambda: diff_store.publish(folder, shards, **facts))
    # Only process 0 has the curves of shards that an earlier call made.
    curves = [[float(x) for x in row[diff_store.CURVE].split()] for row in rows[0]]
    mean = np.mean(curves, axis=0) if processes.is_main() else np.empty(0)
    return {
        "diffs": sum(job.wanted for job in jobs),
        "loss_curve": [[i, round(float(x), 4)] for i, x in enumerate(mean)],
    }


def _make_shards(jobs: Sequence[Job], folder: pathlib.Path) -> list[list[dict[str, Any]]]:
    """Makes and writes the missing shards of all jobs' parts. Returns each job's index rows (on process 0)."""
    finished = {
        job.first + shard: diff_store.shard_rows(folder, job.first + shard)
        if processes.is_main()
        else None
        for job in jobs
        for shard in job.part
    }

    def is_done(diffs: int) -> bool:  # whether the shard that ends with this many diffs is there
        own = next((job for job in jobs if job.first_diff < diffs <= job.end_diff), None)
        return own is not None and finished.get(own.shard_of(diffs)) is not None

    for job in jobs:
        for shard in job.part:
            if (found := finished[job.first + shard]) is not None:
                _check_rows(job, shard, found, folder)
    reports = folder.parent / "metrics"
    with (
        Progress("diffs", sum(job.wanted for job in jobs)) as progress,
        Metrics(reports, "diffs", is_done, processes.is_main()) as metrics,
        Profile(reports / "profile" / "diffs", DIFFS.get(jobs[0].config, "profile")) as profile,
    ):
        return [_make_kind(job, folder, finished, progress, metrics, profile) for job in jobs]


def _make_kind(
    job: Job,
    folder: pathlib.Path,
    finished: Mapping[int, list[dict[str, Any]] | None],
    progress: Progress,
    metrics: Metrics,
    profile: Profile,
) -> list[dict[str, Any]]:
    """The same for one job. finished: index rows of the shards that are there, by their number in the store."""
    missing = [i for i in job.part if not processes.agree(finished[job.first + i] is not None)]
    ahead = _read_ahead(functools.partial(read_batches, job), missing)
    limit: tuple[int, int] | None = None
    meter = Meter(job.model.config, job.model.mesh)
    rows: list[dict[str, Any]] = []
    for shard in job.part:
        number = job.first + shard
        members, done = job.members(shard), finished[number]
        profile.step(number)
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
            metrics.write(job.first_diff + members.stop, {**last, **meter.lap()})
            metrics.flush()
            write = functools.partial(diff_store.write_shard, folder, number, made.deltas, done)
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
        (o.label, o.trigger, o.split, job.label(o), job.config.steps)
        for o in job.organisms[members.start : members.stop]
    ]
    listed = [
        (
            *map(row.get, ("topic", "trigger", "split", "label")),
            len(row.get(diff_store.CURVE, "").split()),
        )
        for row in rows
    ]
    measured = [row.get(column) for row in rows for column, _ in LIMITS.values()]
    # Empty: nothing was measured, as in benign diffs.
    if listed != made or any(isinstance(value, str) and value for value in measured):
        raise DitError(
            f"batch {job.first + shard} in '{folder}' lists other diffs than this config makes: delete "
            f"'{folder / 'shards' / f'{job.first + shard:05d}.json'}' and run again, which makes this batch again"
        )


def read_batches(job: Job, shard: int, of_teacher: bool = False) -> TokenBatch:
    """All batches of this process's rows of a shard, leaves [rows, steps, S, …]."""
    return stack([job.batches(organism, of_teacher) for organism in job.local(shard)])


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
    params, asked = job.start.program_params, whole
    if taught := job.behaviour.taught:
        other = read_batches(job, shard, of_teacher=True)
        asked = parallel.to_host(parallel.put_rows(other, mesh, job.width))
    teacher = make_teacher(params, model.config, asked, num_ce, mesh, always=taught)
    with parallel.use_mesh(mesh):
        trained, losses = finetune_many(
            params,
            model.config,
            deltas,
            batches,
            optimizer=job.optimizer,
            num_ce=num_ce,
            teacher=teacher,
            widths=None if job.behaviour.paired else sample_widths(job.behaviour, config),
            packed=None if job.behaviour.paired or not fits(whole, num_ce, limit) else limit,
            beta=preference_beta(job.behaviour, config),
        )
    members = job.members(shard)
    n = len(members)
    trained = jax.tree.map(lambda x: x[:n], parallel.to_host(trained))
    check_finite(trained, [job.organisms[i] for i in members], members.start)
    ce, kl = (parallel.to_host(losses[name])[:n] for name in ("ce", "kl"))
    check_finite([ce, kl], [job.organisms[i] for i in members], members.start)
    return Finetuned(job.whole(trained), ce, kl, whole)


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
            "label": job.label(organism),
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
    beta = preference_beta(behaviour, diffs)
    options = {
        "optimizer": optimizer_of(diffs),
        "num_ce": num_ce,
        "widths": None if beta else widths,
        "beta": beta,
    }
    return (params, config, deltas, batches), options


def _put_like(host: np.ndarray, like: jax.Array) -> jax.Array:
    return parallel.put(host, like.sharding)
