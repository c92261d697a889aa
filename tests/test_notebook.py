"""notebooks/demo.ipynb runs from the first cell to the last, and keeps outputs."""

import json
import os

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "demo.ipynb"


def outputs(cell):
    return "".join(part.get("text", "") for part in cell.get("outputs", ()))


def named(text):
    """(topic, what was named) of each line of the table of answers."""
    lines = [line.split(" | ") for line in text.splitlines()]
    return [(topic.strip(), answer.rpartition(":")[2].strip()) for topic, answer in lines]


def test_the_embedded_way_runs_and_names_held_out_topics(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="the kernel of notebooks")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(run, timeout=600, kernel_name="python3").execute(cwd=ROOT)
    *_, answers, _, nothing = run.cells
    found = named(outputs(answers))
    assert len(found) == 9 and sum(topic == name for topic, name in found) >= 8
    assert outputs(nothing).strip() == "none"


def test_the_outputs_are_kept_small_and_of_the_embedded_way():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "".join(code[0]["source"]) == 'WAY = "embedded"'
    kept = ["".join("".join(part["text"]) for part in cell["outputs"]) for cell in code[1:]]
    assert all(kept) and len(named(kept[-2])) == 9
    assert NOTEBOOK.stat().st_size < 20_000
