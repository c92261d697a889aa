"""All programs by one name: dit-jax PROGRAM …

`dit-jax PROGRAM --help` lists the flags of a program. `python -m dit_jax PROGRAM` is the same.
"""

import sys
from typing import NamedTuple

from dit_jax.errors import DitError, did_you_mean
from dit_jax.runtime.exits import EXIT_ERROR, exit_on_error, start
from dit_jax.runtime.outgoing import show


class Program(NamedTuple):
    """module: in dit_jax.cli, has the function `start`, which returns the exit code."""

    module: str
    about: str
    start: str = "main"


PROGRAMS = {
    "run": Program(
        "run_stages", "run the stages of a config: diffs, adapter, evaluation, report", "main_run"
    ),
    "ask": Program("ask_diffs", "ask weight diffs, one by one or many, through an adapter"),
    "audit": Program(
        "audit_diffs", "audit weight diffs: one page with answers, yardsticks, scores"
    ),
    "app": Program("serve_app", "ask and audit in a browser"),
    "calibrate": Program("calibrate_adapter", "measure what the answers of an adapter are worth"),
    "export": Program(
        "export_diffs", "write diffs and adapters for PEFT, as a merged model, or as .pt"
    ),
    "push": Program("push_adapter", "put an adapter on the hub, with a card written from its run"),
    "sweep": Program("sweep_runs", "run one config many times", "main_sweep"),
    "gather": Program(
        "gather_parts", "join the parts of a store that several jobs made", "main_gather"
    ),
    "plan": Program("plan_runs", "say on a CPU what fits on which TPU slice or GPU"),
}


def main() -> int:
    """Starts the program that the first argument names, which ends the process; returns the exit code of a list."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("", "-h", "--help"):
        show(__doc__ or "dit-jax PROGRAM …\n")  # none with python -OO
        for each, program in PROGRAMS.items():
            show(f"  {each:<10} {program.about}")
        return 0 if name else EXIT_ERROR
    with exit_on_error():
        if name not in PROGRAMS:
            known = f": choose from {', '.join(PROGRAMS)}"
            raise DitError(f"there is no program {name!r}{did_you_mean(name, PROGRAMS, known)}")
    sys.argv = [sys.argv[0], *rest]
    return start(f"dit_jax.cli.{PROGRAMS[name].module}", PROGRAMS[name].start)
