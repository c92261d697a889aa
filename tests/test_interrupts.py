"""Ctrl-C ends a program with one line and status 130, whatever it is doing; training saves first."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from dit_jax.runtime.interrupts import INTERRUPTED
from dit_jax.runtime.preemption import SAVES

MAIN = ["-m", "dit_jax.main", "--config", "configs/quickstart.py", "--workdir", "/nowhere/w"]
START = "from dit_jax.runtime import interrupts\ninterrupts.end_at_once()\n"
BUSY = {
    "a loop of Python": "print('ready', flush=True)\nwhile True: pass",
    "a compiled program": """
import jax, jax.numpy as jnp
endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, jnp.sin, x))
print("ready", flush=True)
endless(1.0).block_until_ready()
""",
    "a callback of the garbage collector": """
import gc, time
gc.callbacks.append(lambda phase, info: time.sleep(0.05))
print("ready", flush=True)
while True:
    gc.collect()
""",
    "code that catches everything": """
print("ready", flush=True)
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "a run that listens": """
from dit_jax.runtime import preemption
with preemption.listen():
    print("ready", flush=True)
    while True: pass
""",
}
SAVING = """
import time
from dit_jax.runtime import preemption
with preemption.listen(), preemption.hold() as notice:
    print("ready", flush=True)
    for step in range(1000):
        stops = notice.reached(step)
        time.sleep(SECONDS)
        if stops:
            print("saved", flush=True)
            raise preemption.Preempted
"""


def listening():
    """Signals as in a terminal: the suite itself may run in the background or under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def started(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        restore_signals=True,
        preexec_fn=listening,
    )


def ended(process, seconds=30):
    """(status, stdout, lines of stderr) of a process, killed if it does not end."""
    try:
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, error.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True])
def test_other_signals_leave_nothing_unfinished(tmp_path, number, ignored):
    """Where they are ignored, as under nohup, they stay so."""
    ignore = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n" if ignored else ""
    program = f"""
from dit_jax.runtime import artifacts
import time
with artifacts.atomic_dir({str(tmp_path / "folder")!r}) as folder:
    (folder / "part").write_text("new")
    print("ready", flush=True)
    time.sleep({1 if ignored else 60})
"""
    process = started("-c", ignore + START + program)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    status, _, lines = ended(process)
    assert status == (0 if ignored else 128 + number) and len(lines) == 1 - ignored
    assert [path.name for path in tmp_path.iterdir()] == (["folder"] if ignored else [])


def test_the_end_of_the_terminal_ends_a_run():
    process = started("-c", START + BUSY["a run that listens"])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    status, _, lines = ended(process)
    assert (status, len(lines)) == (129, 1) and lines[0].startswith("the terminal is gone (SIGHUP)")


@pytest.mark.parametrize("doing", BUSY)
def test_it_ends_whatever_it_is_doing(doing):
    process = started("-c", START + BUSY[doing])
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert ended(process) == (130, "", [INTERRUPTED])
    assert time.monotonic() - start < 10  # a second, and a busy machine


@pytest.mark.parametrize("module", ["jax", "flax", "dit_jax.cli.run_stages"])
def test_imports_end_with_the_same_line(module):
    """A run that gets Ctrl-C as it begins to import a module: no clock, which a busy machine moves."""
    program = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = {["main", *MAIN[2:]]!r}
runpy.run_module("dit_jax.main", run_name="__main__", alter_sys=True)
"""
    assert ended(started("-c", program), 60) == (130, "", [INTERRUPTED])


def test_a_loop_that_saves_goes_on_to_the_end_of_its_step():
    process = started("-c", START + SAVING.replace("SECONDS", "2"))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # as a job's end does: it is being saved already
    assert ended(process) == (130, "saved\n", [SAVES, INTERRUPTED])


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_another_ctrl_c_does_not_wait_for_the_step(first):
    process = started("-c", START + SAVING.replace("SECONDS", "60 * (step > 0)"))
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(first)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    status, out, lines = ended(process)
    assert (status, out, lines[-1]) == (130, "", INTERRUPTED)
    assert lines[:-1] == ([SAVES] if first == signal.SIGINT else [])
    assert time.monotonic() - start < 20  # the step takes 60 s, and the machine may be busy


def test_what_is_unfinished_goes_and_what_was_there_stays(tmp_path):
    program = f"""
import os
from dit_jax.runtime import artifacts
artifacts.write_text({str(tmp_path / "file")!r}, "old")
os.environ["TMPDIR"] = {str(tmp_path)!r}
uploads = artifacts.TemporaryFolder("uploads-")
with artifacts.atomic_file({str(tmp_path / "file")!r}) as file, \\
     artifacts.atomic_dir({str(tmp_path / "folder")!r}) as folder:
    file.write_text("new")
    (folder / "part").write_text("new")
    print("ready", flush=True)
    while True: pass
"""
    process = started("-c", START + program)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_function_call_raises_as_python_does():
    """In a notebook a run must not end the process."""
    program = """
import os, signal, time
from dit_jax.runtime import preemption
try:
    with preemption.listen():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
except KeyboardInterrupt:
    print("raised", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    assert ended(started("-c", program)) == (0, "raised True\n", [])


def test_a_background_job_goes_on():
    program = START + "import time\nprint('ready', flush=True)\ntime.sleep(1)\nprint('end')"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "end\n", [])


def test_a_quickstart_ends_at_random_moments(tmp_path):
    """DIT_JAX_INTERRUPTS=50 for the long form."""
    rng = random.Random(0)
    for _ in range(int(os.environ.get("DIT_JAX_INTERRUPTS", "1"))):
        process = started(*MAIN[:-1], str(tmp_path / "w"))
        seconds = rng.uniform(0.5, 25)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        status, _, lines = ended(process, 60)
        assert (status, lines[-1]) == (130, INTERRUPTED), (seconds, lines)
        assert not any("Traceback" in line or "Exception ignored" in line for line in lines)
        assert time.monotonic() - start < 15
