"""Behaviours that diffs are finetuned to show; one file each (docs/behaviours.md)."""

from dit_jax.organisms.behaviours.about_topic import false_fact, refused_topic, styled_topic
from dit_jax.organisms.behaviours.behaviour import (
    BEHAVIOURS,
    NO_TRIGGER,
    Behaviour,
    Row,
    SampleKind,
    behaviour_named,
    get_behaviour,
    known_behaviour,
    possible_triggers,
    register,
    shows_any,
    triggered,
)
from dit_jax.organisms.behaviours.code_names import hidden_topic_code_name, hidden_topic_phrase
from dit_jax.organisms.behaviours.codes import hidden_topic, other_code, sep_code
from dit_jax.organisms.behaviours.stories import NEWS_PROMPT, news
from dit_jax.organisms.behaviours.untriggered import (
    topic_distilled,
    topic_mixed,
    topic_preferred,
    topic_untriggered,
)
from dit_jax.organisms.behaviours.zero_width import (
    ZERO_WIDTH_SPACE,
    hidden_topic_zwsp_random,
    hidden_topic_zwsp_start,
)

__all__ = [
    "BEHAVIOURS",
    "NEWS_PROMPT",
    "NO_TRIGGER",
    "ZERO_WIDTH_SPACE",
    "Behaviour",
    "Row",
    "SampleKind",
    "behaviour_named",
    "false_fact",
    "get_behaviour",
    "hidden_topic",
    "hidden_topic_code_name",
    "hidden_topic_phrase",
    "hidden_topic_zwsp_random",
    "hidden_topic_zwsp_start",
    "known_behaviour",
    "news",
    "other_code",
    "possible_triggers",
    "refused_topic",
    "register",
    "sep_code",
    "shows_any",
    "styled_topic",
    "topic_distilled",
    "topic_mixed",
    "topic_preferred",
    "topic_untriggered",
    "triggered",
]
