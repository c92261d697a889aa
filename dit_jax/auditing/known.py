"""Diffs whose truth is known, asked as an audit asks: what a calibration is made from."""

import dataclasses
from collections.abc import Sequence

from dit_jax.api import Diff
from dit_jax.auditing.battery import Reading, interview, noise_of
from dit_jax.auditing.calibration import FEWEST, Known
from dit_jax.auditing.settings import Settings
from dit_jax.auditing.targets import Target, in_batches
from dit_jax.data.labels import NONE, exact_match, normalise
from dit_jax.diff_batches import Given, even_batch, together
from dit_jax.errors import DitError
from dit_jax.runtime.progress import Progress


def measure(settings: Settings, targets: Sequence[Target]) -> list[Known]:
    """Each diff as `calibration.calibrate` takes it. With few benign ones, noise in place of each and no diff, too.

    Raises:
        DitError: a diff cannot be read, or has no label.
    """
    found = _ask(settings, targets)
    if sum(not one.hidden for one in found) < FEWEST:
        found += _ask(settings, targets, noise=True)
    return found


def _ask(settings: Settings, targets: Sequence[Target], noise: bool = False) -> list[Known]:
    """What is known of the diffs; `noise`: of noise of their norms, and of no diff."""
    column = (settings.facts["trained_on"] or {}).get("label") or "label"
    found: list[Known] = []
    at_once = even_batch(len(targets), settings.diffs_at_once)
    rows = even_batch(at_once * settings.battery.answers, settings.batch_size)

    def ask(given: Given) -> list[Reading]:
        model, adapter, battery = settings.model, settings.adapter, settings.battery
        return interview(model, given, adapter, battery, rows, first=first)

    with Progress("calibrate: noise" if noise else "calibrate", len(targets)) as progress:
        for batch in in_batches(targets, settings.model, at_once):
            first = progress.done
            diffs = []
            for target, diff in batch:
                if isinstance(diff, DitError):
                    raise diff
                diffs.append((_label(diff, target, column), diff.delta))
            deltas = [delta for _, delta in diffs]
            if noise:
                readings = ask(noise_of(deltas, settings.battery.seed + first))
                found += [_control(one, first + i) for i, one in enumerate(readings)]
                if not first:
                    found.append(_control(ask(together(deltas[:1]).nothing())[0], 0))
            else:
                for i, reading in enumerate(ask(together(deltas))):
                    hidden = normalise(diffs[i][0]) != NONE
                    right = hidden and exact_match(reading.name, diffs[i][0])
                    found.append(_known(reading, hidden, right, first + i))
            progress.advance(len(batch))
    return found


def _control(reading: Reading, group: int) -> Known:
    return dataclasses.replace(_known(reading, False, False, group), control=True)


def _known(reading: Reading, hidden: bool, right: bool, group: int) -> Known:
    return Known(reading.evidence, reading.features, hidden, right, group)


def _label(diff: Diff, target: Target, column: str) -> str:
    label = diff.label
    if column != "label" and label is not None and normalise(label) != NONE:
        label = diff.metadata.get(column)
    if not isinstance(label, str) or not label:
        raise DitError(
            f"{target.name} has no {column}: calibration needs diffs whose truth is known"
        )
    return label
