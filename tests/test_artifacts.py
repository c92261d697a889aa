"""Artifacts are complete or absent; a disk that refuses and a damaged file give one clear line."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.errors import DitError
from dit_jax.runtime import artifacts, stage_records
from dit_jax.runtime.digests import base_digest, digest_tree
from dit_jax.runtime.exits import exit_on_error


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------ atomic writes


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    artifacts.write_text(file, "old é")
    assert file.read_text(encoding="utf-8") == "old é"
    with pytest.raises(KeyboardInterrupt), artifacts.atomic_file(file) as temporary:
        temporary.write_text("half")
        assert temporary.parent.parent == file.parent  # a rename across file systems is not atomic
        raise KeyboardInterrupt
    assert file.read_text(encoding="utf-8") == "old é"
    assert names(file.parent) == ["a.txt"]
    with artifacts.atomic_file(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"
    assert names(file.parent) == ["a.txt"]


@pytest.mark.parametrize("name", ["pipe", "device", "link to a device"])
def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path, name):
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    elif name == "device":
        path.symlink_to("/dev/null")
    elif name == "link to a device":
        (tmp_path / "first").symlink_to("/dev/null")
        path.symlink_to(tmp_path / "first")
    before = path.lstat()
    with pytest.raises(DitError, match="is no regular file"):
        artifacts.write_text(path, "x")
    assert path.lstat() == before


def test_text_of_models_is_written_whatever_it_holds(tmp_path):
    """A lone surrogate has no UTF-8; JSON reads its escape back."""
    artifacts.write_text(tmp_path / "page.md", "half \ud800 \u00e9")
    assert (tmp_path / "page.md").read_bytes() == b"half \\ud800 \xc3\xa9"
    artifacts.write_json(tmp_path / "row.json", {"guess": "\ud800"})
    assert artifacts.read_json(tmp_path / "row.json") == {"guess": "\ud800"}


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(ValueError, match="half"), artifacts.atomic_dir(folder) as temporary:
        (temporary / "shard").write_text("x")
        assert not folder.exists()
        raise ValueError("half")
    assert names(tmp_path) == []

    with artifacts.atomic_dir(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "shard").write_text("1")
    with (
        pytest.raises(DitError, match="store' exists already: delete it"),
        artifacts.atomic_dir(folder),
    ):
        pass
    with (
        pytest.raises(DitError, match="cannot write '.*late': a folder of that name is in the way"),
        artifacts.atomic_dir(tmp_path / "late"),
    ):
        artifacts.write_text(tmp_path / "late" / "mine", "made meanwhile")
    assert names(tmp_path / "late") == ["mine"]
    (tmp_path / "late" / "mine").unlink()
    (tmp_path / "late").rmdir()
    with pytest.raises(ValueError, match="late"), artifacts.atomic_dir(folder, replace=True):
        raise ValueError("late")
    assert (folder / "sub" / "shard").read_text() == "1"
    with artifacts.atomic_dir(folder, replace=True) as temporary:
        (temporary / "shard").write_text("2")
    assert names(folder) == ["shard"]
    assert names(tmp_path) == ["store"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    with artifacts.atomic_dir(folder) as temporary:
        (temporary / "shard").write_text("1")
    rename = os.rename

    def fail_to_publish(source, target):
        if target == folder and source != retired[0]:
            raise OSError(errno.EIO, "Input/output error")
        retired[0] = target
        rename(source, target)

    retired = [None]
    monkeypatch.setattr(os, "rename", fail_to_publish)
    with (
        pytest.raises(DitError, match="cannot write '.*store': input/output error"),
        artifacts.atomic_dir(folder, replace=True) as temporary,
    ):
        (temporary / "shard").write_text("2")
    assert (folder / "shard").read_text() == "1"
    assert names(tmp_path) == ["store"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full, free some space"),
        (errno.EACCES, "permission denied, choose another folder"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "input/output error, check the disk"),
        (errno.EXDEV, os.strerror(errno.EXDEV)),
    ],
)
def test_a_refusing_disk_is_one_line(tmp_path, monkeypatch, number, reason):
    file = tmp_path / "a.json"
    artifacts.write_json(file, 1)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DitError, match=f"^cannot write '.*a.json': {reason}"):
        artifacts.write_json(file, 2)
    assert artifacts.read_json(file) == 1
    assert names(tmp_path) == ["a.json"]


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DitError, match="cannot make the folder '.*': a part of the path is a file"):
        artifacts.write_json(tmp_path / "file" / "a" / "b.json", 1)
    with pytest.raises(DitError, match="cannot make the folder '/proc/dit_jax'"):
        artifacts.make_dir("/proc/dit_jax")  # refused even to root


# ------------------------------------------------------------------ JSON


def test_json_takes_arrays_and_paths(tmp_path):
    file = tmp_path / "a.json"
    artifacts.write_json(
        file, {"a": np.float32(0.5), "b": jnp.arange(2), "c": np.ones((1, 1)), "d": tmp_path}
    )
    assert artifacts.read_json(file) == {"a": 0.5, "b": [0, 1], "c": [[1.0]], "d": str(tmp_path)}
    with pytest.raises(TypeError):
        artifacts.write_json(file, {"a": object()})


def test_missing_and_truncated_json(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(DitError, match="a.json' is missing: run the stage 'diffs'"):
        artifacts.read_json(file, "run the stage 'diffs'")
    artifacts.write_json(file, {"numbers": list(range(100))})
    data = file.read_bytes()
    for cut in (0, 1, len(data) // 2):
        file.write_bytes(data[:cut])
        with pytest.raises(DitError, match="is truncated or not JSON: delete it and run"):
            artifacts.read_json(file)
    file.write_bytes(b"\xff\xff")
    with pytest.raises(DitError, match="is not a text file"):
        artifacts.read_json(file)
    file.write_text("[" * 100_000)
    with pytest.raises(DitError, match="nested more than 64 deep"):
        artifacts.read_json(file)
    with pytest.raises(DitError, match="cannot read"):
        artifacts.read_json(tmp_path)


# ------------------------------------------------------------------ digests


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert artifacts.digest_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(DitError, match="cannot read"):
        artifacts.digest_file(tmp_path / "b")


def test_tree_digest_sees_names_values_dtypes_and_shapes():
    tree = {"b": jnp.arange(6.0).reshape(2, 3), "a": {"x": jnp.ones(3, jnp.bfloat16)}}
    digest = digest_tree(tree)
    reordered = {"a": {"x": np.asarray(tree["a"]["x"])}, "b": np.asfortranarray(tree["b"])}
    assert digest_tree(reordered) == digest
    changed = [
        {**tree, "b": tree["b"].at[1, 2].add(1e-6)},
        {**tree, "b": tree["b"].reshape(3, 2)},
        {**tree, "b": tree["b"].astype(jnp.int32)},
        {"c": tree["b"], "a": tree["a"]},
        {"b": tree["b"]},
        {**tree, "z": jnp.zeros(0)},
    ]
    digests = [digest_tree(other) for other in changed]
    assert len({digest, *digests}) == len(changed) + 1


def test_tree_digest_of_scalars_and_sharded_arrays():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.arange(16.0).reshape(8, 2)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert len(sharded.sharding.device_set) == 8
    assert digest_tree([sharded, 2.0]) == digest_tree([x, 2.0])


def test_base_digest_ignores_the_load_dtype_only():
    released = jax.random.normal(jax.random.key(0), (64, 8)).astype(jnp.bfloat16)
    digest = base_digest({"w": released})
    assert base_digest({"w": released.astype(jnp.float32)}) == digest
    full = jax.random.normal(jax.random.key(1), (64, 8))
    assert base_digest({"w": full}) == base_digest({"w": full.astype(jnp.bfloat16)})
    trained = released.astype(jnp.float32) + 0.01
    assert base_digest({"w": trained}) != digest
    assert base_digest({"v": released}) != digest


# ------------------------------------------------------------------ manifests


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "0").write_bytes(b"abcd")
    (folder / "index.csv").write_text("topic\nriver\n")
    artifacts.write_manifest(folder, "dit_jax.diffs", version=2, base="123", count=1)
    return folder


def read(folder, **keywords):
    return artifacts.read_manifest(folder, "dit_jax.diffs", **{"version": 2, **keywords})


def test_manifest_round_trip(store):
    manifest = read(store)
    assert (manifest["base"], manifest["count"]) == ("123", 1)
    assert manifest["packages"]["jax"] == jax.__version__
    assert manifest["files"] == {
        "index.csv": {
            "bytes": 12,
            "sha256": hashlib.sha256(b"topic\nriver\n").hexdigest(),
        },
        "shards/0": {"bytes": 4, "sha256": hashlib.sha256(b"abcd").hexdigest()},
    }
    artifacts.write_manifest(store, "dit_jax.diffs", version=2)  # does not list itself
    assert set(read(store)["files"]) == {"index.csv", "shards/0"}
    with pytest.raises(ValueError, match="reserved"):
        artifacts.write_manifest(store, "dit_jax.diffs", packages={})


def test_a_damaged_artifact_is_refused(store, tmp_path):
    with pytest.raises(DitError, match="nothing' is missing: run the stage 'diffs'"):
        read(tmp_path / "nothing", remedy="run the stage 'diffs'")
    with pytest.raises(DitError, match="holds 'dit_jax.diffs', not 'dit_jax.adapter'"):
        artifacts.read_manifest(store, "dit_jax.adapter", version=2)
    with pytest.raises(DitError, match="format version 2, this program reads 3"):
        read(store, version=3)

    shard = store / "shards" / "0"
    shard.write_bytes(b"abce")  # one flipped bit, the same size
    assert read(store, check_digests=False)
    with pytest.raises(DitError, match="shards/0' is damaged"):
        read(store)
    shard.write_bytes(b"abc")
    with pytest.raises(DitError, match="shards/0' has 3 bytes instead of 4"):
        read(store, check_digests=False)
    shard.unlink()
    with pytest.raises(DitError, match="shards/0' is missing"):
        read(store, check_digests=False)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "shards/../../secret"])
def test_a_manifest_cannot_point_outside(store, name):
    (store.parent / "secret").write_text("x")
    file = store / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    file.write_text(json.dumps(manifest))
    with pytest.raises(DitError, match="do not trust this artifact"):
        read(store)


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', None])
def test_a_broken_manifest_is_refused(store, text):
    if text is None:  # a pipe, which nobody writes to
        (store / "manifest.json").unlink()
        os.mkfifo(store / "manifest.json")
    else:
        (store / "manifest.json").write_text(text)
    with pytest.raises(DitError):
        read(store)
    assert artifacts.content_digest(store) is None or text == "{}"


# ------------------------------------------------------------------ stages and exits


def test_stage_marks(tmp_path):
    assert stage_records.stage_done(tmp_path, "diffs") is None
    written = stage_records.mark_done(tmp_path, "diffs", 1.23456, extra={"count": np.int64(3)})
    record = stage_records.stage_done(tmp_path, "diffs")
    assert record == written
    assert (record["stage"], record["seconds"], record["count"]) == ("diffs", 1.235, 3)
    # This process holds jax, so it has between 50 MB and 100 GB, whatever the system's unit.
    assert 5e7 < record["peak_memory_bytes"] < 1e11
    assert stage_records.stage_done(tmp_path, "train") is None
    (tmp_path / "stages" / "diffs.json").write_text('{"inputs": [1]}')
    with pytest.raises(DitError, match="is not the record of a stage"):
        stage_records.stage_done(tmp_path, "diffs")
    (tmp_path / "stages" / "diffs.json").write_text('{"stage": ')
    with pytest.raises(DitError, match="truncated"):
        stage_records.stage_done(tmp_path, "diffs")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DitError("no diff\n  at 'x': look"), 2, "error: no diff at 'x': look\n"),
        (MemoryError("8 TiB for an array"), 2, "error: out of memory (8 TiB for an array): lower"),
        (
            ValueError("RESOURCE_EXHAUSTED: x\ny"),
            2,
            "error: out of memory (RESOURCE_EXHAUSTED: x): ",
        ),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again"),
    ],
)
def test_programs_end_in_one_line(capsys, error, status, message):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise error
    assert stop.value.code == status
    text = capsys.readouterr().err
    assert text.startswith(message)
    assert text.count("\n") == 1


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_error():
        raise ZeroDivisionError


def test_no_room_for_a_temporary_folder_is_one_line(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(DitError, match="cannot make a temporary folder .* with TMPDIR"):
        artifacts.TemporaryFolder("x-")


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path):
    """Also what a library leaves in the middle of a file. A kill between two renames costs no folder."""
    program = f"""
import os, pathlib, sys
from dit_jax.runtime import artifacts, stage_records
place = pathlib.Path({str(tmp_path)!r})
if sys.argv[1] == "file":
    with artifacts.atomic_file(place / "file") as file:
        (file.parent / ".tmpa1B2c3").write_text("of safetensors")
        os.kill(os.getpid(), 9)
rename = os.rename
os.rename = lambda old, new: os.kill(os.getpid(), 9) if ".tmp-" in str(old) else rename(old, new)
with artifacts.atomic_dir(place / "folder", replace=True) as folder:
    (folder / "new").touch()
"""

    def left():
        return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))

    artifacts.write_text(tmp_path / "folder" / "old", "old")
    for kind in ("file", "folder"):
        subprocess.run([sys.executable, "-c", program, kind], cwd=ROOT, check=False)
    assert len(left()) == 3 and not (tmp_path / "folder").exists()
    artifacts.write_text(tmp_path / "other", "x")
    assert len(left()) == 3
    with artifacts.atomic_file(tmp_path / "file") as mine:
        artifacts.write_text(tmp_path / "file", "by another")
        mine.write_text("mine")
    assert len(left()) == 2 and (tmp_path / "file").read_text() == "mine"
    with artifacts.atomic_dir(tmp_path / "folder", replace=True):
        pass
    assert left() == []
