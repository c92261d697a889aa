"""The table of stages, and stages that a config names by their import path."""

import json

import pytest
from ml_collections import ConfigDict

from dit_jax.cli import run_stages
from dit_jax.cli.stages import STAGES, chosen_stages
from dit_jax.errors import DitError

USER_DEFINED = """
from dit_jax.cli.stages import Stage

def write(config, workdir, model):
    assert model is None
    (workdir / "notes").mkdir()
    (workdir / "notes" / "seed.txt").write_text(str(config.seed))
    return {"seed": config.seed}

NOTES = Stage("notes", "notes", "writes the seed down", write)
SAME_NAME = Stage("train", "notes", "has the name of another stage", write)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_stages.py").write_text(USER_DEFINED)
    monkeypatch.syspath_prepend(tmp_path)


def names(*stages):
    return [stage.name for stage in chosen_stages(stages)]


def test_stages_run_in_the_order_of_the_table_each_once(module):
    assert names("report", "diffs", "train", "diffs") == ["diffs", "train", "report"]
    notes = "my_stages:NOTES"
    assert names(notes, "train", "diffs") == ["notes", "diffs", "train"]
    assert names("report", "diffs", notes, "train") == ["diffs", "notes", "train", "report"]


def test_every_stage_reads_what_an_earlier_one_leaves():
    seen = []
    for name, stage in STAGES.items():
        assert name == stage.name and set(stage.reads) <= set(seen)
        assert stage.sections or not stage.traces
        seen.append(name)
    folders = [stage.folder for stage in STAGES.values()]
    assert len(set(folders)) == len(folders)


def test_a_user_defined_stage_runs_once_and_has_a_record(module, tmp_path, capsys):
    config = ConfigDict({"stages": ("my_stages:NOTES",), "seed": 7}).lock()
    workdir = tmp_path / "w"
    run_stages.run(config, workdir)
    assert (workdir / "notes" / "seed.txt").read_text() == "7"
    assert json.loads((workdir / "stages" / "notes.json").read_text())["seed"] == 7
    run_stages.run(config, workdir)  # making the folder again would fail
    assert "[notes] done before, not run again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody_has_this:STAGE", r"cannot import the stage 'nobody_has_this:STAGE': No module"),
        ("my_stages:OTHER", r"cannot import the stage 'my_stages:OTHER': .*no attribute 'OTHER'"),
        (":x", "cannot import the stage ':x': Empty module name"),
        ("my_stages:write", "stage 'my_stages:write' is a function, not a Stage"),
        ("my_stages:SAME_NAME", "has the name 'train' of another stage: rename it"),
        ("measure", "unknown stage 'measure'.*import path 'package.module:NAME'"),
        (["train"], r"unknown stage \['train'\]"),
    ],
)
def test_what_is_no_stage_is_refused_in_one_line(module, name, said):
    with pytest.raises(DitError, match=said) as error:
        chosen_stages(("diffs", name))
    assert "\n" not in str(error.value)
