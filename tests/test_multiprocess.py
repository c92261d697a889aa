"""Two processes of four devices each, as one run: results of one process, each artifact once, no hanging.

DIT_JAX_DEATHS=30 python -m pytest -s tests/test_multiprocess.py -k dies
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

from dit_jax.cli import run_stages as main
from dit_jax.deltas import adapter_file
from dit_jax.deltas.store import DiffStore
from dit_jax.errors import DitError
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import TINY, find_folder
from dit_jax.runtime.processes import initialize_distributed
from tools import small_run

TIMEOUT = 15  # seconds after which a silent process counts as dead, in tests that kill one
DEATHS = int(os.environ.get("DIT_JAX_DEATHS", "1"))
STAGES = ("train", "diffs", "evaluate")
MADE_LATER = ("checkpoints", "adapter", "metrics", "train.json", "evaluate*", "report*")
PATIENCE = 300  # the same in other tests: a busy machine must not fail a test
SMALL = [
    "--config.model.scan_layers=True",  # compiles in half the time
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
    "--config.data.train_topics=9",  # uneven everywhere: batches are filled up
    "--config.data.test_topics=3",
    "--config.data.train_benign=2",
    "--config.data.test_benign=1",
    "--config.diffs.diffs_per_batch=10",
    "--config.diffs.steps=2",
    "--config.diffs.gate_questions=1",
    "--config.diffs.gate_batch=30",
    "--config.train.steps=4",
    "--config.train.batch_size=7",
    "--config.train.save_every=2",
    "--config.train.log_every=1",
    "--config.evaluate.batch_size=18",
    "--config.evaluate.methods=('dit','base_question','noise_diff','logit_difference')",
]


def flags(workdir, *extra):
    return ["--config", "configs/quickstart.py", "--workdir", str(workdir), *SMALL, *extra]


def start(workdir, *extra, timeout=PATIENCE, own=()):
    """Starts two processes of one run, the second with its `own` flags; they log to WORKDIR.0.log and WORKDIR.1.log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "DIT_JAX_COORDINATOR": f"localhost:{port}",
        "DIT_JAX_NUM_PROCESSES": "2",
        "DIT_JAX_TIMEOUT_SECONDS": str(timeout),
    }
    command = [sys.executable, "-m", "dit_jax.main", *flags(workdir, *extra), "--distributed"]
    processes = []
    for i in (0, 1):
        with open(f"{workdir}.{i}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, "--process-id", str(i), *(own if i else ())],
                    cwd=ROOT,
                    env=env,
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def output(workdir, process):
    with open(f"{workdir}.{process}.log") as log:
        return log.read()


def wait(processes, workdir, seconds):
    """Returns the exit codes; a process that outlives the time fails the test."""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(timeout=max(1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running: {output(workdir, 0)[-1500:]} {output(workdir, 1)[-1500:]}")
    finally:
        for p in processes:
            p.kill()
            p.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir of two processes, workdir of one process on the same mesh)."""
    folder = tmp_path_factory.mktemp("run")
    processes = start(folder / "two")
    assert wait(processes, folder / "two", 900) == [0, 0], output(folder / "two", 0)[-3000:]
    jax.config.update("jax_disable_most_optimizations", True)
    assert main.main(flags(folder / "one")) == 0
    jax.config.update("jax_disable_most_optimizations", False)
    return folder / "two", folder / "one"


def load_adapter(folder):
    return adapter_file.load_adapter(folder, read_config(find_folder(TINY)))[0]


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_diffs_are_those_of_one_process(finished):
    two, one = (DiffStore(workdir / "diffs") for workdir in finished)
    assert len(two) == 15 and [r["topic"] for r in two.rows] == [r["topic"] for r in one.rows]
    assert [r["right_code"] for r in two.rows] == [r["right_code"] for r in one.rows]
    for a, b in zip(*(jax.tree.leaves(s.stacked(range(15))) for s in (two, one)), strict=True):
        # 1e-3 of the learning rate; Adam turns the rounding of a gradient near 0 into more for a few.
        assert np.mean(np.abs(a - b) > 2e-5) < 1e-3
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0)


def test_the_adapter_is_that_of_one_process(finished):
    two, one = (load_adapter(workdir / "adapter") for workdir in finished)
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    losses = [
        [r["loss"] for r in read_lines(workdir / "metrics" / "train.jsonl")] for workdir in finished
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert len(losses[0]) == 4  # written by one of the two


def test_the_answers_are_those_of_one_process(finished):
    two, one = (read_lines(workdir / "evaluate" / "answers.jsonl") for workdir in finished)
    keys = ("method", "diff", "question", "answer")
    assert [[row[k] for k in keys] for row in two] == [[row[k] for k in keys] for row in one]
    entropy = [
        json.loads((workdir / "evaluate" / "label_cross_entropy.json").read_text())["matched"]
        for workdir in finished
    ]
    np.testing.assert_allclose(*entropy, rtol=1e-4)


def test_process_0_alone_speaks_and_every_artifact_is_there(finished):
    two, one = finished
    assert "[evaluate]" in output(two, 0) and "mesh data 2" in output(two, 0)
    own = [line for line in output(two, 1).splitlines() if not line.startswith("[Gloo]")]
    assert not [line for line in own if line.startswith(("[", "mesh", "diffs", "adapter"))]
    inner = ("checkpoint", "checkpoints")  # what Orbax writes differs with the number of processes
    files = [
        sorted(str(f.relative_to(w)) for f in w.rglob("*") if not set(inner) & set(f.parts))
        for w in finished
    ]
    assert files[0] == files[1]


def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(finished, tmp_path):
    """One process on one device resumes from the checkpoint of two processes, sharded 2 × 2 × 2."""
    two, _ = finished
    shutil.copytree(two, tmp_path / "w")
    expected = jax.tree.leaves(load_adapter(two / "adapter"))
    for folder in ("adapter", "checkpoints/4"):
        shutil.rmtree(tmp_path / "w" / folder)
    (tmp_path / "w" / "stages" / "train.json").unlink()
    flat = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    assert main.main(flags(tmp_path / "w", *flat, "--config.stages=('train',)")) == 0
    assert [
        record["step"] for record in read_lines(tmp_path / "w" / "metrics" / "train.jsonl")
    ] == [0, 1, 2, 3]
    found = jax.tree.leaves(load_adapter(tmp_path / "w" / "adapter"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)


def wait_until(ready, workdir, processes):
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, output(workdir, 0)[-2000:]
        assert all(p.poll() is None for p in processes), output(workdir, 0)[-2000:]
        time.sleep(0.2)


@pytest.mark.parametrize("number", range(DEATHS))
def test_when_one_process_dies_the_other_ends_and_the_same_command_goes_on(
    finished, tmp_path, number
):
    rng = random.Random(number)
    stage, killed = STAGES[number % len(STAGES)], rng.randrange(2)
    workdir = tmp_path / "w"
    if stage != "diffs":  # made once, as they are not what the death meets
        shutil.copytree(finished[0], workdir, ignore=shutil.ignore_patterns(*MADE_LATER))
    processes = start(workdir, timeout=TIMEOUT)
    wait_until(lambda: f"[{stage}]" in output(workdir, 0), workdir, processes)
    time.sleep(rng.uniform(0, 5))
    processes[killed].send_signal(signal.SIGKILL)
    codes = wait(processes, workdir, 6 * TIMEOUT)
    late = codes[killed] == 0
    assert late or codes[1 - killed] != 0 or stage == STAGES[-1], codes
    assert wait(start(workdir), workdir, PATIENCE) == [0, 0], output(workdir, 0)[-3000:]
    assert small_run.results(workdir) == small_run.results(finished[0])
    print(f"{stage}: process {killed} {'had ended' if late else 'was killed'}, then equal")


def test_sigterm_to_one_process_stops_both_after_the_same_step_with_a_checkpoint(
    finished, tmp_path
):
    workdir = tmp_path / "w"
    shutil.copytree(finished[0] / "diffs", workdir / "diffs")
    endless = ["--config.stages=('train',)", "--config.train.steps=100000"]
    rare = ["--config.train.save_every=100000", "--config.train.log_every=1"]
    processes = start(workdir, *endless, *rare)
    log = workdir / "metrics" / "train.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") > 3, workdir, processes)
    processes[1].send_signal(signal.SIGTERM)
    processes[1].wait(timeout=60)
    processes[0].send_signal(signal.SIGTERM)  # srun ends a step's other tasks so
    assert wait(processes, workdir, 60) == [75, 75], output(workdir, 0)[-2000:]
    assert "preempted (SIGTERM)" in output(workdir, 0)
    (saved,) = (int(p.name) for p in (workdir / "checkpoints").iterdir())
    steps = [record["step"] for record in read_lines(workdir / "metrics" / "train.jsonl")]
    assert steps == list(range(saved)) and saved > 3


def test_what_process_0_refuses_ends_all_processes(tmp_path):
    workdir = tmp_path / "w"
    (workdir / "stages").mkdir(parents=True)
    (workdir / "stages" / "diffs.json").write_text("{}")  # a finished stage, but no config.json
    codes = wait(start(workdir, timeout=TIMEOUT), workdir, 100)
    assert codes[0] == 2 and codes[1] != 0
    assert "config.json' is missing" in output(workdir, 0)


def test_processes_with_different_configs_are_refused(tmp_path):
    workdir = tmp_path / "w"
    processes = start(workdir, timeout=TIMEOUT, own=["--config.seed=1"])
    codes = wait(processes, workdir, 100)
    assert codes[0] == 2 and codes[1] != 0
    assert "have different configs: start the same command" in output(workdir, 0)
    assert not workdir.exists()


def test_a_wrong_process_number_is_one_line(monkeypatch):
    monkeypatch.setenv("DIT_JAX_NUM_PROCESSES", "two")
    with pytest.raises(DitError, match="DIT_JAX_NUM_PROCESSES must be a number"):
        initialize_distributed("localhost:1", None, 0)
