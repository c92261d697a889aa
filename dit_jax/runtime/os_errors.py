"""Errors of the file system as one line, whichever library met them."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from dit_jax.errors import DitError

_REMEDIES = {
    errno.EACCES: "permission denied, choose another folder or change its permissions",
    errno.EPERM: "not permitted, choose another folder or change its permissions",
    errno.EROFS: "the file system is read-only, choose another folder",
    errno.ENOSPC: "the disk is full, free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up, free some space and run the same command again",
    errno.EFBIG: "the limit on file sizes is reached (ulimit -f), raise it and run the same command again",
    errno.EIO: "input/output error, check the disk and run the same command again",
    errno.ENOTDIR: "a part of the path is a file, choose another folder",
    errno.EMFILE: "too many open files, raise the limit (ulimit -n)",
    errno.ENFILE: "the system has too many open files, close some programs",
    errno.ENAMETOOLONG: "the name is too long, choose a shorter one",
    errno.ELOOP: "links lead in a circle, give what they should lead to",
    errno.EISDIR: "it is a folder, give a file",
    errno.EEXIST: "something of that name is in the way, choose another folder",
    errno.ENOTEMPTY: "a folder of that name is in the way, choose another folder",
}
# Errors of the connection, the permissions or this process, not of the files.
_MAY_PASS = frozenset({
    errno.EACCES, errno.EPERM, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM, errno.ENFILE,
    errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
})  # fmt: skip


def os_error(error: BaseException) -> int | None:
    """The errno behind an exception, or None: from an OSError in its chain, or from a library's message.

    Safetensors writes "(os error 28)", tensorstore "[os_error_code='28']", the loader of Python's extensions the words
    of EMFILE.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno:
            return link.errno
        if isinstance(link, MemoryError):
            return errno.ENOMEM
        if found := re.search(r"os[ _]error(?:_code=')? ?(\d+)", str(link)):
            return int(found[1])
        if os.strerror(errno.EMFILE) in str(link):
            return errno.EMFILE
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def reason(number: int) -> str:
    """The error in words, with a remedy if there is one."""
    return _REMEDIES.get(number) or os.strerror(number)


def has_remedy(number: int | None) -> bool:
    """Whether the user can do something about the error."""
    return number in _REMEDIES


def may_pass(number: int | None) -> bool:
    """Whether the same call may succeed later, so that what could not be read need not be damaged."""
    return number in _MAY_PASS


@contextlib.contextmanager
def explain_os_errors(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of the file system into a DitError: `cannot <action> '<path>': <error and remedy>`."""
    try:
        yield
    except DitError:
        raise
    except OSError as error:
        said = reason(error.errno) if error.errno else str(error)
        raise DitError(f"cannot {action} '{path}': {said}") from error
    except Exception as error:
        number = os_error(error)
        if not has_remedy(number):
            raise
        raise DitError(f"cannot {action} '{path}': {reason(number or 0)}") from error
