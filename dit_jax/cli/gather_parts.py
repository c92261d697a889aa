"""Joins what several jobs made of one run: `python -m dit_jax.gather --workdir runs/a runs/a-parts/*`.

Each job ran the same config in a workdir of its own, on any machine: with `--config.stages=diffs
--config.diffs.part=I/N`, or with `--config.stages=evaluate --config.evaluate.part=I/N` beside the run's diffs and
adapter (copies, or links to these folders). This program copies their batches of diffs, or their answers, into one
workdir. The config, run there without a part, makes what is still missing and goes on.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dit_jax.cli.config_checks import check_values
from dit_jax.cli.flags import Parser
from dit_jax.cli.stages import STAGES, free_keys
from dit_jax.cli.workdir import CONFIG_FILE, check_workdir, given_folder, input_digests
from dit_jax.config.loading import config_diff, load_saved
from dit_jax.deltas.store import copy_shards
from dit_jax.errors import DitError
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.units import PARTS, copy_units, made_from
from dit_jax.formats.files import short
from dit_jax.organisms.diffs_keys import DIFFS
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.folder_lock import locked
from dit_jax.runtime.outgoing import show

_STAGE = STAGES["diffs"]


def main_gather(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a problem the user can fix."""
    return status_of(lambda: _gather(argv))


def _gather(argv: Sequence[str] | None) -> None:
    parser = Parser("python -m dit_jax.gather", __doc__)
    parser.add_argument("--workdir", required=True, help="of the run that goes on with all diffs")
    parser.add_argument("parts", nargs="+", help="workdirs of the jobs, finished or not")
    flags = parser.parse_args(argv)
    workdir, parts = given_folder(flags.workdir), [given_folder(x) for x in flags.parts]
    copied = gather(workdir, parts)
    show(f"{copied} parts copied to '{workdir}': run the config with this --workdir")


def gather(workdir: Path, parts: Sequence[Path]) -> int:
    """Copies the shards of diffs, or the units of the evaluation, of all parts that `workdir` lacks; returns how many.

    Raises:
        DitError: a folder is no workdir of a run, or its config has wrong values or a stage of its own, the parts or
            `workdir` belong to different configs, the diffs were made from another corpus than that of `workdir`,
            another run is at work there, or see `copy_shards` and `copy_units`.
    """
    for part in parts:
        if not (part / CONFIG_FILE).is_file():
            raise DitError(f"'{part}' is not the workdir of a run: it has no {CONFIG_FILE}")
    config = load_saved(parts[0] / CONFIG_FILE)
    if not isinstance(config.get(_STAGE.name), ConfigDict):
        raise DitError(f"'{parts[0]}' is the workdir of no run that makes diffs")
    named = config.get("stages")
    for name in named if isinstance(named, tuple) else ():
        if not (isinstance(name, str) and name in STAGES):  # parts may be a stranger's
            raise DitError(
                f"'{parts[0] / CONFIG_FILE}' names the stage {short(name)}, and code of others is not imported: make "
                "parts with --config.stages=diffs or --config.stages=evaluate"
            )
    check_values(config)
    for part in parts[1:]:
        lines = config_diff(config, load_saved(part / CONFIG_FILE), free_keys(config))
        if lines:
            raise DitError(
                f"'{parts[0]}' and '{part}' belong to different configs ({lines[0]}): gather the parts of one run"
            )
    whole = config.copy_and_resolve_references()
    for section in (DIFFS, EVALUATE):
        if "part" in section.values(whole):
            section.values(whole).part = ""
    with locked(workdir):
        check_workdir(whole, workdir)
        inputs = input_digests(workdir, _STAGE, whole)
        evaluated = [part for part in parts if (part / PARTS).is_dir()]
        made = made_from(workdir, whole.get("evaluate", {}), whole.get("seed")) if evaluated else ""
        for part in parts:
            if part not in evaluated and input_digests(part, _STAGE, whole) != inputs:
                raise DitError(
                    f"the diffs in '{part}' were not made from the corpus in '{workdir}': gather into a copy of the "
                    "workdir in which that corpus was written"
                )
        return sum(
            copy_units(part, workdir, made)
            if part in evaluated  # its diffs are those of `workdir`
            else copy_shards(part / _STAGE.folder, workdir / _STAGE.folder)
            for part in parts
        )
