"""Markdown tables of models × machines: each stage's best mesh and largest batch, and a run's time and cost."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.planning import estimate
from dit_jax.planning.machines import GIB, Machine
from dit_jax.planning.programs import STAGES
from dit_jax.planning.search import LARGEST, Found, search_stage
from dit_jax.planning.workload import Compiler, OutOfTime

TITLES = {
    "diffs": "Generating diffs: diffs at once",
    "train": "Training the adapter: examples in a step",
    "ask": "Asking: questions at once, each with its own diff",
}
MISSING = "not computed"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells by (stage, model name, machine name); an absent cell was not computed."""

    models: dict[str, DecoderConfig]
    machines: list[Machine]
    cells: dict[tuple[str, str, str], Found]


def fill(
    models: dict[str, DecoderConfig],
    compilers: Sequence[Compiler],
    config: Any,
    stages: Sequence[str] = STAGES,
    tries: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Searches every cell, except those for which the compilers have no time left."""
    cells: dict[tuple[str, str, str], Found] = {}
    for name, model in models.items():
        for compiler in compilers:
            for stage in stages:

                def one(
                    stage: str,
                    sizes: tuple[int, int, int],
                    batch: int,
                    compiler: Compiler = compiler,
                    model: DecoderConfig = model,
                    name: str = name,
                ) -> Any:
                    found = compiler.compile(stage, model, config, sizes, batch)
                    say(f"{name} {compiler.machine.name} {stage} {sizes} {batch}: {_brief(found)}")
                    return found

                machine = compiler.machine
                try:
                    found = search_stage(stage, model, config, machine, one, tries)
                except OutOfTime:
                    continue
                cells[stage, name, machine.name] = found
    return Table(models, [compiler.machine for compiler in compilers], cells)


def _brief(program: Any) -> str:
    peak = program.memory.get("peak")
    size = f"{peak / GIB:.2f} GiB" if peak else "size unknown"
    return f"{'fits' if program.fits else 'does not fit'}, {size}, {program.seconds:.0f} s"


def cell(found: Found) -> str:
    """`batch on data,fsdp,tensor (peak GiB)`, or what the smallest batch would need."""
    if found.program is None:
        if found.next_peak:
            return f"no: {found.next_peak / GIB:.1f} GiB"
        return "no"
    at_least = "≥ " if not found.next_peak and found.program.batch >= LARGEST else ""
    mesh = ",".join(str(size) for size in found.sizes)
    peak = found.program.memory["peak"] / GIB
    return f"{at_least}**{found.program.batch:,}** on {mesh} ({peak:.1f})"


def stage_table(table: Table, stage: str) -> str:
    """One stage, models down, machines across."""
    rows = [["model", *(machine_title(machine) for machine in table.machines)]]
    for name in table.models:
        row = [name]
        for machine in table.machines:
            found = table.cells.get((stage, name, machine.name))
            row.append(MISSING if found is None else cell(found))
        rows.append(row)
    return markdown(rows)


def machine_title(machine: Machine) -> str:
    """v5e-16: 16 × 15.75 GiB."""
    return f"{machine.name}: {machine.count} × {machine.memory / GIB:.4g} GiB"


def run_table(
    table: Table, config: Any, diffs: int, utilization: float, price: float | None = None
) -> str:
    """Estimated hours and dollars of a whole run on each machine, and the bytes that it stores."""
    titles = [machine.name for machine in table.machines]
    rows = [["model", *titles, "diffs on disk", "adapter on disk"]]
    for name, model in table.models.items():
        row, run = [name], None
        for machine in table.machines:
            made = table.cells.get(("diffs", name, machine.name))
            trained = table.cells.get(("train", name, machine.name))
            if made is None or trained is None:
                row.append(MISSING)
            elif made.program is None or trained.program is None:
                row.append("does not fit")
            else:
                run = estimate.whole_run(
                    model,
                    config,
                    machine,
                    diffs,
                    (made.sizes, made.program.batch),
                    (trained.sizes, estimate.batch_of("train", config, trained.sizes)),
                    utilization,
                    price,
                )
                hours = (run.diff_hours or 0.0) + (run.train_hours or 0.0)
                cost = "" if run.dollars is None else f", ${run.dollars:,.0f}"
                row.append(f"{hours:.1f} h{cost}")
        if run is None:
            run = estimate.whole_run(
                model, config, Machine("", 1), diffs, ((1, 1, 1), 1), ((1, 1, 1), 1)
            )
        rows.append([*row, show_bytes(run.diff_bytes), show_bytes(run.adapter_bytes)])
    return markdown(rows)


def show_bytes(size: float) -> str:
    """Decimal units, as disks and buckets are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
