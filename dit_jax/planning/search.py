"""The best mesh and the largest batch of a stage on a machine: estimates rank them, the compiler decides."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.planning import estimate
from dit_jax.planning.machines import Machine
from dit_jax.planning.programs import Program
from dit_jax.runtime.parallel import UnplaceableMesh

Sizes = tuple[int, int, int]
LARGEST = 1024  # the largest batch that is tried
# A batch is not tried if the compiled ones suggest that it needs more than this share of the memory.
HOPELESS = 1.05
# A mesh is not tried if the estimate for one row per device needs more than this share.
UNLIKELY = 1.1
# If the estimates of two meshes differ by less than this factor, the larger batch wins.
NEARLY = 1.15
Compile = Callable[[str, Sizes, int], Program]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found for one stage.

    Attributes:
        sizes: of the mesh (data, fsdp, tensor).
        program: compiled with the largest batch that fits; None: nothing fits.
        next_peak: bytes on one device with twice that batch; 0: beyond the search.
        next_compiled: whether the compiler reported `next_peak`; otherwise compiled batches were extrapolated.
        seconds_per_row: the estimate by which meshes were ranked.
    """

    stage: str
    sizes: Sizes
    program: Program | None
    next_peak: float = 0.0
    next_compiled: bool = False
    seconds_per_row: float = math.inf


def meshes(model: DecoderConfig, count: int) -> list[Sizes]:
    """All meshes of `count` devices in powers of two that copy no heads of keys and values."""
    powers = [2**i for i in range(count.bit_length()) if count % 2**i == 0]
    return [
        (count // (fsdp * tensor), fsdp, tensor)
        for fsdp in powers
        for tensor in powers
        if count % (fsdp * tensor) == 0 and model.num_key_value_heads % tensor == 0
    ]


def ranked(
    stage: str, model: DecoderConfig, config: Any, machine: Machine
) -> list[tuple[float, int, Sizes]]:
    """(estimated seconds per row at that batch, largest batch by estimate, mesh), the best first.

    Meshes that are nearly as fast as the fastest come first, the largest batch leading; then the others, the fastest
    leading. Meshes that can hardly run one row per device are left out. If that leaves none, the one that needs least
    is kept for the compiler to judge. If the chip's speeds are unknown, the largest batch comes first.
    """
    found, hardly = [], []
    for sizes in meshes(model, machine.count):
        shards = sizes[0] * sizes[1]
        batch = shards
        fixed, temporary = estimate.device_memory(stage, model, config, sizes, batch)
        if machine.memory and fixed + temporary > UNLIKELY * machine.memory:
            hardly.append((fixed + temporary, batch, sizes))
            continue
        while batch * 2 <= max(LARGEST, shards):
            if machine.memory:
                needed = sum(estimate.device_memory(stage, model, config, sizes, batch * 2))
                if needed > 0.97 * machine.memory:
                    break
            batch *= 2
        seconds = 1.0 / batch
        if machine.chip is not None:
            load = estimate.step_load(stage, config, batch)
            seconds = estimate.step_seconds(model, load, sizes, machine.chip) / batch
        found.append((seconds, batch, sizes))
    if not found:
        return sorted(hardly)[:1]
    least = NEARLY * min(found)[0]
    return sorted(found, key=lambda one: (one[0] > least, -one[1] if one[0] <= least else 0, one))


def search_stage(
    stage: str,
    model: DecoderConfig,
    config: Any,
    machine: Machine,
    compile_batch: Compile,
    tries: int = 1,
) -> Found:
    """Looks for the fastest mesh (by estimate) and its largest batch (a power of two times its shards).

    Args:
        compile_batch: (stage, mesh sizes, batch) -> Program; a mesh for which it raises UnplaceableMesh is left out.
        tries: the least number of meshes to compile; more follow only while none fits.
    """
    best = Found(stage, (1, 1, 1), None)
    candidates = ranked(stage, model, config, machine)
    compiled = 0
    for _, guess, sizes in candidates:
        if compiled >= tries and best.program is not None:
            break
        try:
            found = _largest(stage, model, config, machine, compile_batch, sizes, guess)
        except UnplaceableMesh:
            continue
        compiled += 1
        if found.program is None:
            best = best if best.program else found
            continue
        if machine.chip is not None:
            load = estimate.step_load(stage, config, found.program.batch)
            seconds = estimate.step_seconds(model, load, sizes, machine.chip)
        else:
            seconds = 1.0
        found = dataclasses.replace(found, seconds_per_row=seconds / found.program.batch)
        faster = found.seconds_per_row * NEARLY < best.seconds_per_row
        slower = found.seconds_per_row > best.seconds_per_row * NEARLY
        if best.program is None or faster:
            best = found
        elif found.program is not None and not slower:
            best = max(best, found, key=lambda one: one.program.batch if one.program else 0)
    return best


def _largest(
    stage: str,
    model: DecoderConfig,
    config: Any,
    machine: Machine,
    compile_batch: Compile,
    sizes: Sizes,
    guess: int,
) -> Found:
    """The largest batch on one mesh, from a first guess up or down by factors of two."""
    shards = sizes[0] * sizes[1]
    most = max(LARGEST, shards)
    done: dict[int, Program] = {}

    def fits(batch: int) -> bool:
        done[batch] = done.get(batch) or compile_batch(stage, sizes, batch)
        return done[batch].fits

    def needs(batch: int) -> float:
        """Peak bytes of another batch, extrapolated from the two largest compiled ones that fit."""
        known = sorted((b, p.memory["peak"]) for b, p in done.items() if p.fits)[-2:]
        if len(known) == 2:
            (low, less), (high, more) = known
            return more + (more - less) / (high - low) * (batch - high)
        ((at, peak),) = known
        ours = estimate.device_memory(stage, model, config, sizes, at)
        other = estimate.device_memory(stage, model, config, sizes, batch)
        temporary = max(peak - ours[0], 0.0)
        return other[0] + temporary * other[1] / ours[1]

    batch = guess
    while not fits(batch):
        if batch <= shards:
            return Found(stage, sizes, None, done[batch].memory.get("peak", 0.0), True)
        batch = batch // 2
    # A program of fewer rows than the batch has is that of all larger batches, too.
    while batch * 2 <= most and done[batch].batch >= batch:
        doubled = done.get(batch * 2)
        if doubled is None and machine.memory and needs(batch * 2) > HOPELESS * machine.memory:
            return Found(stage, sizes, done[batch], needs(batch * 2), False)
        if not fits(batch * 2):
            return Found(stage, sizes, done[batch], done[batch * 2].memory.get("peak", 0.0), True)
        batch *= 2
    return Found(stage, sizes, done[batch])
