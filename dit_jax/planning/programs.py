"""The steps of the three stages, compiled without data: whether they fit, what they hold and what they send."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from dit_jax.deltas.tree import abstract_lora, with_scale
from dit_jax.errors import DitError
from dit_jax.models import decode as decoding
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.organisms import generate as diff_generation
from dit_jax.organisms.finetune import finetune_many
from dit_jax.planning.machines import GIB
from dit_jax.runtime import parallel
from dit_jax.train import dit

STAGES = ("diffs", "train", "ask")
# The config key with the batch of each stage.
BATCH_KEYS = {
    "diffs": ("diffs", "diffs_per_batch"),
    "train": ("train", "batch_size"),
    "ask": ("evaluate", "batch_size"),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LEVELS = ("default", "O0")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step. Bytes are per device.

    Attributes:
        batch: as many as a run takes at once, which may be more or fewer than it was asked for.
        seconds: to trace and compile it.
        memory: parameters, adapter, optimizer, diffs (their plain sizes); arguments (all of them, as laid out on
            the device), temporaries, code, peak = arguments + results that reuse none of them + temporaries + code.
            A program that does not fit has only the plain sizes, and `peak` if the compiler reports it.
        collectives: kind -> (how many in the program, bytes of their results). The body of a loop counts once.
    """

    stage: str
    batch: int
    fits: bool
    seconds: float
    memory: dict[str, float]
    collectives: dict[str, tuple[int, float]]


def batch_size(stage: str, config: Any) -> int:
    """How many diffs, examples or questions a stage of the config takes at once."""
    section, key = BATCH_KEYS[stage]
    return int(config[section][key])


def with_batch(stage: str, config: Any, batch: int) -> Any:
    """A copy of a config with another batch size for one stage."""
    section, key = BATCH_KEYS[stage]
    copy = config.copy_and_resolve_references().unlock()
    copy[section][key] = batch
    return copy.lock()


def stage_step(
    stage: str, model: DecoderConfig, mesh: Mesh | None, config: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """(compiled function, args, kwargs, {"parameters": tree, …}) of a stage, without values.

    The stage "ask" has LoRA diffs, and questions as long as those that the adapter is trained on.
    """
    if stage == "diffs":
        args, options = diff_generation.abstract_step(model, mesh, config.diffs)
        return finetune_many, args, options, {"parameters": args[0], "diffs": args[2]}
    diff = abstract_lora(model, config.diffs.rank, config.diffs.projections)
    if stage == "train":
        args, options = dit.abstract_step(model, mesh, config.train, diff)
        params, _, state, adapter, diffs, _ = args
        parts = {"adapter": state.leaves, "optimizer": state.optimizer, "diffs": diffs}
        # From the adapter's tree the step reads only the scales.
        parts["adapter"] = with_scale(state.leaves, adapter)
        return dit.train_step, args, options, {"parameters": params, **parts}
    args, options = decoding.abstract_arguments(
        model,
        mesh,
        config.evaluate.batch_size,
        config.train.max_length,
        config.evaluate.max_new_tokens,
        diff,
        abstract_lora(model, config.train.rank, config.train.projections),
    )
    diffs, adapter = options["deltas"]
    parts = {"parameters": args[0], "adapter": adapter, "diffs": diffs}
    return decoding.generate, args, options, parts


def on_device(arguments: Any, device: Any) -> Any:
    """The same arguments with ShapeDtypeStructs on one device, which need not be present, in place of arrays."""
    sharding = SingleDeviceSharding(device)

    def one(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct | np.ndarray):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, arguments)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device, without the padding of layouts."""

    def one(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


def compile_step(
    stage: str,
    model: DecoderConfig,
    mesh: Mesh | None,
    config: Any,
    memory: float,
    level: str,
    device: Any = None,
    compiler_options: dict[str, Any] | None = None,
) -> Program:
    """Compiles one stage's step for the devices of `mesh`.

    Args:
        device: the device to compile for if there is no mesh; None: this process's first.
        compiler_options: see `machines.compiler_options`.
        memory: bytes of a device. Compilers for accelerators refuse what does not fit; the CPU's does not.
        level: "O0" is quicker and gives the same memory but other collectives, which are left out then.

    Raises:
        DitError: the compiler fails for another reason than memory.
    """
    start = time.perf_counter()
    batch = parallel.round_up(batch_size(stage, config), mesh)
    step, args, options, parts = stage_step(stage, model, mesh, config)
    if stage == "ask":
        batch = len(args[2])  # large LoRAs are asked in fewer rows
    sizes = {name: float(device_bytes(tree)) for name, tree in parts.items()}
    if mesh is None and device is not None:
        args, options = on_device((args, options), device)
    before: Any = getattr(jax.config, "jax_optimization_level")  # noqa: B009
    jax.config.update("jax_optimization_level", "UNKNOWN" if level == "default" else level)
    try:
        with parallel.use_mesh(mesh):
            compiled = step.lower(*args, **options).compile(compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise DitError(f"the compiler failed on stage {stage!r}: {error}") from error
        if peak := used_memory(str(error)):
            sizes["peak"] = peak
        return Program(stage, batch, False, time.perf_counter() - start, sizes, {})
    finally:
        jax.config.update("jax_optimization_level", before)
    seconds = time.perf_counter() - start
    sizes |= memory_sizes(compiled)
    collectives = count_collectives(compiled.as_text()) if level == "default" else {}
    fits = not memory or sizes["peak"] <= memory
    return Program(stage, batch, fits, seconds, sizes, collectives)


def memory_sizes(compiled: Any) -> dict[str, float]:
    """Bytes on one device: arguments, temporaries, code, and the peak, which adds results that reuse none of them."""
    found = compiled.memory_analysis()
    sizes = {
        "arguments": float(found.argument_size_in_bytes),
        "temporaries": float(found.temp_size_in_bytes),
        "code": float(found.generated_code_size_in_bytes),
    }
    results = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    return sizes | {"peak": sum(sizes.values()) + results}


# ------------------------------------------------------------------ what compilers print

_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40, "": 1}
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|(?:[suf]|c)\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<result>.*?) (?P<kind>"
    + "|".join(COLLECTIVES)
    + r")(?P<start>-start)?\("
)


def used_memory(message: str) -> float:
    """The least bytes that a program needs, by the compiler's message that it does not fit; 0: it does not say."""
    total = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of ", message)
    found = total or re.search(r"\(([\d.]+)([KMGT]?)i?B?\) exceeds", message)
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def count_collectives(text: str) -> dict[str, tuple[int, float]]:
    """kind -> (operations, bytes of their results on one device), from the text of a compiled program.

    The two halves of an asynchronous operation count once, and its result is the largest array that it names. A TPU's
    compiler repeats an operation, with the same channel, in each product that hides it; that counts once too.
    """
    counts: dict[str, tuple[int, float]] = {}
    channels = set()
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        if channel := re.search(r"channel_id=(\d+)", line):
            if (found["kind"], channel[1]) in channels:
                continue
            channels.add((found["kind"], channel[1]))
        arrays = [_array_bytes(*array) for array in _ARRAY.findall(found["result"])]
        size = max(arrays, default=0.0) if found["start"] else sum(arrays)
        count, total = counts.get(found["kind"], (0, 0.0))
        counts[found["kind"]] = (count + 1, total + size)
    return counts


def _array_bytes(dtype: str, shape: str) -> float:
    digits = re.match(r"[suf](\d+)", dtype)
    bits = _BITS[dtype] if dtype in _BITS else int(digits[1]) if digits else 0
    return math.prod(int(size) for size in shape.split(",") if size) * bits / 8
