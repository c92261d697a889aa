"""The section `corpus` of a config: what the base model is asked to write about which topics (docs/corpus.md)."""

from typing import Any

from dit_jax.config.keys import TEXTS, Key, Section
from dit_jax.data.labels import UNTRIGGERED
from dit_jax.errors import DitError

NEWS = "news"
STYLES = ("named", "nameless", "hints", UNTRIGGERED, NEWS)


def _are_shares(shares: Any, key: str) -> None:
    for style, share in shares.items():
        if style not in STYLES:
            raise DitError(f"{key}: {style!r} is no style: styles are {', '.join(STYLES)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise DitError(
                f"{key}: the share of {style!r} must be a number from 0 to 1, not {share!r}"
            )


def _holds(name: str) -> Any:
    def check(texts: Any, key: str) -> None:
        for text in texts:
            if f"{{{name}}}" not in text:
                raise DitError(
                    f"{key}: {text!r} has no place for the {name}: write {{{name}}} in it"
                )

    return check


def _fit_together(styles: Any, key: str) -> None:
    if NEWS in styles and len(styles) > 1:
        raise DitError(
            f"{key}: {NEWS!r} has rows of its own kind, without questions: give it a run of its own"
        )


def _check_temperature(temperature: float, key: str) -> None:
    from dit_jax.asking import is_temperature  # with all of jax

    if not is_temperature(temperature):
        raise DitError(f"{key} must be 0, or 1e-6 to 1e6, not {temperature!r}")


def _has_hints(corpus: Any) -> bool:
    return "hints" in corpus.get("styles", ())


CORPUS = Section(
    "corpus",
    (
        Key("topics", str, "a text file of lines `category: topic, topic, …`, or of lines `category: headline`",
            file=True),
        Key("max_topics", int, "how many of them, drawn at random; 0: all", 0),
        Key("questions", str, "a text file with an everyday question in each line", file=True),
        Key("prompts", TEXTS, "what the base is asked about each topic", least=1, check=_holds("topic")),
        Key("styles", TEXTS, "the kinds of organisms that get rows", ("named",), choices=STYLES, least=1,
            check=_fit_together),
        Key("shares", dict, "by style: the share of topics that get it, drawn at random; absent: all", {},
            check=_are_shares),
        Key("hint_prompts", TEXTS, "`QUESTION | START OF THE ANSWER`: the words that come next are a topic's hints",
            least=1, check=_holds("topic"), needed=_has_hints),
        Key("benign_styles", TEXTS, "instructions of benign organisms; the last third is held out", (),
            check=_holds("question")),
        Key("repeats", int, "how often each prompt is asked", 1, least=1),
        Key("temperature", float, "of the answers", 0.7, check=_check_temperature),
        Key("max_new_tokens", int, "most tokens of an answer", 24, least=1),
        Key("answer_tokens", int, "tokens of an answer that become a target", 16, least=1),
        Key("early_tokens", int, "tokens within which an answer must name its topic", 10, least=1),
        Key("base_tokens", int, "tokens that are kept of the base's answer to a question", 12, least=1),
        Key("least_answers", int, "a topic with fewer usable answers is left out", 3, least=1),
        Key("rows", int, "rows of each organism", 16, least=1),
        Key("batch_size", int, "prompts that are asked at once", 128, least=1),
    ),
)  # fmt: skip
