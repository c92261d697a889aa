"""Benchmarks of dit_jax side by side with what people would use instead.

    python -m benchmarks.run --suite diffs --model tiny --tokens world
    python -m benchmarks.run --suite ask --model qwen3-0.6b-4layers --baseline generate-merged
    python -m benchmarks.run --suite train --model qwen3-4b --dtype bfloat16 --remat full --batch 64

Every contender runs in its own process, one after another, on the same random weights of the named shape,
the same tokens, steps and initial factors. The time is the median of the repeats, without warm-up and
compilation. A row is valid only if its outputs equal ours (benchmarks.checks). Rows are appended to
OUT/results.jsonl; OUT/results.md is the table of all of them.

Baselines by suite ("NAME:full" computes logits at all positions, the usual way; "NAME:compile" compiles):
  diffs   peft-loop (a), torch-batched (b)
  train   torch-dense, peft-one-by-one (c), torch-factored
  ask     generate-merged, generate-peft (d)
  corpus  generate-batched, generate-one-by-one
"ours:again" (on a CPU by default) is our second process. It finds its programs in the compilation cache, as every
run of a config after the first does, and so needs neither the compiler's time nor its memory.
`--external NAME COMMAND` adds any other program, which is called as COMMAND FOLDER OUT (benchmarks.contender).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks import checks, models, report, workload
from benchmarks.contender import MODULES
from benchmarks.floors import floor
from benchmarks.workload import Workload
from dit_jax.errors import DitError
from dit_jax.runtime.artifacts import now, package_versions

_SIZES = ("diffs", "batch", "steps", "samples", "num_ce", "length", "scored", "new_tokens", "rank")


def default_baselines(suite: str, platform: str = "cpu") -> list[str]:
    baselines = [name for name in MODULES[suite] if name != "ours"]
    # An accelerator's peak has no compiler in it.
    return ["ours:again", *baselines] if platform == "cpu" else baselines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", required=True, choices=models.SUITES)
    parser.add_argument("--model", default="tiny", help="tiny, or a released shape[-Nlayers]")
    parser.add_argument("--baseline", nargs="*", help="default: all of the suite; none: ours alone")
    parser.add_argument("--external", nargs=2, action="append", default=[])
    parser.add_argument("--platform", choices=["cpu", "gpu"], default=_platform())
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="cpu: float32, gpu: bfloat16"
    )
    for name in (*_SIZES, "repeats", "seed", "adapter_rank"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument(
        "--tokens", choices=["random", "world"], default="random", help="world: the quickstart's"
    )
    parser.add_argument("--remat", choices=["none", "dots", "full"], default="none")
    parser.add_argument("--attention", default="xla")
    parser.add_argument(
        "--scan-layers", choices=["yes", "no"], help="default: whole released shapes"
    )
    parser.add_argument(
        "--cores", type=int, help="processor cores for all contenders; default: all"
    )
    parser.add_argument(
        "--weights", type=pathlib.Path, help="keep random weights here for the next run"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one contender")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"))
    return parser.parse_args(argv)


def _platform() -> str:
    found = shutil.which("nvidia-smi")
    if os.environ.get("JAX_PLATFORMS", "") == "cpu" or found is None:
        return "cpu"
    return "gpu" if subprocess.run([found, "-L"], capture_output=True).returncode == 0 else "cpu"


def make_workload(flags: argparse.Namespace) -> Workload:
    """The preset of the suite and the model, with the flags' values in place of its own."""
    sizes: dict[str, Any] = dict(
        models.preset(flags.suite, flags.model, flags.platform, flags.tokens)
    )
    for name in (*_SIZES, "repeats", "seed", "adapter_rank"):
        if getattr(flags, name) is not None:
            sizes[name] = getattr(flags, name)
    scan = flags.scan_layers or ("no" if models.is_shallow(flags.model) else "yes")
    return Workload(
        suite=flags.suite,
        model=flags.model,
        platform=flags.platform,
        dtype=flags.dtype or {"cpu": "float32", "gpu": "bfloat16"}[flags.platform],
        remat=flags.remat,
        attention=flags.attention,
        scan_layers=scan == "yes",
        tokens=flags.tokens,
        widths=workload.world_widths() if flags.tokens == "world" else (),
        **sizes,
    )


def run_suite(
    work: Workload,
    baselines: list[str],
    external: list[list[str]],
    out: pathlib.Path,
    timeout: float = 1800,
    command: str = "",
    weights: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """Runs all contenders, checks and reports them; returns the rows, ours first.

    Args:
        weights: a folder that keeps the random weights for the next run of this model.
    """
    out.mkdir(parents=True, exist_ok=True)
    commands: dict[str, list[str]] = {}
    for name in ("ours", *baselines):
        if name.partition(":")[0] not in MODULES[work.suite]:
            known = ", ".join(default_baselines(work.suite))
            raise DitError(f"unknown baseline {name!r} of suite {work.suite}: choose from {known}")
        commands[name] = [sys.executable, "-m", "benchmarks.contender", name]
    commands |= {name: shlex.split(text) for name, text in external}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = pathlib.Path(temporary)
        workload.write(work, folder)
        work_floor = floor(work, workload.make_data(work))
        # Ours alone needs no files: it makes its weights where it uses them.
        if len(commands) > 1:
            kept = (weights or folder).absolute() / f"{work.model}-{work.dtype}"
            if not kept.exists():
                _write_model(work, folder, kept)
            (folder / "model").symlink_to(kept)
        for name, arguments in commands.items():
            place = folder / f"out{len(rows)}"
            place.mkdir()
            before = os.getloadavg()[0]
            result = _contend(work, [*arguments, str(folder), str(place)], place, timeout)
            if "error" in result:
                result |= {"valid": False, "check": result["error"]}
            elif name == "ours":
                with np.load(place / "outputs.npz") as outputs:
                    result |= checks.check_ours(dict(outputs), work.dtype)
            elif "error" in rows[0]:
                result |= {"valid": False, "check": "ours failed: nothing to compare with"}
            else:
                theirs = place / "outputs.npz"
                result |= checks.compare(
                    folder, folder / "out0" / "outputs.npz", theirs, work.dtype
                )
            row = {
                "contender": name,
                **result,
                "workload": dataclasses.asdict(work),
                "floor": dataclasses.asdict(work_floor),
                "cores": len(os.sched_getaffinity(0)),
                "load_average_before": before,
                "command": command,
                "date": now(),
                "versions": _versions(),
            }
            rows.append(row)
            with open(out / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(report.line(row, rows), flush=True)
    report.write(out)
    return rows


def _contend(
    work: Workload, command: list[str], place: pathlib.Path, timeout: float
) -> dict[str, Any]:
    """Runs one contender; returns its result.json, or {"error": …}."""
    environment = _environment(work)
    if work.platform == "cpu":  # empty at first, whatever ran before
        environment["JAX_COMPILATION_CACHE_DIR"] = str(place.parent / "programs")
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {timeout:.0f} s"}
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
        return {"error": f"failed: {lines[-1][:200]}"}
    return json.loads((place / "result.json").read_text())


def _write_model(work: Workload, folder: pathlib.Path, model: pathlib.Path) -> None:
    """Writes it in a fresh process, so that this one never holds a device or a model."""
    code = (
        "import pathlib, sys; from benchmarks.workload import read, write_model\n"
        "folder, model = map(pathlib.Path, sys.argv[1:]); write_model(read(folder)[0], model)"
    )
    command = [sys.executable, "-c", code, str(folder), str(model)]
    subprocess.run(command, env=_environment(work), check=True)


def _environment(work: Workload) -> dict[str, str]:
    root = str(pathlib.Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    if work.platform == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = package_versions()
    for package in ("torch", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def main(argv: list[str] | None = None) -> int:
    flags = parse(argv)
    arguments = sys.argv[1:] if argv is None else argv
    if flags.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.cores])
    try:
        rows = run_suite(
            make_workload(flags),
            default_baselines(flags.suite, flags.platform)
            if flags.baseline is None
            else flags.baseline,
            flags.external,
            flags.out,
            flags.timeout,
            f"python -m benchmarks.run {shlex.join(arguments)}",
            flags.weights,
        )
    except DitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all(row["valid"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
