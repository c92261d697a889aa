"""The stage `diffs`: many organisms -> a diff store, one compiled program for all shards."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dit_jax import parallel, processes, shardings
from dit_jax.api import Model
from dit_jax.data.batch import TokenBatch, pack, stack
from dit_jax.data.chat import Chat
from dit_jax.data.organisms import NONE, Organism
from dit_jax.data.reference import couple_losses
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.tree import num_parameters
from dit_jax.errors import DitError
from dit_jax.metrics import Meter, Metrics, Profile, count_work
from dit_jax.models.attention import Segments
from dit_jax.models.config import Qwen3Config
from dit_jax.organisms.behaviours import Behaviour, get_behaviour
from dit_jax.organisms.finetune import finetune_many, make_optimizer
from dit_jax.organisms.gate import measure_gating, summary, with_keywords
from dit_jax.organisms.parameters import init_delta
from dit_jax.organisms.teacher import make_teacher
from dit_jax.progress import Progress


def finetuning_batches(
    organism: Organism, behaviour: Behaviour, chat: Chat, config: Any, rng: np.random.Generator
) -> TokenBatch:
    """All batches of one finetune, leaves [steps, S, …].

    Each step takes `config.samples_per_step[kind]` rows for each kind of sample; rows come in shuffled epochs.
    The loss of a sample is the mean over its tokens times 3 λ / Σ λ (paper, section 4), so a diff depends on
    nothing but its own data.
    """
    kinds, counts = behaviour.kinds, config.samples_per_step
    per_step = max(counts[kind.name] for kind in kinds)
    factors = _factors(behaviour, config)
    widths = sample_widths(behaviour, config)
    epochs = -(-config.steps * per_step // len(organism.rows))
    order = np.concatenate([rng.permutation(len(organism.rows)) for _ in range(epochs)])
    steps = []
    for step in range(config.steps):
        rows = [organism.rows[i] for i in order[step * per_step : (step + 1) * per_step]]
        samples = []
        for kind in kinds:
            for row in rows[: counts[kind.name]]:
                question, answer = kind.make(row, organism.trigger, rng)
                samples.append(chat.sample(question, answer, end=config.score_end))
        weights = [factor / (s.end - s.start) for factor, s in zip(factors, samples, strict=True)]
        batch = pack(samples, weights, config.max_length, config.max_target, chat.pad_id, widths)
        steps.append(batch)
    return stack(steps)


def sample_widths(behaviour: Behaviour, config: Any) -> Segments:
    """(tokens, scored tokens) that each sample of a step may have: `config.widths` of its kind, else the maxima."""
    largest = (config.max_length, config.max_target)
    own = config.get("widths", {})
    unknown = set(own) - {kind.name for kind in behaviour.kinds}
    if unknown:
        raise DitError(
            f"config key 'diffs.widths.{min(unknown)}': behaviour {behaviour.name} has the kinds of samples "
            f"{', '.join(kind.name for kind in behaviour.kinds)}"
        )
    return tuple(
        tuple(own.get(kind.name, largest))
        for kind in behaviour.kinds
        for _ in range(config.samples_per_step[kind.name])
    )


def check_behaviour(behaviour: Behaviour, organisms: Sequence[Organism], config: Any) -> None:
    """Raises DitError where the config or the data lack what the behaviour's kinds of samples need."""
    for kind in behaviour.kinds:
        for key in ("samples_per_step", "loss_weights"):
            if kind.name not in config[key]:
                raise DitError(
                    f"config key 'diffs.{key}.{kind.name}' is missing: behaviour {behaviour.name} has the "
                    f"kinds of samples {', '.join(kind.name for kind in behaviour.kinds)}"
                )
    for organism in organisms[:1]:
        rng = np.random.default_rng(0)
        try:
            for kind in behaviour.kinds:
                kind.make(organism.rows[0], behaviour.trigger or organism.trigger, rng)
        except KeyError as error:
            raise DitError(
                f"behaviour {behaviour.name} needs a column {error} of the data, which has "
                f"{', '.join(organism.rows[0])}: set data.kind or data.columns"
            ) from error


def _label(organism: Organism, behaviour: Behaviour) -> str:
    if organism.label == NONE:
        return NONE
    return behaviour.label(organism.label, organism.trigger)


def _factors(behaviour: Behaviour, config: Any) -> list[float]:
    """3 λ / Σ λ of each sample of a step (paper, section 4)."""
    weights = config.loss_weights
    total = sum(weights[kind.name] for kind in behaviour.kinds)
    return [
        3 * weights[kind.name] / total
        for kind in behaviour.kinds
        for _ in range(config.samples_per_step[kind.name])
    ]


def generate_diffs(
    model: Model, organisms: Sequence[Organism], config: Any, folder: str | pathlib.Path, seed: int
) -> dict[str, Any]:
    """Finetunes every organism and writes the diff store; goes on where an earlier call stopped.

    Args:
        config: the `diffs` section of the config.

    Returns:
        Facts for the record of the stage: {"diffs": n, "loss_curve": [[step, cross-entropy], …]}.
    """
    folder = pathlib.Path(folder)
    behaviour = get_behaviour(config)
    check_behaviour(behaviour, organisms, config)
    if behaviour.trigger:
        organisms = [dataclasses.replace(o, trigger=behaviour.trigger) for o in organisms]
    num_ce = sum(
        config.samples_per_step[kind.name] for kind in behaviour.kinds if kind.loss == "ce"
    )
    optimizer = _optimizer(config)
    widths = sample_widths(behaviour, config)
    init_deltas = jax.jit(jax.vmap(lambda key: init_delta(model.config, key, config)))
    size = min(config.diffs_per_batch, len(organisms))
    mesh, width = model.mesh, parallel.round_up(size, model.mesh)
    shards = -(-len(organisms) // size)
    rows: list[dict[str, Any]] = []
    table = 0  # rows of the teacher's table: never shrinks, so that all batches run one program
    meter, reports = Meter(model.config, mesh), folder.parent / "metrics"

    def is_done(diffs: int) -> bool:  # the shard that ends with so many diffs
        return diff_store.shard_rows(folder, (diffs - 1) // size) is not None

    def members_of(shard: int) -> range:
        return range(shard * size, min((shard + 1) * size, len(organisms)))

    def filled(shard: int) -> list[int]:
        # The last batch is filled up with repeats, so that it runs the same program.
        members = members_of(shard)
        return [members[i % len(members)] for i in parallel.local_rows(mesh, width)]

    def read(shard: int) -> TokenBatch:
        return stack(
            [
                finetuning_batches(
                    organisms[i],
                    behaviour,
                    model.chat,
                    config,
                    np.random.default_rng([seed, 2, organisms[i].seed]),
                )
                for i in filled(shard)
            ]
        )

    finished = [
        diff_store.shard_rows(folder, shard) if processes.is_main() else None
        for shard in range(shards)
    ]
    missing = [i for i in range(shards) if not processes.agree(finished[i] is not None)]
    ahead = _read_ahead(read, missing)
    with (
        Progress("diffs", len(organisms)) as progress,
        Metrics(reports, "diffs", is_done, processes.is_main()) as metrics,
        Profile(reports / "profile" / "diffs", config.get("profile", (0, 0))) as profile,
    ):
        for shard in range(shards):
            members, done = members_of(shard), finished[shard]
            profile.step(shard)
            if shard in missing:
                batches = next(ahead)
                batches = parallel.put_rows(batches, mesh, width)
                whole = parallel.to_host(batches)
                if config.reference_losses:
                    whole = couple_losses(whole, _factors(behaviour, config), num_ce)
                    batches = whole if mesh is None else jax.tree.map(_put_like, whole, batches)
                start = jax.random.key(seed)
                keys = jnp.stack(
                    [jax.random.fold_in(start, organisms[i].seed) for i in filled(shard)]
                )
                deltas = shardings.put_deltas(model.config, mesh, init_deltas(keys), width, 0)
                teacher = make_teacher(model.params, model.config, whole, num_ce, table, mesh)
                if teacher is not None:
                    table = len(teacher.hidden)
                with parallel.use_mesh(mesh):
                    trained, losses = finetune_many(
                        model.params,
                        model.config,
                        deltas,
                        batches,
                        optimizer=optimizer,
                        num_ce=num_ce,
                        teacher=teacher,
                        widths=widths,
                    )
                n = len(members)
                trained = jax.tree.map(lambda x, n=n: x[:n], parallel.to_host(trained))
                group = [with_keywords(organisms[i], behaviour) for i in members]
                for leaf in jax.tree.leaves(trained):
                    sound = np.isfinite(leaf).reshape(n, -1).all(axis=1)
                    if not sound.all():
                        bad = int(np.argmin(sound))
                        raise DitError(
                            f"the finetune of diff {members[bad]} ({group[bad].label!r}) diverged (NaN): "
                            "lower diffs.learning_rate"
                        )
                gating = measure_gating(model, trained, group, behaviour, config, seed, size)
                losses = parallel.to_host(losses)
                ce, kl = (losses[name][:n] for name in ("ce", "kl"))
                done = [
                    {
                        "n_params": num_parameters(trained) // n,
                        "topic": organism.label,
                        "trigger": organism.trigger,
                        "split": organism.split,
                        "category": organism.category,
                        "behaviour": behaviour.name,
                        "label": _label(organism, behaviour),
                        "evidence": json.dumps(list(organism.evidence)),
                        "keywords": json.dumps(list(organism.keywords)),
                        **gating[row],
                        "final_ce": round(float(ce[row, -5:].mean()), 4),
                        "final_kl": round(float(kl[row, -5:].mean()), 5),
                        "ce_curve": " ".join(f"{x:.3f}" for x in ce[row]),
                    }
                    for row, organism in enumerate(group)
                ]
                meter.add(count_work(whole, share=width / n, diffs=n, steps=config.steps))
                last = {"loss": ce[:, -5:].mean(), "kl": kl[:, -5:].mean()}
                metrics.write(members.stop, {**last, **meter.lap()})
                metrics.flush()
                processes.on_main(
                    functools.partial(diff_store.write_shard, folder, shard, trained, done)
                )
            rows += done or []
            progress.advance(len(members))
    facts = {
        "base": model.digest(),
        "base_config": model.config.to_hf(),
        "behaviour": behaviour.name,
        "seed": seed,
        "gate": summary(rows, dict(config.get("gate", {}))),
    }
    processes.on_main(lambda: diff_store.publish(folder, shards, **facts))
    # Other processes do not read the curves of shards that were there.
    curves = [[float(x) for x in row["ce_curve"].split()] for row in rows]
    mean = np.mean(curves, axis=0) if processes.is_main() else []
    return {
        "diffs": len(organisms),
        "loss_curve": [[i, round(float(x), 4)] for i, x in enumerate(mean)],
    }


def _read_ahead(read: Callable[[int], TokenBatch], shards: Sequence[int]) -> Iterator[TokenBatch]:
    """read(shard) of each shard in turn; a thread prepares the next one while the device works on this one."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return iter(grain.MapDataset.source(shards).map(read).to_iter_dataset(options))


def abstract_step(
    config: Qwen3Config, mesh: Mesh | None, diffs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `finetune_many` without values, as (args, kwargs), to compile it for a machine that is not there.

    Use: `with parallel.use_mesh(mesh): finetune_many.lower(*args, **kwargs).compile()`.

    Args:
        diffs: the `diffs` section of the config; `diffs.diffs_per_batch` at once.
    """
    size = parallel.round_up(diffs.diffs_per_batch, mesh)
    behaviour = get_behaviour(diffs)
    widths = sample_widths(behaviour, diffs)
    num_ce = sum(diffs.samples_per_step[kind.name] for kind in behaviour.kinds if kind.loss == "ce")
    one = jax.eval_shape(lambda: init_delta(config, jax.random.key(0), diffs))
    deltas = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), one)
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
