"""Errors that Orbax meets on disk, each as one line instead of the tracebacks of its threads."""

import contextlib
import functools
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats.files import is_decoded
from dit_jax.runtime.os_errors import explain_os_errors, has_remedy, os_error

explain_save = functools.partial(explain_os_errors, "save a checkpoint in")


# How errors of tensorstore begin: "DATA_LOSS: Error reading", or without a status "Error opening "zarr3" driver".
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: |Error opening ")


def check_path(folder: str | os.PathLike[str], *, written: bool = True) -> None:
    """Raises DitError: the path of a folder has what Orbax does not take.

    Orbax finds what its processes wrote by a pattern of the whole path: where "*", "?" or "[" stands in it, it saves an
    empty checkpoint, or one with parts of other folders, and says that all is well.
    """
    path = os.path.abspath(folder)
    found = next((char for char in ("*?[\\" if written else "\\") if char in path), "")
    if found or not is_decoded(path):
        raise DitError(
            f"the path '{path}' has {found or 'bytes that are not UTF-8'} in it, with which checkpoints cannot be "
            f"{'written' if written else 'read'}: choose another folder, or rename it"
        )


class _Reported(logging.Filter):
    """Drops the tracebacks that Orbax's threads log for errors that are reported in one line.

    Of several arrays that cannot be read one error is raised. Asyncio tells of the others when it forgets them, at any
    time after that.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.name == "asyncio":
            return not _STATUS.match(str(error))
        return not ("orbax" in record.pathname and error and has_remedy(os_error(error)))


class _Unraisable:
    """Drops what is reported after the first error: event loops that are closed, or could open no files."""

    def __init__(self, hook: Any):
        self._hook = hook

    def __call__(self, args: Any) -> None:
        said = str(args.exc_value)
        if said != "Event loop is closed" and "_UnixSelectorEventLoop" not in said:
            self._hook(args)


_REPORTED = _Reported()


def say_errors_once() -> None:
    """A refused save or a damaged file is one line, without the tracebacks of the libraries' threads."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_REPORTED)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


@contextlib.contextmanager
def said_by_us() -> Iterator[None]:
    """Libraries log nothing: what is wrong with a checkpoint is one line of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.freeze()  # the collection below goes through what Orbax makes, not through all that a large process holds
    with warnings.catch_warnings():
        # Orbax gives up a checkpoint whose handler is damaged without waiting for what it began.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            yield
        finally:
            gc.collect()  # asyncio logs errors of tasks when it forgets them
            gc.unfreeze()
            logging.disable(disabled)


def has_larger_chunks(stored: Any) -> bool:
    """Whether an array of a checkpoint's metadata has chunks larger than itself.

    Orbax unpacks chunks whole, so a few bytes could fill any memory.
    """
    chunk = stored.storage_metadata.chunk_shape
    return any(c > n for c, n in zip(chunk, stored.shape, strict=True))


def host_target(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What to restore into: Orbax would put jax arrays on the devices that wrote them, which may not exist here."""
    return np.empty(shape, dtype)
