"""Run the stages of a config: python -m dit_jax.main --config configs/quickstart.py --workdir runs/quickstart

Stages run in order, each once: a finished stage leaves its artifact in the workdir and does not run again.
`--config.train.steps=200` replaces a value of the config; docs/config.md lists all keys.

On several hosts, start the same command on each, with --distributed and a workdir that all of them see.
"""

import contextlib
import errno
import functools
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from dit_jax.cli.config_checks import check_config, check_ranks
from dit_jax.cli.flags import Parser
from dit_jax.cli.stages import RUN, STAGES, Stage, chosen_stages, optional_keys
from dit_jax.cli.workdir import check_workdir, given_folder, is_done, run_once
from dit_jax.config.loading import flatten, load_config, split_flags
from dit_jax.errors import DitError
from dit_jax.models.decoder_config import COMPUTE
from dit_jax.models.model_keys import MODEL
from dit_jax.organisms.diffs_keys import DIFFS
from dit_jax.runtime import artifacts, os_errors, parallel, preemption, processes, startup
from dit_jax.runtime.exits import exit_on_error
from dit_jax.runtime.folder_lock import locked
from dit_jax.train.train_keys import TRAIN

COMPILE_AHEAD = "compile ahead"  # name of the thread


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 75 after SIGTERM, 130 for Ctrl-C.

    After a failure, one of several processes does not return: it ends at once, which ends the others.
    """
    parser = Parser("python -m dit_jax.main", __doc__)
    add = parser.add_argument
    add("--config", required=True, help="configs/NAME.py, or configs/NAME.py:ARGUMENT")
    add("--workdir", required=True, help="folder of the run; made when it is not there")
    joins_others = "join the other processes of this run; on TPU slices, SLURM, Kubernetes and MPI they find each other"
    add("--distributed", action="store_true", help=joins_others)
    add("--coordinator", help="elsewhere: HOST:PORT of process 0")
    add("--num-processes", type=int, help="elsewhere: how many there are")
    add("--process-id", type=int, help="elsewhere: which one this is, from 0")
    code, several = 0, False
    try:
        with exit_on_error():
            rest, overrides = split_flags(sys.argv[1:] if argv is None else argv)
            flags = parser.parse_args(rest)
            startup.prepare()
            joins = (flags.coordinator, flags.num_processes, flags.process_id)
            if not flags.distributed and joins != (None, None, None):
                raise DitError(
                    "--coordinator, --num-processes and --process-id say how to join others: add --distributed"
                )
            workdir = given_folder(flags.workdir)
            if flags.distributed:
                processes.initialize_distributed(*joins)
                several = True
            run(load_config(flags.config, overrides, optional_keys()), workdir)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception:
        if not several:
            raise
        traceback.print_exc()
        code = 1
    if code and several:
        if code == preemption.EXIT_PREEMPTED:
            # srun --kill-on-bad-exit sends one more when another process ends. It must not change the status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            preemption.meet()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the usual way out waits for processes that wait for this one
    return code


def run(config: Any, workdir: pathlib.Path) -> None:
    """Runs the stages of `config` that are not finished in `workdir`.

    Raises:
        DitError: a mistake in the config (`check_config`), a workdir of another config, or what a stage raises.
    """
    with _explain(workdir):
        check_config(config)
        parallel.find_devices()
        if not processes.say_the_same(json.dumps(flatten(config))):
            raise DitError(
                "the processes of this run have different configs: start the same command on all of them"
            )
        with preemption.listen(), locked(workdir):
            _run_stages(config, workdir)


def _run_stages(config: Any, workdir: pathlib.Path) -> None:
    mesh = None
    stages = chosen_stages(config.stages)
    if any(stage.needs_model for stage in stages):
        mesh = parallel.make_mesh(dict(RUN.get(config, "mesh")))
        processes.say(f"{parallel.describe(mesh)}, {config.model.dtype}")

    def start_run() -> None:
        check_workdir(config, workdir)
        artifacts.write_json(workdir / "versions.json", artifacts.package_versions())

    processes.on_main(start_run)
    there = importlib.util.find_spec("tensorboard") is not None
    install = "" if there else "pip install tensorboard && "
    processes.say(
        f"writing to {workdir}; curves: {install}tensorboard --logdir {workdir / 'metrics'}"
    )
    model: Any = None
    for stage in stages:
        done = processes.on_main(functools.partial(is_done, workdir, stage, config))
        if done and not stage.always:
            processes.say(f"[{stage.name}] done before, not run again")
            continue
        processes.say(f"[{stage.name}]")
        stage.check_inputs(config)  # before gigabytes of a model are loaded
        if model is None and stage.needs_model:
            from dit_jax.api import load_model

            compute = {name: config.model[name] for name in COMPUTE if name in config.model}
            said = MODEL.get(config.model, "system")
            system = {"": None, "none": ""}.get(said, said)
            model = load_model(
                config.model.path, config.model.dtype, mesh, system=system, **compute
            )
            check_ranks(config, model.config)
            for note in model.notes():
                processes.say(f"note: {note}")
        if stage.name == "diffs" and compiles_ahead(config, workdir):
            _compile_ahead(config, model)
        work = functools.partial(_run_explained, stage, config, workdir, model)
        run_once(workdir, stage, config, work)


def compiles_ahead(config: Any, workdir: pathlib.Path) -> bool:
    """Whether to compile the stage `train` while the diffs are made.

    It must be to come, on these diffs, whose shapes must be known before they are made. And the device must be a CPU,
    where compiling keeps one core busy: on a GPU it would run trial kernels beside the diffs.
    """
    return (
        jax.default_backend() == "cpu"
        and jax.process_count() == 1
        and "train" in config.stages
        and not TRAIN.get(config.train, "stores")
        and not is_done(workdir, STAGES["train"], config)
        and not DIFFS.get(config.diffs, "kinds")
        and DIFFS.get(config.diffs, "parameters") == "lora"
    )


def _compile_ahead(config: Any, model: Any) -> None:
    """Compiles the step of the stage `train` into the cache of programs, in a thread of its own."""
    from dit_jax.deltas.tree import abstract_lora
    from dit_jax.train.dit import abstract_step, train_step

    def compile_step() -> None:
        # The stage itself reports what is wrong with a config.
        with contextlib.suppress(Exception), parallel.use_mesh(model.mesh):
            diff = abstract_lora(model.config, config.diffs.rank, config.diffs.projections)
            args, options = abstract_step(model.config, model.mesh, config.train, diff)
            train_step.lower(model.program_params, *args[1:], **options).compile()

    threading.Thread(target=compile_step, name=COMPILE_AHEAD).start()


def main_run(argv: list[str] | None = None) -> int:
    """`main` of the command line.

    After a failure or Ctrl-C the process ends at once if a program is still being compiled ahead: Python would wait for
    that thread, which cannot be stopped. Nothing is lost: artifacts are complete or absent.
    """
    code = main(argv)
    if code and any(thread.name == COMPILE_AHEAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run_explained(stage: Stage, config: Any, workdir: pathlib.Path, model: Any) -> dict[str, Any]:
    with _explain(workdir):  # here, because process 0 may be alone in it
        return stage.run(config, workdir, model if stage.needs_model else None)


@contextlib.contextmanager
def _explain(workdir: pathlib.Path) -> Iterator[None]:
    """Turns an error of the disk that no library has explained into a DitError."""
    try:
        yield
    except OSError as error:
        place = error.filename or workdir
        # Orbax names absolute paths.
        inside = pathlib.Path(str(place)).absolute().is_relative_to(workdir.absolute())
        if error.errno == errno.ENOENT and inside:
            raise DitError(
                f"'{place}' vanished while the run used it (a disk that went away, a folder that was deleted): "
                "see to that, and run the same command again"
            ) from error
        if not os_errors.has_remedy(error.errno):
            raise
        raise DitError(f"cannot use '{place}': {os_errors.reason(error.errno or 0)}") from error
