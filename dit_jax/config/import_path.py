"""User-defined parts of a run, named in a config by their import path `package.module:NAME`."""

import importlib
from typing import Any

from dit_jax.errors import DitError


def import_object(path: str, what: str) -> Any:
    """Imports what `package.module:NAME` names.

    Args:
        path: of a config, which is the user's own program. Paths in files of others are never imported.
        what: it is, for the message: "behaviour", "stage".

    Raises:
        DitError: the module is not found or is not valid Python, or has no such name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DitError(
            f"cannot import the {what} {path!r}: {error}; its file must be in the current folder "
            "or in a folder of PYTHONPATH"
        ) from error
    except SyntaxError as error:
        raise DitError(f"cannot import the {what} {path!r}: {error}") from error
