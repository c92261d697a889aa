"""The paper's experiments: every config loads with every argument, and two run end to end at toy size."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from dit_jax.cli import sweep_runs as sweep
from dit_jax.config.loading import flatten, load_config
from dit_jax.deltas.store import DiffStore
from dit_jax.errors import DitError

PAPER = ROOT / "configs" / "paper"
FILES = sorted(path.name for path in PAPER.glob("*.py") if path.name != "tables.py")
SWEEPS = [name for name in FILES if "def get_sweep" in (PAPER / name).read_text()]
CONFIGS = [name for name in FILES if name not in SWEEPS]
HUB = {
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma3-1b": "google/gemma-3-1b-it",
    "gemma3-4b": "google/gemma-3-4b-it",
    "tiny": "tiny_qwen3",
}
MODELS = tuple(HUB)

# Smaller than :tiny, with a base that compiles faster.
TOY = [
    "model.scan_layers=True",
    "mesh.data=1",
    "data.train_topics=6",
    "data.test_topics=3",
    "data.train_benign=1",
    "data.test_benign=1",
    "diffs.diffs_per_batch=6",
    "diffs.steps=2",
    "diffs.gate_questions=1",
    "diffs.gate_batch=18",
    "train.steps=4",
    "train.batch_size=8",
    "evaluate.unseen_questions=()",
    "evaluate.max_new_tokens=4",
    "evaluate.batch_size=8",
]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(name: str, arg: str) -> list:
    """(name, config) of the runs of an experiment."""
    if name in SWEEPS:
        return [
            (run.name, run.config) for run in sweep.load_sweep(f"configs/paper/{name}:{arg}").runs
        ]
    return [(Path(name).stem, load_config(f"configs/paper/{name}:{arg}"))]


def test_every_experiment_of_the_paper_is_there():
    assert {
        "hidden_topic.py", "news.py", "rank.py", "full_parameters.py", "data_scaling.py",
        "trigger_generalization.py", "cross_behaviour.py", "trigger_inversion.py",
    } <= set(FILES)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("arg", MODELS)
def test_every_argument_loads(name, arg):
    for run, config in load(name, arg):
        values = flatten(config)
        assert values["model.path"] == HUB[arg]
        # A finetune trains on at least one sample of each kind that has a weight.
        assert all(count > 0 for count in config.diffs.samples_per_step.values()), run
        if "train" in config.stages:
            rest = config.train.no_diff_per_batch + config.train.benign_per_batch
            assert config.train.batch_size > rest
        else:
            assert config.evaluate.adapter, run


@pytest.mark.parametrize("name", FILES)
def test_unknown_arguments_are_refused_by_name(name):
    with pytest.raises(DitError, match="qwen4-1b"):
        load(name, "qwen4-1b")


@pytest.mark.parametrize("name", FILES)
def test_docstrings_say_command_expectation_and_cost(name):
    text = (PAPER / name).read_text().split('"""')[1]
    program = "dit_jax.sweep --sweep" if name in SWEEPS else "dit_jax.main --config"
    for arg in ("qwen3-4b", "tiny"):
        assert f"python -m {program} configs/paper/{name}:{arg} --workdir" in text
    assert re.search(r"\bExpected\b", text) and re.search(r"\bCost\b", text)


def test_the_ranks_of_the_paper():
    ranks = {arg: max(config.diffs.rank for _, config in load("rank.py", arg)) for arg in MODELS}
    assert ranks["qwen3-4b"] == 64 and ranks["gemma3-4b"] == 128


def test_adapters_come_from_runs_of_the_same_sweep():
    for name in SWEEPS:
        runs = dict(load(name, "tiny"))
        for config in runs.values():
            if config.evaluate.adapter:
                up, source, last = config.evaluate.adapter.split("/")
                assert (up, last) == ("..", "adapter")
                assert "train" in runs[source].stages


def test_sweeps_share_the_adapter_of_hidden_topic():
    """All sweeps can share one workdir: runs of one name are the same run."""
    seen: dict[str, dict] = {"hidden_topic": flatten(load("hidden_topic.py", "tiny")[0][1])}
    for name in FILES:
        for run, config in load(name, "tiny"):
            assert seen.setdefault(run, flatten(config)) == flatten(config), (name, run)


# ------------------------------------------------------------------ end to end, at toy size


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """One folder for all sweeps, as the docstrings advise: they share the run `hidden_topic`."""
    return tmp_path_factory.mktemp("paper_tiny")


def run_sweep(name: str, workdir: Path, *only: str) -> dict[str, dict]:
    """Makes the named runs of a sweep as the sweep does; returns their summaries."""
    made = sweep.load_sweep(f"configs/paper/{name}:tiny")
    toys = [run._replace(config=load_config(run.file, [*run.overrides, *TOY])) for run in made.runs]
    for index, run in enumerate(toys):
        if run.name in only:
            assert sweep.make(made._replace(runs=toys), index, workdir) is None
    return {
        run: json.loads((workdir / run / "report" / "summary.json").read_text()) for run in only
    }


def held_out(workdir: Path, run: str) -> list[str]:
    return [
        row["topic"] for row in DiffStore(workdir / run / "diffs").rows if row["split"] == "test"
    ]


def test_data_scaling_shares_the_diffs(workdir):
    summaries = run_sweep("data_scaling.py", workdir, "hidden_topic", "diffs_2")
    for summary in summaries.values():
        assert {"dit", "no_diff", "shuffled_diff"} <= set(summary["methods"])
        assert summary["methods"]["dit"]["n"] == 3
    first, second = (workdir / run / "diffs" / "shards" / "00000.safetensors" for run in summaries)
    assert first.samefile(second)
    manifests = [
        json.loads((workdir / run / "adapter" / "manifest.json").read_text()) for run in summaries
    ]
    assert [manifest["diffs"] for manifest in manifests] == [7, 3]  # one of them is benign
    assert len({manifest["steps"] for manifest in manifests}) == 1


def test_an_adapter_is_asked_about_diffs_with_another_trigger(workdir):
    run = "zero_width_start"
    summaries = run_sweep("trigger_generalization.py", workdir, "hidden_topic", run)
    assert {"dit", "base_question", "base_question_trigger"} <= set(summaries[run]["methods"])
    assert not (workdir / run / "adapter").exists()
    triggers = {row["trigger"] for row in DiffStore(workdir / run / "diffs").rows}
    assert triggers == {"zero_width_space"}
    # The same topics: the two triggers are compared on the same behaviours.
    assert held_out(workdir, run) == held_out(workdir, "hidden_topic")
