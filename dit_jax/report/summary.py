"""The answers of a run, reduced to the numbers of `summary.json`."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dit_jax.data import labels
from dit_jax.errors import DitError
from dit_jax.formats.json_shape import is_number
from dit_jax.report.inputs import Inputs, Json, Row, seen, variant, variants
from dit_jax.report.statistics import (
    Estimate,
    bootstrap_mean,
    cluster_means,
    holm,
    paired_difference,
)
from dit_jax.report.triggers import summarise_scan, summarise_search

# What report/summary.json holds, and each of its methods.
SUMMARY_KEYS = (
    "methods", "differences_from_dit", "variant", "by_variant", "dit_by_name_length", "dit_by_category",
    "dit_by_wording", "dit_by_each_wording", "none", "none_intervals", "capability", "label_cross_entropy",
    "label_cross_entropy_intervals", "trigger_scan", "trigger_search", "gating", "gating_intervals", "seconds",
    "seconds_total", "cost", "excluded", "peak_memory_bytes", "config", "versions", "grades",
)  # fmt: skip
SCORE_KEYS = (
    "kind", "exact_match", "ci_low", "ci_high", "token_f1", "token_f1_low", "token_f1_high", "n", "by_name_length",
    "in_words", "part_in_words", "guesser", "names", "rank",
)  # fmt: skip


def summarise(inputs: Inputs) -> Json:
    """The content of `summary.json`, but for the grades and for the report's own seconds.

    `methods.<name>` is over all held-out names, asked in the wordings of the training; rates and
    cross-entropies are plain means, with their intervals under `<key>_intervals`. Where topics have several diffs, all
    of that is about the first variant, which `variant` names, and `by_variant` is about each.
    """
    kinds = variants(inputs.answered)
    answered = [
        row for row in inputs.answered if row["category"] != "topic" or variant(row) == kinds[0]
    ]
    topics = [row for row in answered if row["category"] == "topic"]
    dit = [row for row in answered if row["method"] == "dit"]
    dit_topics = [row for row in dit if row["category"] == "topic"]
    by_method: dict[str, list[Row]] = {}
    for row in filter(seen, topics):
        by_method.setdefault(row["method"], []).append(row)
    if "dit" not in by_method:
        raise DitError(
            "no answer of 'dit' to a wording of the training: run the stage 'evaluate' again"
        )
    contrasted = [row for row in answered if row["method"] == "dit_contrast"]
    none = {
        split: _none_rates(rows)
        for split, rows in {
            "seen": list(filter(seen, dit)),
            "unseen": list(itertools.filterfalse(seen, dit)),
            "contrasted_seen": list(filter(seen, contrasted)),
            "contrasted_unseen": list(itertools.filterfalse(seen, contrasted)),
        }.items()
        if rows or split in ("seen", "unseen")
    }
    cross_entropy = {
        key: interval(bootstrap_mean(values, rate=False))
        for key, values in label_cross_entropies(inputs).items()
    }
    gating = {key: interval(bootstrap_mean(x)) for key, x in inputs.gating.items() if x}
    memory: list[Any] = [record.get("peak_memory_bytes") for record in inputs.stages.values()]
    seconds = {stage: float(record["seconds"]) for stage, record in inputs.stages.items()}
    return {
        "methods": {name: _method(rows) for name, rows in by_method.items()},
        "differences_from_dit": paired_with_dit(
            {name: _per_unit(rows, _match) for name, rows in by_method.items()}, span=1.0
        ),
        "variant": kinds[0],
        "by_variant": _by_variant(inputs, kinds) if len(kinds) > 1 else {},
        "dit_by_name_length": _by_name_length(by_method["dit"]),
        "dit_by_category": _by_category(by_method["dit"]),
        "dit_by_wording": {
            "seen": _score(by_method["dit"]),
            "unseen": _score([row for row in dit_topics if not seen(row)]),
            "contrasted_unseen": _score(
                [r for r in contrasted if r["category"] == "topic" and not seen(r)]
            ),
        },
        "dit_by_each_wording": _by_wording(dit_topics),
        "none": _only_means(none["seen"]),
        "none_intervals": none,
        "capability": _capability(inputs.capability),
        "label_cross_entropy": _only_means(cross_entropy),
        "label_cross_entropy_intervals": cross_entropy,
        "trigger_scan": summarise_scan(inputs.rows),
        "trigger_search": summarise_search(inputs.rows),
        "gating": _only_means(gating),
        "gating_intervals": gating,
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "cost": inputs.cost,
        "excluded": {"diffs": dict(inputs.excluded), "answers": _gaps(inputs.rows)},
        "peak_memory_bytes": max((int(m) for m in memory if is_number(m)), default=None),
        "config": inputs.config,
        "versions": inputs.versions,
    }


# ------------------------------------------------------------------ scores over diffs


def _per_unit(rows: list[Row], score: Callable[[Row], float]) -> dict[Any, float]:
    """Mean score of each unit of chance: the diff, or without a diff the single answer."""
    units = [f"answer {i}" if row["diff"] is None else row["diff"] for i, row in enumerate(rows)]
    return dict(cluster_means([float(score(row)) for row in rows], units))


def _rate(rows: list[Row], score: Callable[[Row], float]) -> Estimate:
    return bootstrap_mean(list(_per_unit(rows, score).values()))


def _match(row: Row) -> float:
    return float(labels.exact_match(row["guess"], row["topic"]))


def _among(row: Row) -> float:
    return labels.share_among(row["words"], row["topic"])


def _score(rows: list[Row]) -> Json | None:
    """Exact match and token F1 with their intervals, n diffs; None without rows.

    Of readers whose answers have words also how often the whole name (`in_words`) or a word of it (`part_in_words`)
    is among these.
    """
    if not rows:
        return None
    match = _rate(rows, _match)
    f1 = _rate(rows, lambda row: labels.token_f1(row["guess"], row["topic"]))
    score: Json = {
        "exact_match": match.mean,
        "ci_low": match.low,
        "ci_high": match.high,
        "token_f1": f1.mean,
        "token_f1_low": f1.low,
        "token_f1_high": f1.high,
        "n": match.n,
    }
    if all("words" in row for row in rows):
        score["in_words"] = interval(_rate(rows, lambda row: _among(row) == 1))
        score["part_in_words"] = interval(_rate(rows, lambda row: _among(row) > 0))
    return score


def _by_name_length(rows: list[Row]) -> Json:
    return {
        "one_token": _score([row for row in rows if row["name_tokens"] == 1]),
        "multi_token": _score([row for row in rows if row["name_tokens"] > 1]),
        "one_word": _score([row for row in rows if len(row["topic"].split()) == 1]),
        "several_words": _score([row for row in rows if len(row["topic"].split()) > 1]),
        "all": _score(rows),
    }


def _by_category(rows: list[Row]) -> Json:
    """By category of the topics, in alphabetical order; {} where they have none."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.get("topic_category") or "no category"), []).append(row)
    return {name: _score(found[name]) for name in sorted(found)} if len(found) > 1 else {}


def _method(rows: list[Row]) -> Json:
    lengths = _by_name_length(rows)
    made = {"kind": rows[0]["kind"], **lengths.pop("all"), "by_name_length": lengths}
    if "rank" in rows[0]:  # a method that is given a list of names
        made |= {"names": rows[0]["names"], "rank": float(np.mean([row["rank"] for row in rows]))}
    guessers = sorted({str(row["guesser"]) for row in rows if row.get("guesser")})
    return made | ({"guesser": ", ".join(guessers)} if guessers else {})


def interval(estimate: Estimate) -> Json:
    """An estimate as `summary.json` has it."""
    low, high = estimate.low, estimate.high
    return {"mean": estimate.mean, "ci_low": low, "ci_high": high, "n": estimate.n}


def _only_means(intervals: Mapping[str, Json | None]) -> Json:
    return {key: None if value is None else value["mean"] for key, value in intervals.items()}


def label_cross_entropies(inputs: Inputs) -> dict[str, list[float]]:
    """Those of the first variant; the files have one for each held-out diff, in the order of the answers."""
    rows = [r for r in inputs.rows if r["method"] == "dit" and r["category"] == "topic"]
    own = {row["diff"]: variant(row) for row in rows}
    wanted = [kind == next(iter(own.values())) for kind in own.values()]
    return {
        key: [x for x, is_wanted in zip(values, wanted, strict=True) if is_wanted]
        if len(values) == len(wanted)
        else values
        for key, values in inputs.label_cross_entropy.items()
    }


def _by_variant(inputs: Inputs, kinds: list[str]) -> Json:
    """By variant: the scores of methods, DIT's in new wordings, how often it says none, what the gate measured."""
    found: Json = {}
    rows = inputs.answered
    for kind in kinds:
        own = [row for row in rows if row["category"] == "topic" and variant(row) == kind]
        methods = dict.fromkeys(row["method"] for row in own)
        dit = [row for row in own if row["method"] == "dit"]
        found[kind] = {
            "methods": {
                name: _score([row for row in own if row["method"] == name and seen(row)])
                for name in methods
            },
            "dit_unseen": _score([row for row in dit if not seen(row)]),
            "called_none": _none_rates([row for row in dit if seen(row)])["topics_called_none"],
            "gating": {
                key: interval(bootstrap_mean(shares))
                for key, shares in inputs.gating_by_variant.get(kind, {}).items()
                if shares
            },
        }
    return found


def _capability(measured: Json) -> Json:
    """The share of the base's right answers that diffs keep, with its interval; {} where it was not measured."""
    if not measured:
        return {}
    kept = bootstrap_mean(measured["kept"], rate=False)
    return {
        "facts": measured["facts"],
        "base_right": measured["base_right"],
        "kept": interval(kept),
    }


def _none_rates(rows: list[Row]) -> dict[str, Json | None]:
    """How often each category is called `none`; None where a category was not asked."""
    found: dict[str, Json | None] = {}
    for key, category in (("benign", "benign"), ("no_diff", "no_diff"), ("topics", "topic")):
        chosen = [row for row in rows if row["category"] == category]
        rate = _rate(chosen, lambda row: labels.called_none(row["guess"])) if chosen else None
        found[f"{key}_called_none"] = interval(rate) if rate else None
    return found


def _by_wording(rows: list[Row]) -> list[Json]:
    """Score of each wording of the question, those of the training first."""
    wordings = {str(row.get("wording")): seen(row) for row in rows}
    found = []
    for wording in sorted(wordings, key=lambda wording: not wordings[wording]):
        score = _score([row for row in rows if str(row.get("wording")) == wording]) or {}
        found.append({"wording": wording, "seen": wordings[wording], **score})
    return found


def _gaps(rows: list[Row]) -> Json:
    """Answers that are missing, by method and reason."""
    gaps: Json = {}
    for row in rows:
        if reason := row.get("gap"):
            counts = gaps.setdefault(row["method"], {})
            counts[str(reason)] = counts.get(str(reason), 0) + 1
    return gaps


# ------------------------------------------------------------------ pairs


def paired_with_dit(scores: Mapping[str, Mapping[Any, float]], span: float) -> Json:
    """The score of `dit` minus that of every other method, over the diffs that both have.

    Args:
        scores: by method, the score of each diff.
        span: the largest difference that two scores can have.

    Returns:
        By method: difference, interval, two-sided p, p adjusted by Holm's method over all of them, n.
    """
    dit = scores["dit"]
    pairs = {
        name: paired_difference(dit, other, span=span)
        for name, other in scores.items()
        if name != "dit" and any(diff in dit for diff in other)
    }
    adjusted = holm([pair.p_value for pair in pairs.values()])
    return {
        name: {
            "difference": pair.mean,
            "ci_low": pair.low,
            "ci_high": pair.high,
            "p_value": pair.p_value,
            "p_holm": p_holm,
            "n": pair.n,
        }
        for (name, pair), p_holm in zip(pairs.items(), adjusted, strict=True)
    }
