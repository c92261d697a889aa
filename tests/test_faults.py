"""Faults around a run: signals, damaged files, full disks, two runs at once, changed inputs."""

import asyncio
import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.cli import run_stages as main
from dit_jax.cli.stages import STAGES
from dit_jax.config.loading import load_config
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.store import DiffStore
from dit_jax.errors import DitError
from dit_jax.runtime import artifacts, interrupts, parallel, preemption
from dit_jax.train import dit
from dit_jax.train.checkpoints import Checkpoints
from tools import small_run
from tools.watching import peak, reset_peak

METHODS = ("--config.stages=('diffs','train','evaluate')", "--config.evaluate.methods=('dit',)")


def flags(workdir, *extra):
    return small_run.flags(workdir, *METHODS, *extra)


def run(workdir, *extra):
    return main.main(flags(workdir, *extra))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    assert run(workdir) == 0
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "w")


def adapter_digest(workdir):
    return artifacts.read_json(workdir / "adapter" / "manifest.json")["digest"]


def forget(workdir, stage, *folders):
    """Makes a workdir look as if a stage had not run."""
    (workdir / "stages" / f"{stage}.json").unlink()
    for folder in folders:
        shutil.rmtree(workdir / folder)


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "status", "saved", "said"),
    [
        (signal.SIGTERM, 75, 7, "preempted (SIGTERM): what was finished is kept"),
        (signal.SIGINT, 130, 7, "interrupted: run the same command again"),
    ],
)
def test_a_signal_while_training_costs_nothing(
    copy, finished, monkeypatch, capfd, request, number, status, saved, said
):
    forget(copy, "train", "adapter", "checkpoints")
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    step, calls = dit.train_step, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
            time.sleep(1)  # for the thread that hears of it
        return step(*args, **kwargs)

    monkeypatch.setattr(dit, "train_step", signalled)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert run(copy) == status
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    error = capfd.readouterr().err
    assert error.count(said) == 1
    assert not (copy / "adapter").exists()
    assert max(int(p.name) for p in (copy / "checkpoints").iterdir()) == saved
    done = len(calls)
    assert run(copy) == 0
    assert len(calls) - done == 12 - saved, "goes on from the checkpoint"
    assert adapter_digest(copy) == adapter_digest(finished)


def test_sigterm_ends_a_computation_that_python_waits_for(tmp_path):
    """The main thread is in XLA, where Python's own handlers would have to wait for its end."""
    program = """
import jax, jax.numpy as jnp
from dit_jax.runtime import preemption
from tools import small_run
from tools.watching import peak, reset_peak
endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, jnp.sin, x))
with preemption.listen():
    print("ready", flush=True)
    endless(1.0).block_until_ready()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == preemption.EXIT_PREEMPTED == 75
    assert error.decode().count("preempted (SIGTERM)") == 1


def test_sigterm_ends_the_stage_diffs_and_a_second_run_is_refused(tmp_path, capfd):
    workdir, log = tmp_path / "w", tmp_path / "log"
    endless = "--config.diffs.steps=20000"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dit_jax.main", *flags(workdir, endless)],
            cwd=ROOT, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while "[diffs]" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert run(workdir, endless) == 2
        error = capfd.readouterr().err.strip()
        assert f"another run is at work in '{workdir}' (process {process.pid} on" in error
        assert "\n" not in error
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == preemption.EXIT_PREEMPTED
        assert log.read_text().count("preempted (SIGTERM)") == 1
    finally:
        process.kill()
        process.wait()
    with main.locked(workdir):  # nothing to clean up after a dead run
        pass


class Service:
    """The key-value store and barriers of two processes; the other process is at step `other`."""

    def __init__(self, other):
        self.keys = (
            {} if other is None else {"dit_jax/preempted": "15", "dit_jax/preempted/1": other}
        )
        self.met = []

    def key_value_set(self, key, value):
        assert key not in self.keys
        self.keys[key] = value

    def key_value_try_get(self, key):
        return self.keys[key]

    def blocking_key_value_get(self, key, timeout):
        return self.keys[key]

    def wait_at_barrier(self, name, timeout):
        self.met.append(name)


@pytest.mark.parametrize(("other", "stop_at"), [("3", 6), ("5", 6), ("9", 10)])
def test_processes_stop_after_the_first_step_that_none_has_passed(monkeypatch, other, stop_at):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    notice = preemption.Notice(Service(other))
    with pytest.raises(preemption.Preempted), notice.hold():
        assert not notice.reached(5)
        notice.react(set())
        for step in range(6, 20):
            if notice.reached(step):
                assert step == stop_at
                raise preemption.Preempted
    assert notice._client.keys["dit_jax/preempted/0"] == "5"


def test_all_processes_end_at_once_if_one_has_nothing_to_save(monkeypatch):
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(interrupts, "exit_now", lambda *said: ended.append(said) or sys.exit())
    notice = preemption.Notice(Service(""))
    with pytest.raises(SystemExit), notice.hold():
        notice.reached(5)
        notice.react(set())
    assert ended == [(75, preemption.MESSAGE)] and notice._client.met == ["dit_jax/preempted/exit"]
    alone = preemption.Notice(Service(None))
    alone.react(set())
    assert not alone.reached(9)


# ------------------------------------------------------------------ damaged checkpoints

LIKE = {"w": jnp.zeros((64, 64)), "count": jnp.zeros((), jnp.int32)}


def state(step):
    return {
        "w": jax.random.normal(jax.random.key(step), (64, 64)),
        "count": jnp.asarray(step, jnp.int32),
    }


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 2 and 4."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, data="d")
    for step in (1, 2, 4):
        checkpoints.save(step, state(step), {"at": step})
    checkpoints.close()
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def restored(folder, data="d"):
    checkpoints = Checkpoints(folder, keep=2, data=data)
    found = checkpoints.restore(LIKE)
    checkpoints.close()
    return found


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def largest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def turn_back(folder):
    file = folder / "_CHECKPOINT_METADATA"
    text = file.read_text()
    assert text.count('{"at": 4}') == 1
    file.write_text(text.replace('{"at": 4}', '{"at": 0}'))


def misspell(folder):
    file = folder / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace("init_timestamp_nsecs", "init_timestamp_nsgcs"))


def pipe(folder):
    (folder / "_CHECKPOINT_METADATA").unlink()
    os.mkfifo(folder / "_CHECKPOINT_METADATA")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (misspell, "its metadata cannot be read"),
        (pipe, ""),
        (lambda folder: flip(largest(folder)), "['w'] differs from its digest"),
        (lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:-500]), ""),
        (lambda folder: largest(folder).unlink(), ""),
        (turn_back, "iterator differs from its digest"),
        (empty, ""),
    ],
    ids=[
        "unknown metadata",
        "pipe",
        "flipped bit",
        "truncated",
        "file missing",
        "another iterator",
        "empty folder",
    ],
)
def test_a_damaged_checkpoint_is_moved_aside_and_the_newest_good_one_used(
    saved, damage, said, capfd, caplog
):
    assert names(saved) == ["2", "4"]
    damage(saved / "4")
    step, found, iterator = restored(saved)
    assert (step, iterator) == (2, {"at": 2})
    jax.tree.map(np.testing.assert_array_equal, found, state(2))
    line = capfd.readouterr().err.splitlines()
    assert (
        (len(line), caplog.text) == (1, "")  # no traceback beside it
        and "4' is not used (" + said in line[0]
        and "moved to 'damaged-4'" in line[0]
    )
    # The step can be written again, retention leaves moved checkpoints alone, and a second one finds a free name.
    checkpoints = Checkpoints(saved, keep=2, data="d")
    for step in (4, 6, 8):
        checkpoints.save(step, state(step), {"at": step})
    checkpoints.close()
    assert names(saved) == ["6", "8", "damaged-4"]
    (saved / "damaged-8").mkdir()
    empty(saved / "8")
    assert restored(saved)[0] == 6
    assert names(saved) == ["6", "damaged-4", "damaged-8", "damaged-8.2"]


def test_a_checkpoint_of_other_arrays_is_moved_aside_before_they_are_read(saved, capfd):
    """A few bytes may unpack to any size."""
    checkpoints = Checkpoints(saved, keep=3, data="d")
    huge = {"w": jnp.zeros((9_000, 9_000)), "count": jnp.asarray(6, jnp.int32)}
    checkpoints.save(6, huge, {"at": 6})
    checkpoints.close()
    del huge
    before = reset_peak()
    assert restored(saved)[0] == 4
    assert peak() - before < 100 * 2**20
    assert "6' is not used (its arrays have other shapes)" in capfd.readouterr().err


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(saved, monkeypatch, number):
    from orbax.checkpoint import v1 as ocp

    def refuse(*args, **kwargs):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("Orbax wraps it") from error

    with monkeypatch.context() as patched:
        patched.setattr(ocp.training.Checkpointer, "load", refuse)
        with pytest.raises(DitError, match=f"4' cannot be read now \\({os.strerror(number)}\\)"):
            restored(saved)
    assert names(saved) == ["2", "4"]
    assert restored(saved)[0] == 4


def test_checkpoints_of_other_diffs_are_not_gone_on_from(saved, capfd):
    assert restored(saved, data="changed") is None
    assert names(saved) == ["other-data-2", "other-data-4"]
    assert "trained on other diffs" in capfd.readouterr().err


def test_a_checkpoint_of_one_mesh_is_restored_bitwise_onto_another(tmp_path):
    def place(tree, *sizes):
        mesh = parallel.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
        split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.device_put(x, split if x.ndim else whole), tree)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, place(state(3), 2, 2, 2), {"at": 3})
    checkpoints.close()
    for like in (LIKE, place(LIKE, 1, 8, 1)):
        checkpoints = Checkpoints(tmp_path)
        step, found, _ = checkpoints.restore(like)
        checkpoints.close()
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, found, state(3))
        assert found["w"].sharding.device_set == like["w"].sharding.device_set


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    from orbax.checkpoint._src.serialization.type_handlers import NumpyHandler

    write = NumpyHandler._background_serialize
    may_end = threading.Event()

    async def slow(*args, **kwargs):
        await asyncio.to_thread(may_end.wait, 60)
        return await write(*args, **kwargs)

    monkeypatch.setattr(NumpyHandler, "_background_serialize", slow)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {})
    assert "1" not in names(tmp_path)
    may_end.set()
    checkpoints.close()
    assert names(tmp_path) == ["1"]


# ------------------------------------------------------------------ disks that refuse


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip(
            "small disks need the right to mount: the limit on file sizes is tested without"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def big(step):
    rng = np.random.default_rng(step)  # not to be compressed
    return {"w": rng.integers(0, 256, 500_000, np.uint8)}


def save_until_refused(folder, match):
    checkpoints = Checkpoints(folder, keep=2)
    last = 0
    with pytest.raises(DitError, match=match):
        for step in range(1, 9):
            checkpoints.save(step, big(step), {"at": step})
            checkpoints.wait()
            last = step
    checkpoints.close()  # once reported is enough
    return last


def test_a_full_disk_is_one_line_and_the_checkpoints_before_are_intact(disk, caplog):
    folder = disk / "checkpoints"
    last = save_until_refused(folder, "cannot save a checkpoint in '.*': the disk is full")
    assert "Traceback" not in caplog.text
    assert last >= 1
    checkpoints = Checkpoints(folder)
    step, found, _ = checkpoints.restore(big(0))
    checkpoints.close()
    assert step == last
    np.testing.assert_array_equal(found["w"], big(last)["w"])
    for action in (
        lambda: artifacts.write_bytes(disk / "a", bytes(10**6)),
        lambda: diff_store.write_shard(disk / "s", 0, {"w": np.ones((1, 10**6))}, [{}]),
    ):
        with pytest.raises(DitError, match="cannot write .*: the disk is full"):
            action()
    assert names(disk / "s" / "shards") == [] and not (disk / "a").exists()


def test_a_full_disk_is_said_once_however_many_arrays_are_written(disk, monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: said.append(str(args.exc_value)))
    rng = np.random.default_rng(0)
    many = {str(i): rng.integers(0, 256, 40_000, np.uint8) for i in range(60)}
    checkpoints = Checkpoints(disk / "checkpoints")
    with pytest.raises(DitError, match="the disk is full"):
        checkpoints.save(1, many, {})
        checkpoints.wait()
    checkpoints.close()
    time.sleep(0.5)  # for the threads that write
    assert said == []
    sys.unraisablehook(SimpleNamespace(exc_value=ValueError("another")))
    assert said == ["another"]


def test_a_read_only_disk_is_one_line(disk, capfd):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(DitError, match="read-only"):
        Checkpoints(disk / "checkpoints")
    assert run(disk / "w") == 2
    error = capfd.readouterr().err.strip()
    assert "the file system is read-only" in error and "\n" not in error


def test_a_limit_on_file_sizes_is_one_line_and_the_checkpoints_before_are_intact(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, big(1), {})
    checkpoints.close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        checkpoints = Checkpoints(tmp_path / "c")
        with pytest.raises(DitError, match="cannot save a checkpoint in .*ulimit -f"):
            checkpoints.save(2, big(2), {})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints = Checkpoints(tmp_path / "c")
    step, found, _ = checkpoints.restore(big(0))
    checkpoints.close()
    assert step == 1
    np.testing.assert_array_equal(found["w"], big(1)["w"])


def test_what_stops_inside_a_stage_is_one_line(copy, monkeypatch, capfd):
    forget(copy, "train")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")

    def run_stage(run):
        stage = dataclasses.replace(STAGES["train"], run=run)
        monkeypatch.setitem(STAGES, "train", stage)

    run_stage(full)
    assert run(copy) == 2
    assert "error: cannot use '/somewhere/file': the disk is full" in capfd.readouterr().err

    def vanished(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(copy / "checkpoints"))

    run_stage(vanished)
    assert run(copy) == 2
    assert "checkpoints' vanished while the run used it" in capfd.readouterr().err
    run_stage(lambda *_: SimpleNamespace().missing)
    with pytest.raises(AttributeError):  # a bug keeps its traceback
        run(copy)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("place, kind", [("run/c", DitError), ("run2/c", FileNotFoundError)])
def test_a_file_is_of_the_run_by_its_path_not_by_its_letters(
    tmp_path, monkeypatch, place, kind, absolute
):
    monkeypatch.chdir(tmp_path)
    place = str(tmp_path / place) if absolute else place
    with pytest.raises(kind), main._explain(Path("run")):
        raise FileNotFoundError(errno.ENOENT, "No such file", place)


def test_a_config_without_a_key_is_one_line_before_any_stage(tmp_path, capfd):
    file = tmp_path / "config.py"
    whole = load_config("configs/quickstart.py").to_dict()
    train = {name: value for name, value in whole["train"].items() if name != "steps"}
    for section, key in (
        ({}, "stages"),
        ({"stages": ("diffs",)}, "data"),
        ({**whole, "train": train}, "train.steps"),
    ):
        text = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict"
        file.write_text(f"{text}({section})\n")
        assert main.main(["--config", str(file), "--workdir", str(tmp_path / "w")]) == 2
        error = capfd.readouterr().err.strip()
        assert f"error: the config has no key '{key}', which is needed: add it" in error
        assert "\n" not in error


# ------------------------------------------------------------------ what a stage was made from


def test_a_damaged_shard_is_named_and_made_again_alone(copy, capfd):
    shards = [copy / "diffs" / "shards" / f"0000{i}.safetensors" for i in (0, 1)]
    before = [shard.read_bytes() for shard in shards]
    kept = shards[0].stat().st_mtime_ns
    flip(shards[1])
    forget(copy, "evaluate", "evaluate")
    assert run(copy) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "00001.safetensors' is damaged" in error and "delete this file and run" in error
    shards[1].unlink()
    assert run(copy) == 0
    said = capfd.readouterr().out
    assert "[diffs] '" in said and "00001.safetensors' is missing" in said
    assert "[train] done before" in said  # the diffs are what they were
    assert [shard.read_bytes() for shard in shards] == before
    assert shards[0].stat().st_mtime_ns == kept


def test_a_damaged_file_of_a_finished_run_is_named_and_the_remedy_works(copy, capfd):
    """Whatever is damaged, the line says what to delete; the run then ends as before, and keeps the shards."""
    shards = [copy / "diffs" / "shards" / f"0000{i}.safetensors" for i in (0, 1)]
    kept = [shard.stat().st_mtime_ns for shard in shards]
    answers = (copy / "evaluate" / "answers.jsonl").read_bytes()
    digest = adapter_digest(copy)
    report = "--config.stages=('diffs','train','evaluate','report')"
    assert run(copy, report) == 0
    damages = {"emptied": lambda _: b"", "cut short": lambda data: data[: len(data) // 2]}
    damages["flipped"] = lambda data: bytes([data[0] ^ 1]) + data[1:]
    for name in (
        "diffs/manifest.json",
        "diffs/index.csv",
        "adapter/manifest.json",
        "evaluate/answers.jsonl",
    ):
        for how, damage in damages.items():
            if how == "flipped" and name == "diffs/index.csv":
                continue  # nothing reads it in a run that is finished
            file = copy / name
            file.write_bytes(damage(file.read_bytes()))
            capfd.readouterr()
            assert run(copy, report) == 2, (name, how)
            error = capfd.readouterr().err.strip().splitlines()[-1]
            assert f"'{file}'" in error and "delete" in error and "again" in error, error
            file.unlink()
            assert run(copy, report) == 0, (name, how)
            assert [shard.stat().st_mtime_ns for shard in shards] == kept
            assert adapter_digest(copy) == digest
            assert (copy / "evaluate" / "answers.jsonl").read_bytes() == answers


def test_stages_run_again_when_the_diffs_have_changed(copy, finished, capfd):
    store = DiffStore(copy / "diffs")
    stacked = store.stacked(range(12))
    rows = diff_store.shard_rows(copy / "diffs", 0)
    changed = jax.tree.map(lambda x: x * np.float32(1.5), stacked)
    diff_store.write_shard(copy / "diffs", 0, changed, rows)
    facts = {k: store.manifest[k] for k in ("base", "base_config", "behaviour", "seed")}
    diff_store.publish(copy / "diffs", 2, **facts)
    answers = (copy / "evaluate" / "answers.jsonl").stat().st_mtime_ns
    assert run(copy) == 0
    text = capfd.readouterr()
    assert "[diffs] done before" in text.out and "[train] 'diffs' has changed since" in text.out
    assert "[evaluate] 'diffs' has changed since" in text.out
    assert "trained on other diffs" in text.err
    assert adapter_digest(copy) != adapter_digest(finished)
    assert (copy / "evaluate" / "answers.jsonl").stat().st_mtime_ns != answers
    assert {"other-data-12", "12"} <= set(names(copy / "checkpoints"))
    assert run(copy) == 0
    assert capfd.readouterr().out.count("done before") == 3
