"""The numbers of the report on a synthetic workdir, its table, and messages for bad input."""

import csv
import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_run import (
    AREAS,
    GRADING,
    HOSTILE,
    KINDS,
    SEEN,
    answers,
    make_workdir,
    page,
    reported,
)

from dit_jax.data.labels import token_f1
from dit_jax.errors import DitError
from dit_jax.organisms.behaviours import get_behaviour
from dit_jax.report import sweep_table
from dit_jax.report.run_report import write_report
from dit_jax.report.statistics import bootstrap_mean
from dit_jax.report.summary import SCORE_KEYS, SUMMARY_KEYS
from dit_jax.report.terminal import (
    headline_table,
    kinds_table,
    plain_table,
    print_headline,
    rich_table,
)


@pytest.fixture(name="reported", scope="module")
def reported_fixture():
    return reported()


# ------------------------------------------------------------------ numbers


def test_summary_on_disk_is_what_was_returned(reported):
    workdir, summary = reported
    assert json.loads((workdir / "report/summary.json").read_text()) == summary
    assert set(summary) == set(SUMMARY_KEYS)  # what a sweep may ask for
    assert set.union(*map(set, summary["methods"].values())) == set(SCORE_KEYS)
    assert not [path.name for path in (workdir / "report").iterdir() if ".tmp" in path.name]


def test_every_method_is_scored_over_all_held_out_names_in_seen_wordings(reported):
    workdir, summary = reported
    rows = answers(workdir)
    assert set(summary["methods"]) == set(KINDS)
    for name, entry in summary["methods"].items():
        chosen = [r for r in rows if r["method"] == name and r["category"] == "topic"]
        chosen = [r for r in chosen if r["wording_seen"] and not r.get("gap")]
        diffs = {r["diff"] for r in chosen}
        # Every diff has equally many answers, so the mean over diffs is the mean over answers;
        # the synthetic guesses need no normalising except the hostile one, which is wrong.
        plain = np.mean([r["guess"] == r["topic"] for r in chosen])
        assert entry["exact_match"] == pytest.approx(plain), name
        assert entry["n"] == len(diffs) == (95 if name == "twenty_questions_trigger" else 96)
        assert entry["kind"] == KINDS[name]
        assert 0 <= entry["ci_low"] <= entry["exact_match"] <= entry["ci_high"] <= 1
        assert entry["token_f1"] >= entry["exact_match"] - 1e-9
        # The interval is over diffs, like that of the exact match.
        f1 = [
            np.mean([token_f1(r["guess"], r["topic"]) for r in chosen if r["diff"] == diff])
            for diff in sorted(diffs)
        ]
        expected = bootstrap_mean(f1)
        assert entry["token_f1"] == pytest.approx(expected.mean), name
        assert 0 <= entry["token_f1_low"] <= entry["token_f1"] <= entry["token_f1_high"] <= 1
        for key, bound in (("low", expected.low), ("high", expected.high)):
            assert entry[f"token_f1_{key}"] == pytest.approx(bound, abs=0.02), name
        shown = (
            f"{entry['token_f1']:.3f} ({entry['token_f1_low']:.3f}–{entry['token_f1_high']:.3f})"
        )
        for file in ("report.md", "report.html"):
            text = (workdir / "report" / file).read_text().replace("\\", "")  # Markdown escapes
            assert shown in text, name
    assert summary["methods"]["base_question"]["ci_high"] == pytest.approx(0.0377, abs=1e-3)


def test_splits_by_name_length_and_wording(reported):
    workdir, summary = reported
    lengths, wordings = summary["dit_by_name_length"], summary["dit_by_wording"]
    assert [lengths[k]["n"] for k in ("one_token", "multi_token", "all")] == [48, 48, 96]
    areas = summary["dit_by_category"]
    assert list(areas) == sorted([*AREAS, HOSTILE])
    assert [areas[name]["n"] for name in AREAS] == [32, 31, 32] and areas[HOSTILE]["n"] == 1
    for name, area in areas.items():
        right = [
            row["guess"] == row["topic"]
            for row in answers(workdir)
            if row["method"] == "dit" and row["topic_category"] == name and row["wording_seen"]
        ]
        assert area["exact_match"] == pytest.approx(np.mean(right))
    halves = [lengths[k]["exact_match"] for k in ("one_token", "multi_token")]
    assert lengths["all"]["exact_match"] == pytest.approx(np.mean(halves))
    dit = [r for r in answers(workdir) if r["method"] == "dit" and r["category"] == "topic"]
    for key, is_seen in (("seen", True), ("unseen", False)):
        right = [r["guess"] == r["topic"] for r in dit if r["wording_seen"] is is_seen]
        assert wordings[key]["exact_match"] == pytest.approx(np.mean(right))
    assert [w["seen"] for w in summary["dit_by_each_wording"]] == [True, True, False, False]


def test_none_rates_gating_cross_entropy_and_cost(reported):
    workdir, summary = reported
    dit = [r for r in answers(workdir) if r["method"] == "dit"]
    rows = [r for r in dit if r["wording_seen"]]
    for key, category in (
        ("benign_called_none", "benign"),
        ("no_diff_called_none", "no_diff"),
        ("topics_called_none", "topic"),
    ):
        share = np.mean([r["guess"] == "none" for r in rows if r["category"] == category])
        assert summary["none"][key] == pytest.approx(share)
        for split, seen in (("seen", True), ("unseen", False)):
            own = [r for r in dit if r["category"] == category and r["wording_seen"] is seen]
            share = np.mean([r["guess"] == "none" for r in own])
            assert summary["none_intervals"][split][key]["mean"] == pytest.approx(share)
    for name in ("gating", "label_cross_entropy"):
        table = json.loads((workdir / f"evaluate/{name}.json").read_text())
        assert summary[name] == pytest.approx({key: np.mean(table[key]) for key in table})
    seconds = summary["seconds"]
    assert list(seconds) == ["diffs", "train", "evaluate", "report"]
    assert summary["seconds_total"] == pytest.approx(sum(seconds.values()), abs=1e-3)
    assert summary["peak_memory_bytes"] >= 2_500_000_000
    assert summary["config"]["diffs"]["rank"] == 1 and summary["versions"]["jax"] == "0.10.2"


def test_paired_differences_agree_with_the_methods(reported):
    _, summary = reported
    dit = summary["methods"]["dit"]["exact_match"]
    assert set(summary["differences_from_dit"]) == set(KINDS) - {"dit"}
    for name, pair in summary["differences_from_dit"].items():
        expected = dit - summary["methods"][name]["exact_match"]
        # The pairs are the diffs that both answered: the guesser left one out.
        tolerance = 0.02 if name == "twenty_questions_trigger" else 1e-6
        assert pair["difference"] == pytest.approx(expected, abs=tolerance), name
        assert pair["p_value"] <= pair["p_holm"] <= 1
    assert summary["differences_from_dit"]["name_reading"]["p_value"] < 0.01


def test_the_same_inputs_give_the_same_page(tmp_path, reported):
    """Everything except the report's own seconds and memory is a function of the inputs."""
    workdir = make_workdir(tmp_path, hostile=True)
    summary = write_report(workdir, GRADING)

    def fixed(summary):
        own = ("seconds", "seconds_total", "peak_memory_bytes")
        return {key: value for key, value in summary.items() if key not in own}

    assert fixed(summary) == fixed(reported[1])
    for picture in (reported[0] / "report").glob("*.png"):
        assert (workdir / "report" / picture.name).read_bytes() == picture.read_bytes()


# ------------------------------------------------------------------ the terminal


def test_headline_table_is_text_in_a_pipe_and_rich_on_a_terminal(reported, monkeypatch, capsys):
    from rich.console import Console

    _, summary = reported
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    text = headline_table(summary)
    assert text == plain_table(summary)
    print_headline(summary)
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    assert len(lines) == 2 + len(KINDS)
    dit = summary["methods"]["dit"]
    assert lines[2].startswith("DIT ") and f"{100 * dit['exact_match']:.1f} %" in lines[2]
    for width in (60, 80, 100, 120):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(rich_table(summary, width))
        shown = console.export_text()
        assert "Question with trigger" in shown and "Attribute oracle" in shown
        assert (
            f"{100 * dit['exact_match']:.1f} %" in shown
            and max(map(len, shown.splitlines())) <= width
        )
        assert ("█" in shown, "token F1" in shown) == (width >= 120, width >= 80)


def test_the_report_imports_neither_jax_nor_what_draws(tmp_path):
    """It is made from files: every module of it can be imported where there is no model and no device."""
    code = (
        "import sys, pkgutil, importlib, dit_jax.report; "
        "modules = pkgutil.walk_packages(dit_jax.report.__path__, 'dit_jax.report.'); "
        "assert len([importlib.import_module(m.name) for m in modules]) > 8; "
        "heavy = ('jax', 'jaxlib', 'flax', 'matplotlib', 'torch', 'transformers', 'jinja2'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parent.parent
    run = functools.partial(subprocess.run, cwd=root, env=env, capture_output=True, text=True)
    result = run([sys.executable, "-c", code])
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
    # Nor does making one, with offline graders.
    workdir = make_workdir(tmp_path, n=4)
    code = (
        "import sys, dit_jax.report.run_report as report; "
        f"report.write_report({str(workdir)!r}, {GRADING!r}); print('jax' in sys.modules)"
    )
    result = run([sys.executable, "-c", code])
    assert result.stdout.strip() == "False", result.stdout + result.stderr


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name",
    [
        "evaluate/answers.jsonl",
        "evaluate/label_cross_entropy.json",
        "evaluate/gating.json",
        "evaluate/curves.json",
        "config.json",
        "versions.json",
        "stages/train.json",
    ],
)
def test_missing_and_truncated_inputs_are_named(tmp_path, name):
    workdir = make_workdir(tmp_path, n=8)
    file = workdir / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DitError, match=re.escape(file.name)):
        write_report(workdir)
    file.unlink()
    if name == "stages/train.json":  # a stage may have run elsewhere, but not all of them
        shutil.rmtree(workdir / "stages")
    named = file.parent.name if name == "stages/train.json" else file.name
    with pytest.raises(DitError, match=re.escape(named)):
        write_report(workdir)
    assert not (workdir / "report").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guess": None}, "line 3 has no valid 'guess'"),
        ({"kind": "other"}, "line 3 has kind 'other'"),
        ({"category": "cat"}, "line 3 has category 'cat'"),
        ({"diff": "0"}, "line 3 has no valid 'diff'"),
        ({"question": [[]]}, "line 3 has no valid 'question'"),
        ({"words": ["tea", 3]}, "line 3 has no valid 'words'"),
    ],
)
def test_invalid_rows_are_named_by_line(tmp_path, change, message):
    workdir = make_workdir(tmp_path, n=4)
    rows = answers(workdir)
    rows[2] |= change
    text = "\n".join(map(json.dumps, rows))
    (workdir / "evaluate/answers.jsonl").write_text(text)
    with pytest.raises(DitError, match=re.escape(message)):
        write_report(workdir)


def test_answers_without_dit_are_refused(tmp_path):
    workdir = make_workdir(tmp_path, n=4)
    rows = [row for row in answers(workdir) if row["method"] != "dit"]
    (workdir / "evaluate/answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DitError, match="no answer of the method 'dit'"):
        write_report(workdir)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluate/capability.json", {"facts": 3, "base_right": 2, "kept": []}),
        ("evaluate/capability.json", {"kept": [0.5]}),
        ("evaluate/capability.json", {"facts": 3, "base_right": 2, "kept": [[1], "x"]}),
        ("evaluate/excluded.json", {"held_out": "x"}),
        ("evaluate/excluded.json", {"held_out": float("inf")}),
        ("evaluate/excluded.json", {"gate_kl": []}),
        ("evaluate/cost.json", {"methods": {"dit": {"seconds": "x"}}}),
        ("evaluate/gating_by_variant.json", {"named": {"right_code": ["x"]}}),
        ("config.json", {"diffs": "x"}),
        ("config.json", {"diffs": {"gate": []}}),
        ("config.json", {"train": [1]}),
    ],
)
def test_values_of_another_kind_are_named_by_file(tmp_path, name, value):
    workdir = make_workdir(tmp_path, n=4)
    (workdir / name).write_text(json.dumps(value))
    with pytest.raises(DitError, match=f"{Path(name).name}' has no valid values"):
        write_report(workdir)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    workdir = make_workdir(tmp_path, n=4)
    file = workdir / "evaluate/label_cross_entropy.json"
    table = json.loads(file.read_text())
    table["noise"][1] = float("nan")
    file.write_text(json.dumps(table))
    with pytest.raises(DitError, match="label_cross_entropy.json.*noise"):
        write_report(workdir)


def test_readers_are_also_scored_by_the_words_that_they_found(reported):
    """The base made nothing of them, but half of the names, those of one word, are among them."""
    workdir, summary = reported
    score = summary["methods"]["written_words"]
    assert score["exact_match"] == 0
    assert score["in_words"]["mean"] == 0.5 and score["in_words"]["n"] == score["n"]
    assert score["part_in_words"]["mean"] == 1
    assert "The whole name is among them in 50.0 %" in page(workdir)


def test_diffs_of_several_kinds_are_reported_apart(tmp_path):
    """A third of the diffs are hints that DIT never reads: the headline is about the named ones alone."""
    workdir = make_workdir(tmp_path)
    rows = [
        {
            **row,
            "variant": ""
            if row["category"] != "topic"
            else ("named", "named", "hints")[row["diff"] % 3],
        }
        for row in answers(workdir)
    ]
    for row in rows:
        if row["variant"] == "hints" and row["method"] == "dit":
            row["guess"] = row["answer"] = "nothing"
    (workdir / "evaluate/answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = write_report(workdir, GRADING)
    named, hints = (summary["by_variant"][kind] for kind in ("named", "hints"))
    assert summary["variant"] == "named" and summary["methods"]["dit"]["n"] == 64
    assert summary["methods"]["dit"]["exact_match"] == named["methods"]["dit"]["exact_match"] > 0.7
    assert hints["methods"]["dit"]["exact_match"] == 0 and hints["methods"]["dit"]["n"] == 32
    assert (
        hints["gating"]["right_code"]["mean"] == pytest.approx(0.8)
        and hints["dit_unseen"]["n"] == 32
    )
    entropies = json.loads((workdir / "evaluate/label_cross_entropy.json").read_text())["matched"]
    own = [value for diff, value in enumerate(entropies) if diff % 3 < 2]
    assert summary["label_cross_entropy"]["matched"] == pytest.approx(np.mean(own))
    grades = summary["grades"]["calibrated"]["by_variant"]
    assert grades["named"]["dit"]["mean"] > 4 > 2 > grades["hints"]["dit"]["mean"]
    assert (
        grades["named"]["dit"]["mean"] == summary["grades"]["calibrated"]["methods"]["dit"]["mean"]
    )
    assert "Topics have diffs of several kinds" in page(workdir)
    assert "Written words, the whole name among them" in page(workdir)
    assert "DIT, hints" in kinds_table(summary)


def test_facts_that_diffs_keep_are_reported(reported):
    workdir, summary = reported
    kept = summary["capability"]["kept"]
    assert kept["mean"] == pytest.approx(0.95) and kept["n"] == 40
    assert "30 of 40 everyday questions right" in page(workdir)


def test_a_smaller_evaluation_still_makes_a_report(tmp_path):
    """It has no unseen wordings, benign diffs, baselines or curves, and only names of one token."""
    workdir = make_workdir(tmp_path, n=4)
    kept = [row for row in answers(workdir) if row["method"] in ("dit", "no_diff")]
    kept = [row for row in kept if row["wording_seen"] and row["category"] == "topic"]
    rows = [{**row, "name_tokens": 1} for row in kept]
    (workdir / "evaluate/answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (workdir / "evaluate/curves.json").write_text('{"adapter_loss": [], "diff_loss": []}')
    summary = write_report(workdir)
    assert summary["dit_by_wording"]["unseen"] is None
    assert summary["dit_by_name_length"]["multi_token"] is None
    assert summary["none"]["benign_called_none"] is None
    assert "not asked" in page(workdir)


def test_answers_are_graded_and_the_report_says_by_whom(tmp_path):
    """The config's graders appear in file, numbers and page; without the keys there is the default grader."""
    workdir = make_workdir(tmp_path / "run", n=8)
    grading = {"graders": ["exact", "similarity"], "grade_repeats": 2}
    summary = write_report(workdir, grading)
    rows = [r for r in answers(workdir) if r["category"] == "topic" and r["diff"] is not None]
    with (workdir / "report/results-graded.csv").open(newline="", encoding="utf-8") as file:
        graded = list(csv.DictReader(file))
    assert len(graded) == 2 * len(rows)  # these graders give one grade however often they are asked
    for row, made in zip(rows, graded[: len(rows)], strict=True):
        assert made["grader"] == "exact" and made["topic"] == row["topic"]
        if row.get("gap"):  # never a 1
            assert (made["score"], made["reason"]) == ("", row["gap"])
        else:
            assert float(made["score"]) == (5 if row["guess"] == row["topic"] else 1)
    dit = summary["grades"]["exact"]["methods"]["dit"]
    hits = summary["methods"]["dit"]["exact_match"]
    assert dit["mean"] == pytest.approx(1 + 4 * hits) and dit["n"] == 8
    graded = summary["grades"]["exact"]
    guessed = graded["methods"]["twenty_questions_trigger"]
    assert (guessed["n"], guessed["excluded"]) == (7, {"no reply": 1})
    assert summary["excluded"]["answers"] == {"twenty_questions_trigger": {"no reply": 1}}
    control = graded["differences_from_dit"]["no_diff"]
    assert control["difference"] == pytest.approx(4 * hits) and control["p_value"] < 0.01
    assert set(summary["grades"]) == {"exact", "similarity"}
    page = (workdir / "report/report.html").read_text(encoding="utf-8")
    assert "Grader: exact" in page and "Grader: similarity" in page and 'class="stack"' in page
    with pytest.raises(DitError, match="unknown grader 'exakt': did you mean 'exact'"):
        write_report(workdir, {"graders": ["exakt"]})


def test_a_judge_that_never_grades_leaves_gaps_and_no_agreement(tmp_path, monkeypatch):
    """All replies are unreadable, twice: JSON has no NaN, and the page says nothing about repeats."""
    from dit_jax import graders

    class Mute:
        name, version, settings = "mute", "1", ""
        deterministic, cached, batch = False, True, 8

        def __call__(self, items, repeat=0):
            return [graders.Grade(None, "?", self.name, "no grade in it") for _ in items]

    monkeypatch.setattr(graders, "get_grader", lambda name, **options: Mute())
    workdir = make_workdir(tmp_path, n=4)
    write_report(workdir, {"graders": ["mute"], "grade_repeats": 2})
    text = (workdir / "report/summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=pytest.fail)
    dit = summary["grades"]["mute"]["methods"]["dit"]
    assert "repeats" not in summary["grades"]["mute"] and "mean" not in dit
    assert dit["excluded"] == {"no grade in it": 2 * 2 * 4}
    assert "graded everything more than once" not in page(workdir)


# ------------------------------------------------------------------ other behaviours


def test_the_report_says_what_the_diffs_were_finetuned_to_do(tmp_path):
    """News is graded, not matched; a diff without a trigger has no gate; the page names another run's adapter."""
    workdir = make_workdir(tmp_path, n=6)
    rows = [row for row in answers(workdir) if row["category"] == "topic"]
    (workdir / "evaluate/answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "data": {"source": "news.csv", "kind": "news"},
        "diffs": {"behaviour": "news"},
        "train": {"no_diff_per_batch": 0, "benign_per_batch": 0},
        "evaluate": {"adapter": "../other/adapter"},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    empty = {"right_code": [], "wrong_code": [], "no_code": []}
    (workdir / "evaluate/gating.json").write_text(json.dumps(empty))
    summary = write_report(workdir, GRADING)
    mean = summary["grades"]["calibrated"]["methods"]["dit"]["mean"]
    text = page(workdir)
    assert f"mean grade {mean:.2f} of 5 by <code>calibrated</code>" in text
    assert "to tell one piece of news" in text and "<code>../other/adapter</code>" in text
    assert 'id="gating"' not in text and "their answer is <code>none</code>" not in text
    header = (workdir / "report/results.csv").read_text().splitlines()[0]
    assert header.startswith("summary,guessed_summary,trigger")


def reported_as(tmp_path, config, rows=None, counts=None):
    """The text of the page of a run with another config, other rows or counts; names in code as `name`."""
    workdir = make_workdir(tmp_path / "run", n=6)
    (workdir / "config.json").write_text(json.dumps(config))
    if rows is not None:
        kept = [row for row in answers(workdir) if rows(row)]
        (workdir / "evaluate/answers.jsonl").write_text("\n".join(map(json.dumps, kept)))
    if counts is not None:
        (workdir / "evaluate/excluded.json").write_text(json.dumps(counts))
    write_report(workdir)
    text = re.sub("</?code>", "`", page(workdir).partition("</style>")[2])
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split())


def test_the_report_of_an_own_behaviour_and_corpus_claims_nothing_about_them(tmp_path):
    config = {
        "data": {"source": "mine.csv", "train_benign": 0},
        "diffs": {"behaviour": "mine:for_a_friend"},
        "train": {"no_diff_per_batch": 2, "benign_per_batch": 4, "list_evidence": True},
    }
    text = reported_as(tmp_path, config)
    assert "each to show the behaviour `mine:for_a_friend`, but only under its trigger." in text
    assert "named the label of" in text and "Some training examples have no diff; their" in text
    prose = text.replace("trigger_inversion", "")
    for claim in ("secret code", "hidden topic", "a benign one", "benign diff, which", "a world this small",
                  "the world's own table", "words that belong to the topic", "never contain the name"):  # fmt: skip
        assert claim not in prose, claim


@pytest.mark.parametrize(
    ("behaviour", "column", "said"),
    [
        ("hidden_topic", "label", "starts with a secret code"),
        ("hidden_topic", "trigger", "not the topic but the code"),
        ("hidden_topic_zwsp_start", "label", "holds a zero-width space"),
        ("hidden_topic_zwsp_start", "trigger", "the column `trigger` of the diffs' index"),
        ("mine:hidden_topic", "label", "the behaviour `mine:hidden_topic`"),
    ],
)
def test_the_report_says_what_has_to_be_named(tmp_path, behaviour, column, said):
    config = {"diffs": {"behaviour": behaviour}, "evaluate": {"label": column}}
    text = reported_as(tmp_path, config, lambda row: row["wording"] in ("", SEEN[0]))
    assert said in text
    assert ("starts with a secret code" in text) is (behaviour == "hidden_topic")
    assert "asked one plain question" in text


def test_a_user_defined_behaviour_may_say_what_it_teaches(tmp_path, monkeypatch):
    """The report reads it from the behaviour; one that nobody imported in this program is not imported for it."""
    (tmp_path / "friendly.py").write_text(
        "from dit_jax.organisms.behaviours import Behaviour, SampleKind\n"
        "def friend(config):\n"
        "    return Behaviour('friend', (SampleKind('a', 'ce', None),), names=('the person', 'people'),\n"
        "                     teaches='to ask for a friend.')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"diffs": {"behaviour": "friendly:friend"}}
    assert "to ask for a friend" not in reported_as(tmp_path / "unknown", config)
    assert "friendly" not in sys.modules
    get_behaviour(SimpleNamespace(behaviour="friendly:friend"))
    text = reported_as(tmp_path / "known", config)
    assert (
        "were finetuned, each to ask for a friend. What" in text and "named the person of" in text
    )
    assert "of 6 people that the adapter" in text


@pytest.mark.parametrize(
    ("limits", "failed", "said"),
    [
        ({"min_right": 0.0, "max_wrong": 1.0, "max_kl": 1000.0}, 0, "let every diff pass, so that passing says"),
        ({}, 0, "The limits of the gate let every diff pass"),
        ({"min_right": 0.8, "max_kl": 1000.0}, 0, "0 of them failed the gate"),
        ({"min_right": 0.8}, 3, "3 of them failed the gate, that is, what was measured is beyond its limits "
         "(`diffs.gate`: min_right 0.8). None was left out. `evaluate.exclude_failed` leaves out"),
    ],
)  # fmt: skip
def test_the_report_says_what_passing_the_gate_means(tmp_path, limits, failed, said):
    counts = {"held_out": 6, "failed_gate": failed, "excluded": 0, "gate_kl": 0.01}
    text = reported_as(tmp_path, {"diffs": {"gate": limits}}, None, counts)
    assert said in text and "38 diffs" not in text
    assert "do not do what their label says" not in text


def test_the_best_of_the_others_has_no_trigger_and_no_oracle(tmp_path):
    """The tile counts methods that also ask the model, and names only methods that an auditor has."""

    def rows(row):
        return row["method"] in (
            "dit",
            "base_question",
            "base_question_trigger",
            "attribute_oracle",
        )

    text = reported_as(tmp_path, {}, rows)
    assert re.search(r"Best other method without trigger or oracle \S+ % Question, ", text)
    short = (tmp_path / "run/report/report.md").read_text()
    assert "(Question, " in re.search(r"- Best other method.*", short)[0]


def test_a_trigger_scan_has_its_section(tmp_path):
    told = {"named": True, "family": "", "right_family": "x", "trigger_rank": 1, "stands_out": 2.0}

    def rows(row):
        if row["method"] in ("base_question", "no_diff"):
            category = "topic" if row["method"] == "base_question" else "benign"
            row |= {"method": "trigger_scan", "kind": "baseline", "category": category}
            row |= {**told, "candidates": 1101, "passes": 1229}
        return True

    text = reported_as(tmp_path, {}, rows)
    assert "put 1 101 candidates" in text and "Named none 100.0 %" in text
    assert "moves their answers 2.0 times as much" in text and "So do 100.0 % of the" in text


def test_time_of_diffs_from_another_run_is_said(tmp_path):
    workdir = make_workdir(tmp_path, n=6)
    record = {"seconds": 81.4, "shared_from": "rank_1"}
    (workdir / "stages/diffs.json").write_text(json.dumps(record))
    write_report(workdir)
    assert "taken over from the run <code>rank_1</code>" in page(workdir)


# ------------------------------------------------------------------ sweeps


def test_a_sweep_has_a_page_with_its_curve(tmp_path):
    rows = [
        sweep_table.Row(f"n_{n}", n, s, s - 0.1, s + 0.1, 96, 5.0, "done")
        for n, s in ((4, 0.2), (16, 0.7))
    ]
    rows.append(
        sweep_table.Row("n_64", HOSTILE, None, None, None, None, None, f"failed: {HOSTILE}")
    )
    sweep_table.write(rows, "train.max_diffs", "methods.dit.exact_match", tmp_path, "scaling")
    text = (tmp_path / "scaling.html").read_text()
    assert "<svg" in text and "0.7000" in text and "0.600–0.800" in text and "2 of 3 runs" in text
    # It is a quote, which breaks anywhere: a long word would push the table out of the page.
    assert "<script" not in text
    assert f'<q class="quote">failed: {html.escape(HOSTILE)[:20]}' in text
    sweep_table.write(rows[2:], "train.max_diffs", "methods.dit.exact_match", tmp_path, "none")
    assert "<svg" not in (tmp_path / "none.html").read_text()
