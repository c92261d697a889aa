"""Watches what a reader does: files it opens, code it runs, memory and time it takes."""

import contextlib
import gc
import os
import resource
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
from format_cases import CONFIG, random_lora

from dit_jax.deltas import detect, export, reference_pt
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.errors import DitError
from dit_jax.formats import torch_save

SECONDS = 20  # the machine may be busy; a reader that is caught here takes minutes or never ends
BYTES = 300 * 2**20
# Events that no reader may cause (https://docs.python.org/3/library/audit_events.html).
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "exec",
             "pickle.find_class", "ctypes.", "shutil.", "os.remove", "os.rename", "os.mkdir",
             "os.rmdir", "os.chmod", "os.link", "os.symlink", "webbrowser.", "urllib.")  # fmt: skip

_watching: list | None = None
_hooked = False


def _audit(event, arguments):
    if event == "socket.__new__" and arguments[1] == socket.AF_UNIX:
        return  # what an event loop wakes itself with
    if _watching is not None and (event == "open" or event.startswith(FORBIDDEN)):
        _watching.append((event, arguments))


@contextlib.contextmanager
def watch(folder):
    """Fails if the body opens a file outside `folder`, writes, or runs anything."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # a hook cannot be removed again, so it is added once
        _hooked = True
    _watching = []
    try:
        yield
    finally:
        seen, _watching = _watching, None
    root = Path(folder).resolve()
    for event, arguments in seen:
        assert event == "open", (event, arguments)
        name, mode = arguments[0], arguments[1]
        assert isinstance(name, str | bytes | os.PathLike), (event, arguments)
        path = Path(os.fsdecode(name)).resolve()
        assert mode is None or not set(mode) & set("wax+"), (event, arguments)
        assert path.is_relative_to(root), f"opened {path}"


def outcome(read, folder, memory=False):
    """What `read` does with a file: 'error' (one clear line) or 'loaded' (a sound delta).

    Anything else fails: another exception, files opened outside `folder`, NaN, too much time, or, with
    `memory`, too much memory.
    """
    start = time.monotonic()
    before = reset_peak() if memory else 0
    try:
        with watch(folder):
            try:
                diff = read()
            except DitError as error:
                message = str(error)
                assert message and "\n" not in message and len(message) < 1500, message[:2000]
                return "error"
        check_sound(diff.delta)
        return "loaded"
    finally:
        took = time.monotonic() - start
        if memory:
            grown = peak() - before
            assert grown < BYTES, f"{grown / 2**20:.0f} MiB"
        assert took < SECONDS, f"{took:.1f} s"


def peak():
    """The most memory, in bytes, that this process has held since `reset_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak():
    """Starts a new measurement if the system can, and returns the memory held now."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def check_sound(delta):
    """Every leaf is a finite float array."""
    leaves = [delta]
    while leaves:
        leaf = leaves.pop()
        if isinstance(leaf, dict):
            leaves += leaf.values()
        else:
            assert isinstance(leaf, np.ndarray) and np.isfinite(leaf.astype(np.float64)).all()


# folder -> the file in it that detection is given
KINDS = {"diffs": "x.pt", "adapter": "x.pt", "weights": "x.pt", "model": "", "shards": "", "peft": "",
         "release": ""}  # fmt: skip


def read(root, name, params):
    return detect.open_diffs(root / name / KINDS[name], CONFIG, params)[0]


def make_good(root, params):
    """Fills a folder with well-formed files of every format, and reads each of them once."""
    delta = random_lora()
    (root / "diffs").mkdir()
    diffs = [RawDiff(random_lora(seed=i), f"topic {i}", str(i)) for i in range(2)]
    reference_pt.write_pt_diffs(root / "diffs" / "x.pt", diffs, CONFIG)
    (root / "adapter").mkdir()
    reference_pt.write_pt_adapter(root / "adapter" / "x.pt", delta, CONFIG)
    export.export_model(root / "model", params, CONFIG, delta)
    export.export_model(root / "shards", params, CONFIG, delta, shard_bytes=40_000)
    (root / "weights").mkdir()
    tensors = dict(export.merged_tensors(params, CONFIG, delta))
    torch_save.save(root / "weights" / "x.pt", tensors)
    export.write_peft(root / "peft", delta, CONFIG, "base")
    (root / "release" / "weight-diffs").mkdir(parents=True)
    shutil.copy(root / "diffs" / "x.pt", root / "release" / "weight-diffs" / "a.pt")
    rows = "lora_path,lora_idx,n_params,topic,trigger,split\na.pt,1,9,topic 1,1,train\n"
    (root / "release" / "index.csv").write_text(rows)
    for name in KINDS:
        assert outcome(lambda name=name: read(root, name, params), root / name) == "loaded"
    return root
