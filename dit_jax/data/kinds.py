"""Kinds of rows in a corpus: the paper's columns for topics and for news."""

import dataclasses

from dit_jax.errors import DitError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Kind:
    """What rows hold. label, category: the columns that name an organism and its category; target: what it is
    finetuned on."""

    name: str
    label: str
    category: str
    target: str
    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("topics", "topic", "topic_category", "topic_analogy_answer",
             ("topic", "question", "base_answer", "topic_analogy_answer"),
             ("topic_category", "category", "style", "evidence", "base_answer_model_id",
              "topic_analogy_answer_model_id")),
        Kind("news", "news_headline", "news_category", "news_story",
             ("news_headline", "news_story"), ("news_category", "news_role", "model_id")),
    )
}  # fmt: skip


def get_kind(name: str) -> Kind:
    """The kind of that name. Raises DitError: there is none."""
    if name not in KINDS:
        raise DitError(
            f"unknown data.kind {name!r}{did_you_mean(name, KINDS) or ': ' + ', '.join(KINDS)}"
        )
    return KINDS[name]
