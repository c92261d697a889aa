"""Sweeps: named overrides become runs, commands, one table and one plot; failures hide nothing."""

import csv
import json
import os
import re
import shlex

import pytest
from conftest import ROOT

from dit_jax.cli import run_stages as main
from dit_jax.cli import sweep_runs as sweep
from dit_jax.cli.stages import STAGES
from dit_jax.cli.workdir import is_done
from dit_jax.config.loading import flatten, load_config, split_flags
from dit_jax.deltas.store import DiffStore
from dit_jax.report import sweep_table
from dit_jax.runtime import artifacts, stage_records

CONFIG = """
from dit_jax.config.loading import load_config
def get_config(arg=None):
    changes = {"stages": ("diffs", "train", "report"), "train.rank": 1, "train.list_evidence": False}
    config = load_config("configs/quickstart.py", changes).unlock()
    config.note, config.ranks = "", (1, 2)
    return config
"""
SWEEP = """
CONFIG = "{config}"
SWEPT = "train.rank"
METRIC = "methods.dit.exact_match"
def get_sweep(arg=None):
    for rank in (1, 2, 16):
        train = {{"rank": rank, "list_evidence": True}}
        yield f"rank_{{rank}}", {{"train": train, "note": "it's $HOME; a b", "ranks": (3,)}}
ALSO = {{"matches again": "methods.dit.exact_match"}}
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "base.py").write_text(CONFIG)
    (tmp_path / "ranks.py").write_text(SWEEP.format(config=tmp_path / "base.py"))
    return tmp_path


@pytest.fixture
def fake_run(monkeypatch):
    """Stands in for `main.run`: leaves the files of a run; fails if its `broken` says so."""

    def run(config, workdir):
        run.made.append(workdir.name)
        main.check_workdir(config, workdir)
        if workdir.name in run.broken:
            raise run.broken[workdir.name]
        for stage in config.stages:
            folder = artifacts.make_dir(workdir / STAGES[stage].folder)
            if stage == "diffs" and not stage_records.stage_done(workdir, stage):
                artifacts.write_text(folder / "shard", "made by " + workdir.name)
                artifacts.write_manifest(folder, "dit_jax.diffs")
            if not stage_records.stage_done(workdir, stage):
                stage_records.mark_done(workdir, stage, 1.5)
        score = {"exact_match": config.train.rank / 20, "ci_low": 0.0, "ci_high": 1.0, "n": 7}
        summary = {"methods": {"dit": score}, "seconds_total": 3.25}
        artifacts.write_json(workdir / "report" / "summary.json", summary)

    run.made, run.broken = [], {}
    monkeypatch.setattr(main, "run", run)
    return run


def call(files, *flags, file="ranks.py"):
    return sweep.main_sweep(["--sweep", str(files / file), "--workdir", str(files / "w"), *flags])


def table(files):
    with open(files / "w" / "sweep.csv") as handle:
        return list(csv.DictReader(handle))


# ------------------------------------------------------------------ what runs


def test_runs_every_run_once_and_ends_with_table_and_plot(files, fake_run, capsys):
    assert call(files) == 0
    assert fake_run.made == ["rank_1", "rank_2", "rank_16"]
    rows = table(files)
    assert [(row["run"], row["train.rank"], row["status"]) for row in rows] == [
        ("rank_1", "1", "done"), ("rank_2", "2", "done"), ("rank_16", "16", "done"),
    ]  # fmt: skip
    assert [float(row["methods.dit.exact_match"]) for row in rows] == [0.05, 0.1, 0.8]
    assert [float(row["matches again"]) for row in rows] == [0.05, 0.1, 0.8]
    assert {row["matches again n"] for row in rows} == {"7"}
    shown = capsys.readouterr().out
    assert "| rank_16 | 16 " in shown and "| 0.800 (0.000–1.000) | " in shown
    assert "0.8000" in (files / "w" / "sweep.md").read_text()
    assert (files / "w" / "sweep.png").read_bytes().startswith(b"\x89PNG")

    assert call(files) == 0  # finished runs are skipped, not run again
    assert len(fake_run.made) == 3
    assert capsys.readouterr().out.count("done before") == 3


def test_a_failed_run_is_reported_and_hides_no_other(files, fake_run, capsys):
    fake_run.broken = {"rank_1": sweep.DitError("the disk is full"), "rank_2": ValueError("a bug")}
    assert call(files) == 1
    assert fake_run.made == ["rank_1", "rank_2", "rank_16"]
    shown = capsys.readouterr()
    assert "error: rank_1: the disk is full" in shown.err
    assert "error: 2 of 3 runs failed: rank_1, rank_2" in shown.err
    assert "ValueError: a bug" in shown.err and "Traceback" in shown.err
    assert [row["status"] for row in table(files)] == [
        "the disk is full",
        "ValueError: a bug",
        "done",
    ]

    fake_run.broken = {"rank_2": MemoryError("9 GB")}
    assert call(files) == 1
    shown = capsys.readouterr().err
    assert "error: rank_2: out of memory (9 GB): lower" in shown and "Traceback" not in shown

    fake_run.broken = {}
    assert call(files) == 0
    assert fake_run.made[3:] == ["rank_1", "rank_2", "rank_2"]  # what failed is tried again, alone
    assert [row["status"] for row in table(files)] == ["done"] * 3


def test_one_index_makes_one_run(files, fake_run, capsys):
    assert call(files, "--index", "2") == 0
    assert fake_run.made == ["rank_16"]
    assert [row["status"] for row in table(files)] == ["not run", "not run", "done"]
    for index in ("3", "-1"):
        assert call(files, "--index", index) == 2
        assert "the sweep has runs 0 to 2" in capsys.readouterr().err
    assert call(files, "--table") == 0
    assert fake_run.made == ["rank_16"]


def test_ctrl_c_ends_the_sweep(files, fake_run):
    fake_run.broken = {"rank_2": KeyboardInterrupt()}
    assert call(files) == 130
    assert fake_run.made == ["rank_1", "rank_2"]


def test_listed_commands_make_the_same_configs(files, fake_run, capsys):
    assert call(files, "--list", "--config.seed=3") == 0
    assert not fake_run.made and not (files / "w").exists()
    lines = capsys.readouterr().out.splitlines()
    runs = sweep.load_sweep(str(files / "ranks.py"), ["seed=3"]).runs
    assert len(lines) == len(runs) == 3
    for line, run in zip(lines, runs, strict=True):
        words = shlex.split(line)
        assert words[:5] == ["python", "-m", "dit_jax.main", "--config", str(files / "base.py")]
        assert words[5:7] == ["--workdir", str(files / "w" / run.name)]
        rest, overrides = split_flags(words[3:])
        made = flatten(load_config(rest[1], overrides))
        assert made == flatten(run.config)
        assert made["note"] == "it's $HOME; a b" and made["ranks"] == [3] and made["seed"] == 3
        assert made["train.list_evidence"] is True


@pytest.mark.parametrize("flags", [[], ["--table"]])
def test_runs_without_the_metric_are_an_error(files, fake_run, capsys, flags):
    """A summary may have this metric, but those of these runs do not."""
    assert call(files) == 0
    text = (files / "ranks.py").read_text().replace("methods.dit", "methods.name_reading")
    (files / "ranks.py").write_text(text)
    assert call(files, *flags) == 1
    error = capsys.readouterr().err
    assert (
        "error: 3 finished runs have no number for the table, first 'rank_1': the summary" in error
    )


# ------------------------------------------------------------------ sharing


def test_runs_with_the_same_diffs_share_them(files, fake_run, capsys):
    assert call(files) == 0
    shards = [files / "w" / f"rank_{rank}" / "diffs" / "shard" for rank in (1, 2, 16)]
    assert [shard.read_text() for shard in shards] == ["made by rank_1"] * 3
    assert len({os.stat(shard).st_ino for shard in shards}) == 1  # links: no space on the disk
    record = json.loads((files / "w" / "rank_16" / "stages" / "diffs.json").read_text())
    assert record["shared_from"] in ("rank_1", "rank_2") and record["seconds"] == 1.5
    shown = capsys.readouterr().out
    assert shown.count("are the same: taken from there") == 2
    # The diffs' time counts in each run, as if it had made them itself.
    assert "diffs that a run took over from another one count with their time there" in shown


def test_runs_with_other_diffs_do_not_share(files, fake_run):
    text = (files / "ranks.py").read_text().replace('"ranks": (3,)', '"diffs.steps": rank')
    (files / "ranks.py").write_text(text)
    assert call(files) == 0
    for rank in (1, 2, 16):
        assert (
            files / "w" / f"rank_{rank}" / "diffs" / "shard"
        ).read_text() == f"made by rank_{rank}"


def test_unfinished_diffs_are_not_shared(files, fake_run):
    assert call(files, "--index", "0") == 0
    (files / "w" / "rank_1" / "stages" / "diffs.json").unlink()
    assert call(files, "--index", "1") == 0
    assert (files / "w" / "rank_2" / "diffs" / "shard").read_text() == "made by rank_2"


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"rank": rank', '"rnak": rank', "run 'rank_1' of sweep .* unknown config key 'train.rnak'"),
        ('"rank": rank', '"rank": "many"', "config key 'train.rank' must be int, not str"),
        ('"train.rank"', '"train.size"', "SWEPT = 'train.size' is no key"),
        ('f"rank_{rank}"', '"same"', "two runs named 'same'"),
        ('f"rank_{rank}"', '"../up"', "a run named '../up'"),
        ('f"rank_{rank}"', "rank", "a run named 1"),
        ("(1, 2, 16)", "()", "has no runs"),
        ("SWEPT =", "OTHER =", "has no SWEPT"),
        ("methods.dit.exact", "method.dit.exact", "'method' is none of its keys: did you mean 'methods'"),
        ("methods.dit.exact", "methods.ditt.exact", "unknown 'ditt': did you mean 'dit'"),
        ("exact_match", "exact", "unknown 'exact': did you mean 'exact_match'"),
        ('again": "methods', 'again": "method', "'method' is none of its keys"),
        ("ALSO = {", "ALSO = 1 or {", "ALSO must be a dict of titles and metrics, not 1"),
        ("get_sweep", "get_runs", "no function get_sweep"),
        ("(1, 2, 16)", "missing", ", line 6: NameError: name 'missing' is not defined"),
        ("SWEPT =", "SWEPT = (", r"line 3: '\(' was never closed"),
        ("base.py", "bose.py", "no config file"),
        ('"rank": rank', '"rank": rank - 1', "run 'rank_1' of sweep .* 'train.rank' must be a whole number"),
    ],
)  # fmt: skip
def test_a_bad_sweep_file_is_one_line(files, fake_run, capsys, old, new, said):
    text = (files / "ranks.py").read_text()
    assert old in text
    (files / "ranks.py").write_text(text.replace(old, new))
    assert call(files) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and "\n" not in error
    assert re.search(said, error), error
    assert not fake_run.made


def test_unknown_overrides_and_missing_files_are_one_line(files, fake_run, capsys):
    assert call(files, "--config.train.rnak=1") == 2
    assert "did you mean 'train.rank'" in capsys.readouterr().err
    flags = ["--sweep", str(files / "ranks.py"), "--workdir="]
    assert sweep.main_sweep(flags) == 2
    assert "--workdir is empty" in capsys.readouterr().err
    assert sweep.main_sweep([*flags[:2], "--workdir=/proc/none/w"]) == 2
    assert re.fullmatch("error: cannot make the folder .*\n", capsys.readouterr().err)
    assert call(files, file="none.py") == 2
    assert "there is no sweep file" in capsys.readouterr().err


def test_a_changed_sweep_does_not_mix_with_the_old_runs(files, fake_run, capsys):
    assert call(files) == 0
    assert call(files, "--config.seed=1") == 1
    assert "belongs to another config (seed: 0 -> 1)" in capsys.readouterr().err


# ------------------------------------------------------------------ table and plot


def test_rows_say_what_is_wrong_with_a_summary(tmp_path):
    def row(text, metric="methods.dit.exact_match"):
        artifacts.write_text(tmp_path / "report" / "summary.json", text)
        return sweep_table.read_row("a", 1, metric, tmp_path, None)

    assert "'dit' should be, it has other" in row('{"methods": {"other": 1}}').status
    assert "no number" in row('{"methods": {"dit": {"exact_match": null}}}').status
    assert "truncated" in row('{"methods"').status
    assert row('{"seconds_total": 2}', "seconds_total").metric == 2.0


def test_the_mean_over_seeds_stands_below_the_table():
    rows = [
        sweep_table.Row(f"s{i}", i, x, None, None, 9, 1.0, "done") for i, x in enumerate((0.2, 0.4))
    ]
    assert "Mean over 2 seeds: 0.3000, standard deviation 0.1414." in sweep_table.to_markdown(
        rows, "seed", "m"
    )
    assert "Mean" not in sweep_table.to_markdown(rows, "rank", "m")


def test_the_plot_stands_over_the_swept_value():
    def axes(values, swept="x"):
        rows = [sweep_table.Row(f"r{v}", v, 0.5, 0.4, 0.6, 9, 1.0, "done") for v in values]
        return sweep_table.plot(rows, swept, "m").axes[0]

    scaled = axes((256, 4, 16))
    assert scaled.get_xscale() == "log"
    assert list(scaled.lines[0].get_xdata()) == [4.0, 16.0, 256.0]
    assert list(axes((0, 1)).lines[0].get_xdata()) == [0.0, 1.0]
    words = axes(("a$b$", "c"))
    # Long names side by side below the plot would overlap.
    assert [text.get_text() for text in words.get_yticklabels()] == [r"ra\$b\$", "rc"]
    assert list(words.lines[0].get_xdata()) == [0.5, 0.5]
    assert axes((0, 1, 2), "seed").lines[0].get_linestyle() == "None"


# ------------------------------------------------------------------ the shipped sweeps


def test_the_shipped_sweeps_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    scaling = sweep.load_sweep("configs/sweeps/data_scaling.py")
    assert [run.config.train.max_diffs for run in scaling.runs] == [4, 8, 16, 32, 64, 128, 256]
    assert len({run.config.train.steps for run in scaling.runs}) == 1
    seeds = sweep.load_sweep("configs/sweeps/seeds.py")
    assert [run.config.seed for run in seeds.runs] == [0, 1, 2]
    real = sweep.load_sweep("configs/sweeps/real_scaling.py")
    assert [run.config.train.max_diffs for run in real.runs] == [0, 160, 80, 40]
    others = sweep.load_sweep("configs/sweeps/real_others.py")
    assert {run.config.evaluate.adapter for run in others.runs} == {"../../real/adapter"}
    for shipped in (ROOT / "configs" / "sweeps").glob("*.py"):
        assert f"--sweep configs/sweeps/{shipped.name}" in shipped.read_text()


def test_data_scaling_at_small_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = ["--sweep", "configs/sweeps/data_scaling.py:tiny", "--workdir", str(tmp_path)]
    short = [  # compiles and decodes in less time
        "model.scan_layers=True",
        "evaluate.max_new_tokens=6",
        "evaluate.methods=('dit','shuffled_diff')",
    ]
    assert sweep.main_sweep([*flags, *(f"--config.{text}" for text in short)]) == 0
    shown = capsys.readouterr().out
    assert "the diffs of 'diffs_4' are the same" in shown
    with open(tmp_path / "sweep.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["status"] for row in rows] == ["done", "done"]
    for row in rows:
        folder = tmp_path / row["run"]
        summary = json.loads((folder / "report" / "summary.json").read_text())
        assert float(row["methods.dit.exact_match"]) == summary["methods"]["dit"]["exact_match"]
        manifest = json.loads((folder / "adapter" / "manifest.json").read_text())
        assert manifest["diffs"] == int(row["train.max_diffs"]) + 2  # and the benign ones
    shards = [tmp_path / row["run"] / "diffs" / "shards" / "00000.safetensors" for row in rows]
    assert os.path.samefile(*shards)


def test_readings_at_small_size(tmp_path, monkeypatch):
    """Of two kinds: the specialists, the adapter of both, and one that never saw the kind that it is asked about."""
    monkeypatch.chdir(ROOT)
    flags = ["--sweep", "configs/sweeps/readings.py:tiny", "--workdir", str(tmp_path)]
    flags += ["--config.model.scan_layers=True", "--config.mesh.data=1"]
    for index in (0, 1, 2, 6):
        assert sweep.main_sweep([*flags, "--index", str(index)]) == 0
    with open(tmp_path / "readings.csv") as handle:
        rows = {row["run"]: row for row in csv.DictReader(handle) if row["status"] == "done"}
    told = {}
    for run in rows:
        manifest = json.loads((tmp_path / run / "adapter" / "manifest.json").read_text())
        told[run] = (manifest["trained_on"]["behaviour"], manifest["diffs"])
        assert float(rows[run]["cross-entropy"]) > 0 and rows[run]["called none n"] == "3"
    codes, spaces = ("hidden_topic", 7), ("hidden_topic_zwsp_start", 7)
    assert told == {
        "sep": codes, "zero_width_start": spaces, "without.zero_width_start": codes,
        "generalist.sep": ("hidden_topic, hidden_topic_zwsp_start", 14),
    }  # fmt: skip
    asked = DiffStore(tmp_path / "without.zero_width_start" / "diffs")
    assert {row["behaviour"] for row in asked.rows} == {"hidden_topic_zwsp_start"}

    # The diffs of another run have changed: what was made from them is made again.
    run = sweep.load_sweep(flags[1], [text.removeprefix("--config.") for text in flags[4:]]).runs[2]
    made = tmp_path / "generalist.sep"
    assert is_done(made, STAGES["train"], run.config)
    manifest = tmp_path / "zero_width_start" / "diffs" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0'))
    assert not is_done(made, STAGES["train"], run.config)
