"""The stage `train`: one LoRA adapter that, added to any diff, answers what the diff does (paper, section 3)."""

import contextlib
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.api import Model, check_base
from dit_jax.data.batch import TokenBatch
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.tree import abstract_lora, init_lora, per_example, trainable, with_scale
from dit_jax.errors import DitError
from dit_jax.models import shardings
from dit_jax.models.decoder import Params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, abstract_stack
from dit_jax.models.families import hf_config
from dit_jax.optimize.batch_loss import batch_loss
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.optimize.speed import Meter, Profile, count_work
from dit_jax.runtime import parallel, preemption, processes
from dit_jax.runtime.metrics import Metrics, read_records
from dit_jax.runtime.progress import Progress
from dit_jax.train import mixture
from dit_jax.train.checkpoints import Checkpoints
from dit_jax.train.examples import PADDING, check_attention, make_pipeline, to_batch
from dit_jax.train.train_keys import TRAIN
from dit_jax.train.variation import vary


class State(NamedTuple):
    """What training changes: the adapter's factors (not its scales) and the optimizer's state."""

    leaves: Delta
    optimizer: Any


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "packed"), donate_argnames=("state",)
)
def train_step(
    params: Params,
    config: DecoderConfig,
    state: State,
    adapter: Delta,
    diffs: Delta,
    batch: TokenBatch,
    *,
    optimizer: optax.GradientTransformation,
    packed: tuple[int, int] | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step.

    Args:
        state: donated, so its arrays are gone afterwards, even if an adapter shares them, as in
            State(trainable(adapter), …). Copy them first (`jax.tree.map(jnp.copy, …)`) to keep them.
        adapter: supplies the scales; `state` supplies the factors.
        diffs: one for each example, leaves [L, B, …] (zeros: the bare base).
        optimizer: compared by identity; make it once before the loop, since each new one compiles again.
        packed: the most scored entries that are used, see `head_loss.Options`.
    """

    def loss(leaves: Delta) -> jax.Array:
        deltas = (diffs, with_scale(leaves, adapter))
        return batch_loss(params, config, batch, deltas, packed=packed)[0]

    value, grads = jax.value_and_grad(loss)(state.leaves)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.leaves)
    leaves = optax.apply_updates(state.leaves, updates)
    metrics = parallel.replicate({"loss": value, "grad_norm": optax.tree.norm(grads)})
    # Without this XLA may choose another sharding for the new state, and the next step would compile again.
    pin = functools.partial(shardings.constrain_delta, config)
    return _map_state(pin, State(leaves, optimizer_state)), metrics


def _map_state(fn: Any, state: State) -> State:
    """Applies fn to every tree of the state that mirrors the adapter: its factors and their moments."""
    leaves: Any = jax.tree.structure(state.leaves)
    mirrors = lambda x: jax.tree.structure(x) == leaves  # noqa: E731
    moments = jax.tree.map(lambda x: fn(x) if mirrors(x) else x, state.optimizer, is_leaf=mirrors)
    return State(fn(state.leaves), moments)


def state_shardings(config: DecoderConfig, mesh: Mesh, state: State) -> State:
    """NamedShardings of a training state: factors and moments fsdp × tensor, counters on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    named = _map_state(functools.partial(shardings.delta_shardings, config, mesh), state)
    return jax.tree.map(lambda x: x if isinstance(x, NamedSharding) else whole, named)


def abstract_step(
    config: DecoderConfig, mesh: Mesh | None, train: Any, diff: Delta
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `train_step` without values, as (args, kwargs), to compile it for an absent machine.

    Use: `with parallel.use_mesh(mesh): train_step.lower(*args, **kwargs).compile()`.

    Args:
        train: the `train` section of the config.
        diff: the diff of each example, see `deltas.tree.abstract_lora`.
    """
    size = parallel.round_up(train.batch_size, mesh)
    optimizer = _optimizer(train)
    adapter = abstract_lora(config, train.rank, train.projections)
    leaves = trainable(adapter)
    state = State(leaves, jax.eval_shape(optimizer.init, leaves))
    diffs = abstract_stack(diff, size, 1)
    batch = shardings.abstract_batch(mesh, (size,), train.max_length, train.max_target)
    if mesh is not None:
        state = shardings.with_shardings(state, state_shardings(config, mesh, state))
        adapter, diffs = (
            shardings.with_shardings(x, shardings.delta_shardings(config, mesh, x, axis))
            for x, axis in ((adapter, None), (diffs, 1))
        )
    params = shardings.abstract_params(config, mesh)
    options = {"optimizer": optimizer, "packed": _entry_limit(train, mesh)}
    return (params, config, state, adapter, diffs, batch), options


def _optimizer(train: Any) -> optax.GradientTransformation:
    return make_optimizer(
        train.optimizer,
        train.learning_rate,
        train.steps,
        warmup_steps=train.warmup_steps,
        final_fraction=train.final_fraction,
        weight_decay=train.weight_decay,
    )


def train_adapter(
    model: Model, store_path: pathlib.Path, train: Any, workdir: pathlib.Path, seed: int
) -> dict[str, Any]:
    """Trains the adapter and exports it to WORKDIR/adapter; resumes from the newest sound checkpoint.

    Args:
        store_path: the run's own diffs, for a config without `train.stores`.
        train: the `train` section of the config.

    Returns:
        Facts for the record of the stage: {"steps": n, "loss_curve": [[step, loss], …]}.

    Raises:
        DitError: the diffs belong to another model, training diverges, or attention cannot compute the labels' loss.
    """
    check_attention(train, model.config.attention)
    # ---------------------------------------------------------------- data
    parts = mixture.open_parts(store_path, train, workdir)
    for part in parts:
        check_base(part.store.manifest.get("base"), model, str(part.store.path))
        part.store.check_fits((*part.topics, *part.benign), model.config)
    members = mixture.members_of(parts)
    read_diffs = mixture.diff_reader(members, model.config)
    iterator = iter(make_pipeline(parts, train, seed).to_iter_dataset(_read_options()))

    # ---------------------------------------------------------------- state
    mesh, optimizer = model.mesh, _optimizer(train)
    adapter, state = _first_state(model, train, optimizer, seed)
    data = mixture.digest_of(parts)
    checkpoints = Checkpoints(workdir / "checkpoints", train.keep_checkpoints, data)
    start = 0
    restored = checkpoints.restore(state)
    if restored is not None:
        start, state, iterator_state = restored
        set_place(iterator, iterator_state, checkpoints.folder / str(start))

    # ---------------------------------------------------------------- loop
    limit = _entry_limit(train, mesh)
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    meter, folder = Meter(model.config, mesh), workdir / "metrics"
    with (
        Progress("adapter", train.steps) as progress,
        contextlib.closing(checkpoints),  # waits for a save under way, also after Ctrl-C
        Metrics(folder, "train", lambda step: step < start, processes.is_main()) as curves,
        Profile(folder / "profile" / "train", TRAIN.get(train, "profile")) as profile,
        preemption.hold() as notice,
    ):
        progress.advance(start)
        for step in range(start, train.steps):
            profile.step(step, state)
            examples = next(iterator)
            # Every process draws the same examples and prepares its own rows of the batch.
            size = parallel.round_up(len(examples), mesh)
            rows = parallel.local_rows(mesh, size)
            batch = to_batch(examples, model.chat, train, rows)
            meter.add(count_work(batch, share=len(rows) / size))
            mine = [examples[i] if i < len(examples) else PADDING for i in rows]
            seeds = [example.variation for example in mine]
            own = vary(read_diffs([example.diff for example in mine]), seeds, train)
            # A second program computes all entries of a batch that uses more.
            packed = limit if limit and np.count_nonzero(batch.weight) <= limit[0] else None
            batch = parallel.put_rows(batch, mesh, size)
            diffs = shardings.put_deltas(model.config, mesh, per_example(own), size, 1)
            with parallel.use_mesh(mesh):
                state, metrics = train_step(
                    model.program_params,
                    model.config,
                    state,
                    adapter,
                    diffs,
                    batch,
                    optimizer=optimizer,
                    packed=packed,
                )
            pending.append((step, metrics))
            last = step + 1 == train.steps
            stops = notice.reached(step)
            saves = last or stops or (step + 1) % train.save_every == 0
            if saves or (step + 1) % train.log_every == 0:
                # The log is written before a checkpoint, so that a resumed run leaves no gap. Only here the loop waits
                # for the device.
                _write_log(curves, pending, meter)
                progress.advance(len(pending), note=f"loss {float(metrics['loss']):.3f}")
                pending = []
            if saves:
                checkpoints.save(step + 1, state, iterator.get_state())
            if stops:
                raise preemption.Preempted

    # ---------------------------------------------------------------- export
    export_adapter(
        workdir / "adapter",
        with_scale(state.leaves, adapter),
        base=model.digest(),
        base_config=hf_config(model.config),
        system=model.chat.system,
        questions=list(train.questions),
        rank=train.rank,
        steps=train.steps,
        diffs=len(members),
        seed=seed,
        trained_on=mixture.trained_on(parts, train),
    )
    curve = read_records(folder / "train.jsonl") if processes.is_main() else []
    return {"steps": train.steps, "loss_curve": [[r["step"], round(r["loss"], 5)] for r in curve]}


def _first_state(
    model: Model, train: Any, optimizer: optax.GradientTransformation, seed: int
) -> tuple[Delta, State]:
    """A new adapter and the state of its training, on the model's mesh if it has one."""
    adapter = init_lora(
        model.config,
        jax.random.fold_in(jax.random.key(seed), 2**20),
        train.rank,
        projections=train.projections,
        fan_in="rank" if train.reference_init else "out",
    )
    leaves = trainable(adapter)
    state = State(leaves, optimizer.init(leaves))
    if model.mesh is not None:
        places = state_shardings(model.config, model.mesh, state)
        state = jax.tree.map(parallel.put, state, places)
        adapter = shardings.put_delta(model.config, model.mesh, adapter)
    return adapter, state


def _write_log(
    curves: Metrics, pending: Sequence[tuple[int, dict[str, jax.Array]]], meter: Meter
) -> None:
    """Writes the metrics of steps, and with the last one their speed. Raises DitError: training diverged."""
    last, _ = pending[-1]
    for step, values in pending:
        numbers = {name: float(value) for name, value in values.items()}
        if not np.isfinite([numbers["loss"], numbers["grad_norm"]]).all():
            curves.flush()
            raise DitError(f"adapter training diverged at step {step}: lower train.learning_rate")
        curves.write(step, {**numbers, **(meter.lap() if step == last else {})})
    curves.flush()


def set_place(iterator: Any, place: Any, checkpoint: pathlib.Path) -> None:
    """Sets an iterator of grain to its state in a checkpoint, whose digests may be a stranger's.

    Raises:
        DitError: it is no place in this data.
    """
    try:
        iterator.set_state(place)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise DitError(
            f"the checkpoint '{checkpoint}' names no place in these diffs to go on from: delete it and run the same "
            "command again"
        ) from None


def _entry_limit(train: Any, mesh: Mesh | None) -> tuple[int, int] | None:
    """The most scored entries of a batch; None if a mesh splits them or the config does not set it."""
    most = TRAIN.get(train, "max_scored")
    return (most, 0) if most and mesh is None else None


def _read_options() -> Any:
    import grain

    # The data is in memory, so threads and prefetching cost more than they hide.
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
