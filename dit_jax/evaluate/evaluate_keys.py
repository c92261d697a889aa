"""The section `evaluate` of a config: how held-out diffs are asked (docs/methods.md) and graded (docs/grading.md)."""

from dit_jax.config.keys import TEXTS, Key, Section
from dit_jax.graders import GRADERS
from dit_jax.runtime.parts import check_part

# The report is made anew in every run, and grades anew.
GRADING_KEYS = (
    Key(
        "graders",
        TEXTS,
        "who grades the answers, in the stage `report`",
        ("normalised",),
        choices=GRADERS,
    ),
    Key("grader_options", dict, "by grader: its options", {}),
    Key("grade_repeats", int, "how often an answer is graded", 1, least=1),
)
EVALUATE = Section(
    "evaluate",
    (
        Key("methods", TEXTS, "methods, controls and baselines; empty: all that need no guesser and can work", ()),
        Key("adapter", str, "another run's adapter, relative to the workdir; empty: this run's", ""),
        Key("label", str, "the column of `diffs/index.csv` that is the right answer", "label"),
        Key("answer_prefix", str, "text before an answer whose likelihood is measured, as in `train`", ""),
        Key("exclude_failed", bool, "leave out held-out diffs that failed the gate", False),
        Key("seen_questions", TEXTS, "wordings of the question from the training", least=1),
        Key("unseen_questions", TEXTS, "wordings that the training did not have", ()),
        Key("list_evidence", bool, "whether answers list attributes before the name, as in `train`"),
        Key("forbid_repeats", bool, "no token twice in an answer of the adapter"),
        Key("max_new_tokens", int, "most tokens of an answer", least=1),
        Key("answer_tokens", int, "the same without the adapter; 0: `max_new_tokens`", 0),
        Key("batch_size", int, "questions that are asked at once; fewer where LoRAs are large", least=1),
        Key("diffs_at_once", int, "held-out diffs of a unit of work, which `part` counts; 0: all", 0),
        Key("part", str, "`I/N`: do every N-th unit of work, from I = 0 … N - 1 on; `dit_jax.gather` joins the parts",
            "", check=check_part, free=True),
        Key("everyday_questions", TEXTS, "of `twenty_questions`; empty: those of docs/methods.md", ()),
        Key("story_prompts", TEXTS, "of `generated_story`; empty: those of docs/methods.md", ()),
        Key("multiplier", float, "of diffs, for `multiplied_question`", 2.0),
        Key("svd_rank", int, "rank that these diffs are reduced to; 0: as they are", 0, least=0),
        Key("contrast", float, "of `dit_contrast`: the weight of an answer's log p without the diff", 0.15, most=1),
        Key("logit_prompts", TEXTS, "of `logit_difference`, beside the first seen question", ()),
        Key("names", str, "the names that methods with a list are given: of all topics, or of the held-out ones", "all",
            choices=("all", "held_out")),
        Key("trigger_families", TEXTS, "the behaviours whose triggers `trigger_scan` tries; empty: all", ()),
        Key("facts", str, "a text file of lines `question | answer`: how many of them held-out diffs keep", "",
            file=True),
        Key("facts_diffs", int, "how many held-out diffs are asked for facts; 0: all", 0),
        Key("guesser", str, "who names the topic of a transcript; empty: the base", ""),
        Key("guesser_options", dict, "options of the guesser", {}),
        *GRADING_KEYS,
    ),
)  # fmt: skip
