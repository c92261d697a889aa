"""What a plan prints: the memory of each stage, its collectives, the largest batches, and the whole run."""

from collections.abc import Mapping
from typing import Any

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.planning import estimate, machines
from dit_jax.planning.machines import GIB, Machine
from dit_jax.planning.programs import BATCH_KEYS, Program, batch_size
from dit_jax.planning.search import Found
from dit_jax.planning.table import show_bytes
from dit_jax.runtime.parallel import MESH_AXES

Sizes = tuple[int, int, int]
Results = dict[str, tuple[Sizes, Program]]  # by stage: the mesh, and what was compiled for it


def memory(results: Results, machine: Machine) -> str:
    """Bytes per device of each stage, by what holds them."""
    parts = ("parameters", "adapter", "optimizer", "diffs", "temporaries", "peak")
    peaks = [program.memory.get("peak", 0.0) for _, program in results.values()]
    unit, size = ("MiB", 2**20) if max(peaks, default=0.0) < GIB else ("GiB", GIB)
    head = "".join(f"{part:>13}" for part in parts)
    lines = [
        f"{unit} per device" + (f", of {machine.memory / size:,.2f}" if machine.memory else ""),
        f"{'stage':7}{'mesh':>9}{'batch':>7}{'fits':>6}{head}  compiled in",
    ]
    for stage, (sizes, program) in results.items():
        mesh, fits = ",".join(map(str, sizes)), "yes" if program.fits else "NO"
        numbers = "".join(
            f"{program.memory[part] / size:13.3f}" if part in program.memory else f"{'-':>13}"
            for part in parts
        )
        seconds = f"{program.seconds:.0f} s"
        lines.append(f"{stage:7}{mesh:>9}{program.batch:7}{fits:>6}{numbers}  {seconds}")
    lines.append(
        "peak: arguments as laid out on the device, temporaries, results and code. Where a stage does not fit, it is\n"
        "the least that the compiler asks for. The moments of the diffs' optimizer are temporaries of their program.\n"
    )
    return "\n".join(lines)


def collectives(results: Results, level: str) -> str:
    """How many collectives each program has, and the size of their results."""
    if level != "default":
        return "collectives: only at --level default\n"
    lines = ["collectives in each program (a loop's body counts once) and the MiB of their results"]
    for stage, (_, program) in results.items():
        kinds = [
            f"{kind} {n} ({size / 2**20:.1f})" for kind, (n, size) in program.collectives.items()
        ]
        none = "none" if program.fits else "not compiled"
        lines.append(f"{stage:7}{', '.join(sorted(kinds)) or none}")
    return "\n".join([*lines, ""])


def recommendation(found: Found, config: Any) -> str:
    """The flags for the best mesh and the largest batch of a stage."""
    assert found.program is not None
    named = zip(MESH_AXES, found.sizes, strict=True)
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in named)
    section, key = BATCH_KEYS[found.stage]
    line = f"{found.stage}: {mesh} --config.{section}.{key}={found.program.batch}"
    if found.next_peak:
        how = "compiled" if found.next_compiled else "extrapolated"
        line += f" (twice the batch needs {found.next_peak / GIB:.2f} GiB, {how})"
    asked = batch_size(found.stage, config)
    if asked <= found.program.batch:
        line += f"; the config's {asked} fits"
    return line


def whole_run(
    model: DecoderConfig,
    config: Any,
    machine: Machine,
    settings: Mapping[str, tuple[Sizes, int]],
    diffs: int,
    utilization: float,
    price: float | None,
) -> str:
    """Estimated hours, dollars and bytes of a run.

    Args:
        settings: by stage, the mesh and the batch.
        diffs: how many are made.
        utilization: share of the peak, assumed.
        price: dollars per chip and hour; None: a list price.
    """
    mesh = settings["train"][0]
    train = mesh, estimate.batch_of("train", config, mesh)
    plan = estimate.whole_run(
        model, config, machine, diffs, settings["diffs"], train, utilization, price
    )
    lines = [f"the whole run, ESTIMATED ({diffs:,} diffs, {config.train.steps} adapter steps):"]
    if machine.chip is None:
        lines.append("  time: not estimated, the speed of this device is not in the table of chips")
    else:
        source = "given" if price is not None else f"{machines.PRICES_OF}, on demand"
        price = machine.chip.price if price is None else price
        paid = f"${plan.dollars:,.0f}" if plan.dollars is not None else "cost: give --price"
        cost = f", ${price:g} a chip and hour ({source})" if price else ""
        lines += [
            f"  diffs {plan.diff_hours:.2f} h, adapter {plan.train_hours:.2f} h, {paid}",
            f"  assumed: {utilization:.0%} of {machine.chip.flops / 1e12:g} TFLOP/s a chip{cost};",
            "  without loading, compiling, gating, evaluation and waiting for data",
        ]
    made, adapter = (show_bytes(size) for size in (plan.diff_bytes, plan.adapter_bytes))
    lines.append(f"  stored: diffs {made}, adapter with its checkpoints {adapter} (float32)")
    return "\n".join(lines)
