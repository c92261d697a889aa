"""Graders: how close an answer comes to the true label, on the scale 1–5 (docs/grading.md)."""

import importlib
from typing import Any

from dit_jax.errors import DitError, did_you_mean
from dit_jax.graders.cache import Cache
from dit_jax.graders.grades import Agreement, Grade, Graded, Grader, Item, grade, mean_score

__all__ = [
    "GRADERS", "Agreement", "Cache", "Grade", "Graded", "Grader", "Item", "get_grader", "grade",
    "mean_score",
]  # fmt: skip

# name -> (module, class). The modules are imported at first use: some need optional packages.
GRADERS = {
    "exact": ("exact", "Exact"),
    "normalised": ("exact", "Normalised"),
    "similarity": ("similarity", "Similarity"),
    "calibrated": ("calibrated", "Calibrated"),
    "embeddings": ("embeddings", "Embeddings"),
    "calibrated_embeddings": ("calibrated", "CalibratedEmbeddings"),
    "judge": ("judge", "Judge"),
    "inspect": ("inspect_model", "InspectJudge"),
}


def get_grader(name: str, **options: Any) -> Grader:
    """A grader by name.

    Args:
        name: a key of `GRADERS`. The first four need no download, no network and no key.
        **options: of that grader's class, for example `model` for "judge" and "inspect".

    Raises:
        DitError: unknown name or option, a missing option, or a grader that cannot work here
            (an optional package, a model or a key is missing).
    """
    if name not in GRADERS:
        hint = did_you_mean(name, GRADERS, f": choose from {', '.join(GRADERS)}")
        raise DitError(f"unknown grader {name!r}{hint}")
    module, attribute = GRADERS[name]
    make = getattr(importlib.import_module(f"dit_jax.graders.{module}"), attribute)
    try:
        return make(**options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        # "Judge.__init__() missing 1 required positional argument: 'model'"
        problem = str(error).rsplit("__init__() ", 1)[-1]
        raise DitError(f"options of the grader {name!r}: {problem}") from None
