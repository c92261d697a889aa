"""Does a run fit, and what will it take? Compiles the real steps for a machine that need not be there.

    python -m dit_jax.plan --config configs/plan/paper.py --topology v5e:4x4 --mesh 1,4,4 --model qwen3-32b
    python -m dit_jax.plan --config configs/plan/paper.py --topology v5e-16 --search
    python -m dit_jax.plan --config configs/plan/paper.py --topology h200 --model qwen3-8b --search
    python -m dit_jax.plan --config configs/quickstart.py                     # the devices of this machine
    python -m dit_jax.plan --config configs/plan/paper.py --table --cache runs/plan/cache.jsonl

Planning for TPUs needs the extra `tpu` (pip install 'dit_jax[tpu]') and no TPU, for GPUs `plan-gpu` and no GPU.
Batches are the config's: `--config.train.batch_size=32`. docs/scale.md has the tables and says how to read them.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from dit_jax.cli import flags as given
from dit_jax.cli.config_checks import check_values
from dit_jax.cli.stages import RUN, optional_keys
from dit_jax.config.keys import Section
from dit_jax.config.loading import load_config, split_flags
from dit_jax.data.data_keys import COUNTS, DATA
from dit_jax.errors import DitError
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.model_keys import MODEL
from dit_jax.models.modules import count_parameters
from dit_jax.models.shapes import NAMED_CONFIGS
from dit_jax.organisms.behaviours import get_behaviour
from dit_jax.organisms.diffs_keys import DIFFS
from dit_jax.organisms.samples import check_samples
from dit_jax.planning import estimate, machines, plan_text, table
from dit_jax.planning.machines import GIB, Machine
from dit_jax.planning.programs import LEVELS, STAGES, Program
from dit_jax.planning.search import search_stage
from dit_jax.planning.workload import Compiler, OutOfTime, model_shape
from dit_jax.runtime import artifacts, parallel
from dit_jax.runtime.exits import exit_on_error
from dit_jax.runtime.outgoing import show
from dit_jax.train.train_keys import TRAIN

# What shapes, and the steps of a whole run, depend on.
_OPTIMIZER = ("optimizer", "learning_rate", "warmup_steps", "final_fraction", "steps")
_MOST = 10**15  # of any number: no run has as many diffs
_SIZES = ("rank", "projections", "max_length", "max_target")
NEEDED: tuple[tuple[Section, tuple[str, ...]], ...] = (
    (MODEL, ("path", "dtype")),
    (DIFFS, ("behaviour", *_SIZES, *_OPTIMIZER, "adam_betas", "samples_per_step", "diffs_per_batch")),
    (TRAIN, (*_SIZES, *_OPTIMIZER, "weight_decay", "batch_size", "keep_checkpoints")),
    (EVALUATE, ("max_new_tokens", "batch_size")),
)  # fmt: skip
TABLE_MACHINES = ("v5e-4", "v5e-16", "v6e-16", "v5p-8", "v5p-64")
TABLE_MODELS = tuple(name for name in NAMED_CONFIGS if name.startswith("qwen3-"))
# The flags that each way of planning has no use for.
_UNREAD = {
    "--table": ("topology", "mesh", "model", "json"),
    "--search": ("mesh", "models", "topologies"),
    "a plan of one mesh": ("tries", "models", "topologies"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a stage does not fit, 2 for a problem the user can fix."""
    parser = given.Parser("python -m dit_jax.plan", __doc__)
    add = parser.add_argument
    add("--config", required=True, help="configs/NAME.py, or configs/NAME.py:ARGUMENT")
    add(
        "--topology",
        type=given.TEXT,
        help="v5e:4x4, v5e-16, h200 or h200:8; default: the devices here",
    )
    add("--mesh", type=given.TEXT, help="data,fsdp,tensor, e.g. 1,4,4; default: the config's")
    add("--model", default="", help="another model: a folder, or " + ", ".join(NAMED_CONFIGS))
    add("--stages", default=",".join(STAGES), help="default: %(default)s")
    add("--level", choices=LEVELS, default="", help="O0: quicker, without collectives")
    add("--search", action="store_true", help="recommend a mesh and the largest batch per stage")
    add("--tries", type=int, default=0, help="meshes to compile per stage in a search")
    add("--table", action="store_true", help="search models × machines, print Markdown")
    add("--models", help="models of the table (default: all Qwen3)")
    add("--topologies", help=f"machines of the table (default: {','.join(TABLE_MACHINES)})")
    add("--cache", type=given.FILE, help="file that remembers what was compiled (JSON lines)")
    add("--minutes", type=float, help="compile no longer; with --cache the next call goes on")
    add("--json", type=given.FILE, help="write the numbers of a plan there too")
    add("--diffs", type=int, help="diffs of the whole run (default: as many as the config makes)")
    add("--utilization", type=float, default=estimate.UTILIZATION, help="assumed share of the peak")
    add("--price", type=float, help="dollars per chip and hour; default: a list price")
    with exit_on_error():
        rest, overrides = split_flags(sys.argv[1:] if argv is None else argv)
        flags = parser.parse_args(rest)
        return run(flags, load_config(flags.config, overrides, optional_keys()))
    return 2


def run(flags: argparse.Namespace, config: Any) -> int:
    """Plans as the flags say; see `main`.

    Raises:
        DitError: an unknown stage, model, topology or mesh, a config without a section or with a number out of range,
            no TPU compiler.
    """
    if flags.json is not None:
        artifacts.check_place(flags.json)
    stages = _split(flags.stages, "--stages")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise DitError(f"unknown stage {unknown[0]!r}: stages of a plan are {', '.join(STAGES)}")
    for section in ("model", "diffs", "train", "evaluate"):
        if section not in config:
            raise DitError(f"config '{flags.config}' has no section '{section}': a plan needs it")
    check_values(config)
    for declared, names in NEEDED:
        declared.check_needed(config, names)
    check_samples(get_behaviour(config.diffs), config.diffs, ("samples_per_step",))
    if DIFFS.get(config.diffs, "kinds"):
        raise DitError(
            "a plan is for one kind of diffs, and diffs.kinds has several: plan one of them by itself"
        )
    kind = DIFFS.get(config.diffs, "parameters")
    if kind != "lora" and stages != ["diffs"]:
        raise DitError(
            f"an adapter and questions are planned for LoRA diffs, and diffs.parameters is {kind!r}: "
            "plan --stages diffs alone, or set it to 'lora'"
        )
    for name, least in (("tries", 0), ("diffs", 1), ("minutes", 0), ("price", 0)):
        value = getattr(flags, name)
        if value is not None and not least <= value <= _MOST:
            raise DitError(f"--{name} must be a number from {least} to 10^15, not {value}")
    if not 0 < flags.utilization <= 1:
        raise DitError(f"--utilization must be above 0 and at most 1, not {flags.utilization:g}")
    way = "--table" if flags.table else "--search" if flags.search else "a plan of one mesh"
    for name in _UNREAD[way]:
        if getattr(flags, name):
            raise DitError(f"{way} does not use --{name}: leave it out")
    if flags.json is not None and flags.json == flags.cache:
        raise DitError(f"--json and --cache are one file, '{flags.json}': give two")
    deadline = None if flags.minutes is None else time.monotonic() + 60 * flags.minutes
    searching = flags.search or flags.table
    level = flags.level or ("O0" if searching else "default")
    if flags.table:
        return _print_tables(flags, config, stages, level, deadline)
    if flags.topology:
        machine, devices = machines.find_machine(flags.topology), None
        machines.absent_devices(machine)
    else:
        machine, devices = machines.local_machine()
    compiler = Compiler(machine, devices, level, flags.cache, deadline)
    model = model_shape(config, flags.model)
    name = flags.model or config.model.path
    memory = f", {machine.memory / GIB:.2f} GiB each" if machine.memory else ""
    where = f"{machine.name} ({machine.topology})" if machine.topology else machine.name
    show(f"{name}: {count_parameters(model) / 1e9:.2f} B parameters, {model.dtype}")
    show(f"machine: {where}, {machine.count} devices{memory}; compiled only, nothing was run\n")
    try:
        if searching:
            results = _search(flags, config, stages, model, compiler)
        else:
            results = _compile(flags, config, stages, model, compiler)
    except OutOfTime:
        raise DitError("out of time: raise --minutes, or give --cache and call again") from None
    show(plan_text.memory(results, machine))
    show(plan_text.collectives(results, level))
    settings = {stage: (sizes, p.batch) for stage, (sizes, p) in results.items() if p.fits}
    if "diffs" in settings and "train" in settings:
        assumed = number_of_diffs(flags.diffs, config), flags.utilization, flags.price
        show(plan_text.whole_run(model, config, machine, settings, *assumed))
    if flags.json is not None:
        record = {
            stage: {"mesh": sizes, **dataclasses.asdict(p)} for stage, (sizes, p) in results.items()
        }
        artifacts.write_json(flags.json, {"machine": machine.name, "stages": record})
    return 0 if len(settings) == len(stages) else 1


def _split(text: str, flag: str) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise DitError(f"{flag} names nothing: leave it out to have all")
    return parts


def number_of_diffs(asked: int | None, config: Any) -> int:
    """How many diffs the whole run makes. Raises DitError: the config does not tell.

    Args:
        asked: --diffs; None: as many as the config has organisms.
    """
    data = config.get("data", {})
    counted = sum(DATA.get(data, name) for name in COUNTS)
    if not asked and not DATA.get(data, "train_topics"):
        raise DitError(
            "data.train_topics is 0, which means all topics of the rows: say how many diffs that is, --diffs 5000"
        )
    return asked or counted


def _compile(
    flags: argparse.Namespace,
    config: Any,
    stages: Sequence[str],
    model: DecoderConfig,
    compiler: Compiler,
) -> plan_text.Results:
    """The config's own batches on one mesh."""
    sizes = _mesh(flags, config, compiler.machine)
    results: plan_text.Results = {}
    for stage in stages:
        batch = estimate.batch_of(stage, config, sizes)
        results[stage] = sizes, compiler.compile(stage, model, config, sizes, batch)
    return results


def _mesh(flags: argparse.Namespace, config: Any, machine: Machine) -> tuple[int, int, int]:
    configured = dict(RUN.get(config, "mesh"))
    named = parallel.parse_mesh(flags.mesh) if flags.mesh else configured
    return parallel.mesh_shape(named, machine.count)


def _search(
    flags: argparse.Namespace,
    config: Any,
    stages: Sequence[str],
    model: DecoderConfig,
    compiler: Compiler,
) -> plan_text.Results:
    """The best mesh and largest batch of each stage; prints the recommendation."""

    def one(stage: str, sizes: tuple[int, int, int], batch: int) -> Program:
        program = compiler.compile(stage, model, config, sizes, batch)
        peak = program.memory.get("peak", 0.0) / GIB
        mesh = ",".join(map(str, sizes))
        said = "fits" if program.fits else "does not fit"
        line = f"  tried {stage} mesh {mesh} batch {batch}: {peak:.2f} GiB, {said}"
        show(line, error=True)
        return program

    results: plan_text.Results = {}
    for stage in stages:
        found = search_stage(stage, model, config, compiler.machine, one, flags.tries or 2)
        if found.program is None:
            parameters = count_parameters(model) * (2 if model.dtype == "bfloat16" else 4)
            share = parameters / compiler.machine.count / GIB
            show(f"{stage}: nothing fits ({share:.2f} GiB a device for the parameters alone)")
            continue
        results[stage] = found.sizes, found.program
        show(plan_text.recommendation(found, config))
    show("")
    return results


def _print_tables(
    flags: argparse.Namespace,
    config: Any,
    stages: Sequence[str],
    level: str,
    deadline: float | None,
) -> int:
    named = TABLE_MACHINES if flags.topologies is None else _split(flags.topologies, "--topologies")
    found = [machines.find_machine(name) for name in named]
    shapes = TABLE_MODELS if flags.models is None else _split(flags.models, "--models")
    models = {name: model_shape(config, name) for name in shapes}
    compilers = [Compiler(machine, None, level, flags.cache, deadline) for machine in found]

    def say(line: str) -> None:
        show(line, error=True)

    made = table.fill(models, compilers, config, stages, flags.tries or 1, say)
    for stage in stages:
        show(f"### {table.TITLES[stage]}\n\n{table.stage_table(made, stage)}\n")
    if "diffs" in stages and "train" in stages:
        diffs = number_of_diffs(flags.diffs, config)
        run_table = table.run_table(made, config, diffs, flags.utilization, flags.price)
        show(f"### The whole run, estimated: {diffs:,} diffs and the adapter\n\n{run_table}\n")
    missing = len(models) * len(found) * len(stages) - len(made.cells)
    if missing:
        show(f"{missing} cells were not computed: call again with the same --cache", error=True)
    return 0
