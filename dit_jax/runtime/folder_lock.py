"""A folder that one run has for itself, whatever ends that run."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dit_jax.errors import DitError
from dit_jax.formats.files import file_below
from dit_jax.runtime import artifacts, processes
from dit_jax.runtime.os_errors import explain_os_errors
from dit_jax.runtime.outgoing import show

LOCK = ".lock"
LOCK_WAIT_SECONDS = 2.0  # a predecessor that was killed may take a moment to be gone
_HELD = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run, on process 0. The system releases it, whatever ends the process.

    The folder itself is locked, because a file in it may be deleted, and the file LOCK, because network mounts may lock
    files alone. Where the file system has no locks (some network mounts), one line says so and the run goes on.

    Raises:
        DitError: another run holds it, LOCK is no file of the folder, the folder cannot be made, or at the end another
            one is in its place: a mount vanished, and what was written after that lies elsewhere.
    """
    handle: list[int] = []

    def acquire() -> None:
        file = artifacts.make_dir(workdir) / LOCK
        if os.path.lexists(file):
            file_below(workdir, file)  # it is written to
        with explain_os_errors("write", file):
            handle.append(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644))
            handle.append(os.open(workdir, os.O_RDONLY | os.O_DIRECTORY))
        refused = [
            error for error in (_lock(number, handle[0], workdir) for number in handle) if error
        ]
        if len(refused) == len(handle):
            show(
                f"note: '{workdir}' cannot be locked ({refused[0].strerror}): "
                "make sure that no other run uses it",
                error=True,
            )
            return
        with contextlib.suppress(OSError):  # for the message alone
            os.ftruncate(handle[0], 0)
            os.pwrite(handle[0], f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def check() -> None:
        there = workdir.stat() if workdir.exists() else None
        if there is None or not os.path.samestat(there, os.fstat(handle[1])):
            raise DitError(
                f"'{workdir}' vanished or was replaced while the run was at work: bring it back (a mount?) and run "
                "the same command again"
            )

    try:
        processes.on_main(acquire)
        yield
        processes.on_main(check)
    finally:
        for number in handle:
            os.close(number)


def _lock(handle: int, file: int, workdir: Path) -> OSError | None:
    """Locks a file or folder; returns why the file system cannot. Raises DitError: the run that `file` names has it."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except OSError as error:
            if error.errno not in _HELD:
                return error
        if time.monotonic() > deadline:
            holder = os.pread(file, 100, 0).decode("utf-8", "replace").strip()
            raise DitError(
                f"another run is at work in '{workdir}' ({holder or 'unknown process'}): "
                "wait for its end, or use another --workdir"
            )
        time.sleep(0.1)
