"""Estimates of a step's time, a run's cost and memory, from counted operations and a chip's published speeds.

Nothing here is measured. On each device a step takes

    max(FLOPs / (utilization × peak), bytes of weights read / memory bandwidth) + bytes received / (network / 2)

FLOPs are those that the program executes, with padding, recomputation (remat) and the teacher of the KL terms.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from dit_jax.deltas.tree import abstract_lora, num_parameters
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.kv_cache import cache_slots
from dit_jax.models.modules import count_parameters
from dit_jax.optimize.batch_loss import CHUNK_ELEMENTS
from dit_jax.optimize.speed import Work, forward_flops, train_flops
from dit_jax.organisms.behaviours import get_behaviour
from dit_jax.organisms.behaviours.behaviour import TO_BASE
from dit_jax.organisms.samples import sample_widths
from dit_jax.planning.machines import Chip, Machine
from dit_jax.planning.programs import batch_size
from dit_jax.runtime.sizes import next_multiple

UTILIZATION = 0.4  # assumed share of the peak FLOPs per second
NETWORK_SHARE = 0.5  # assumed share of the links' bandwidth that collectives reach
FLOAT32 = 4  # bytes: diffs and adapters are trained and stored in it


@dataclasses.dataclass(frozen=True)
class Load:
    """What one step of a stage runs, on all devices together.

    Attributes:
        rows: sequences through the model that is trained or asked.
        teacher_rows: how many of them also go through the bare base.
        length: tokens of each, with padding.
        scored: positions of each whose logits are computed.
        trained: False for a forward pass alone.
        new_tokens: tokens decoded one by one after the first, which the forward pass gives.
    """

    rows: int
    teacher_rows: int
    length: float
    scored: float
    trained: bool
    new_tokens: int = 0


def step_load(stage: str, config: Any, batch: int) -> Load:
    """The work of one step with `batch` diffs, examples or questions."""
    if stage == "diffs":
        diffs = config.diffs
        behaviour = get_behaviour(diffs)
        by_kl = sum(
            diffs.samples_per_step[kind.name] for kind in behaviour.kinds if kind.loss in TO_BASE
        )
        # Kinds of samples may differ in width, so take the mean.
        tokens, scored = zip(*sample_widths(behaviour, diffs), strict=True)
        length, terms = sum(tokens) / len(tokens), sum(scored) / len(scored)
        return Load(batch * len(tokens), batch * by_kl, length, terms, True)
    train = config.train
    if stage == "train":
        return Load(batch, 0, train.max_length, train.max_target, True)
    return Load(batch, 0, train.max_length, 1, False, config.evaluate.max_new_tokens - 1)


def step_flops(model: DecoderConfig, load: Load) -> float:
    """FLOPs of a step: its model FLOPs (`optimize/speed.py`), recomputation and the teacher's pass."""

    def work(rows: float) -> Work:
        return Work(rows * load.length, rows * load.scored, rows * load.length**2)

    own = work(load.rows)
    if not load.trained:
        decoded = load.rows * load.new_tokens
        return forward_flops(model, own) + forward_flops(model, Work(decoded, decoded))
    # The head recomputes nothing (optimize/head_loss.py).
    again = {
        "none": Work(),
        "dots": Work(squares=own.squares),
        "full": own._replace(scored=0.0),
    }[model.remat]
    teacher = work(load.teacher_rows)
    return train_flops(model, own) + forward_flops(model, again) + forward_flops(model, teacher)


def _passes(load: Load) -> int:
    """How many times a step goes through all layers."""
    return (2 if load.trained else 1) + (1 if load.teacher_rows else 0) + load.new_tokens


def step_seconds(
    model: DecoderConfig,
    load: Load,
    sizes: tuple[int, int, int],
    chip: Chip,
    utilization: float = UTILIZATION,
) -> float:
    """Seconds of one step on a mesh of sizes (data, fsdp, tensor), by the formula at the top."""
    data, fsdp, tensor = sizes
    weights = count_parameters(model) * _item(model) / tensor
    compute = step_flops(model, load) / (data * fsdp * tensor) / (utilization * chip.flops)
    read = weights * _passes(load) / chip.bandwidth
    received = weights * (fsdp - 1) / fsdp * _passes(load)
    if tensor > 1:
        # A layer sums activations twice forward, twice backward and twice in recomputation.
        ways = 2 * (6 if load.trained else 2)
        tokens = load.rows * (load.length + load.new_tokens) + load.teacher_rows * load.length / 3
        summed = tokens / (data * fsdp) * model.hidden_size * _item(model)
        received += ways * model.num_hidden_layers * summed * (tensor - 1) / tensor
    return max(compute, read) + received / (NETWORK_SHARE * chip.network)


def _item(model: DecoderConfig) -> int:
    return 2 if model.dtype == "bfloat16" else 4


def lora_parameters(model: DecoderConfig, rank: int, projections: Sequence[str]) -> int:
    """Parameters of one LoRA, without its scales."""
    return _lora_parameters(model, rank, tuple(projections))


@functools.lru_cache
def _lora_parameters(model: DecoderConfig, rank: int, projections: tuple[str, ...]) -> int:
    return num_parameters(abstract_lora(model, rank, projections))


# ------------------------------------------------------------------ memory


def device_memory(
    stage: str,
    model: DecoderConfig,
    config: Any,
    sizes: tuple[int, int, int],
    batch: int,
) -> tuple[float, float]:
    """(bytes that stay, temporary bytes) of one device, roughly: a search starts from them, the compiler decides."""
    data, fsdp, tensor = sizes
    shards = data * fsdp
    load = step_load(stage, config, batch)
    layers, width = model.num_hidden_layers, model.hidden_size
    fixed = count_parameters(model) * _item(model) / (fsdp * tensor)
    # One factor of each projection, about half of a LoRA's bytes, is split over tensor.
    share = 0.5 + 0.5 / tensor
    projections = config.diffs.projections
    diffs = batch / shards * share * FLOAT32
    diffs *= lora_parameters(model, config.diffs.rank, projections)
    adapter = (
        lora_parameters(model, config.train.rank, config.train.projections)
        * FLOAT32
        / (fsdp * tensor)
    )
    tokens = load.rows / shards * load.length
    heads = model.num_attention_heads * model.head_dim
    inner = 4 * model.intermediate_size + 6 * heads
    working = tokens * (8 * width + inner / tensor) * _item(model)
    scores = load.rows / shards * model.num_attention_heads / tensor * load.length**2 * FLOAT32 * 2
    gathered = 2 * count_parameters(model, lora_only=True) / layers / tensor * _item(model)
    gathered += model.vocab_size * width / tensor * _item(model) * (1 if fsdp > 1 else 0)
    logits = min(load.rows / shards * load.scored * model.vocab_size / tensor, CHUNK_ELEMENTS)
    temporary = working + scores + gathered + 2 * FLOAT32 * logits
    if load.trained:
        outputs = 2 * model.intermediate_size + 2 * width
        outputs += model.head_dim * (model.num_attention_heads + 2 * model.num_key_value_heads)
        saved = {"none": 2 * outputs, "dots": outputs, "full": width}[model.remat]
        temporary += saved * layers * tokens * _item(model)
    else:
        slots = cache_slots(model, math.ceil(load.length + load.new_tokens))
        kv = min(tensor, model.num_key_value_heads)
        cache = 2 * slots * model.num_key_value_heads * model.head_dim / kv
        cache *= load.rows / shards
        temporary += 2 * cache * _item(model)
    if stage == "diffs":
        return fixed + diffs, temporary + 3 * diffs
    return fixed + diffs + adapter * (3 if stage == "train" else 1), temporary


# ------------------------------------------------------------------ the whole run


@dataclasses.dataclass(frozen=True)
class Run:
    """An estimate of a whole run: hours and dollars on one machine (None: speed or price unknown), bytes on disk."""

    diffs: int
    diff_hours: float | None
    train_hours: float | None
    dollars: float | None
    diff_bytes: float
    adapter_bytes: float


def whole_run(
    model: DecoderConfig,
    config: Any,
    machine: Machine,
    diffs: int,
    diff_setting: tuple[tuple[int, int, int], int],
    train_setting: tuple[tuple[int, int, int], int],
    utilization: float = UTILIZATION,
    price: float | None = None,
) -> Run:
    """Estimates a run that makes `diffs` diffs and trains the adapter for the config's steps.

    Args:
        diff_setting, train_setting: mesh sizes and batch; a training step has at least one example per batch shard.
        price: dollars per chip and hour; default the chip's.
    """
    train = config.train
    per_diff = lora_parameters(model, config.diffs.rank, config.diffs.projections)
    adapter = lora_parameters(model, train.rank, train.projections)
    # Each kept checkpoint holds the factors and both moments.
    copies = 1 + 3 * train.keep_checkpoints
    stored = (float(diffs * per_diff * FLOAT32), float(copies * adapter * FLOAT32))
    if machine.chip is None:
        return Run(diffs, None, None, None, *stored)
    sizes, batch = diff_setting
    load = step_load("diffs", config, batch)
    rounds = math.ceil(diffs / batch) * config.diffs.steps
    diff_hours = rounds * step_seconds(model, load, sizes, machine.chip, utilization) / 3600
    sizes, batch = train_setting
    load = step_load("train", config, max(batch, sizes[0] * sizes[1]))
    seconds = step_seconds(model, load, sizes, machine.chip, utilization)
    train_hours = train.steps * seconds / 3600
    each = machine.chip.price if price is None else price
    dollars = (diff_hours + train_hours) * machine.count * each if each else None
    return Run(diffs, diff_hours, train_hours, dollars, *stored)


def batch_of(stage: str, config: Any, sizes: tuple[int, int, int]) -> int:
    """A stage's batch in the config, rounded up to what the mesh splits evenly."""
    return next_multiple(batch_size(stage, config), sizes[0] * sizes[1])
