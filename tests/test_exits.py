"""What goes out is as untrusted as what came in: control and bidirectional characters, and encodings."""

import ast
import csv
import io
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from dit_jax.errors import HIDDEN, DitError, printable
from dit_jax.report import markdown, plots
from dit_jax.report.html import _visible
from dit_jax.report.tables.graded_files import read_file
from dit_jax.runtime.outgoing import csv_text, from_cell, json_text, show

RAW = ["\x1b[2J", "\x07", "\x9b31m", "\u202e", "\u2066", "\x00", "\x7f"]


@pytest.mark.parametrize("raw", RAW, ids=ascii)
@pytest.mark.parametrize("show", [printable, markdown.escape, lambda text: str(DitError(text))])
def test_control_and_bidirectional_characters_are_escaped(show, raw):
    assert raw[0] not in show(f"tea {raw} milk") and show("grün 茶 🙂") == "grün 茶 🙂"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(encoding):
    code = "from dit_jax.runtime.exits import exit_on_error\nwith exit_on_error():\n    print('茶 \\ud800 tea')"
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.endswith(b" tea\n")


@pytest.mark.parametrize("raw", RAW, ids=ascii)
def test_pages_show_control_and_bidirectional_characters_escaped(raw):
    assert raw[0] not in _visible(f"tea {raw} milk") and _visible("grün\n茶") == "grün\n茶"


# ------------------------------------------------------------------ who writes

# What hands text on as it is, and where that is allowed: each of these escapes, or writes no text of others.
ALLOWED = {
    "print": {"runtime/outgoing.py": 1},
    "rich.print": {"report/terminal.py": 1},  # of cells that `printable` made
    "tqdm": {"runtime/progress.py": 1},  # names and numbers of ours
    "csv.writer": {"runtime/outgoing.py": 1},
    "json.dumps(ensure_ascii=False)": {
        "runtime/outgoing.py": 1,
        "report/html.py": 1,  # a value of a page
        "report/sweep_table.py": 1,  # a cell of a page
    },
    "jinja2.Environment": {"report/html.py": 1},
    "os.write": {"runtime/interrupts.py": 3},  # a line of ours, and what wakes and tells threads
    "logging": {"inspection/provider.py": 1},  # `printable`
    "Score": {"inspection/scorer.py": 1},
    # An answer, which is scored as it is.
    "ModelOutput.from_content": {"inspection/provider.py": 1, "inspection/tasks.py": 1},
    "EventFile": {"runtime/metrics.py": 1},  # numbers, under names of ours
    "savefig": {"report/plots.py": 2},
}


def written_by(node):
    """The name in ALLOWED of a call that hands text on."""
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if last in ("dumps", "dump") and "json" in name:
        raw = any(key.arg == "ensure_ascii" for key in node.keywords)
        return "json.dumps(ensure_ascii=False)" if raw else None
    if name in ("csv.writer", "csv.DictWriter"):
        return "csv.writer"
    if name == "rich.print":
        return name
    if last in ("print", "print_exception", "pprint") and name not in ("print", "rich.print"):
        return name if name != "traceback.print_exc" else None
    if name.startswith(("_log.", "logging.", "logger.", "warnings.")):
        return "logging" if last in ("debug", "info", "warning", "error", "warn", "log") else None
    if name.startswith(("sys.stdout.write", "sys.stderr.write")):
        return name
    return next((key for key in ALLOWED if name == key or last == key), None)


def test_who_writes_text_is_listed():
    """A new exit fails here: use `outgoing.show`, `csv_text` or `json_text`, or escape and list it."""
    found = {}
    for file in sorted((ROOT / "dit_jax").rglob("*.py")):
        calls = (
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        )
        for name, count in Counter(map(written_by, calls)).items():
            if name is not None:
                place = file.relative_to(ROOT / "dit_jax").as_posix()
                found.setdefault(name, {})[place] = count
    assert found == ALLOWED


@pytest.mark.parametrize("raw", RAW, ids=ascii)
def test_terminals_files_and_plots_get_it_escaped(raw, capsys):
    text = f"tea {raw} milk"
    show(text)
    show(text, error=True)
    said = capsys.readouterr()
    rows = csv_text([{"a": text}], ["a"])
    lines = json_text([text], indent=1)
    for out in (said.out, said.err, rows, lines):
        assert raw[0] not in out and "tea" in out
    assert json.loads(lines) == [text]
    figure, axes = plots.new_figure(2)
    axes.set_yticks([0], [text])
    axes.set_xlabel(text)
    assert raw[0] not in plots.to_svg(figure, "x")


FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "=cmd|' /C calc'!A0",
    "-a",
]
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="'=+-@\t\r\n\\u0041\x1b\u202e,\"x"),
    st.sampled_from(FORMULAS).map(lambda text: f"'{text}"),
)


@pytest.mark.parametrize("text", FORMULAS)
def test_spreadsheets_compute_nothing(text):
    (cell,) = list(csv.reader(io.StringIO(csv_text([{"a": text}], ["a"]), newline="")))[1]
    assert cell == f"'{text}" and from_cell(cell) == text


@pytest.mark.parametrize(
    "value", [-5, -0.25, "-5", "+3.5", "-1e-05", "tea", "'tis", "", None, "0=1"]
)
def test_numbers_and_plain_texts_are_written_as_they_are(value):
    (cell,) = list(csv.reader(io.StringIO(csv_text([{"a": value, "b": 1}], ["a", "b"]))))[1][:1]
    assert cell == ("" if value is None else str(value))


@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_cells_are_read_back_unchanged(texts):
    columns = [f"c{i}" for i in range(len(texts))]
    text = csv_text([dict(zip(columns, texts, strict=True))], columns)
    assert not HIDDEN.search(text.replace("\r", ""))
    (read,) = list(csv.reader(io.StringIO(text, newline="")))[1:] or [[""] * len(texts)]
    assert [from_cell(cell) for cell in read] == texts


def test_the_papers_tables_read_our_cells_back_unchanged(tmp_path):
    texts = ["=HYPERLINK(1)", "-tea", "'=x", "a \x1b[2J \u202e b", "\\u001b", "@user"]
    columns = ("topic", "guessed_topic", "score", "method")
    rows = [dict.fromkeys(columns, text) | {"score": "3", "method": "dit"} for text in texts]
    (tmp_path / "results-graded.csv").write_text(csv_text(rows, columns))
    (graded,) = read_file(tmp_path / "results-graded.csv", "x")
    assert [row.label for row in graded.rows] == [row.guess for row in graded.rows] == texts
    # The paper's own files are not ours to change.
    (tmp_path / "other.csv").write_text("topic,guessed_topic,score\n'=x,'=x,3\n")
    (graded,) = read_file(tmp_path / "other.csv", "x")
    assert graded.rows[0].label == "'=x"
