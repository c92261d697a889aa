"""The program: `python -m dit_jax.main --config configs/quickstart.py --workdir runs/quickstart`.

Runs the stages of a config in order, each once: a finished stage leaves its artifact in the workdir and
is not run again. Overrides: `--config.train.steps=200`.
"""

import argparse
import pathlib
import sys
import time
from typing import Any

from dit_jax import artifacts
from dit_jax.config import check_workdir, load_config, split_flags
from dit_jax.errors import DitError

ORDER = ("pretrain", "diffs", "train", "evaluate", "report")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 130 for Ctrl-C."""
    try:
        rest, overrides = split_flags(sys.argv[1:] if argv is None else argv)
        parser = argparse.ArgumentParser(prog="python -m dit_jax.main", description=__doc__)
        parser.add_argument(
            "--config", required=True, help="configs/NAME.py, or configs/NAME.py:ARGUMENT"
        )
        parser.add_argument(
            "--workdir", required=True, help="folder of the run; made when it is not there"
        )
        flags = parser.parse_args(rest)
        run(load_config(flags.config, overrides), pathlib.Path(flags.workdir))
    except DitError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from here", file=sys.stderr)
        return 130
    return 0


def run(config: Any, workdir: pathlib.Path) -> None:
    """Runs the stages of `config` that are not finished in `workdir`.

    Raises:
        DitError: an unknown stage, a workdir of another config, or what a stage raises.
    """
    unknown = [stage for stage in config.stages if stage not in ORDER]
    if unknown:
        raise DitError(f"unknown stage {unknown[0]!r}: stages are {', '.join(ORDER)}")
    check_workdir(config, workdir)
    artifacts.write_json(workdir / "versions.json", artifacts.package_versions())
    _setup_jax()
    model: Any = None
    for stage in (name for name in ORDER if name in config.stages):
        if artifacts.stage_done(workdir, stage) and stage != "report":
            print(f"[{stage}] done before, not run again", flush=True)
            continue
        print(f"[{stage}]", flush=True)
        start = time.monotonic()
        if model is None and stage in ("diffs", "train", "evaluate"):
            from dit_jax.api import load_model

            model = load_model(
                config.model.path, config.model.dtype, scan_layers=config.model.scan_layers
            )
        facts = run_stage(stage, config, workdir, model)
        artifacts.mark_done(workdir, stage, time.monotonic() - start, facts)


def run_stage(stage: str, config: Any, workdir: pathlib.Path, model: Any) -> dict[str, Any]:
    """Runs one stage; returns facts for its record."""
    if stage == "pretrain":
        from dit_jax.train.pretrain import pretrain

        pretrain(config, workdir)
        return {}
    if stage == "diffs":
        from dit_jax.data.organisms import load_organisms
        from dit_jax.organisms.generate import generate_diffs

        organisms = load_organisms(config.data, config.seed)
        return generate_diffs(model, organisms, config.diffs, workdir / "diffs", config.seed)
    if stage == "train":
        from dit_jax.train.dit import train_adapter

        return train_adapter(model, workdir / "diffs", config.train, workdir, config.seed)
    if stage == "evaluate":
        from dit_jax.evaluate.run import evaluate_run

        return evaluate_run(model, workdir, config.evaluate, config.seed)
    from dit_jax.evaluate.report import print_headline, write_report

    print_headline(write_report(workdir))
    print(f"report: {workdir / 'report' / 'report.html'}", flush=True)
    return {}


def _setup_jax() -> None:
    """A persistent compilation cache: the second run of a program starts at once."""
    import os

    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = (
            pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
            / "dit_jax"
            / "xla"
        )
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    sys.exit(main())
