"""Audit weight diffs: python -m dit_jax.audit --base B --adapter A --out DIR DIFF …

    python -m dit_jax.audit --base tiny_qwen3 --adapter runs/quickstart/adapter --out runs/audit \\
        'runs/quickstart/diffs[256:286]' my_adapters/

A DIFF is what `ask` takes, also PATH[3] or PATH[256:352], a folder of diffs, or a .txt file with one of these a line.
It leaves audit.html, audit.csv and audit.jsonl in DIR. The same command goes on with an audit that was interrupted.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from dit_jax.cli import flags as given
from dit_jax.errors import DitError, printable
from dit_jax.report.wording import plural
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.outgoing import show
from dit_jax.runtime.parts import check_part

EXIT_FOUND = 1  # --fail-on
FEWEST_BENIGN = 8
_CONDITION = re.compile(r"\s*([a-z_]+)\s*(>=|<=|>|<)\s*([-+.\de]+)\s*")
_MEASURES = (
    "hidden",
    "right",
    "kl",
    "share",
    "ratio",
    "none",
    "norm",
    "effective_rank",
    "rank",
    "unusual",
)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for --fail-on, 2 for a problem the user can fix, 130 for Ctrl-C."""
    return status_of(lambda: run(parse_flags(argv)))


# fmt: off
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises DitError: a flag that is unknown or has a wrong value."""
    parser = given.Parser("python -m dit_jax.audit", __doc__)
    add = parser.add_argument
    add("diffs", nargs="+", metavar="DIFF", type=given.TEXT, help="see above")
    given.add_model_flags(parser)
    add("--out", required=True, type=given.FILE, help="folder of the audit; made when it is not there")
    add("--split", type=given.TEXT, help="of stores and releases take only this split, such as test")
    add("--jobs", metavar="I/N", type=_job, default="",
        help="be job I of N (from 0), which share --out: the last to end writes the page")
    add("--fail-on", metavar="CONDITION", type=_condition,
        help="exit with status 1 if a diff has e.g. 'hidden>0.9' or cannot be read; one of " + ", ".join(_MEASURES))
    add("--benign", action="append", default=[], type=given.TEXT, metavar="DIFF",
        help="diffs that hide nothing, made as the others: says how unlike them each diff's weights are")
    add("--triggers", action="append", default=[], type=given.TEXT, metavar="BEHAVIOUR",
        help="try all triggers of a behaviour, or of 'all', in two everyday prompts: says which one moves answers most")
    add("--align", action="store_true", help="undo rewritings of finetuned models that leave their function as it is")
    add("--svd-rank", type=given.COUNT, help="reduce finetuned models' diffs to LoRAs of this rank")
    add_battery_flags(parser)
    add("--everyday", metavar="FILE", type=given.FILE, help="everyday prompts, one a line (default: 20 of our own)")
    return parser.parse_args(argv)


def add_battery_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what every diff is asked."""
    add = parser.add_argument
    add("--questions", metavar="FILE", type=given.FILE,
        help="questions, one a line (default: the adapter's own wordings)")
    add("--system", help="the system message of all prompts (default: that of the adapter's training)")
    add("--samples", type=given.COUNT, help="answers to each question, at temperature 1 (default 1, greedy)")
    add("--contrast", metavar="WEIGHT", type=given.SHARE,
        help="of the likeliest answers to each question take the one that is unlikely without the diff (0.1 is little)")
    add("--max-new-tokens", type=given.COUNT, help="most tokens of an answer (default 20)")
    add("--forbid-repeats", action="store_true", default=None,
        help="no token twice (default for adapters that list evidence before the name)")
    add("--list-evidence", action="store_true", default=None,
        help="the name stands after the last colon of an answer (default: as the adapter's files say)")
    add("--seed", type=given.SEED, help="seed of sampling and noise (default 0)")
    add("--batch-size", type=given.COUNT, default=64, help="rows per decode (default %(default)s)")
# fmt: on


def battery_of(flags: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `Battery` that the user gave, or that follow from them."""
    if flags.contrast is not None and (flags.samples or 1) > 1:
        raise DitError("--contrast gives one answer to each question: leave out --samples")
    names = ("samples", "contrast", "max_new_tokens", "forbid_repeats", "list_evidence", "seed")
    asked = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if flags.questions:
        asked["questions"] = tuple(given.read_lines(flags.questions))
    if flags.samples is not None:
        asked["temperature"] = 1.0 if flags.samples > 1 else 0.0
    # A calibration may say the other of the two, which exclude each other.
    if flags.contrast is not None:
        asked |= {"samples": 1, "temperature": 0.0}
    elif asked.get("temperature"):
        asked["contrast"] = None
    return asked


def run(flags: argparse.Namespace) -> int:
    """Runs the audit and returns the exit code."""
    asked = battery_of(flags)
    prompts = given.read_lines(flags.everyday) if flags.everyday else ()

    from dit_jax.auditing.run_audit import audit
    from dit_jax.auditing.settings import make_settings
    from dit_jax.auditing.targets import list_targets
    from dit_jax.deltas.detect import look_for_adapter
    from dit_jax.deltas.truncation import check_svd_rank

    found = look_for_adapter(flags.adapter) if flags.adapter else None
    model = given.load_base(flags)
    settings = make_settings(
        model, flags.adapter, asked, prompts, flags.system, flags.batch_size, found=found
    )
    condition = flags.fail_on
    if condition and condition[0] in ("hidden", "right") and settings.calibration is None:
        raise DitError(
            f"--fail-on {condition[0]} needs a calibration of the adapter for these questions: run 'python -m "
            "dit_jax.calibrate', or use another measure"
        )
    if flags.svd_rank is not None:
        check_svd_rank(flags.svd_rank, model.config)
    how = {"svd_rank": flags.svd_rank, "align": flags.align}
    settings = dataclasses.replace(settings, facts={**settings.facts, **how})
    targets = list_targets(flags.diffs, model, flags.split, **how)
    if flags.benign:
        settings = dataclasses.replace(settings, benign=_reference(flags.benign, model, **how))
    if flags.triggers:
        settings = dataclasses.replace(
            settings, tried=_candidates(flags.triggers, settings.prompts)
        )
    out = flags.out
    diffs, questions = len(targets), len(settings.battery.questions)
    show(f"{plural(diffs, 'diff')}, {plural(questions, 'question')} each", error=True)
    rows = audit(settings, targets, out, flags.jobs)
    if rows is None:
        show(f"done; the last of the other jobs writes {out / 'audit.html'}")
        return 0
    for verdict in dict.fromkeys(row["verdict"] for row in rows):
        show(f"{sum(row['verdict'] == verdict for row in rows):5} {verdict}")
    show(f"audit: {out / 'audit.html'}")
    failing = [row["name"] for row in rows if condition and _fails(row, *condition)]
    if failing:
        name, sign, limit = condition
        more = f" and {len(failing) - 5} more" if len(failing) > 5 else ""
        # Names of a stranger's folders may hold line breaks.
        shown = printable(", ".join(failing[:5]))
        show(f"--fail-on {name}{sign}{limit:g}: {shown}{more}", error=True)
    if all("error" in row for row in rows):
        raise DitError(f"no diff could be read. {rows[0]['error']}")
    return EXIT_FOUND if failing else 0


def _reference(given: Sequence[str], model: Any, **how: Any) -> dict[str, list[float]]:
    """`weights.reference` of the diffs of --benign. Raises DitError: one cannot be read, or there are too few."""
    from dit_jax.auditing import weights
    from dit_jax.auditing.targets import list_targets

    spectra = []
    for target in list_targets(given, model, **how):
        if target.read is None:
            raise DitError(target.problem)
        spectra.append(weights.spectrum(target.read().delta))
    if len(spectra) < FEWEST_BENIGN:
        raise DitError(
            f"--benign needs {FEWEST_BENIGN} diffs or more to say what is usual, not {len(spectra)}"
        )
    return weights.reference(spectra)


def _candidates(names: Sequence[str], prompts: Sequence[str]) -> Any:
    """The candidates of --triggers. Raises DitError: a name is no behaviour with a trigger."""
    from dit_jax.evaluate import trigger_scan
    from dit_jax.organisms.behaviours import BEHAVIOURS

    behaviours = list(BEHAVIOURS) if "all" in names else list(names)
    return trigger_scan.candidates(prompts[: trigger_scan.QUESTIONS], behaviours)


def _fails(row: dict[str, Any], name: str, sign: str, limit: float) -> bool:
    """Whether a diff meets the condition of --fail-on. What cannot be read or measured meets it: it was not cleared."""
    if "error" in row:
        return True
    places = [row, row["reading"], row["score"] or {}]
    value = next((place[name] for place in places if name in place), None)
    if value is None:
        return name != "right"  # no name, so no right one
    return {">": value > limit, ">=": value >= limit, "<": value < limit, "<=": value <= limit}[
        sign
    ]


def _job(text: str) -> str:
    check_part(text, "--jobs")
    return text


def _condition(text: str) -> tuple[str, str, float]:
    match = _CONDITION.fullmatch(text)
    try:
        if match and match[1] in _MEASURES:
            return match[1], match[2], float(match[3])
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"must be like 'hidden>0.9', with one of {', '.join(_MEASURES)}, not {text!r}"
    )
