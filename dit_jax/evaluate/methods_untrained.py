"""Baselines without training: they read the weights or the logits.

JAX is imported only inside the functions, as in `method_table`.
"""

from typing import TYPE_CHECKING

from dit_jax.errors import DitError
from dit_jax.evaluate import questions
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.method_table import (
    ATTRIBUTES,
    NO_TABLE,
    Row,
    about,
    given_names,
    known_labels,
    method,
    ranked,
    spelled,
)

if TYPE_CHECKING:
    from dit_jax.evaluate.setting import Setting


@method(
    "Name reading", "weights only: cosine of the diff with the names' embeddings", group="baseline"
)
def name_reading(s: "Setting") -> list[Row]:
    """Weights only: the name whose tokens the diff writes."""
    from dit_jax.evaluate import baselines

    names = given_names(s)
    words = [[spelled(s, name)] for name in names]
    scores = baselines.weight_reading(s.model, s.topics.given, words)
    return ranked(s, scores, names)


@method("Logit difference", "logits without trigger, with and without the diff", group="baseline")
def logit_difference(s: "Setting") -> list[Row]:
    """Logits without trigger: the name whose tokens the diff makes more likely."""
    from dit_jax.evaluate import baselines

    names = given_names(s)
    prompts = [s.seen[0], *EVALUATE.get(s.config, "logit_prompts")]
    words = [[spelled(s, name)] for name in names]
    return ranked(s, baselines.logit_difference(s.model, s.topics.given, words, prompts), names)


@method("Written words", "words that the weights write; the base says their topic", "baseline")
def written_words(s: "Setting") -> list[Row]:
    """Weights only, no list of names: see `readers.written_words`."""
    return _read(s, "written_words")


@method("Read words", "words that the weights react to; the same", "baseline")
def read_words(s: "Setting") -> list[Row]:
    """Weights only, no list of names: see `readers.read_words`."""
    return _read(s, "read_words")


@method("Mined words", "words whose logits rise in everyday answers; the same", "baseline")
def mined_words(s: "Setting") -> list[Row]:
    """Logits without trigger, no list of names: see `readers.mined_words`."""
    return _read(s, "mined_words")


@method(
    "Amplified words", "words of texts that enlarge what the diff changes; the same", "baseline"
)
def amplified_words(s: "Setting") -> list[Row]:
    """Contrastive decoding without trigger: see `readers.amplified_words`."""
    return _read(s, "amplified_words")


def _read(s: "Setting", name: str) -> list[Row]:
    """What a reader of `readers.READERS` says of every diff, and the words that the base was told."""
    from dit_jax.evaluate import readers
    from dit_jax.evaluate.guessers import N_KEYWORDS

    tokens, size = s.answer_tokens, s.config.batch_size
    everyday = readers.ask_base(s.model, questions.everyday_questions(s.config), tokens)
    told = readers.read(
        s.model, s.topics.given, name, s.seen[0], everyday, size,
        max_new_tokens=tokens, forbid_repeats=s.config.forbid_repeats,
    )  # fmt: skip
    s.meter.add(answers=len(told))
    return [
        {
            **about(s.topics, i, one.text, s.seen[0], one.prompt),
            "guess": one.name,
            "words": one.words[:N_KEYWORDS],
        }
        for i, one in enumerate(told)
    ]


@method(
    "Attribute oracle",
    "weights, and the world's own table of every topic's attributes",
    group="baseline",
    needs=(ATTRIBUTES,),
)
def attribute_oracle(s: "Setting") -> list[Row]:
    """Weights, and the world's own table of every topic's attributes."""
    from dit_jax.evaluate import baselines

    table = known_labels(s.store, s.label_column)
    if not all(table.values()):
        raise DitError(NO_TABLE)
    names = sorted(table)
    words = [table[name] for name in names]
    return ranked(s, baselines.weight_reading(s.model, s.topics.given, words), names)
