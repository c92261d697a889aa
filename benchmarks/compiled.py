"""Compiles the programs of the GPU suite without a GPU, and prints their memory, kernels and traffic.

    python -m benchmarks.compiled --suite train --model qwen3-4b --remat dots --scan-layers no
    python -m benchmarks.compiled --gpu h100 --suite diffs --model qwen3-8b --batch 32 --remat full --kernels 20

Takes the options of `benchmarks.run`. Needs the extra `plan-gpu` (for --attention cudnn also nvidia-cudnn-cu12) and no
GPU. Nothing runs. `bound` is the least time that these kernels can take: each at the data sheet's FLOPs or bytes per
second, whichever is slower, and at 2 µs at least. It compares ways to compute and is not a measurement.
"""

import argparse
import json
import sys
import time
from collections import Counter
from typing import Any

import jax

from benchmarks import run, workload
from benchmarks.hlo import Kernel, Program
from benchmarks.workload import LEARNING_RATE, WEIGHT_DECAY, Workload
from dit_jax.data.batch import TokenBatch, entry_limit
from dit_jax.deltas.tree import abstract_lora, trainable
from dit_jax.errors import DitError
from dit_jax.models import decode as decoding
from dit_jax.models import shardings
from dit_jax.models.delta_trees import abstract_stack
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.organisms.finetune import finetune_many
from dit_jax.planning.gpus import GIB, GPUS
from dit_jax.planning.machines import CHIPS, absent_devices, compiler_options, find_machine
from dit_jax.planning.programs import device_bytes, memory_sizes, on_device
from dit_jax.runtime.exits import exit_on_error
from dit_jax.runtime.xla_flags import GPU_FLAGS
from dit_jax.train.dit import State, train_step

LAUNCH = 2e-6  # least seconds of a kernel


def abstract_program(work: Workload) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(compiled function, args, kwargs) as `benchmarks.ours` calls it, without values.

    Raises:
        DitError: for the embedded world's tokens, whose program also takes a table of the base's hidden states.
    """
    if work.tokens == "world":
        raise DitError(
            "--tokens world is a suite for CPUs: programs are compiled for random tokens"
        )
    config = work.config
    params = shardings.abstract_params(config, None)
    diff, adapter = abstract_lora(config, work.rank), abstract_lora(config, work.adapter_rank)
    if work.suite == "ask":
        args, options = decoding.abstract_arguments(
            config,
            None,
            work.batch,
            work.length,
            work.new_tokens,
            diff,
            adapter,
        )
        return decoding.generate, args, options
    data = workload.make_data(work)
    batches = TokenBatch(*(data[name] for name in TokenBatch._fields))
    if work.suite == "diffs":
        batch = TokenBatch(*(x[: work.batch] for x in batches))
        optimizer = make_optimizer("adam", LEARNING_RATE["diffs"], work.steps)
        options = {
            "optimizer": optimizer,
            "num_ce": work.num_ce,
            "packed": entry_limit(batch, work.num_ce, room=1.03),
        }
        return (
            finetune_many,
            (params, config, abstract_stack(diff, work.batch, 0), batch),
            options,
        )
    optimizer = make_optimizer(
        "adamw", LEARNING_RATE["train"], work.steps, weight_decay=WEIGHT_DECAY["train"]
    )
    leaves = trainable(adapter)
    state = State(leaves, jax.eval_shape(optimizer.init, leaves))
    limit = entry_limit(TokenBatch(*(x[None] for x in batches)), work.batch, room=1.0)
    diffs = abstract_stack(diff, work.batch, 1)
    args = (params, config, state, adapter, diffs, TokenBatch(*(x[0] for x in batches)))
    return train_step, args, {"optimizer": optimizer, "packed": limit}


def seconds(kernel: Kernel, gpu: str) -> float:
    """The least that all launches of a kernel take."""
    chip = CHIPS[gpu]
    once = max(kernel.flops / chip.flops, kernel.bytes / chip.bandwidth, LAUNCH)
    return kernel.times * once


def analyse(work: Workload, gpu: str, flags: bool = True) -> tuple[dict[str, Any], list[Kernel]]:
    """The numbers of one program, and its kernels. flags: compile with those of `dit_jax.runtime.xla_flags`."""
    machine = find_machine(gpu)
    (device,) = absent_devices(machine)
    function, args, options = abstract_program(work)
    args, options = on_device((args, options), device)
    left_out = () if flags else GPU_FLAGS
    compiler = {k: v for k, v in (compiler_options(machine) or {}).items() if k not in left_out}
    start = time.perf_counter()
    compiled = function.lower(*args, **options).compile(compiler)
    took = time.perf_counter() - start
    memory, weights = memory_sizes(compiled), device_bytes(args[0])
    kernels = Program(compiled.as_text()).kernels(trips=max(work.new_tokens - 1, 1))
    numbers = {
        "weights_gib": weights / GIB,
        "temporaries_gib": memory["temporaries"] / GIB,
        "peak_gib": memory["peak"] / GIB,
        "peak_over_weights": memory["peak"] / weights,
        "fits": memory["peak"] <= machine.memory,
        "kernels": sum(kernel.times for kernel in kernels),
        "tflop": sum(kernel.times * kernel.flops for kernel in kernels) / 1e12,
        "gbyte": sum(kernel.times * kernel.bytes for kernel in kernels) / 1e9,
        "bound_ms": 1e3 * sum(seconds(kernel, gpu) for kernel in kernels),
        "compile_s": took,
    }
    return numbers, kernels


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h200")
    parser.add_argument(
        "--without-flags",
        action="store_true",
        help="without the flags of dit_jax.runtime.xla_flags",
    )
    parser.add_argument("--kernels", type=int, default=0, help="list the most expensive places")
    with exit_on_error():
        flags, rest = parser.parse_known_args(argv)
        work = run.make_workload(run.parse([*rest, "--platform", "gpu"]))
        numbers, kernels = analyse(work, flags.gpu, not flags.without_flags)
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in numbers.items()}
        print(json.dumps({"suite": work.suite, "model": work.model, **shown}))
        places: Counter[str] = Counter()
        for kernel in kernels:
            places[kernel.where] += seconds(kernel, flags.gpu)
        for place, spent in places.most_common(flags.kernels):
            print(f"{1e3 * spent:10.2f} ms  {place[-120:]}")
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
