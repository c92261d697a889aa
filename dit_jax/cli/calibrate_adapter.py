"""Say what an adapter's answers are worth: python -m dit_jax.calibrate --base B --adapter A STORE

    python -m dit_jax.calibrate --base tiny_qwen3 --adapter runs/quickstart/adapter runs/quickstart/diffs

It asks the held-out diffs of a store as an audit does, with noise and no diff as controls, and writes
ADAPTER.calibration.json beside the adapter, where `dit_jax.audit` finds it. With --test it asks the diffs of a store of
another kind, and says what the calibration that is there is worth on them.
"""

import argparse

from dit_jax.cli import flags as given
from dit_jax.cli.audit_diffs import add_battery_flags, battery_of
from dit_jax.errors import DitError
from dit_jax.runtime.artifacts import check_place
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.outgoing import show


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 130 for Ctrl-C."""
    return status_of(lambda: run(parse_flags(argv)))


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises DitError: a flag that is unknown or has a wrong value."""
    parser = given.Parser("python -m dit_jax.calibrate", __doc__)
    add = parser.add_argument
    add(
        "diffs", nargs="+", metavar="STORE", type=given.TEXT, help="labelled diffs, benign ones too"
    )
    given.add_model_flags(parser, adapter_required=True)
    add(
        "--split",
        type=given.TEXT,
        default="test",
        help="the diffs that no training saw (default %(default)s)",
    )
    add("--test", action="store_true", help="test the calibration that is there, and write nothing")
    add_battery_flags(parser)
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> None:
    """Writes the calibration, or tests the one that is there, and prints its numbers."""
    asked = battery_of(flags)

    from dit_jax.auditing import calibration, calibration_file
    from dit_jax.auditing.known import measure
    from dit_jax.auditing.settings import make_settings
    from dit_jax.auditing.targets import list_targets
    from dit_jax.deltas.detect import look_for_adapter
    from dit_jax.report.wording import between, percent

    found = look_for_adapter(flags.adapter)
    path = calibration_file.file_beside(flags.adapter)
    if not flags.test:
        check_place(path)  # before hours of work
    model = given.load_base(flags)
    settings = make_settings(
        model,
        flags.adapter,
        asked,
        system=flags.system,
        batch_size=flags.batch_size,
        calibrated=flags.test,
        found=found,
    )
    if flags.test and settings.calibration is None:
        raise DitError(
            f"there is no calibration of these questions at '{path}': run the same command without --test, on diffs of "
            "the adapter's own kind"
        )
    calibration_file.check_battery(settings.battery.to_json())
    targets = list_targets(flags.diffs, model, flags.split)
    if settings.calibration is None:
        calibration.check_count(len(targets), "hide something")  # before all of them are asked
    known = measure(settings, targets)
    if settings.calibration is not None:
        made = calibration.worth_on(settings.calibration, known)
    else:
        facts = {
            "adapter": settings.facts["adapter_digest"],
            "base": settings.facts["base_digest"],
            "battery": settings.battery.to_json(),
            "system": settings.facts["system"],
            "source": f"{', '.join(flags.diffs)}, split {flags.split}",
        }
        made = calibration.calibrate(known, facts)
        calibration_file.write(path, made)
    for name in ("hidden", "right"):
        one = made[name]
        area = (
            f"AUROC {one['auroc']['mean']:.3f} ({between(one['auroc'])} %), "
            if one["auroc"]
            else ""
        )
        show(f"{name}: {area}calibration error {percent(one['calibration_error'])}, n = {one['n']}")
        for limit in filter(None, one["thresholds"]):
            show(
                f"  score above {limit['above']:.3f}: false positives {percent(limit['false_positives']['mean'])} "
                f"({between(limit['false_positives'])}), found {percent(limit['found']['mean'])} "
                f"({between(limit['found'])})"
            )
    if settings.calibration is None and made["controls"]:
        show("too few benign diffs: noise and no diff stand for what hides nothing, and are easier")
    show(f"{'tested' if flags.test else 'calibration'}: {path}")
