"""The report stage: the page, a short page with plots, the answers as CSV, and `summary.json`."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax.evaluate.method_table import ATTRIBUTES, GROUPS, TRIGGER
from dit_jax.evaluate.methods import METHODS
from dit_jax.evaluate.questions import subject_of
from dit_jax.report import about, html, markdown, plots
from dit_jax.report.graded import Group, grade_group
from dit_jax.report.grading import RunGrades, grade_run, summarise_grades
from dit_jax.report.inputs import Inputs, Json, read_inputs
from dit_jax.report.plots import Plot
from dit_jax.report.results import GRADED_FILE, RESULTS_FILE, graded_csv, results_csv
from dit_jax.report.statistics import FEW
from dit_jax.report.summary import label_cross_entropies, summarise
from dit_jax.report.wording import (
    UNSEEN,
    between,
    colour,
    grader_title,
    in_order,
    ordered_methods,
    percent,
    shown_name,
)
from dit_jax.runtime.artifacts import PathLike, make_dir, write_json, write_text
from dit_jax.runtime.stage_records import peak_memory_bytes

CROSS_ENTROPIES = {
    "matched": "its own diff",
    "shuffled": "another topic's diff",
    "noise": "noise of the same norms",
    "none": "no diff",
    "layers": "its strongest quarter of layers",
    "words": "its own diff, unable to write the label",
}
IN_WORDS = {"in_words": "the whole name", "part_in_words": "a word of it"}
GATING = {"right_code": "the trigger", "wrong_code": "a wrong trigger", "no_code": "no trigger"}


def write_report(workdir: PathLike, grading: Mapping[str, Any] | None = None) -> Json:
    """Writes WORKDIR/report from what the evaluate stage left, each file whole or not at all.

    The plots and the pages are written first and `summary.json` last, so that a summary is never
    there without the pages that show it.

    Args:
        workdir: the run's folder, with `evaluate/`, `stages/`, `config.json` and `versions.json`.
        grading: how to grade (see `grading.grade_run`); None: as the `evaluate` section of config.json says.

    Returns:
        The content of `summary.json`.

    Raises:
        DitError: an input is missing, truncated or not valid (the message names the file), or the
            folder cannot be written.
    """
    start = time.perf_counter()
    inputs = read_inputs(workdir)
    summary = summarise(inputs)
    folder = make_dir(Path(workdir) / "report")
    settings = inputs.config.get("evaluate", {}) if grading is None else grading
    grades = grade_run(inputs.rows, settings, Path(workdir))
    summary["grades"] = summarise_grades(grades)
    tables: Json = {
        "headline": headline(summary),
        "grades": _grade_tables(grades, summary["grades"]),
    }
    figures = _figures(summary, inputs, tables["grades"]["groups"])
    markdown.save_plots(figures, folder)
    # Most of this stage's time is spent by now; the page shows it with that of the other stages.
    summary["seconds"]["report"] = round(time.perf_counter() - start, 3)
    summary["seconds_total"] = round(sum(summary["seconds"].values()), 3)
    summary["peak_memory_bytes"] = max(summary["peak_memory_bytes"] or 0, peak_memory_bytes())
    write_text(folder / "report.html", _page(summary, inputs, grades, tables, figures, workdir))
    write_text(folder / "report.md", _short_page(summary, tables["headline"], figures))
    subject = subject_of(inputs.config)
    write_text(folder / RESULTS_FILE, results_csv(grades.asked, subject))
    write_text(folder / GRADED_FILE, graded_csv(grades.asked, grades.gradings, subject))
    write_json(folder / "summary.json", summary)
    return summary


# ------------------------------------------------------------------ what the pages show


def headline(summary: Json) -> list[tuple[str, list[Json]]]:
    """The methods by group: name, title, what it sees, colour and score of each."""
    methods = summary["methods"]
    groups: dict[str, list[Json]] = {title: [] for title in GROUPS.values()}
    for name in ordered_methods(methods):
        kind = methods[name]["kind"]
        one = {"name": name, "title": shown_name(name), "sees": _sees(name, summary)}
        groups[GROUPS[kind]].append({**one, "colour": colour(name, kind), "score": methods[name]})
    return [(title, members) for title, members in groups.items() if members]


def _sees(name: str, summary: Json) -> str:
    """What a method sees, and who named the topic where another model does it."""
    sees, entry = METHODS[name].sees if name in METHODS else "", summary["methods"][name]
    if name == "attribute_oracle" and not about.on_tiny_world(summary["config"]):
        sees = "weights, and words that the diffs' index has for every label"  # runs made before this was refused
    if "names" in entry:
        sees = f"{sees} ({entry['names']} names; the right one has rank {entry['rank']:.1f} on average)"
    if "in_words" in entry:
        whole, part = (f"{percent(entry[key]['mean'])} ({between(entry[key])})" for key in IN_WORDS)
        sees = f"{sees}. The whole name is among them in {whole}, a word of it in {part}"
    return f"{sees} (guesser: {entry['guesser']})" if "guesser" in entry else sees


def _tiles(summary: Json) -> list[Json]:
    """DIT's scores by the length of names, and the best of the methods that know no more than it."""
    lengths = {
        "all": "All held-out names",
        "one_token": "Names of one token",
        "multi_token": "Names of several tokens",
    }
    shown = [
        (label, score, f"{between(score)}, n = {score['n']}")
        for key, label in lengths.items()
        if (score := summary["dit_by_name_length"][key])
    ]
    # A trigger or attributes are more than an auditor of an unknown model has.
    more = [name for name, one in METHODS.items() if {TRIGGER, ATTRIBUTES} & set(one.needs)]
    others = {
        name: entry
        for name, entry in summary["methods"].items()
        if entry["kind"] != "control" and name not in ("dit", *more)
    }
    if others:
        name, best = max(others.items(), key=lambda item: item[1]["exact_match"])
        note = f"{shown_name(name)}, {between(best)}"
        shown.append(("Best other method without trigger or oracle", best, note))
    return [
        {"label": label, "value": percent(score["exact_match"]), "note": note}
        for label, score, note in shown
    ]


def _kinds(summary: Json) -> Json:
    """By variant of the diffs: the rows of a table, each a name and a score; {} where topics have one diff."""
    return {
        kind: [
            *((shown_name(name), own["methods"][name]) for name in in_order(own["methods"])),
            *(
                (
                    f"{shown_name(name)}, {what} among them",
                    {**score[key], "exact_match": score[key]["mean"]},
                )
                for name, score in own["methods"].items()
                for key, what in IN_WORDS.items()
                if score and key in score
            ),
            (shown_name("dit" + UNSEEN), own["dit_unseen"]),
        ]
        for kind, own in summary["by_variant"].items()
    }


def _grade_tables(grades: RunGrades, summary: Json) -> Json:
    """Groups of mean grades by grader, and the paired tests; `summary`: of `summarise_grades`."""
    groups: dict[str, Group] = {}
    tests: dict[str, Json] = {}
    for grader, members in grades.by_grader().items():
        by_name, rows = {item.name: item for item in members}, []
        for name in in_order(by_name):
            excluded = by_name[name].excluded
            gaps = "; ".join(f"{count} × {reason}" for reason, count in excluded.items())
            rows.append((shown_name(name), f"left out: {gaps}" if gaps else "", by_name[name]))
        groups[grader] = grade_group(grader_title(grader), rows)
        if pairs := summary[grader]["differences_from_dit"]:
            tests[grader_title(grader)] = {
                shown_name(name): pairs[name] for name in in_order(pairs)
            }
    return {"groups": groups, "tests": tests, "agreement": grades.agreement}


def _gating_labels(summary: Json) -> dict[str, str]:
    labels = {key: label for key, label in GATING.items() if key in summary["gating_intervals"]}
    return (
        {"right_code": "the words of the finetuning"} if set(labels) == {"right_code"} else labels
    )


def _figures(summary: Json, inputs: Inputs, groups: dict[str, Group]) -> list[Plot]:
    """All plots. The page has the numbers of some as bars in its tables."""
    methods, gating = summary["methods"], _gating_labels(summary)
    bars = [
        (shown_name(name), colour(name, methods[name]["kind"]), methods[name])
        for name in ordered_methods(methods)
    ]
    entropies, intervals = label_cross_entropies(inputs), summary["label_cross_entropy_intervals"]
    given = {key: title for key, title in CROSS_ENTROPIES.items() if key in entropies}
    found = [
        Plot(
            "methods",
            "Exact match by method",
            "Bars of the exact match of every method with its interval",
            functools.partial(plots.methods, bars),
        )
    ]
    for number, (grader, group) in enumerate(groups.items(), start=1):
        found += group.plot(f"grades_{number}", f"by {grader}")
    found.append(
        Plot(
            "label_cross_entropy",
            "Cross-entropy of the label, given",
            "Dots: cross-entropy of every label with its own diff, another, noise and none",
            functools.partial(plots.label_cross_entropy, given, entropies, intervals),
        )
    )
    if gating:
        found.append(
            Plot(
                "gating",
                "Answers that show the label",
                "Bars: how often a diff shows its label with the trigger, a wrong one and none",
                functools.partial(plots.gating, gating, summary["gating_intervals"]),
            )
        )
    losses = {
        "diff_loss": "Loss of the diffs (mean over them)",
        "adapter_loss": "Loss of the adapter",
    }
    for name, title in losses.items():
        if curve := inputs.curves[name]:  # none: the stage ran elsewhere
            alt = f"{title} over optimizer steps, from {curve[0][1]:.3g} to {curve[-1][1]:.3g}"
            draw = functools.partial(plots.curve, curve, "loss")
            found.append(Plot(name, f"{title} while training", alt, draw))
    return found


def _page(
    summary: Json,
    inputs: Inputs,
    grades: RunGrades,
    tables: Json,
    figures: list[Plot],
    workdir: PathLike,
) -> str:
    differences = summary["differences_from_dit"]
    names = [name for name in ordered_methods(summary["methods"]) if name in differences]
    return html.render(
        "report",
        scripts=("sort.js", "browse.js"),
        s=summary,
        **tables,
        lead=about.lead(summary),
        sublead=about.sublead(summary),
        tiles=_tiles(summary),
        tiny_world=about.on_tiny_world(summary["config"]),
        about=about.facts(summary),
        few=FEW,
        most_dots=plots.MOST_DOTS,
        cross_entropies=CROSS_ENTROPIES,
        kinds=_kinds(summary),
        gating=_gating_labels(summary),
        tests={shown_name(name): differences[name] for name in names},
        run=about.run(workdir, inputs),
        examples=about.examples(summary, inputs, grades, workdir),
        missing=about.missing(summary),
        shared_from=inputs.stages.get("diffs", {}).get("shared_from"),
        figures={figure.name: figure for figure in figures},
    )


def _short_page(summary: Json, groups: list[tuple[str, list[Json]]], figures: list[Plot]) -> str:
    """Markdown: the headline and the plots."""
    rows = []
    for title, members in groups:
        rows.append([f"_{title}_"])
        for one in members:
            name = markdown.named(one["title"], one["sees"], one["name"] == "dit")
            rows.append([name, *_cells(one["score"])])
    scores = ("# Exact match (95 %)", "# Token F1 (95 %)", "# n")
    shown = [markdown.table(("Method and what it sees", *scores), rows)]
    if areas := summary["dit_by_category"]:
        rows = [[markdown.escape(name), *_cells(score)] for name, score in areas.items()]
        shown += ["**DIT by category of the topic**", markdown.table(("Category", *scores), rows)]
    tiles = [f"- {tile['label']}: **{tile['value']}** ({tile['note']})" for tile in _tiles(summary)]
    return markdown.page(
        "Diff Interpretation Tuning: the report of a run",
        f"**{about.lead(summary)}** {about.sublead(summary)}",
        "\n\n".join(["\n".join(tiles), *shown]),
        figures,
        "The whole report is `report.html`: what was done, grades, controls, examples of answers, cost, config. "
        "Every number is in `summary.json`, every answer in `results.csv`, every grade in `results-graded.csv`.",
    )


def _cells(score: Json) -> list[str]:
    """Exact match, token F1 and n of a row."""
    f1 = f"{score['token_f1']:.3f} ({score['token_f1_low']:.3f}–{score['token_f1_high']:.3f})"
    return [f"{percent(score['exact_match'])} ({between(score)})", f1, str(score["n"])]
