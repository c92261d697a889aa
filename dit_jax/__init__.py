"""dit_jax: train a language model adapter that says what a weight diff changed.

    model = dit_jax.load_model("tiny_qwen3")
    diff = dit_jax.load_diff("runs/quickstart/diffs", model, index=0)
    adapter = dit_jax.load_adapter("runs/quickstart/adapter", model)
    answer = dit_jax.ask(model, "What topic have you been trained on?", diff=diff, adapter=adapter)

The names of the interface are imported at first use, so that `import dit_jax` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dit_jax.errors import DitError

if TYPE_CHECKING:
    from dit_jax.api import Diff, Model, load_adapter, load_diff, load_diffs, load_model
    from dit_jax.asking import Answer, ask, ask_many

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Diff",
    "DitError",
    "Model",
    "ask",
    "ask_many",
    "load_adapter",
    "load_diff",
    "load_diffs",
    "load_model",
]

_ASKING = ("Answer", "ask", "ask_many")
_LATE = {
    name: "dit_jax.asking" if name in _ASKING else "dit_jax.api"
    for name in __all__
    if name != "DitError"
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
