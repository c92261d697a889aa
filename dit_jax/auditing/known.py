"""Diffs whose truth is known, asked as an audit asks: what a calibration is made from."""

from collections.abc import Sequence

from dit_jax.api import Diff
from dit_jax.auditing.battery import Reading, interview, noise_of
from dit_jax.auditing.calibration import Known
from dit_jax.auditing.settings import Settings
from dit_jax.auditing.targets import Target, in_batches
from dit_jax.data.labels import NONE, exact_match, normalise
from dit_jax.diff_batches import Given, together
from dit_jax.errors import DitError
from dit_jax.runtime.progress import Progress


def measure(settings: Settings, targets: Sequence[Target]) -> list[Known]:
    """Each diff, noise of its norms, and no diff at all, as `calibration.calibrate` takes them.

    Raises:
        DitError: a diff cannot be read, or has no label.
    """
    column = (settings.facts["trained_on"] or {}).get("label") or "label"
    found: list[Known] = []
    done = 0

    def ask(given: Given) -> list[Reading]:
        model, adapter, battery = settings.model, settings.adapter, settings.battery
        size = settings.batch_size
        return interview(model, given, adapter, battery, size, measure_none=False, first=done)

    with Progress("calibrate", len(targets)) as progress:
        for batch in in_batches(targets, settings.model, settings.diffs_at_once):
            diffs = []
            for _, diff in batch:
                if isinstance(diff, DitError):
                    raise diff
                diffs.append(diff)
            labels = [
                _label(diff, target, column) for (target, _), diff in zip(batch, diffs, strict=True)
            ]
            deltas = [diff.delta for diff in diffs]
            given = together(deltas)
            own = ask(given)
            noise = noise_of(deltas, settings.battery.seed + done)
            controls = ask(noise)
            for i, (reading, control) in enumerate(zip(own, controls, strict=True)):
                hidden = normalise(labels[i]) != NONE
                right = hidden and exact_match(reading.name, labels[i])
                found.append(Known(reading.features, hidden, right, done + i))
                found.append(_nothing(control, done + i))
            if not done:
                (bare,) = ask(given.reordered([0]).nothing())
                found.append(_nothing(bare, 0))
            done += len(batch)
            progress.advance(len(batch))
    return found


def _nothing(reading: Reading, group: int) -> Known:
    return Known(reading.features, False, False, group)


def _label(diff: Diff, target: Target, column: str) -> str:
    label = diff.label
    if column != "label" and label is not None and normalise(label) != NONE:
        label = diff.metadata.get(column)
    if not isinstance(label, str) or not label:
        raise DitError(
            f"{target.name} has no {column}: calibration needs diffs whose truth is known"
        )
    return label
