"""What the system refuses a program is one line that is true: outputs, folders, files, locks; and damaged programs."""

import errno
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from dit_jax.errors import DitError
from dit_jax.graders.cache import Cache
from dit_jax.runtime.folder_lock import LOCK, locked
from dit_jax.runtime.metrics import Metrics

START = """
from dit_jax.runtime import interrupts
interrupts.end_at_once()
from dit_jax.runtime.exits import exit_on_error
with exit_on_error():
    """


def ended(body, **options):
    return subprocess.run(
        [sys.executable, "-c", START + body],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )


def test_a_closed_output_is_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    done = ended("for i in range(100_000): print(i)", stdout=writer)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the output was closed before the end: what was written until then is kept\n"
    )


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)"])
def test_an_output_on_a_full_disk_is_one_line(body):
    with open("/dev/full", "w") as full:
        done = ended(body, stdout=full)
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full")
    assert done.stderr.count("\n") == 1


def test_plots_need_no_home():
    code = "from dit_jax.report import plots; print(plots.to_svg(plots.new_figure(2)[0], 'x')[:4])"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/proc/none"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("<svg\n", "")


def test_programs_are_listed_where_python_drops_texts_about_them():
    command = [sys.executable, "-OO", "-m", "dit_jax", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "  audit " in done.stdout and not done.stderr


@pytest.mark.parametrize("program", [[], ["--help"], ["ask", "--help"]])
def test_help_on_a_full_disk_is_one_line(program):
    command = [sys.executable, "-m", "dit_jax", *program]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full")
    assert done.stderr.count("\n") == 1


def test_files_do_not_take_the_place_of_closed_streams(tmp_path):
    body = f"""
    with open({str(tmp_path / "file")!r}, "w") as file:
        print("to stdout", flush=True)
        interrupts.say("to stderr")
        file.write("content")"""
    done = ended(body.strip(), preexec_fn=lambda: [os.close(i) for i in range(3)])
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == "content"


def test_a_deleted_working_directory_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    body = f"""
    import os
    os.chdir({str(tmp_path / "gone")!r})
    os.rmdir({str(tmp_path / "gone")!r})
    with exit_on_error():
        print("not reached")"""
    done = ended(body.strip(), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working directory was deleted: change to another one\n"


@pytest.mark.parametrize("what", ["open('/dev/null')", "__import__('_ctypes_test')"])
def test_too_few_file_handles_are_one_line(what):
    body = f"kept = []\n    while True: kept.append({what}); kept.append(open('/dev/null'))"
    limit = (30, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    done = ended(body, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
    assert done.returncode == 2 and "too many open files, raise the limit" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    done = ended("open('no such file')")
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("delete", [True, False])
def test_two_runs_stay_apart_also_without_the_file_of_the_lock(tmp_path, delete):
    other = "from pathlib import Path; from dit_jax.runtime.folder_lock import locked\n"
    other += f"    with locked(Path({str(tmp_path)!r})): print('held')"
    with locked(tmp_path):
        if delete:
            (tmp_path / LOCK).unlink()
        done = ended(other, stdout=subprocess.PIPE)
        assert (done.returncode, done.stdout) == (2, "")
        who = "unknown process" if delete else f"process {os.getpid()} on "
        assert f"another run is at work in '{tmp_path}' ({who}" in done.stderr
    assert ended(other, stdout=subprocess.PIPE).stdout == "held\n"


def test_what_is_written_in_place_is_no_link_out_of_its_folder(tmp_path):
    """The folder of a run may be a stranger's: all other files are replaced, and a link with them."""
    secret, workdir = tmp_path / "secret", tmp_path / "w"
    secret.write_text("secret")
    events = workdir / "metrics" / "tensorboard" / "train"
    events.mkdir(parents=True)
    for file in (
        workdir / LOCK,
        workdir / "grades.jsonl",
        events / "events.out.tfevents.0000000000.dit_jax",
    ):
        file.symlink_to(secret)
    with pytest.raises(DitError, match="lock' is a link out of its folder"), locked(workdir):
        pass
    with pytest.raises(DitError, match="grades.jsonl' is a link out of its folder"):
        Cache(workdir / "grades.jsonl")
    for _ in range(2):
        Metrics(workdir / "metrics", "train").close()
        file.unlink()
        os.mkfifo(file)
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_vanished_is_said_though_the_run_went_on(tmp_path, replaced):
    with pytest.raises(DitError, match="vanished or was replaced"), locked(tmp_path / "w"):
        (tmp_path / "w").rename(tmp_path / "elsewhere")
        if replaced:
            (tmp_path / "w").mkdir()
    with locked(tmp_path / "elsewhere"):  # the lock is released
        pass


def test_a_folder_that_cannot_be_locked_is_said_and_used(tmp_path, monkeypatch, capfd):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert capfd.readouterr().err.count("cannot be locked (No locks available)") == 1


# ------------------------------------------------------------------ compiled programs

DAMAGES = {
    "flipped": lambda data, i: data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :],
    "cut": lambda data, i: data[:i],
    "emptied": lambda data, i: b"",
    "another's": lambda data, i: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_program_is_compiled_again_and_replaced(tmp_path, damage, recwarn):
    from jax._src import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    x = np.arange(9, dtype=np.float32)

    def compute():
        jax.clear_caches()
        return [np.asarray(jax.jit(f)(x)) for f in (lambda x: jnp.sin(x) @ x, lambda x: x * 3)]

    try:
        expected = compute()
        files = sorted(tmp_path.glob("*-sha256-cache"))
        assert len(files) == 2 == len(list(tmp_path.iterdir()))
        for share in (0, 0.3, 0.6, 0.99):
            sound = [file.read_bytes() for file in files]
            for file, data, other in zip(files, sound, sound[::-1], strict=True):
                wrong = DAMAGES[damage](data, int(share * len(data)))
                file.write_bytes(other if wrong is None else wrong)
            damaged = [file.read_bytes() for file in files]
            for _ in range(2):
                np.testing.assert_equal(compute(), expected)
            mended = [file.read_bytes() for file in files]
            assert all(a != b for a, b in zip(mended, damaged, strict=True))
            np.testing.assert_equal(compute(), expected)
            assert [file.read_bytes() for file in files] == mended  # sound ones are used
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()
    assert not [w for w in recwarn if "cache" in str(w.message)]


@pytest.mark.parametrize("refused", ["__init__", "get", "put"])
def test_programs_that_cannot_be_kept_are_one_note(tmp_path, refused, monkeypatch, recwarn, capfd):
    from jax._src import compilation_cache, lru_cache

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: '{len(told)}'")

    told = []
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setattr(lru_cache.LRUCache, refused, full)
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        jax.clear_caches()
        for number in (2, 3):
            told.append(jax.jit(lambda x, n=number: x * n)(np.float32(2)))
    finally:
        monkeypatch.undo()
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()
    assert told == [4, 6] and not [w for w in recwarn if "cache" in str(w.message)]
    said = capfd.readouterr().err
    assert said.startswith(f"note: compiled programs are not all kept in '{tmp_path}'")
    assert said.count("\n") == 1


def test_errors_of_locks_are_clear():
    with pytest.raises(DitError, match="cannot (make|write)"), locked(ROOT / "README.md" / "x"):
        pass
