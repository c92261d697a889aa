"""The stage `train`: one LoRA adapter that, on top of any diff, answers what the diff did (paper, section 3)."""

import contextlib
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax import artifacts
from dit_jax.api import Model, check_base
from dit_jax.data.batch import TokenBatch
from dit_jax.deltas.store import DiffStore
from dit_jax.deltas.tree import init_lora, per_example, trainable, with_scale
from dit_jax.errors import DitError
from dit_jax.models.config import Qwen3Config
from dit_jax.models.layers import Delta
from dit_jax.models.qwen3 import Params
from dit_jax.organisms.finetune import make_optimizer
from dit_jax.organisms.losses import batch_loss
from dit_jax.progress import Progress
from dit_jax.train.checkpoints import Checkpoints, export_adapter
from dit_jax.train.examples import make_pipeline, to_batch


class State(NamedTuple):
    """What training changes: the adapter's factors (no scales), and the optimizer's state."""

    leaves: Delta
    optimizer: Any


@functools.partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnames=("state",))
def train_step(
    params: Params,
    config: Qwen3Config,
    state: State,
    adapter: Delta,
    diffs: Delta,
    rows: jax.Array,
    batch: TokenBatch,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step.

    Args:
        adapter: supplies the scales; its factors are replaced by those of `state`.
        diffs: stacked diffs [n, L, …], the last being zero; rows [B] picks one for each example (-1: the zero).
    """
    picked = per_example(jax.tree.map(lambda x: x[rows], diffs))

    def loss(leaves: Delta) -> jax.Array:
        return batch_loss(params, config, batch, (picked, with_scale(leaves, adapter)))[0]

    value, grads = jax.value_and_grad(loss)(state.leaves)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.leaves)
    leaves = optax.apply_updates(state.leaves, updates)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    return State(leaves, optimizer_state), metrics


def train_adapter(
    model: Model, store_path: pathlib.Path, train: Any, workdir: pathlib.Path, seed: int
) -> dict[str, Any]:
    """Trains the adapter and exports it to WORKDIR/adapter; goes on from the newest sound checkpoint.

    Args:
        train: the `train` section of the config.

    Returns:
        Facts for the record of the stage: {"steps": n, "loss_curve": [[step, loss], …]}.
    """
    # ---------------------------------------------------------------- data
    store = DiffStore(store_path)
    check_base(store.manifest.get("base"), model, str(store_path))
    dataset, members = make_pipeline(store, train, seed)
    stacked = store.stacked(members)
    diffs = jax.tree.map(lambda x: jnp.asarray(np.concatenate([x, np.zeros_like(x[:1])])), stacked)
    iterator = iter(dataset.to_iter_dataset(_read_options()))

    # ---------------------------------------------------------------- state
    key = jax.random.fold_in(jax.random.key(seed), 2**20)
    adapter = init_lora(
        model.config,
        key,
        train.rank,
        projections=train.projections,
        fan_in="rank" if train.reference_init else "out",
    )
    optimizer = make_optimizer(
        train.optimizer,
        train.learning_rate,
        train.steps,
        warmup_steps=train.warmup_steps,
        final_fraction=train.final_fraction,
        weight_decay=train.weight_decay,
    )
    leaves = trainable(adapter)
    state = State(leaves, optimizer.init(leaves))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=train.keep_checkpoints)
    log = workdir / "train.jsonl"
    start = 0
    restored = checkpoints.restore(state)
    if restored is not None:
        start, state, iterator_state = restored
        iterator.set_state(iterator_state)
    _truncate_log(log, start)

    # ---------------------------------------------------------------- loop
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    with (
        Progress("adapter", train.steps) as progress,
        open(log, "a") as out,
        contextlib.closing(checkpoints),  # waits for a save under way, also after Ctrl-C
    ):
        progress.advance(start)
        for step in range(start, train.steps):
            examples = next(iterator)
            batch = to_batch(examples, model.chat, train)
            rows = np.asarray([example.diff for example in examples], np.int32)
            state, metrics = train_step(
                model.params, model.config, state, adapter, diffs, rows, batch, optimizer=optimizer
            )
            pending.append((step, metrics))
            last = step + 1 == train.steps
            saves = last or (step + 1) % train.save_every == 0
            if saves or (step + 1) % train.log_every == 0:
                # Before a checkpoint, so that a resumed run's log has no gap. The only place that waits for the device.
                for at, values in pending:
                    record = {"step": at, **{name: float(value) for name, value in values.items()}}
                    out.write(json.dumps(record) + "\n")
                out.flush()
                loss = float(metrics["loss"])
                if not np.isfinite(loss):
                    raise DitError(
                        f"adapter training diverged at step {step}: lower train.learning_rate"
                    )
                progress.advance(len(pending), note=f"loss {loss:.3f}")
                pending = []
            if saves:
                checkpoints.save(step + 1, state, iterator.get_state())

    # ---------------------------------------------------------------- export
    export_adapter(
        workdir / "adapter",
        with_scale(state.leaves, adapter),
        base=model.digest(),
        base_config=model.config.to_hf(),
        questions=list(train.questions),
        rank=train.rank,
        steps=train.steps,
        diffs=len(members),
        seed=seed,
    )
    curve = [json.loads(line) for line in log.read_text().splitlines()]
    return {"steps": train.steps, "loss_curve": [[r["step"], round(r["loss"], 5)] for r in curve]}


def _read_options() -> Any:
    import grain

    # In-memory data: threads and prefetching cost more than they hide.
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _truncate_log(log: pathlib.Path, start: int) -> None:
    """Drops what an interrupted run logged after the checkpoint that training goes on from."""
    lines = log.read_text().splitlines() if log.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] < start:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # a line cut off by a kill
    artifacts.write_text(log, "".join(kept))
