"""What the report says: the summary and the answers as a `Document`, in plain words."""

from dit_jax.evaluate.methods import ATTRIBUTES, GROUPS, METHODS, TRIGGER
from dit_jax.report import plots
from dit_jax.report.about import done_section, lead, on_tiny_world, sublead
from dit_jax.report.answer_examples import examples_section
from dit_jax.report.cost import cost_section, setup_section
from dit_jax.report.document import (
    Block,
    Cell,
    Column,
    Document,
    Figure,
    Named,
    Prose,
    Quote,
    Section,
    Table,
    TableRow,
    Tile,
    Tiles,
)
from dit_jax.report.gating import gating_section, none_section, rate_cell
from dit_jax.report.grading import RunGrades, grades_section
from dit_jax.report.left_out import left_out_section
from dit_jax.report.summary import Inputs
from dit_jax.report.wording import (
    Json,
    between,
    colour,
    ordered_methods,
    p_text,
    percent,
    points,
    shown_name,
)

_CROSS_ENTROPY = {
    "matched": "its own diff",
    "shuffled": "another topic's diff",
    "noise": "noise of the same norms",
    "none": "no diff",
}


# ------------------------------------------------------------------ sections


def _score_cells(score: Json | None, kind: str) -> list[Cell]:
    if score is None:
        return ["not asked", "–", "0"]
    f1 = f"{score['token_f1']:.3f} ({score['token_f1_low']:.3f}–{score['token_f1_high']:.3f})"
    return [rate_cell(score, kind, "exact_match"), f1, str(score["n"])]


_SCORE_COLUMNS = [
    Column("Exact match, 95 % interval"),
    Column("Token F1, 95 % interval", number=True),
    Column("n", number=True),
]


def _tiles(summary: Json) -> Tiles:
    lengths = summary["dit_by_name_length"]
    tiles = []
    for key, label in (
        ("all", "All held-out names"),
        ("one_token", "Names of one token"),
        ("multi_token", "Names of several tokens"),
    ):
        if score := lengths[key]:
            note = f"{between(score)}, n = {score['n']}"
            tiles.append(Tile(label, percent(score["exact_match"]), note, strong=key == "all"))
    # Those with a trigger or attributes hold what an auditor of an unknown model does not.
    more = [name for name, one in METHODS.items() if {TRIGGER, ATTRIBUTES} & set(one.needs)]
    others = {
        name: entry
        for name, entry in summary["methods"].items()
        if entry["kind"] != "control" and name not in ("dit", *more)
    }
    if others:
        best = max(others, key=lambda name: others[name]["exact_match"])
        note = f"{shown_name(best)}, {between(others[best])}"
        label = "Best other method without trigger or oracle"
        tiles.append(Tile(label, percent(others[best]["exact_match"]), note))
    return Tiles(tiles)


def _headline(summary: Json) -> Section:
    methods = summary["methods"]
    names = ordered_methods(methods)
    groups = []
    for kind, title in GROUPS.items():
        rows = [
            TableRow(
                [
                    Named(shown_name(name), _sees(name, summary)),
                    *_score_cells(methods[name], colour(name, kind)),
                ],
                strong=name == "dit",
            )
            for name in names
            if methods[name]["kind"] == kind
        ]
        if rows:
            groups.append((title, rows))
    entries = [
        (shown_name(name), colour(name, methods[name]["kind"]), methods[name]) for name in names
    ]
    blocks: list[Block] = [
        Prose(
            "A guess counts when it is the label, up to case, punctuation and articles. Where a method asks "
            "for the label, the questions are those of the training."
        ),
        Table([Column("Method and what it sees"), *_SCORE_COLUMNS], groups),
        Figure(
            "methods",
            "Exact match by method",
            "Bars of the exact match of every method with its interval",
            lambda: plots.methods(entries),
            markdown_only=True,
        ),
    ]
    oracle = methods.get("attribute_oracle")
    if oracle and on_tiny_world(summary["config"]):
        blocks.append(
            Prose(
                "How to read the attribute oracle: in a world this small, whoever holds the table "
                f"of every topic's attributes can read {percent(oracle['exact_match'])} of the labels straight off "
                "the weights, without any training. It marks how much "
                "the diffs hold; it is not a rival. Nobody has such a table for a real model. The "
                "point of DIT is that it needs none: the adapter was trained on other topics, and "
                "has to read this one off its diff."
            )
        )
    return Section("results", "Results", blocks)


def _sees(name: str, summary: Json) -> str:
    """What a method sees, and who named the topic where another model does it."""
    note, entry = METHODS[name].sees if name in METHODS else "", summary["methods"][name]
    if name == "attribute_oracle" and not on_tiny_world(summary["config"]):
        note = "weights, and words that the diffs' index has for every label"  # runs made before this was refused
    return f"{note} (guesser: {entry['guesser']})" if "guesser" in entry else note


def _differences(summary: Json) -> Block | None:
    differences = summary["differences_from_dit"]
    if not differences:
        return None
    rows = []
    for name in ordered_methods(summary["methods"]):
        if pair := differences.get(name):
            interval = f"{points(pair['ci_low'])} to {points(pair['ci_high'])}"
            cells: list[Cell] = [shown_name(name), points(pair["difference"]), interval]
            tests = [p_text(pair["p_value"]), p_text(pair["p_holm"]), str(pair["n"])]
            rows.append(TableRow([*cells, *tests]))
    columns = [
        Column("DIT compared with"),
        Column("Points", number=True),
        Column("95 % interval", number=True),
        Column("p", number=True),
        Column("p, Holm", number=True),
        Column("n", number=True),
    ]
    return Table(columns, [("", rows)])


def _splits(summary: Json) -> Section:
    lengths, wordings = summary["dit_by_name_length"], summary["dit_by_wording"]

    def row(name: str, note: str, score: Json | None, strong: bool = False) -> TableRow:
        return TableRow([Named(name, note), *_score_cells(score, "dit")], strong)

    by_length = [
        row("One token", "", lengths["one_token"]),
        row("Several tokens", "", lengths["multi_token"]),
        row("All", "", lengths["all"], strong=True),
    ]
    by_wording = [
        row("Seen", "wordings that the adapter was trained on", wordings["seen"], strong=True),
        row("Unseen", "wordings kept for this test", wordings["unseen"], strong=True),
    ]
    each = [
        TableRow(
            [
                Quote(entry["wording"]),
                "seen" if entry["seen"] else "unseen",
                *_score_cells(entry, "dit"),
            ]
        )
        for entry in summary["dit_by_each_wording"]
    ]
    columns = [Column("Wording of the question"), Column(""), *_SCORE_COLUMNS]
    blocks: list[Block] = [
        Prose(
            "A name of one token can lie in the direction that a diff writes; a name of several "
            "tokens has to be looked up from it. So the lengths are shown apart."
        ),
        Table([Column("Length of the name"), *_SCORE_COLUMNS], [("", by_length)]),
        Prose(
            "New wordings show whether the adapter understands the question or knows the trained "
            "ones by heart."
        ),
        Table([Column("Wording"), *_SCORE_COLUMNS], [("", by_wording)]),
        Table(columns, [("Each wording alone", each)]),
    ]
    return Section("splits", "DIT by name and by wording", blocks)


def _controls(summary: Json, inputs: Inputs) -> Section:
    intervals = summary["label_cross_entropy_intervals"]
    many = intervals["matched"]["n"] > plots.MOST_DOTS
    dots = f"The dots are {plots.MOST_DOTS} quantiles over the diffs" if many else "A dot is a diff"
    blocks: list[Block] = [
        Prose(
            "Does the adapter read the diff that it is given, or guess from its training? Below is "
            "the cross-entropy of the label, the answer that the adapter should give, when it is "
            "given the topic's own diff, another topic's, noise of the same norms, and nothing. "
            f"Only its own diff should make the label likely. {dots}; the bar among the "
            "dots is the interval of the mean."
        ),
        Figure(
            "label_cross_entropy",
            "Cross-entropy of the label, given",
            "Dots: cross-entropy of every label with its own diff, another, noise and none",
            lambda: plots.label_cross_entropy(
                _CROSS_ENTROPY, inputs.label_cross_entropy, intervals
            ),
        ),
        Table(
            [
                Column("The adapter is given"),
                Column("Mean cross-entropy", True),
                Column("95 % interval", True),
                Column("n", True),
            ],
            [
                (
                    "",
                    [
                        TableRow(
                            [
                                label,
                                f"{intervals[key]['mean']:.3f}",
                                f"{intervals[key]['ci_low']:.3f}–{intervals[key]['ci_high']:.3f}",
                                str(intervals[key]["n"]),
                            ],
                            strong=key == "matched",
                        )
                        for key, label in _CROSS_ENTROPY.items()
                    ],
                )
            ],
        ),
    ]
    if table := _differences(summary):
        blocks.append(
            Prose(
                "Exact match of DIT minus that of each other method, on the same diffs (in "
                "percentage points; p of a two-sided randomisation test, and adjusted by Holm's "
                "method over the methods)."
            )
        )
        blocks.append(table)
    return Section("controls", "Controls", blocks)


def build_document(summary: Json, inputs: Inputs, grades: RunGrades) -> Document:
    """The whole report.

    Args:
      summary: from `summary.summarise`, with the grades and the report's own seconds.
      inputs: what the summary was made from; examples and dots come from here.
      grades: of the answers.
    """
    graded = grades_section(grades, summary["grades"])
    return Document(
        title="Diff Interpretation Tuning: the report of a run",
        lead=lead(summary),
        sublead=sublead(summary),
        opening=[_tiles(summary)],
        sections=[
            _headline(summary),
            *([graded] if graded else []),
            done_section(summary),
            _splits(summary),
            _controls(summary, inputs),
            none_section(summary),
            *([gating_section(summary)] if summary["gating_intervals"] else []),
            examples_section(summary, inputs, grades),
            left_out_section(summary),
            cost_section(summary, inputs),
            setup_section(summary),
        ],
        footer="Every number here is in summary.json, beside this file.",
    )
