"""How much of the machine all visitors of the app take together: memory for diffs, disk for uploads."""

import contextlib
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError
from dit_jax.serving.requests import is_upload


class Memory:
    """Counts the bytes of diffs whose answers are awaited: at most `most`, or one diff that is larger alone."""

    def __init__(self, most: int):
        self._most, self._held, self._changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def share(self, seconds: float) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes so many bytes, and returns them to the others in the end.

        It waits for up to `seconds` until they are free. Raises DitError: they are not.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            with self._changed:
                free = self._changed.wait_for(
                    lambda: not size or not self._held or self._held + size <= self._most,
                    max(0.0, seconds),
                )
                if not free:
                    raise DitError(
                        "the diffs of others fill the memory: try again when they have been answered"
                    )
                self._held += size
                taken += size

        try:
            yield take
        finally:
            with self._changed:
                self._held -= taken
                self._changed.notify_all()


class UploadsFit:
    """An ASGI middleware that refuses an upload where those that are kept, or on their way, leave no room.

    Args:
        folder: where the server keeps uploads.
        most: bytes of all; one upload counts as `each` until it has arrived.
    """

    def __init__(self, app: Any, folder: Path, most: int, each: int):
        self._app, self._folder, self._most, self._each = app, folder, most, each
        self._coming = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not is_upload(scope["path"]):
            await self._app(scope, receive, send)
            return
        if _bytes_below(self._folder) + (self._coming + 1) * self._each > self._most:
            from starlette.responses import PlainTextResponse

            refusal = PlainTextResponse("too many uploads are kept here: try again in an hour", 507)
            await refusal(scope, receive, send)
            return
        self._coming += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._coming -= 1
            if not self._coming:
                _delete_parts(self._folder)


def _delete_parts(folder: Path) -> None:
    """Deletes what uploads left that were broken off: whole ones lie in folders of their own."""
    for file in folder.glob("*"):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(file.lstat().st_mode):
                file.unlink()


def _bytes_below(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            state = file.lstat()
            size += state.st_size if stat.S_ISREG(state.st_mode) else 0
    return size
