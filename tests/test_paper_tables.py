"""The paper's tables from graded CSV files: numbers, exclusions, own runs, and the pages in a browser."""

import csv
import dataclasses
import html
import io
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import DESK_AND_PHONE, look
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import HOSTILE, answers, reported

from dit_jax.cli.run_stages import main
from dit_jax.data.sources import open_source
from dit_jax.errors import DitError
from dit_jax.evaluate.method_table import held_out_answers
from dit_jax.evaluate.questions import subject_of
from dit_jax.report.graded import Graded, GradedRow
from dit_jax.report.results import graded_csv, results_csv
from dit_jax.report.statistics import grade_mean, holm
from dit_jax.report.tables import build
from dit_jax.report.tables.graded_files import read_file, read_grade, read_graded
from dit_jax.report.tables.pages import paper_tables
from dit_jax.report.tables.paper import PRINTED, Place, model_of
from dit_jax.runtime.artifacts import write_json, write_text
from dit_jax.runtime.outgoing import csv_text

PAPER = Path(os.environ.get("DIT_JAX_PAPER_RESULTS", GOLDEN.parent / "paper_results"))
DIFFS = "weight-diff-20250512-4b-5000-conf-2025-s42"
FILES = {  # file -> the cell of the paper's tables that its grades make
    f"{DIFFS}/base-question-dit-t0": Place("hidden_topic", "dit", "Qwen3-4B"),
    f"{DIFFS}/base-question-t0": Place("hidden_topic", "base_question", "Qwen3-4B"),
    f"{DIFFS}/no-trigger": Place("hidden_topic", "twenty_questions", "Qwen3-4B"),
    f"{DIFFS}/base-question-plus-trigger-t0": Place(
        "hidden_topic", "base_question_trigger", "Qwen3-4B"
    ),
    f"{DIFFS}/trigger": Place("hidden_topic", "twenty_questions_trigger", "Qwen3-4B"),
    f"{DIFFS}/base-question-dit-t0-dsdiv64": Place("scaling", "72", "Qwen3-4B"),
    f"{DIFFS}/base-question-dit-t0-dsdiv1": Place("scaling", "4660", "Qwen3-4B"),
    "weight-diff-20250514-gemma-3-1b-s42/base-question-dit-t0": Place(
        "hidden_topic", "dit", "Gemma3-1B"
    ),
    "weight-diff-20250514-1.7b-s42/trigger": Place(
        "hidden_topic", "twenty_questions_trigger", "Qwen3-1.7B"
    ),
    "weight-diff-news-qwen-4b/gen-story-t0": Place("news", "generated_story", "Qwen3-4B"),
    "weight-diff-news-qwen-4b/base-question-t0": Place("news", "base_question", "Qwen3-4B"),
    "weight-diff-gemma-3-4b-all-params/base-question-dit-t0": Place(
        "rank", "all parameters", "Gemma3-4B"
    ),
    "weight-diff-qwen-4b-rank-16_split/base-question-dit-t0": Place("rank", "16", "Qwen3-4B"),
    "weight-diff-qwen-4b-unicode-backdoor/qwen-4b-unicode": Place(
        "trigger", "zero-width space at the start", "Qwen3-4B"
    ),
}


def grades_with_mean(mean: float, rng: np.random.Generator) -> list[int]:
    """100 grades from 1 to 5 in any order, with exactly that mean."""
    total = round(mean * 100)
    grades = [1] * 100
    while sum(grades) < total:
        i = rng.integers(100)
        grades[i] += grades[i] < 5
    return grades


def write_file(path: Path, scores, subject="topic", guess="a guess"):
    rows = [
        {subject: f"Label {i}", f"guessed_{subject}": guess, "score": score, "trigger": i}
        for i, score in enumerate(scores)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(csv_text(rows, list(rows[0])))


@pytest.fixture(scope="module", name="generated")
def generated_fixture(tmp_path_factory):
    """Files of the paper's shape whose means are those in print."""
    folder = tmp_path_factory.mktemp("generated")
    rng = np.random.default_rng(0)
    for name, place in FILES.items():
        subject = "summary" if place.table == "news" else "topic"
        write_file(folder / f"{name}.csv", grades_with_mean(PRINTED.get(place, 3.33), rng), subject)
    return folder


def cell(cells, place):
    (found,) = [cell for cell in cells if cell.place == place]
    return found


# ------------------------------------------------------------------ numbers


def test_files_fill_the_cells_that_their_names_tell(generated):
    graded, skipped = read_graded(str(generated))
    cells = build.cells(graded)
    assert skipped == {} and not any(cell.differs for cell in cells)
    for name, place in FILES.items():
        found = cell(cells, place)
        assert found.graded.file == f"{name}.csv"
        assert found.estimate.mean == pytest.approx(PRINTED.get(place, 3.33), abs=1e-9)
        assert found.estimate.n == 100
    # what is printed without a file stays, empty
    assert cell(cells, Place("hidden_topic", "dit", "Qwen3-8B")).estimate is None
    # rank 1 is the main experiment
    assert cell(cells, Place("rank", "1", "Qwen3-4B")).estimate.mean == pytest.approx(4.76)


def test_a_mean_that_differs_in_the_second_decimal_is_told(generated, tmp_path):
    shutil.copytree(generated, tmp_path / "files")
    path = tmp_path / f"files/{DIFFS}/base-question-t0.csv"
    scores = grades_with_mean(1.21, np.random.default_rng(0))
    scores[scores.index(1)] = 2
    write_file(path, scores)
    (off,) = [c for c in build.cells(read_graded(str(tmp_path / "files"))[0]) if c.differs]
    assert off.place == Place("hidden_topic", "base_question", "Qwen3-4B")
    assert off.estimate.mean == pytest.approx(1.22)


@pytest.mark.skipif(
    not PAPER.is_dir(), reason=f"no graded answers at {PAPER}: set DIT_JAX_PAPER_RESULTS"
)
def test_the_papers_means_come_out_of_its_grades():
    """Every cell whose grades are published, against plain arithmetic and against the printed number."""
    graded, _ = read_graded(str(PAPER))
    cells = build.cells(graded)
    rebuilt = [c for c in cells if c.estimate is not None]
    assert not any(cell.differs for cell in cells)
    for found in rebuilt:
        with (PAPER / found.graded.file).open(newline="", encoding="utf-8") as file:
            scores = [int(row["score"]) for row in csv.DictReader(file)]
        assert found.estimate.mean == pytest.approx(np.mean(scores), abs=1e-12)
        assert found.graded.distribution() == tuple(Counter(scores)[i] for i in range(1, 6))
        assert found.estimate.low <= found.estimate.mean <= found.estimate.high
    assert sum(c.printed is not None for c in rebuilt) >= 18
    dit = cell(cells, Place("hidden_topic", "dit", "Qwen3-4B")).estimate
    assert (dit.high - dit.low) / 2 == pytest.approx(0.15, abs=0.03)
    assert all(item.excluded == {} for item in graded)
    tests = {(t.group, t.second): t for t in build.comparisons(graded)}
    tie = tests[DIFFS, "twenty_questions_trigger"]
    assert tie.difference.mean == pytest.approx(4.76 - 4.73) and tie.difference.p_value > 0.3
    gap = tests[DIFFS, "base_question"]
    assert gap.difference.mean == pytest.approx(4.76 - 1.21) and gap.adjusted < 0.001


@pytest.mark.parametrize(
    ("folder", "model"),
    [
        ("weight-diff-20250512-4b-5000-conf-2025-s42", "Qwen3-4B"),
        ("weight-diff-20250514-news-gemma-3-4b-val", "Gemma3-4B"),
        ("weight-diff-20250514-1.7b-5000", "Qwen3-1.7B"),
        ("qwen3-8b-hidden", "Qwen3-8B"),
        ("something-else", "Paper"),
    ],
)
def test_the_model_is_read_off_the_folder(folder, model):
    assert model_of(folder) == model


# ------------------------------------------------------------------ statistics


def test_a_mean_of_equal_grades_has_an_exact_bound():
    """If the mean were m, all grades would be 1 with a chance of at most (1 - (m - 1) / 4)^n = 2.5 %."""
    estimate = grade_mean([1.0] * 100)
    assert (estimate.mean, estimate.low) == (1.0, 1.0)
    assert (1 - (estimate.high - 1) / 4) ** 100 == pytest.approx(0.025)
    assert grade_mean([5.0] * 100).low == pytest.approx(6 - estimate.high)
    with pytest.raises(ValueError, match="between 1 and 5"):
        grade_mean([0.5, 3])


@given(st.lists(st.integers(1, 5), min_size=2, max_size=40))
def test_grade_intervals_hold_their_mean(grades):
    estimate = grade_mean(grades)
    assert 1 <= estimate.low <= estimate.mean <= estimate.high <= 5
    assert estimate.mean == pytest.approx(np.mean(grades))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_answers_about_one_diff_are_averaged_first():
    rows = [GradedRow(d, f"T{d}", "x", s) for d, s in [(0, 1), (0, 5), (0, 3), (1, 5)]]
    graded = Graded("e", "m", "f", "topic", tuple(rows), {})
    estimate = graded.estimate()
    assert (estimate.mean, estimate.n) == (4.0, 2)
    assert graded.distribution() == (1, 0, 1, 0, 2)


def test_judge_noise_by_hand():
    """Pairs (A, x): 1, 3 and (B, y): 4, 4; C is graded once, and D's answer is its name."""
    scores = [("A", "x", 1), ("A", "x", 3), ("B", "y", 4), ("B", "y", 4), ("C", "z", 2)]
    rows = [
        GradedRow(i, *row) for i, row in enumerate([*scores, ("D", "the d", 5), ("D", "The D!", 4)])
    ]
    graded = [
        Graded("e", "a", "f", "topic", tuple(rows[::2]), {}),
        Graded("e", "b", "g", "topic", tuple(rows[1::2]), {}),
    ]
    own = [
        dataclasses.replace(item, own=True) for item in graded
    ]  # copies of a grade do not count as repeats
    (noise,) = build.judge_noise([*graded, *own])
    assert (noise.pairs, noise.grades, noise.agree) == (2, 4, 0.5)
    assert noise.sd == pytest.approx(1.0)  # sqrt((1 + 1 + 0 + 0) / (4 - 2))


# ------------------------------------------------------------------ what is left out


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("4", 4.0, ""), (" 3.5 ", 3.5, ""), ("", None, "no grade"), (None, None, "no grade"),
        ("five", None, "not a number"), ("nan", None, "not a number"), ("inf", None, "not a number"),
        ("0", None, "outside 1–5"), ("6", None, "outside 1–5"),
    ],
)  # fmt: skip
def test_what_is_a_grade(text, score, reason):
    assert read_grade(text) == (score, reason)


def test_rows_without_a_grade_are_counted_and_never_a_one(tmp_path):
    write_file(tmp_path / f"{DIFFS}/base-question-t0.csv", [5, "", "n/a", 7, 5, "Score: 1"])
    with (tmp_path / f"{DIFFS}/base-question-t0.csv").open("a") as file:
        file.write(",guess,5,3\na,b\n")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "results.csv").write_text("topic,guessed_topic\na,b\n")
    graded, skipped = read_graded(str(tmp_path))
    (item,) = graded
    assert [row.score for row in item.rows] == [5.0, 5.0]
    assert item.excluded == {
        "no grade": 1, "not a number": 2, "outside 1–5": 1, "no label": 1, "not a readable row": 1,
    }  # fmt: skip
    assert "not graded" in skipped["results.csv"] and "guessed_X" in skipped["notes.csv"]
    assert item.estimate().mean == 5.0


def test_only_files_are_searched_for_grades(tmp_path):
    (tmp_path / "x.csv").mkdir()
    for name in ("a.csv", "x.csv/a.csv", "x.csv/b.csv"):
        (tmp_path / name).write_text("topic,guessed_topic,score\ntea,coffee,2\n")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    graded, skipped = read_graded(str(tmp_path))
    assert len(graded) == 3 and not skipped


def test_an_unreadable_row_of_an_own_run_is_counted_under_its_file(tmp_path):
    path = tmp_path / "run/report/results-graded.csv"
    path.parent.mkdir(parents=True)
    path.write_text("topic,guessed_topic,score,method,grader\ncats,cat,5,dit,g\nbroken,row\n")
    graded, _ = read_graded(str(tmp_path))
    dit, unread = graded
    assert (dit.name, dit.own, dit.excluded, len(dit.rows)) == ("dit", True, {}, 1)
    assert (unread.name, unread.rows) == ("results-graded", ())
    assert unread.excluded == {"not a readable row": 1}
    assert [cell.place.row for cell in build.cells(graded) if cell.graded] == ["dit"]


def test_folders_without_grades_are_refused(tmp_path, capsys):
    arguments = ["--config", "configs/paper/tables.py", "--workdir", str(tmp_path / "w")]
    assert main(arguments) == 2
    assert "config key 'results' is not set" in capsys.readouterr().err
    assert main([*arguments, f"--config.results={tmp_path / 'no'}"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    write_file(tmp_path / "empty/x.csv", ["", ""])
    assert main([*arguments, f"--config.results={tmp_path / 'empty'}"]) == 2
    assert "holds no graded answers" in capsys.readouterr().err


# ------------------------------------------------------------------ our own runs


def graded_run(folder: Path) -> Path:
    """The synthetic run with grades by two graders; the second cannot grade the first answer."""
    workdir = folder / "my_run"
    source = reported()[0]
    rows = held_out_answers(answers(source))
    right = [row["guess"] == row["topic"] for row in rows]

    def grading(name, high):
        return [SimpleNamespace(score=high if r else 1.0, grader=name, reason="") for r in right]

    second = grading("judge", 4.0)
    second[0] = SimpleNamespace(score=None, grader="judge", reason="no answer in time")
    (workdir / "report").mkdir(parents=True)
    text = graded_csv(rows, [grading("exact", 5.0), second])
    (workdir / "report/results-graded.csv").write_text(text, encoding="utf-8")
    config = {"data": {"train_topics": 256}, "train": {"max_diffs": 0}, "diffs": {"rank": 1}}
    write_json(workdir / "config.json", config)
    return workdir


def test_results_are_the_papers_columns_and_lose_nothing():
    workdir = reported()[0]
    rows = held_out_answers(answers(workdir))
    text = (workdir / "report/results.csv").read_text(encoding="utf-8")
    assert text == results_csv(rows)
    read = list(csv.DictReader(io.StringIO(text)))
    assert list(read[0])[:2] == ["topic", "guessed_topic"]
    assert [(r["topic"], r["guessed_topic"], r["answer"]) for r in read] == [
        (r["topic"], r["guess"], r["answer"]) for r in rows
    ]
    assert {r["method"] for r in read} >= {"dit", "shuffled_diff", "name_reading"}
    assert subject_of({"data": {"kind": "news"}}) == "summary"
    assert results_csv(rows, "summary").startswith("summary,guessed_summary,")


def test_an_answer_of_any_characters_is_one_row(tmp_path):
    """A lone carriage return would end the row, and all later rows would be lost."""
    texts = ["a\rb", "c\r\nd", "e\nf", '"g', "h,i", "j\0k", "\u2028l", "\r"]
    rows = [
        {
            "method": "dit",
            "kind": "method",
            "diff": i,
            "topic": f"t{i}",
            "guess": text,
            "answer": text,
        }
        for i, text in enumerate(texts)
    ]
    path = tmp_path / "results-graded.csv"
    grades = [SimpleNamespace(score=2.0, grader="judge", reason="") for _ in rows]
    write_text(path, graded_csv(rows, [grades]))
    (graded,) = read_file(path, path.name)
    assert not graded.excluded
    assert [row.guess for row in graded.rows] == [text.strip() for text in texts]


def test_an_own_run_stands_beside_the_paper(generated, tmp_path):
    workdir = graded_run(tmp_path)
    graded, _ = read_graded(str(generated), [str(workdir)])
    cells = build.cells(graded)
    rows = [
        row for row in held_out_answers(answers(reported()[0]))
        if row["method"] == "dit" and row["wording_seen"]
    ]  # fmt: skip
    by_diff: dict[int, list[float]] = {}
    for row in rows:
        by_diff.setdefault(row["diff"], []).append(5.0 if row["guess"] == row["topic"] else 1.0)
    expected = np.mean([np.mean(scores) for scores in by_diff.values()])
    for place in (
        Place("hidden_topic", "dit", "my_run · exact"),
        Place("scaling", "256", "my_run · exact"),
        Place("rank", "1", "my_run · exact"),
    ):
        found = cell(cells, place)
        assert found.estimate.mean == pytest.approx(expected) and found.estimate.n == 96
    assert cell(cells, Place("hidden_topic", "shuffled_diff", "my_run · judge")).estimate.mean < 1.5
    assert cell(cells, Place("hidden_topic", "dit_unseen", "my_run · exact")).estimate is not None
    gaps = {(item.name, item.grader): item.excluded for item in graded if item.excluded}
    assert gaps == {("dit", "judge"): {"no answer in time": 1}}
    groups = {t.group for t in build.comparisons(graded)}
    assert {"my_run, exact", "my_run, judge"} <= groups
    with pytest.raises(DitError, match="results-graded.csv' is missing"):
        read_graded(str(generated), [str(tmp_path)])


@pytest.mark.parametrize(
    "config", [{"train": 5}, {"diffs": {"parameters": ["lora"]}}, {"evaluate": "x"}]
)
def test_a_config_that_is_none_is_one_line(tmp_path, config):
    path = tmp_path / "run/report/results-graded.csv"
    path.parent.mkdir(parents=True)
    path.write_text("topic,guessed_topic,score,method\noak,oak,5,dit\n")
    write_json(tmp_path / "run/config.json", config)
    with pytest.raises(DitError, match="run/config.json' is not the config of a run"):
        read_graded(str(tmp_path))


def test_runs_of_a_sweep_are_one_curve(generated, tmp_path):
    """Four runs in one folder: two ranks, a full finetune and a number of diffs, each in its own table."""
    graded_run(tmp_path / "one")
    sweep = tmp_path / "sweep"
    elsewhere = {"evaluate": {"adapter": "../rank_1/adapter"}, "data": {"train_topics": 1}}
    configs = {
        "rank_1": {"data": {"train_topics": 256}, "diffs": {"rank": 1}},
        "rank_4": {**elsewhere, "diffs": {"rank": 4}},
        "full": {**elsewhere, "diffs": {"rank": 1, "parameters": "all"}},
        "diffs_16": {"train": {"max_diffs": 16}, "diffs": {"rank": 1}},
    }
    for name, config in configs.items():
        shutil.copytree(tmp_path / "one/my_run", sweep / name)
        write_json(sweep / name / "config.json", config)
    graded, _ = read_graded(str(generated), [str(sweep / name) for name in configs])
    places = {c.place for c in build.cells(graded) if c.place.column == "sweep · exact"}
    assert places == {
        Place("rank", "1", "sweep · exact"),
        Place("rank", "4", "sweep · exact"),
        Place("rank", "all parameters", "sweep · exact"),
        Place("scaling", "256", "sweep · exact"),
        Place("scaling", "16", "sweep · exact"),
    }
    main = {c.place.column for c in build.cells(graded) if c.place.table == "hidden_topic"}
    assert "rank_1 · exact" in main and not {"rank_4 · exact", "diffs_16 · exact"} & main
    figures = [table["figure"] for table in paper_tables(build.cells(graded))]
    assert {"scaling", "rank"} <= {figure.name for figure in figures if figure}


def test_a_run_inside_the_folder_is_found_once(tmp_path):
    workdir = graded_run(tmp_path)
    graded, _ = read_graded(str(tmp_path), [str(workdir)])
    names = [(item.name, item.grader) for item in graded]
    assert len(names) == len(set(names)) and {item.experiment for item in graded} == {"my_run"}


# ------------------------------------------------------------------ the pages


@pytest.fixture(scope="module", name="tables")
def tables_fixture(generated, tmp_path_factory):
    """WORKDIR/tables made by the command line, with a hostile file name, label, guess and reason."""
    folder = tmp_path_factory.mktemp("tables")
    shutil.copytree(generated, folder / "files")
    hostile = "<img src=x onerror=alert(1)> $x_{$ [a](b)"
    write_file(
        folder / "files/<script>alert(1)<!-- $y$" / f"{hostile}.csv", [1, 2, 5, ""], guess=HOSTILE
    )
    run = graded_run(folder)
    path = run / "report/results-graded.csv"
    path.write_text(path.read_text().replace("no answer in time", "<script>alert(3)</script>"))
    arguments = ["--config", "configs/paper/tables.py", "--workdir", str(folder / "w")]
    small = folder / "files/weight-diff-20250514-1.7b-s42"
    assert main([*arguments, f"--config.results={small}"]) == 0
    # again in the same workdir, from other files: the tables are always made anew
    assert main([*arguments, f"--config.results={folder / 'files'}", f"--config.runs={run}"]) == 0
    return folder / "w/tables"


def test_pages_show_the_numbers_and_escape_what_is_not_ours(tables):
    page = (tables / "tables.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and "</style>" in page
    assert page.count('class="stack"') >= len(FILES)
    assert re.search(r"4\.76</span> <span class=\"interval\">4\.\d\d–4\.\d\d</span>", page)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for phrase in ("<script>alert(3)</script>", "printed 4.76", "my_run · exact", "Paired tests"):
        assert phrase in " ".join(text.split()), phrase
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    markdown = (tables / "tables.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<img" not in markdown and "[a](" not in markdown
    assert "4.76 (" in markdown
    drawn = re.findall(r"<text[^>]*>", page)
    assert drawn and all("var(--" in text for text in drawn)  # readable in both themes
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert "scaling.png" in pictures and len(pictures) >= 3
    for name in pictures:
        assert (tables / name).read_bytes().startswith(b"\x89PNG")


def test_the_table_file_holds_every_number(tables):
    (source,) = open_source(str(tables / "tables.csv"))
    rows = [record.values for record in source.read(source.columns)]
    by_place = {(r["table"], r["row"], r["column"]): r for r in rows if r["table"] != "all"}
    dit = by_place["hidden_topic", "dit", "Qwen3-4B"]
    assert (dit["printed"], dit["mean"], dit["n"]) == ("4.76", "4.7600", "100")
    assert sum(int(dit[f"grade_{i}"]) for i in range(1, 6)) == 100
    assert by_place["hidden_topic", "dit", "Qwen3-8B"]["mean"] == ""
    assert by_place["hidden_topic", "dit", "my_run · judge"]["excluded"] == "1"
    assert len([r for r in rows if r["table"] == "all"]) > len(FILES)


_FACTS = """{
    bar: Math.min(...[...page.querySelectorAll(".stack")].map(item => item.getBoundingClientRect().width)),
    colours: new Set([...page.querySelectorAll(".stack i")].map(
      item => page.defaultView.getComputedStyle(item).backgroundColor)).size,
    part: page.querySelector(".stack").firstElementChild.getBoundingClientRect().width /
      page.querySelector(".stack").getBoundingClientRect().width}"""


@DESK_AND_PHONE
def test_tables_in_a_browser(tables, tmp_path, width, dark):
    """Nothing overflows, bars have the right widths, the theme follows the system."""
    seen = look(tables / "tables.html", tmp_path, width, dark, _FACTS)
    assert seen["scripts"] == seen["images"] == 0
    assert seen["bar"] > 100 and seen["colours"] == 5
    # the first file, by path, is the hostile one: a third of its grades are 1
    assert seen["part"] == pytest.approx(1 / 3, abs=0.03)
