"""A run that is killed at random moments and resumed has bitwise the results of an uninterrupted run.

DIT_JAX_KILLS=20 python -m pytest tests/test_kill.py
"""

import concurrent.futures
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from dit_jax.cli import run_stages as main
from dit_jax.cli.gather_parts import main_gather
from dit_jax.runtime.metrics import read_records
from tools import small_run
from tools.small_run import diffs_of, results

KILLS = int(os.environ.get("DIT_JAX_KILLS", "4"))
SEED = int(os.environ.get("DIT_JAX_KILL_SEED", "0"))
STEPS = 24
CHANGED = (
    "--config.stages=('diffs','train','evaluate')",
    "--config.data.train_topics=40",
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=3",
    "--config.train.log_every=1",
    "--config.evaluate.methods=('dit','base_question','shuffled_diff','noise_diff')",
    "--config.evaluate.diffs_at_once=2",
)
SHARDS = 4
PATIENCE = 600  # seconds until a process reaches its kill: the machine may be busy


def flags(workdir, *extra):
    return small_run.flags(workdir, *CHANGED, *extra)


def plan(rng, kills):
    """(stage, progress in it, seconds after that) of the kills, in the order in which a run reaches them."""
    most = {"diffs": 2 * SHARDS, "train": STEPS, "evaluate": 0}
    stages = list(most)
    drawn = [(i % 3, rng.randint(0, most[stages[i % 3]])) for i in range(kills)]
    return [
        (stages[stage], at, rng.uniform(0, 1.5 if stages[stage] == "evaluate" else 0.3))
        for stage, at in sorted(drawn)
    ]


def progress(workdir, log):
    """{stage: its progress, -1 before it begins}."""
    text = log.read_text()
    done = {
        "diffs": sum(1 for _ in (workdir / "diffs").rglob("*0*")),  # half-written files too
        "train": len(read_records(workdir / "metrics" / "train.jsonl")),
        "evaluate": 0,
    }
    return {stage: count if f"[{stage}]" in text else -1 for stage, count in done.items()}


def run_and_kill(workdir, log, moment, *extra):
    """Starts the run and kills it at a given point; False if it ended before."""
    process = start(log, "dit_jax.main", *flags(workdir, *extra))
    try:
        deadline = time.monotonic() + PATIENCE
        if moment is None:
            assert process.wait(timeout=PATIENCE) == 0, log.read_text()[-3000:]
            return False
        stage, at, delay = moment
        while process.poll() is None and progress(workdir, log)[stage] < at:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        return code != 0
    finally:
        process.kill()
        process.wait()


def start(log, module, *arguments):
    with open(log, "w") as out:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "w"
    assert main.main(flags(workdir)) == 0
    return workdir


def test_a_run_killed_at_random_moments_ends_bitwise_as_an_undisturbed_one(undisturbed, tmp_path):
    expected = results(undisturbed)
    assert len(expected["rows"]) == 48 and len(expected["losses"]) == STEPS
    assert sum(name.endswith(".safetensors") for name in expected) == SHARDS

    rng = random.Random(SEED)
    killed, chain = [], 0
    while len(killed) < KILLS:
        workdir, log = tmp_path / f"chain{chain}", tmp_path / f"chain{chain}.log"
        for moment in plan(rng, KILLS - len(killed)):
            if not run_and_kill(workdir, log, moment):
                break
            killed.append(moment[0])
        run_and_kill(workdir, log, None)
        found = results(workdir)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        leftovers = [f.name for f in workdir.rglob("*") if "tmp" in f.name]
        assert leftovers == []
        chain += 1
    print(f"{len(killed)} kills in {chain} runs: {', '.join(killed)}")
    if KILLS >= 3:
        assert {"diffs", "train"} <= set(killed)


def test_jobs_that_make_parts_and_are_killed_give_the_diffs_of_one_run(undisturbed, tmp_path):
    """Each job has a folder of its own; all run at the same time, and the gathered store is the same to the byte."""
    jobs = 4 if KILLS >= 20 else 2

    def work(job):
        rng, killed = random.Random(f"{SEED} {job}"), 0
        workdir, log = tmp_path / f"part{job}", tmp_path / f"part{job}.log"
        part = ["--config.stages=diffs", f"--config.diffs.part={job}/{jobs}"]
        for at in sorted(rng.randint(0, 2 * SHARDS // jobs) for _ in range(max(1, KILLS // 4))):
            killed += run_and_kill(workdir, log, ("diffs", at, rng.uniform(0, 0.3)), *part)
        run_and_kill(workdir, log, None, *part)
        return killed

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        killed = sum(pool.map(work, range(jobs)))
    assert killed
    whole, parts = tmp_path / "whole", [tmp_path / f"part{job}" for job in range(jobs)]
    assert not (parts[0] / "diffs" / "manifest.json").exists()
    made = [set(path.name for path in (part / "diffs" / "shards").iterdir()) for part in parts]
    assert len(set().union(*made)) == sum(map(len, made)) == 2 * SHARDS
    assert main_gather(["--workdir", str(whole), *map(str, parts)]) == 0
    times = {path: path.stat().st_mtime_ns for path in (whole / "diffs" / "shards").iterdir()}
    assert main.main(flags(whole, "--config.stages=diffs")) == 0
    assert times == {
        path: path.stat().st_mtime_ns for path in (whole / "diffs" / "shards").iterdir()
    }
    assert diffs_of(whole) == diffs_of(undisturbed)
    print(f"{killed} kills of {jobs} jobs")


@pytest.mark.skipif(KILLS < 20, reason="tests/test_methods.py has the short form")
def test_jobs_that_evaluate_parts_and_are_killed_give_the_answers_of_one_run(undisturbed, tmp_path):
    whole, jobs = tmp_path / "whole", 4
    shutil.copytree(undisturbed, whole, ignore=shutil.ignore_patterns("evaluate", "evaluate.json"))
    parts = [tmp_path / str(job) for job in range(jobs)]

    def work(job):
        parts[job].mkdir()
        for name in ("diffs", "adapter"):
            (parts[job] / name).symlink_to(whole / name)
        rng, log, killed = random.Random(f"{SEED} {job}"), tmp_path / f"{job}.log", 0
        part = ["--config.stages=evaluate", f"--config.evaluate.part={job}/{jobs}"]
        for _ in range(KILLS // jobs):
            killed += run_and_kill(parts[job], log, ("evaluate", 0, rng.uniform(0, 8)), *part)
        run_and_kill(parts[job], log, None, *part)
        return killed

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        print(f"{sum(pool.map(work, range(jobs)))} kills of {jobs} jobs")
    assert main_gather(["--workdir", str(whole), *map(str, parts)]) == 0
    assert len(list((whole / "evaluate_parts").iterdir())) == 11
    assert main.main(flags(whole, "--config.stages=evaluate")) == 0
    assert results(whole) == results(undisturbed)


@pytest.mark.skipif(KILLS < 20, reason="tests/test_audit.py has the short form")
def test_jobs_of_an_audit_that_are_killed_give_the_rows_of_one(undisturbed, tmp_path):
    diffs = str(undisturbed / "diffs")
    given = ["--base", "tiny_qwen3", "--adapter", str(undisturbed / "adapter"), diffs]

    def audit(out, log, *rest):
        return start(log, "dit_jax.audit", *given, "--out", str(tmp_path / out), *rest)

    def work(job):
        rng, log, killed = random.Random(f"{SEED} {job}"), tmp_path / f"{job}.log", 0
        for _ in range(KILLS // 4):
            process = audit("jobs", log, "--jobs", f"{job}/4")
            try:
                process.wait(rng.uniform(0, 40))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += process.wait() == -signal.SIGKILL
        assert audit("jobs", log, "--jobs", f"{job}/4").wait(PATIENCE) == 0, log.read_text()
        return killed

    assert audit("whole", tmp_path / "whole.log").wait(PATIENCE) == 0
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        print(f"{sum(pool.map(work, range(4)))} kills of 4 jobs")
    for name in ("audit.jsonl", "audit.csv"):
        assert (tmp_path / "jobs" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
