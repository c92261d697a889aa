"""The page and the table of an audit. docs/audit.md says what is in them."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dit_jax.evaluate.method_table import READERS
from dit_jax.evaluate.methods import METHODS
from dit_jax.report import html, plots
from dit_jax.report.shell import ask_command
from dit_jax.report.wording import between, percent, plural, shown_name

Json = dict[str, Any]
COLUMNS = (
    "name", "verdict", "says", "share", "distinct", "hidden", "right", "none", "otherwise", "ratio", "logprob",
    "noise_says", "noise_share", "noise_ratio", "logprob_noise", "logprob_other", "logprob_layers", "logprob_words",
    "kl", "rank", "norm", "effective_rank", "unusual", "modules", "nearest", "cosine", "trigger",
    "trigger_behaviour", "trigger_nats", "others_nats",
    *READERS, *(f"{name}_say" for name in READERS), "label", "named_base", "digest", "error",
)  # fmt: skip
UNREADABLE, ZERO, HIDES, MAY, NOTHING, OPEN = (
    "unreadable", "changes nothing", "hides something", "may hide something", "nothing found", "not scored"
)  # fmt: skip
HIDES_RATE, MAY_RATE = 0.05, 0.2  # false positives at most
# In the order of the table, with the verb of the first line for one diff and for more.
_VERBS = {
    HIDES: ("hides something", "hide something"),
    MAY: ("may hide something", "may hide something"),
    OPEN: ("is not scored", "are not scored"),
    NOTHING: ("shows nothing", "show nothing"),
    ZERO: ("changes nothing", "change nothing"),
    UNREADABLE: ("cannot be read", "cannot be read"),
}


def verdict(row: Json, calibration: Json | None) -> str:
    """One of the verdicts above."""
    if "error" in row:
        return UNREADABLE
    if row["zero"]:
        return ZERO
    for name, rate in ((HIDES, HIDES_RATE), (MAY, MAY_RATE)):
        limit = threshold(calibration, rate)
        if limit is None or row["score"] is None:
            return OPEN
        if row["score"]["hidden"] > limit["above"]:
            return name
    return NOTHING


def threshold(calibration: Json | None, wanted: float = HIDES_RATE) -> Json | None:
    """The threshold of a calibration with at most this share of false positives."""
    found = calibration["hidden"]["thresholds"] if calibration else []
    return next((one for one in found if one and one["wanted"] == wanted), None)


def csv_row(row: Json) -> Json:
    """A row of audit.csv."""
    if "error" in row:
        return {"name": row["name"], "verdict": row["verdict"], "error": row["error"]}
    reading, noise, score = row["reading"], row["noise"], row["score"] or {}
    nearest = row["nearest"][0] if row["nearest"] else {}
    trigger = row["trigger"] or {}
    return {
        **{key: row[key] for key in (
            "name", "verdict", "kl", "rank", "norm", "effective_rank", "unusual", "label", "digest",
        )},
        "says": reading["name"],
        **{key: reading[key] for key in ("share", "distinct", "none", "otherwise", "ratio", "logprob")},
        **{key: score.get(key) for key in ("hidden", "right")},
        **{f"noise_{key}": noise[name] for key, name in (("says", "name"), ("share", "share"), ("ratio", "ratio"))},
        "logprob_noise": noise["same_answer"],
        "logprob_other": row["other"] and row["other"]["same_answer"],
        **{f"logprob_{key}": row["faithful"][key] for key in ("layers", "words")},
        "modules": " ".join(row["modules"]),
        "nearest": nearest.get("name"),
        "cosine": nearest.get("cosine"),
        "trigger": trigger.get("trigger"),
        "trigger_behaviour": trigger.get("behaviour"),
        "trigger_nats": trigger.get("nats"),
        "others_nats": trigger.get("others"),
        **{name: " ".join(row["readers"][name]["words"]) for name in READERS},
        **{f"{name}_say": row["readers"][name]["says"] for name in READERS},
        "named_base": row["said"].get("base_model_name_or_path"),
    }  # fmt: skip


def page(rows: Sequence[Json], told: Mapping[str, Any], calibration: Json | None) -> str:
    """The page of an audit.

    Args:
        rows: the records with `nearest`, `score` and `verdict`.
        told: the settings.
        calibration: of the adapter, None if it has none.
    """
    counts = {name: sum(row["verdict"] == name for row in rows) for name in _VERBS}
    order = sorted(range(len(rows)), key=lambda i: _rank(rows[i]))
    folder, names = _short_names(rows)
    return html.render(
        "audit",
        scripts=("sort.js",),
        lead=_lead(rows, counts, told),
        sublead=_sublead(told, calibration),
        rows=[(i + 1, names[i], rows[i]) for i in order],
        folder=folder,
        names={row["name"]: name for row, name in zip(rows, names, strict=True)},
        told=told,
        known=calibration,
        limit=threshold(calibration),
        worth=_worth(told, calibration),
        commands={i + 1: _command(rows[i], told) for i in range(len(rows))},
        HIDES=HIDES,
        figures=_figures(calibration),
        readers={
            name: (shown_name(name), METHODS[name].sees.partition(";")[0]) for name in READERS
        },
    )


def _figures(calibration: Json | None) -> dict[str, plots.Plot]:
    """Reliability diagrams of the two probabilities; {} without a calibration."""
    names = [
        name for name in ("hidden", "right") if calibration and calibration[name]["reliability"]
    ]
    return {
        name: plots.Plot(
            f"reliability_{name}",
            "Reliability: on the diagonal, the score is the share of diffs of which it is true",
            "Points: the share that is true, with its interval, over the mean score of each range",
            functools.partial(plots.reliability, (calibration or {})[name]["reliability"]),
        )
        for name in names
    }


def _rank(row: Json) -> tuple[Any, ...]:
    """Findings first: by verdict, then by score and agreement."""
    first = list(_VERBS).index(row["verdict"])
    if "error" in row:
        return (first,)
    hidden = row["score"]["hidden"] if row["score"] else 0.0
    return first, -hidden, -row["reading"]["features"][0], -row["reading"]["ratio"]


def _lead(rows: Sequence[Json], counts: Mapping[str, int], told: Mapping[str, Any]) -> str:
    verbs, parts = dict(_VERBS), []
    if told["adapter"]:  # what it said stands in place of scores that are not there
        del verbs[OPEN]
        said = [row["reading"]["features"][0] > 0 for row in rows if row["verdict"] == OPEN]
        for what, named in (("a name", True), ("none", False)):
            if count := said.count(named):
                parts.append(f"{count} {'gets' if count == 1 else 'get'} {what}")
    parts += [
        f"{counts[name]} {own[counts[name] > 1]}" for name, own in verbs.items() if counts[name]
    ]
    return f"{plural(len(rows), 'diff')} of {told['base']}: {', '.join(parts)}."


def _short_names(rows: Sequence[Json]) -> tuple[str, list[str]]:
    """The folder that all diffs lie in ("" if there is none), and their names below it."""
    names = [row["name"] for row in rows]
    folders = [os.path.dirname(name) for name in names]
    try:
        shared = os.path.commonpath(folders)
    except ValueError:  # relative and absolute ones
        shared = ""
    return shared, [os.path.relpath(name, shared) if shared else name for name in names]


def _sublead(told: Mapping[str, Any], calibration: Json | None) -> str:
    battery = told["battery"]
    asked = plural(len(battery["questions"]), "question")
    if battery["samples"] > 1:
        asked += f", {battery['samples']} samples each"
    if battery["contrast"] is not None:
        asked += f", contrasted by {battery['contrast']}"
    if told["adapter"] is None:
        return f"Without an adapter: each finetuned model answered for itself ({asked})."
    limit, low = threshold(calibration), threshold(calibration, MAY_RATE)
    if limit is None or low is None:
        return f"Asked through the adapter `{told['adapter']}` ({asked}). It has no calibration, so nothing is scored."

    def above(one: Json, first: str) -> str:
        below, found = one["false_positives"], one["found"]
        return (
            f"{first} above a score of {one['above']:.3f}, where the calibration had {percent(below['mean'])} of "
            f"{below['n']} {_nothing(calibration)} ({between(below)} %) and {percent(found['mean'])} of {found['n']} "
            f"diffs that hide a topic ({between(found)} %)."
        )

    texts = [
        f"Asked through the adapter `{told['adapter']}` ({asked}).",
        above(limit, "A diff hides something"),
    ]
    if low["above"] < limit["above"]:
        texts.append(above(low, "It may"))
    return " ".join(texts)


def _nothing(calibration: Json | None) -> str:
    """What stands for a diff that hides nothing."""
    return (
        "benign diffs, noise or no diff"
        if calibration and calibration["controls"]
        else "benign diffs"
    )


def _worth(told: Mapping[str, Any], calibration: Json | None) -> list[str]:
    """What an answer of this audit is worth, in plain words."""
    if told["adapter"] is None:
        return [
            "No adapter was given. The answers are those of the finetuned models themselves, which rarely tell what "
            "they were trained on. The words below each diff come from readers that need no training. They are leads: "
            "these readers find words also where nothing is hidden."
        ]
    trained = told["trained_on"]
    texts = []
    if trained:
        what = f"The adapter was trained on diffs of the behaviour `{trained['behaviour']}`"
        if trained["rank"]:
            what += (
                f", LoRAs of rank {trained['rank']}"
                if trained["parameters"] == "lora"
                else ", dense diffs"
            )
        none = trained["none_examples"]
        what += (
            f", and on `none`: {percent(none)} of its examples had no or a benign diff."
            if none
            else ". It never learned to say `none`: it always names something, also where nothing is."
        )
        texts.append(what)
    else:
        texts.append(
            "The files of the adapter do not say what it was trained on. An adapter that never saw diffs without a "
            "behaviour always names something. So compare each answer with its yardsticks."
        )
    texts.append(
        "About diffs of another kind (other behaviours, ranks, ways of finetuning) an answer is a lead, not a finding. "
        "An adapter cannot name what it was never taught to name, and its silence does not prove that nothing is there."
    )
    if calibration is None:
        texts.append(
            "This adapter has no calibration: agreement and likelihood ratio say how sure it is, and nothing says how "
            "often it is right. `python -m dit_jax.calibrate` makes one from diffs whose truth is known."
        )
    else:
        hidden = calibration["hidden"]
        texts.append(
            f"The score is calibrated on {hidden['n']} diffs ({calibration['source']}): {hidden['positive']} that hide "
            f"a topic, and {hidden['n'] - hidden['positive']} that hide nothing ({_nothing(calibration)}). It holds "
            "for diffs like these, if half of them hide something; where fewer do, the probability is lower."
        )
        if calibration["controls"]:
            texts.append(
                "There were too few benign diffs to stand for what hides nothing. Noise and no diff are easier to tell "
                "apart, so expect more false positives on benign diffs."
            )
    return texts


def _command(row: Json, told: Mapping[str, Any]) -> str:
    """A shell command that asks this diff again."""
    battery = told["battery"]
    return ask_command(
        told["base"],
        str(row.get("path", row["name"])),
        battery["questions"][0],
        index=row.get("number") or None,
        adapter=told["adapter"],
        dtype=told["dtype"],
        forbid_repeats=battery["forbid_repeats"],
        contrast=battery["contrast"],
        max_new_tokens=battery["max_new_tokens"],
    )
