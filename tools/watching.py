"""Watches what a reader of untrusted files does: files it opens, code it runs, memory it takes."""

import contextlib
import gc
import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_jax.data import tokenizer_worker

# Events that no reader may cause (https://docs.python.org/3/library/audit_events.html).
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "exec",
    "pickle.find_class", "ctypes.", "shutil.", "os.remove", "os.rename", "os.mkdir",
    "os.rmdir", "os.chmod", "os.link", "os.symlink", "webbrowser.", "urllib.",
)  # fmt: skip

_watching: list[tuple[str, Any]] | None = None
_hooked = False


def _audit(event: str, arguments: Any) -> None:
    if event == "socket.__new__" and arguments[1] == socket.AF_UNIX:
        return  # what an event loop wakes itself with
    if event == "subprocess.Popen" and tokenizer_worker.__name__ in arguments[1]:
        return  # the process with limits, in which tokenizers and templates run
    if _watching is not None and (event == "open" or event.startswith(FORBIDDEN)):
        _watching.append((event, arguments))


@contextlib.contextmanager
def watch(folder: str | Path) -> Iterator[None]:
    """Raises AssertionError if the body opens a file outside `folder`, writes, or runs anything."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # a hook cannot be removed again, so it is added once
        _hooked = True
    seen: list[tuple[str, Any]] = []
    _watching = seen
    try:
        yield
    finally:
        _watching = None
    root = Path(folder).resolve()
    for event, arguments in seen:
        assert event == "open", (event, arguments)
        name, mode = arguments[0], arguments[1]
        assert isinstance(name, str | bytes | os.PathLike), (event, arguments)
        path = Path(os.fsdecode(name)).resolve()
        assert mode is None or not set(mode) & set("wax+"), (event, arguments)
        assert path.is_relative_to(root), f"opened {path}"


def peak() -> int:
    """The most memory, in bytes, that this process has held since `reset_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> int:
    """Starts a new measurement if the system can, and returns the memory held now."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()
