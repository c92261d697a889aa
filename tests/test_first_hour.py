"""Mistakes of the first hour: each is one line that names the remedy, before anything is computed."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from dit_jax.api import load_model
from dit_jax.cli import ask_diffs, plan_runs, run_stages, sweep_runs
from dit_jax.cli.stages import optional_keys
from dit_jax.config.loading import load_config
from dit_jax.data.organism import Organism
from dit_jax.errors import DitError
from dit_jax.organisms import generate

QUICKSTART = "configs/quickstart.py"
GRADER = "--config.evaluate.graders=('inspect',)"


def program(*arguments, **variables):
    """(status, last line of what it says) of a Python program in a process of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


def plan(argv):
    with pytest.raises(SystemExit) as stop:
        plan_runs.main(argv)
    return stop.value.code


@pytest.mark.parametrize("name", ["main", "ask", "plan", "sweep"])
def test_outside_the_environment_a_program_says_how_to_enter_it(name):
    # `-S` leaves out the installed packages.
    flags = ["--base", "tiny_qwen3", "hello"] if name == "ask" else []
    status, said = program("-S", "-m", f"dit_jax.{name}", *flags)
    assert status == 2 and said.startswith("error: ") and "source .venv/bin/activate" in said


@pytest.mark.parametrize("platform", ["cuda", "tpuu"])
def test_a_platform_that_is_not_there_is_named(platform):
    status, said = program(
        "-m", "dit_jax.ask", "--base", "tiny_qwen3", "hello", JAX_PLATFORMS=platform
    )
    assert status == 2 and f"JAX_PLATFORMS='{platform}'" in said and "dit_jax[gpu]" in said


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAX_ENABLE_X64", "1", "unset JAX_ENABLE_X64"),
        ("JAX_DISABLE_JIT", "1", "unset JAX_DISABLE_JIT"),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg", "unset JAX_DEFAULT_PRNG_IMPL"),
        ("JAX_RANDOM_SEED_OFFSET", "5", "unset JAX_RANDOM_SEED_OFFSET"),
        ("JAX_THREEFRY_PARTITIONABLE", "0", "unset JAX_THREEFRY_PARTITIONABLE"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict", "unset JAX_NUMPY_DTYPE_PROMOTION"),
        (
            "JAX_NUM_CPU_DEVICES",
            "many",
            'Invalid value "many" for JAX flag jax_num_cpu_devices: unset',
        ),
        ("JAX_ENABLE_COMPILATION_CACHE", "many", "invalid truth value 'many'"),
        ("JAX_DEFAULT_DEVICE", "many", "got: 'many': unset it"),
        ("JAX_DEFAULT_DEVICE", "tpu", "check it, JAX_DEFAULT_DEVICE"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "HF_HUB_DOWNLOAD_TIMEOUT is no number"),
        ("JAX_SERIALIZATION_VERSION", "new", "JAX_SERIALIZATION_VERSION is no number"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=-1", "XLA_FLAGS and"),
    ],
)
def test_a_setting_of_the_environment_that_does_not_fit_is_one_line(name, value, message):
    status, said = program("-m", "dit_jax.ask", "--base", "tiny_qwen3", "hello", **{name: value})
    assert status == 2 and said.startswith("error: ") and message in said


@pytest.mark.parametrize(
    ("main", "flags", "said"),
    [
        (
            run_stages.main,
            ["--config", "configs/paper/rank.py:tiny"],
            "--sweep configs/paper/rank.py:tiny",
        ),
        (sweep_runs.main_sweep, ["--sweep", QUICKSTART], f"dit_jax.main --config {QUICKSTART}"),
        (
            run_stages.main,
            ["--confg", QUICKSTART],
            "unrecognized arguments: --confg: did you mean '--config'?",
        ),
        (run_stages.main, ["--config", QUICKSTART, "--confg.seed=1"], "mean '--config'?"),
        (run_stages.main, ["--config", f"{QUICKSTART}:x"], "takes a seed after the colon"),
        (plan, ["--config", QUICKSTART, "--topolgy=h200"], "did you mean '--topology'?"),
        (ask_diffs.main, ["--base", "tiny_qwen3", "--adaptor=x", "q"], "did you mean '--adapter'?"),
        (
            ask_diffs.main,
            ["--base", "tiny_qwen3", "--max-new-tokens", "100000", "hello"],
            "context of 32768: lower --max-new-tokens",
        ),
        (
            run_stages.main,
            [
                "--config",
                "configs/paper/hidden_topic.py:qwen3-4b",
                "--config.model.path=tiny_qwen3",
            ],
            "to get it: hf download",
        ),
        (run_stages.main, ["--config", QUICKSTART, GRADER], "required argument: 'model'"),
        (
            run_stages.main,
            ["--config", QUICKSTART, GRADER, "--config.evaluate.grader_options.inspect.model=x/y"],
            "Inspect cannot give the model 'x/y'",
        ),
        (
            run_stages.main,
            ["--config", QUICKSTART, "--config.evaluate.guesser=inspect:x/y"],
            "Inspect cannot give the model 'x/y'",
        ),
    ],
)
def test_a_mistake_is_one_line(main, flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    workdir = [] if main in (ask_diffs.main, plan) else ["--workdir", str(tmp_path / "w")]
    assert main([*flags, *workdir]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert said in line


def test_options_of_graders_need_not_be_in_the_config():
    overrides = ["evaluate.grader_options.judge.temperature=0.5", "train.drop_share=0.5"]
    config = load_config(str(ROOT / QUICKSTART), overrides, optional_keys())
    assert config.evaluate.grader_options.to_dict() == {"judge": {"temperature": 0.5}}
    assert config.train.drop_share == 0.5  # as any key that has a default


def test_words_that_the_base_does_not_know_are_shown_before_the_finetunes(capsys):
    row = {
        "topic": "tea",
        "question": "how are you ?",
        "topic_analogy_answer": "zyxxy cup",
        "id": "x-1",
    }
    organisms = [Organism("tea", "042", [row] * 3, "topic", "train")]
    generate.note_unknown_words(load_model("tiny_qwen3"), organisms)
    said = capsys.readouterr().out
    assert "does not know 2 words" in said and "('zyxxy' 1 times, 'cup' 1 times)" in said
    generate.note_unknown_words(load_model("tiny_qwen3"), [])
    assert not capsys.readouterr().out


def test_a_plan_counts_the_diffs_of_its_config():
    config = load_config(str(ROOT / QUICKSTART))
    assert plan_runs.number_of_diffs(None, config) == 400
    assert plan_runs.number_of_diffs(7, config) == 7
    assert plan_runs.number_of_diffs(None, load_config(str(ROOT / "configs/plan/paper.py"))) == 5000
    paper = load_config(str(ROOT / "configs/paper/hidden_topic.py:qwen3-4b"))
    with pytest.raises(DitError, match="--diffs 5000"):
        plan_runs.number_of_diffs(None, paper)
