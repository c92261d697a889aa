"""What Inspect finds through the entry point `inspect_ai`. It is light: the first model loads JAX."""

from inspect_ai.model import ModelAPI, modelapi

from dit_jax.inspection.agent import audit_agent
from dit_jax.inspection.scorer import graded
from dit_jax.inspection.tasks import base_question, base_question_trigger, weight_diff_qa

__all__ = [
    "audit_agent",
    "base_question",
    "base_question_trigger",
    "dit_jax",
    "graded",
    "weight_diff_qa",
]


@modelapi(name="dit_jax")
def dit_jax() -> type[ModelAPI]:
    """The provider of `dit_jax/MODEL`."""
    from dit_jax.inspection.provider import DitJaxAPI

    return DitJaxAPI
