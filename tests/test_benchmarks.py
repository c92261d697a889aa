"""The benchmarks at minuscule size: every contender passes its check, and a wrong contender is found."""

import json
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import checks, contender, floors, growth, models, report, run, workload
from dit_jax.models.modules import count_parameters

SIZES = {
    "diffs": ["--diffs", "2", "--batch", "2", "--steps", "2"],
    "train": ["--diffs", "2", "--batch", "2", "--steps", "2"],
    "ask": ["--diffs", "2", "--batch", "2", "--new-tokens", "3"],
    "corpus": ["--diffs", "2", "--batch", "2", "--new-tokens", "3"],
}


def wrong_learning_rate(monkeypatch, work, data, factors):
    monkeypatch.setitem(workload.LEARNING_RATE, "diffs", 0.0)
    return work, data, factors


def wrong_diffs(monkeypatch, work, data, factors):
    other = {name: x[::-1].copy() if "diffs" in name else x for name, x in factors.items()}
    return work, data, other


def wrong_prompts(monkeypatch, work, data, factors):
    return work, {"prompt": data["prompt"][::-1].copy()}, factors


WRONG = {
    "diffs": wrong_learning_rate,
    "train": wrong_diffs,
    "ask": wrong_diffs,
    "corpus": wrong_prompts,
}


@pytest.fixture
def in_process(monkeypatch):
    """Runs all contenders in this process; tests below cover separate processes."""
    pytest.importorskip("peft")
    import torch

    torch.set_num_threads(1)
    read = workload.read

    def contend(work, command, place, timeout):
        name, folder = command[-3], pathlib.Path(command[-2])
        with pytest.MonkeyPatch.context() as patch:
            if name == "wrong":
                wrong = WRONG[work.suite]
                patch.setattr(workload, "read", lambda folder: wrong(patch, *read(folder)))
            contender.main("ours" if name == "wrong" else name, folder, place)
        return json.loads((place / "result.json").read_text())

    monkeypatch.setattr(run, "_contend", contend)
    monkeypatch.setattr(
        run, "_write_model", lambda work, _, model: workload.write_model(work, model)
    )


@pytest.mark.parametrize("suite", models.SUITES)
def test_contenders_agree_and_a_wrong_one_is_flagged(suite, tmp_path, in_process):
    flags = ["--suite", suite, "--model", "tiny-1layers", *SIZES[suite], "--repeats", "1"]
    code = run.main([*flags, "--external", "wrong", "wrong", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["contender"] for row in rows] == [
        "ours",
        *run.default_baselines(suite),
        "wrong",
    ]
    for row in rows[:-1]:
        assert row["valid"], row["check"]
        assert row["seconds"] > 0 and row["peak_host_bytes"] > 2**20
        assert report.numbers(row, rows)["share_of_ceiling"] > 0
    assert not rows[-1]["valid"]
    assert code == 1
    table = (tmp_path / "results.md").read_text()
    assert table.count("**INVALID**") == 1 and shlex.join(flags) in table


def test_contenders_agree_on_the_samples_of_the_embedded_world(tmp_path, in_process):
    """Ours computes each kind at its own width, and runs the base once for samples that repeat."""
    flags = ["--suite", "diffs", "--model", "tiny-1layers", "--tokens", "world"]
    sizes = ["--diffs", "2", "--batch", "2", "--steps", "3"]
    assert run.main([*flags, *sizes, "--baseline", "torch-batched", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["valid"] for row in rows] == [True, True]
    tokens = workload.make_data(run.make_workload(run.parse([*flags, *sizes])))["tokens"]
    assert tokens.shape == (2, 3, 3, 35) and (tokens[:, 0] == tokens[:, -1]).all()
    with pytest.raises(run.DitError, match="--tokens world has diffs"):
        workload.make_data(run.make_workload(run.parse([*flags, *sizes, "--length", "40"])))
    with pytest.raises(run.DitError, match="--tokens world is for"):
        run.make_workload(run.parse(["--suite", "train", "--tokens", "world"]))


def test_contenders_run_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    work = workload.Workload("ask", "tiny-1layers", diffs=2, batch=2, length=4, new_tokens=2)
    copy = "import sys, shutil; shutil.copytree(sys.argv[1] + '/out0', sys.argv[2], dirs_exist_ok=True)"
    command = shlex.join([sys.executable, "-c", copy])
    rows = run.run_suite(work, ["ours:again"], [["copy", command]], tmp_path)
    assert [row["valid"] for row in rows] == [True] * 3
    assert rows[0]["warm_up_seconds"] > rows[0]["seconds"]


def test_a_contender_that_fails_is_a_row_that_says_so(tmp_path):
    work = run.make_workload(run.parse(["--suite", "ask", "--model", "tiny", "--platform", "cpu"]))
    command = [sys.executable, "-c", "raise ValueError('no such thing')"]
    assert run._contend(work, command, tmp_path, 60) == {
        "error": "failed: ValueError: no such thing"
    }
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert "not finished" in run._contend(work, command, tmp_path, 0.5)["error"]


def test_checks_tell_equal_from_different():
    ours = np.array([[5.0, 4.0], [6.0, 3.0]])
    assert checks.check_losses(ours, ours * (1 + 5e-6), "float32")["valid"]
    assert not checks.check_losses(ours, ours * (1 + 5e-5), "float32")["valid"]
    assert checks.check_losses(ours, ours * (1 + 5e-5), "bfloat16")["valid"]
    assert not checks.check_losses(ours, ours * np.nan, "bfloat16")["valid"]
    assert not checks.check_losses(ours, ours[:1], "bfloat16")["valid"]
    tokens = np.array([[1, 2], [3, 4]])
    other = np.array([[1, 2], [3, 5]])
    assert checks.check_tokens(tokens, tokens, "float32", None)["valid"]
    assert not checks.check_tokens(tokens, other, "float32", [1e-3])["valid"]
    assert checks.check_tokens(tokens, other, "bfloat16", [1e-3])["valid"]
    assert not checks.check_ours({"losses": np.full((2, 3), 7.0)}, "float32")["valid"]
    assert not checks.check_ours({"tokens": np.ones((4, 3), int)}, "float32")["valid"]


def test_floors_are_what_a_count_by_hand_gives():
    """Two diffs of one step, with one cross-entropy sample and one KL sample; the tiny shape counted by hand."""
    work = workload.Workload("diffs", "tiny", diffs=2, batch=2, steps=1, samples=2, num_ce=1)
    data = {
        "tokens": np.arange(40).reshape(2, 1, 2, 10),
        "lengths": np.full((2, 1, 2), 10),
        "weight": np.ones((2, 1, 2, 3), np.float32),
    }
    n = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)
    head = 128 * 2730
    assert count_parameters(work.config, lora_only=True) == n
    found = floors.floor(work, data)
    attention = 4 * 128 * 2 * 100  # L x NH x 2 t^2
    flops = 2 * (4 * n * 20 + 2 * n * 10 + head * (4 * 6 + 2 * 3) + attention * (3 * 2 + 1))
    assert found.tokens == 40 and found.scored == 12
    assert found.flops == pytest.approx(flops)
    assert found.bytes == 3 * 4 * (n + head)


def test_names_of_shapes():
    assert models.shape("qwen3-0.6b-4layers").num_hidden_layers == 4
    assert models.shape("qwen3-4b").hidden_size == 2560
    for name in ("qwen3-5b", "tiny-9layers"):
        with pytest.raises(run.DitError):
            models.shape(name)
    with pytest.raises(run.DitError, match="unknown baseline"):
        work = workload.Workload("ask", "tiny")
        run.run_suite(work, ["peft-loop"], [], models.TINY_FOLDER.parent / "nowhere")


def test_growth_fits_and_plots(tmp_path):
    def row(axis, diffs, tokens, seconds, held=1, length=16):
        return {
            "axis": axis,
            "workload": {"diffs": diffs, "batch": 16, "length": length},
            "floor": {"tokens": tokens},
            "seconds": seconds,
            "peak_host_bytes": held * 2**20,
        }

    at_once = [row("diffs", n, 100 * n, 0.02 * n, 50 + 3 * n) for n in (16, 32, 64)]
    batches = [row("batches", n, 100 * n, 0.01 * n) for n in (32, 64)]
    by_tokens = [
        row("tokens", 16, 1000 * n, 1 + (2e-5 + 1e-6 * n) * 1000 * n, length=n)
        for n in (16, 32, 64, 128)
    ]
    said = growth.plot(at_once + batches + by_tokens, tmp_path / "growth.png")
    assert said == [
        "200 to 200 µs per token for 16 to 64 diffs at once; "
        "100 to 100 µs per token for 32 to 64 diffs in batches of 16",
        "peak memory 50 MiB + 3.00 MiB per diff",
        "time 1 s + (length x 1 µs + 20 µs) per token",
    ]
    assert (tmp_path / "growth.png").stat().st_size > 5000
    said = growth.plot(at_once + by_tokens, tmp_path / "growth.png")
    assert said[0] == "200 to 200 µs per token for 16 to 64 diffs at once"


def test_baselines_do_not_carry_jax():
    names = {name for suite in contender.MODULES.values() for name in suite.values()} - {"ours"}
    code = "import sys, benchmarks.contender\n" + "".join(
        f"import benchmarks.{name}\n" for name in sorted(names)
    )
    code += "sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
