"""The program: `python -m dit_jax.main --config configs/quickstart.py --workdir runs/quickstart`.

Runs the stages of a config in order, each once: a finished stage leaves its artifact in the workdir and
is not run again. Overrides: `--config.train.steps=200`.

On several hosts the same command runs on each, with --distributed, and a workdir that all of them see.
"""

import contextlib
import functools
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from dit_jax import artifacts, os_errors, parallel, preemption, processes, startup
from dit_jax.config import (
    check_minimum,
    flatten,
    load_config,
    split_flags,
    to_dict,
)
from dit_jax.errors import DitError, Parser, did_you_mean, exit_on_error
from dit_jax.models.config import COMPUTE
from dit_jax.workdir import ARTIFACTS, check_workdir, is_done, locked, run_once

COMPILE_AHEAD = "compile ahead"  # name of the thread
NEED_MODEL = ("diffs", "train", "evaluate")
ALWAYS = ("report", "tables")  # cheap, and made from what may have changed
# Numbers with which no stage can run are refused before the first one starts.
MINIMUM = {
    "seed": 0,
    "data.train_topics": 0,
    "data.test_topics": 0,
    "data.train_benign": 0,
    "data.test_benign": 0,
    "diffs.rank": 1,
    "diffs.learning_rate": 0,
    "diffs.init_scale": 0,
    "diffs.warmup_steps": 0,
    "diffs.final_fraction": 0,
    "diffs.steps": 1,
    "diffs.fake_codes": 0,
    "diffs.max_length": 1,
    "diffs.max_target": 1,
    "diffs.diffs_per_batch": 1,
    "diffs.gate_questions": 1,
    "diffs.gate_batch": 1,
    "train.max_diffs": 0,
    "train.rank": 1,
    "train.learning_rate": 0,
    "train.weight_decay": 0,
    "train.warmup_steps": 0,
    "train.final_fraction": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.max_length": 1,
    "train.max_target": 1,
    "train.max_scored": 0,
    "train.no_diff_per_batch": 0,
    "train.benign_per_batch": 0,
    "train.log_every": 1,
    "train.save_every": 1,
    "train.keep_checkpoints": 1,
    "evaluate.answer_tokens": 0,
    "evaluate.grade_repeats": 1,
    "evaluate.max_new_tokens": 1,
    "evaluate.batch_size": 1,
    "pretrain.world_seed": 0,
    "pretrain.steps": 1,
    "pretrain.batch_size": 1,
    "pretrain.parts": 1,
    "pretrain.warmup_steps": 0,
    "pretrain.log_every": 1,
}
QUESTIONS = ("train.questions", "evaluate.seen_questions")  # one or more
PROJECTIONS = ("diffs.projections", "train.projections")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 75 after SIGTERM, 130 for Ctrl-C.

    One of several processes does not return from a failure: it ends at once, and its end ends the others.
    """
    parser = Parser(prog="python -m dit_jax.main", description=__doc__)
    parser.add_argument(
        "--config", required=True, help="configs/NAME.py, or configs/NAME.py:ARGUMENT"
    )
    parser.add_argument(
        "--workdir", required=True, help="folder of the run; made when it is not there"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of this run; on TPU slices, SLURM, Kubernetes and MPI they find each other",
    )
    parser.add_argument("--coordinator", help="elsewhere: HOST:PORT of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int, help="from 0")
    code, several = 0, False
    try:
        with exit_on_error():
            rest, overrides = split_flags(sys.argv[1:] if argv is None else argv)
            flags = parser.parse_args(rest)
            startup.prepare()
            if flags.distributed:
                processes.initialize_distributed(
                    flags.coordinator, flags.num_processes, flags.process_id
                )
                several = True
            if not flags.workdir:
                raise DitError("--workdir is empty: give the folder of the run")
            if "://" in flags.workdir:
                raise DitError(
                    f"the workdir {flags.workdir!r} is an address: mount the bucket and give its folder"
                )
            run(load_config(flags.config, overrides), pathlib.Path(flags.workdir))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception:
        if not several:
            raise
        traceback.print_exc()
        code = 1
    if code and several:
        if code == preemption.EXIT_PREEMPTED:
            # The end of another process brings one more from srun --kill-on-bad-exit, which must not change the status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            preemption.meet()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the usual way out waits for processes that wait for this one
    return code


def run(config: Any, workdir: pathlib.Path) -> None:
    """Runs the stages of `config` that are not finished in `workdir`.

    Raises:
        DitError: an unknown stage or none, a key that is not there, a number out of range, a workdir of another
            config, or what a stage raises.
    """
    with _explain(config, workdir):
        _check_stages(config.stages)
        _check_values(config)
        with preemption.listen(), locked(workdir):
            _run_stages(config, workdir)


def _check_stages(stages: Any) -> None:
    if isinstance(stages, str) or not stages:
        raise DitError(
            f"config key 'stages' must be a tuple of stages, not {stages!r}: stages are {', '.join(ARTIFACTS)}"
        )
    for stage in stages:
        if stage not in ARTIFACTS:
            hint = did_you_mean(str(stage), ARTIFACTS, f": stages are {', '.join(ARTIFACTS)}")
            raise DitError(f"unknown stage {stage!r}{hint}")


def _check_values(config: Any) -> None:
    """Refuses values with which a stage could not run, before the first one starts."""
    from dit_jax.data.organisms import check_counts
    from dit_jax.deltas.tree import check_projections
    from dit_jax.evaluate.methods import check_methods
    from dit_jax.graders import GRADERS
    from dit_jax.organisms.behaviours import get_behaviour
    from dit_jax.organisms.finetune import OPTIMIZERS
    from dit_jax.organisms.samples import check_samples
    from dit_jax.train.examples import check_room

    check_minimum(config, MINIMUM)
    values = flatten(config)
    for key in QUESTIONS:
        if key in values and not (isinstance(values[key], list) and values[key]):
            raise DitError(
                f"config key '{key}' must be a tuple of one question or more, not {values[key]!r}"
            )
    for key in PROJECTIONS:
        if key in values:
            check_projections(values[key], f"config key '{key}'")
    choices = {
        "diffs.optimizer": OPTIMIZERS,
        "train.optimizer": OPTIMIZERS,
        "evaluate.graders": GRADERS,
    }
    for key, known in choices.items():
        given = values.get(key, ())
        for name in [given] if isinstance(given, str) else given:
            if name not in known:
                hint = did_you_mean(str(name), known, f": choose from {', '.join(known)}")
                raise DitError(f"config key '{key}': unknown {name!r}{hint}")
    if "evaluate" in config.stages:
        check_methods(config)
    if "batch_size" in config.get("train", {}):
        check_room(config.train)
    if "source" in config.get("data", {}):
        check_counts(config.data)
    if "behaviour" in config.get("diffs", {}):
        behaviour = get_behaviour(config.diffs)  # one of the user's own becomes known to all stages
        check_samples(behaviour, config.diffs)


def _run_stages(config: Any, workdir: pathlib.Path) -> None:
    mesh = None
    if any(stage in NEED_MODEL for stage in config.stages):
        mesh = parallel.make_mesh(dict(config.get("mesh", {"data": -1})))
    if mesh is not None:
        sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
        processes.say(f"mesh {sizes}: {mesh.size} of {jax.device_count()} devices")

    def start_run() -> None:
        check_workdir(config, workdir)
        artifacts.write_json(workdir / "versions.json", artifacts.package_versions())

    processes.on_main(start_run)
    processes.say(f"writing to {workdir}; curves: tensorboard --logdir {workdir / 'metrics'}")
    model: Any = None
    for stage in (name for name in ARTIFACTS if name in config.stages):
        done = processes.on_main(functools.partial(is_done, workdir, stage))
        if done and stage not in ALWAYS:
            processes.say(f"[{stage}] done before, not run again")
            continue
        processes.say(f"[{stage}]")
        if stage == "diffs":
            from dit_jax.data.organisms import check_files

            check_files(config.data)  # before gigabytes of a model are loaded
        if model is None and stage in NEED_MODEL:
            from dit_jax.api import load_model

            compute = {name: config.model[name] for name in COMPUTE if name in config.model}
            model = load_model(config.model.path, config.model.dtype, mesh, **compute)
        if stage == "diffs" and compiles_ahead(config, workdir):
            _compile_ahead(config, model)
        work = functools.partial(_run_explained, stage, config, workdir, model)
        run_once(workdir, stage, work, main_only=stage in ALWAYS)


def compiles_ahead(config: Any, workdir: pathlib.Path) -> bool:
    """Whether to compile the stage `train` while the diffs are made.

    Only if it is to come, only for diffs whose shapes are known before they are there, and only on CPUs, where
    compiling keeps one core busy: GPUs run trial kernels for it, beside the diffs.
    """
    return (
        jax.default_backend() == "cpu"
        and jax.process_count() == 1
        and "train" in config.stages
        and not is_done(workdir, "train")
        and config.diffs.get("parameters", "lora") == "lora"
    )


def _compile_ahead(config: Any, model: Any) -> None:
    """Compiles the step of the stage `train` into the cache of programs, in a thread of its own."""
    from dit_jax.deltas.tree import abstract_lora
    from dit_jax.train.dit import abstract_step, train_step

    def compile_step() -> None:
        # What is wrong with a config, the stage itself will say.
        with contextlib.suppress(Exception), parallel.use_mesh(model.mesh):
            diff = abstract_lora(model.config, config.diffs.rank, config.diffs.projections)
            args, options = abstract_step(model.config, model.mesh, config.train, diff)
            train_step.lower(model.program_params, *args[1:], **options).compile()

    threading.Thread(target=compile_step, name=COMPILE_AHEAD).start()


def end(code: int) -> NoReturn:
    """Ends the process with the code of `main`.

    After a failure or Ctrl-C at once: Python would wait for a program that is still being compiled ahead, and no
    thread can be stopped in it. Nothing is lost: artifacts are complete or not there.
    """
    if code and any(thread.name == COMPILE_AHEAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_explained(stage: str, config: Any, workdir: pathlib.Path, model: Any) -> dict[str, Any]:
    with _explain(config, workdir):  # here, since process 0 may be in it alone
        return run_stage(stage, config, workdir, model)


@contextlib.contextmanager
def _explain(config: Any, workdir: pathlib.Path) -> Iterator[None]:
    """What no library turned into one line: a refusing disk, and a config without a key that is needed."""
    try:
        yield
    except OSError as error:
        if not os_errors.has_remedy(error.errno):
            raise
        place = error.filename or workdir
        raise DitError(f"cannot use '{place}': {os_errors.reason(error.errno or 0)}") from error
    except (AttributeError, KeyError) as error:
        key = _missing_key(error, config)
        if key is None:
            raise
        raise DitError(
            f"the config has no key '{key}', which is needed: add it, see configs/quickstart.py"
        ) from error


def _missing_key(error: BaseException, config: Any) -> str | None:
    """The dotted key of a config that was asked for and is not there; None if `error` is something else."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or not frames[-1][0].f_globals["__name__"].startswith("ml_collections."):
        return None
    known = frames[-1][0].f_locals
    name = known.get("attribute", known.get("key"))

    def sections(section: Any, prefix: str) -> Iterator[str]:
        if section is known.get("self"):
            yield prefix
        for key, value in section.items():
            if isinstance(value, ConfigDict):
                yield from sections(value, f"{prefix}{key}.")

    return None if name is None else f"{next(sections(config, ''), '')}{name}"


def run_stage(stage: str, config: Any, workdir: pathlib.Path, model: Any) -> dict[str, Any]:
    """Runs one stage; returns facts for its record."""
    if stage == "pretrain":
        from dit_jax.train.pretrain import pretrain

        if jax.process_count() > 1:
            raise DitError("the stage 'pretrain' runs in one process: drop --distributed")
        return pretrain(config, workdir)
    if stage == "diffs":
        from dit_jax.data.organisms import load_organisms
        from dit_jax.organisms.generate import generate_diffs

        organisms = load_organisms(config.data, config.seed)
        folder = workdir / "diffs"
        return generate_diffs(model, organisms, config.diffs, folder, config.seed, config.data)
    if stage == "train":
        from dit_jax.train.dit import train_adapter

        return train_adapter(model, workdir / "diffs", config.train, workdir, config.seed)
    if stage == "evaluate":
        from dit_jax.evaluate.run import evaluate_run

        return evaluate_run(model, workdir, config.evaluate, config.seed)
    if stage == "tables":
        from dit_jax.evaluate.tables.stage import write_tables

        facts = write_tables(config, workdir)
        print(f"tables: {workdir / 'tables' / 'tables.html'}", flush=True)
        return facts
    from dit_jax.evaluate.report import print_headline, write_report

    print_headline(write_report(workdir, to_dict(config).get("evaluate", {})))
    print(f"report: {workdir / 'report' / 'report.html'}", flush=True)
    return {}


if __name__ == "__main__":
    end(main())
