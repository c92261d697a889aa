"""Graders: how close an answer comes to the true label, on the scale 1–5 (docs/grading.md)."""

from typing import Any

from dit_jax.errors import DitError, did_you_mean
from dit_jax.graders.cache import Cache
from dit_jax.graders.calibrated import Calibrated, CalibratedEmbeddings
from dit_jax.graders.embeddings import Embeddings
from dit_jax.graders.grades import Grade, Graded, Grader, Item, check_options, grade
from dit_jax.graders.inspect_model import InspectJudge
from dit_jax.graders.judge import Judge
from dit_jax.graders.match import Exact, Normalised, Similarity

__all__ = [
    "GRADERS",
    "Cache",
    "Grade",
    "Graded",
    "Grader",
    "Item",
    "check_grader",
    "get_grader",
    "grade",
]

# What a grader needs beyond this package, it imports when it is made.
GRADERS: dict[str, type[Grader]] = {
    one.name: one
    for one in (
        Exact, Normalised, Similarity, Calibrated, Embeddings, CalibratedEmbeddings, Judge, InspectJudge,
    )
}  # fmt: skip


def get_grader(name: str, **options: Any) -> Grader:
    """A grader by name.

    Args:
        name: a key of `GRADERS`. The first four need no download, no network and no key.
        **options: of that grader's class, for example `model` for "judge" and "inspect".

    Raises:
        DitError: unknown name or option, a missing option, or a grader that cannot work here
            (an optional package, a model or a key is missing).
    """
    _check_options(name, options)
    return GRADERS[name](**options)


def check_grader(name: str, **options: Any) -> None:
    """Raises DitError as `get_grader` does, as far as it can be seen without loading a model."""
    _check_options(name, options)
    GRADERS[name].check(**options)


def _check_options(name: str, options: dict[str, Any]) -> None:
    if name not in GRADERS:
        hint = did_you_mean(name, GRADERS, f": choose from {', '.join(GRADERS)}")
        raise DitError(f"unknown grader {name!r}{hint}")
    make = GRADERS[name]
    hint = f"; it needs {make.needs}" if make.needs else ""
    check_options(f"options of the grader {name!r}", make, hint=hint, **options)
