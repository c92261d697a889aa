"""What is wrong with the values of a config, as far as that can be told before the first stage, in one line.

Configs are programs, and one that is written anew has no other config's types: every value may be anything.
"""

import contextlib
import math
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dit_jax.cli.stages import chosen_stages
from dit_jax.config.loading import check_minimum, flatten
from dit_jax.data import organism as organisms
from dit_jax.errors import DitError, did_you_mean

# Numbers with which no stage can run. Where the minimum is a whole number, so must the value be.
MINIMUM: dict[str, float] = {
    "seed": 0,
    "diffs.rank": 1,
    "diffs.learning_rate": 0.0,
    "diffs.init_scale": 0.0,
    "diffs.warmup_steps": 0,
    "diffs.final_fraction": 0.0,
    "diffs.steps": 1,
    "diffs.fake_codes": 0,
    "diffs.max_length": 1,
    "diffs.max_target": 1,
    "diffs.diffs_per_batch": 1,
    "diffs.gate_questions": 1,
    "diffs.gate_batch": 1,
    "train.max_diffs": 0,
    "train.rank": 1,
    "train.learning_rate": 0.0,
    "train.weight_decay": 0.0,
    "train.warmup_steps": 0,
    "train.final_fraction": 0.0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.max_length": 1,
    "train.max_target": 1,
    "train.max_scored": 0,
    "train.no_diff_per_batch": 0,
    "train.benign_per_batch": 0,
    "train.log_every": 1,
    "train.save_every": 1,
    "train.keep_checkpoints": 1,
    "evaluate.answer_tokens": 0,
    "evaluate.grade_repeats": 1,
    "evaluate.max_new_tokens": 1,
    "evaluate.batch_size": 1,
    "pretrain.world_seed": 0,
    "pretrain.steps": 1,
    "pretrain.batch_size": 1,
    "pretrain.parts": 1,
    "pretrain.kernel_learning_rate": 0.0,
    "pretrain.learning_rate": 0.0,
    "pretrain.warmup_steps": 0,
    "pretrain.weight_decay": 0.0,
    "pretrain.log_every": 1,
}
SECTIONS = (
    "model", "mesh", "data", "data.columns", "diffs", "diffs.samples_per_step", "diffs.loss_weights", "diffs.widths",
    "diffs.gate", "train", "evaluate", "evaluate.grader_options", "evaluate.guesser_options", "pretrain",
)  # fmt: skip
FLAGS = (
    "model.scan_layers", "data.streaming", "diffs.score_end", "diffs.reference_losses", "train.list_evidence",
    "train.exclude_failed", "train.reference_labels", "train.reference_init", "evaluate.list_evidence",
    "evaluate.forbid_repeats", "evaluate.exclude_failed",
)  # fmt: skip
TEXTS = (
    "model.path", "model.dtype", "model.remat", "model.attention", "data.source", "data.kind", "diffs.behaviour",
    "diffs.parameters", "diffs.optimizer", "train.optimizer", "train.label", "evaluate.label", "results",
)  # fmt: skip
TEXTS_OR_EMPTY = (
    "data.split_column", "data.split_file", "data.test_source", "evaluate.adapter", "evaluate.guesser",
)  # fmt: skip
QUESTIONS = ("train.questions", "evaluate.seen_questions")  # one or more
TUPLES = (
    *QUESTIONS, "diffs.projections", "train.projections", "evaluate.methods", "evaluate.graders", "runs",
    "evaluate.everyday_questions", "evaluate.story_prompts", "evaluate.unseen_questions", "evaluate.logit_prompts",
)  # fmt: skip
PROFILES = ("diffs.profile", "train.profile")
COUNTS = tuple(f"data.{key}" for key in organisms.COUNTS)
LEAVES = (
    *MINIMUM, *COUNTS, *FLAGS, *TEXTS, *TEXTS_OR_EMPTY, *TUPLES, *PROFILES, "diffs.adam_betas",
)  # fmt: skip
# Sections whose keys are those of `LEAVES`, and within them those whose keys are names.
CLOSED = ("data", "diffs", "train", "evaluate", "pretrain")
NAMED = tuple(section for section in SECTIONS if "." in section)


def check_config(config: Any) -> None:
    """Refuses a config with which a stage could not run, before the first one starts.

    What depends on data, on the model, or on what is in the workdir, the stages say.

    Raises:
        DitError: the first mistake; the message names the key.
    """
    chosen_stages(config.stages)
    check_values(config)
    _check_together(config, flatten(config))


def check_values(config: Any) -> None:
    """What `check_config` says of each value by itself, for a plan too. Raises DitError: the first mistake."""
    values = flatten(config)
    _check_known(values)
    _check_kinds(config, values)
    check_minimum(config, MINIMUM)
    _check_choices(config, values)
    _check_pairs(values)


def check_ranks(config: Any, model: Any) -> None:
    """Refuses ranks that the model (its `DecoderConfig`) has no room for. Raises DitError."""
    from dit_jax.deltas.tree import check_lora_rank

    for name in ("diffs", "train"):
        if name in config.stages and config[name].get("parameters", "lora") == "lora":
            section = config[name]
            key = f"config key '{name}.rank'"
            check_lora_rank(model, section.rank, section.projections, key)


# ------------------------------------------------------------------ one value


def _check_known(values: Mapping[str, Any]) -> None:
    """A config of its own has no other config's keys to compare with: a misspelt one would say nothing to anyone."""
    own = ":" in str(values.get("diffs.behaviour", ""))  # it may read keys of its own from `diffs`
    for key in values:
        section, _, name = key.partition(".")
        if not name or section not in CLOSED or (own and section == "diffs"):
            continue
        if not any(key == leaf or key.startswith(f"{leaf}.") for leaf in (*LEAVES, *NAMED)):
            inside = f"{section}."
            known = [leaf.removeprefix(inside) for leaf in LEAVES if leaf.startswith(inside)]
            otherwise = f": keys of '{section}' are {', '.join(known)}"
            hint = did_you_mean(name, known, otherwise)
            raise DitError(f"config key '{key}' is unknown{hint}")


def _check_kinds(config: ConfigDict, values: Mapping[str, Any]) -> None:
    for key in SECTIONS:
        *outer, name = key.split(".")
        node = config.get(outer[0], {}) if outer else config
        if name in node and not isinstance(node[name], ConfigDict):
            raise DitError(f"config key '{key}' must be a section, not {node[name]!r}")
    for key in values:
        for leaf in LEAVES:
            if key.startswith(f"{leaf}."):
                raise DitError(f"config key '{leaf}' must be one value, and is a section")
    for key in FLAGS:
        if not isinstance(values.get(key, False), bool):
            raise DitError(f"config key '{key}' must be True or False, not {values[key]!r}")
    columns = [key for key in values if key.startswith("data.columns.")]
    for key in (*TEXTS, *TEXTS_OR_EMPTY, *columns):
        given = values.get(key, "x")
        if not isinstance(given, str) or (key in TEXTS and not given.strip()):
            raise DitError(f"config key '{key}' must be text, not {given!r}")
    for key in TUPLES:
        given = values.get(key, [])
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise DitError(f"config key '{key}' must be a tuple of texts, not {given!r}")
    for key in QUESTIONS:
        if values.get(key) == []:
            raise DitError(f"config key '{key}' must be a tuple of one question or more, not ()")


def _check_choices(config: Any, values: Mapping[str, Any]) -> None:
    from dit_jax.graders import GRADERS
    from dit_jax.models.modules import check_projections
    from dit_jax.optimize.optimizer import OPTIMIZERS
    from dit_jax.organisms.gate import LIMITS
    from dit_jax.organisms.parameters import PARAMETERS

    for key in ("diffs.projections", "train.projections"):
        if key in values:
            check_projections(tuple(values[key]), f"config key '{key}'")
    choices: dict[str, Any] = {
        "diffs.optimizer": OPTIMIZERS,
        "train.optimizer": OPTIMIZERS,
        "diffs.parameters": PARAMETERS,
        "evaluate.graders": GRADERS,
    }
    for key, known in choices.items():
        given = values.get(key, [])
        for name in given if isinstance(given, list) else [given]:
            if name not in known:
                hint = did_you_mean(str(name), known, f": choose from {', '.join(known)}")
                raise DitError(f"config key '{key}': unknown {name!r}{hint}")
    for name, limit in config.get("diffs", {}).get("gate", {}).items():
        if name not in LIMITS:
            hint = did_you_mean(name, LIMITS, f": limits are {', '.join(LIMITS)}")
            raise DitError(f"config key 'diffs.gate.{name}' is no limit of the gate{hint}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit):
            raise DitError(f"config key 'diffs.gate.{name}' must be a number, not {limit!r}")


def _check_pairs(values: Mapping[str, Any]) -> None:
    from dit_jax.optimize.optimizer import check_betas

    if "diffs.adam_betas" in values:
        check_betas(values["diffs.adam_betas"], "config key 'diffs.adam_betas'")
    for key in PROFILES:
        match values.get(key, [0, 0]):
            case [int(first), int(last)] if 0 <= first <= last:
                continue
        raise DitError(
            f"config key '{key}' must be two whole numbers, the first traced and the one after the last, not "
            f"{values[key]!r}: write {key}=10,13"
        )


# ------------------------------------------------------------------ several values


def _check_together(config: Any, values: Mapping[str, Any]) -> None:
    """Values that exclude each other, of which a later stage would tell when the earlier ones have taken their time."""
    from dit_jax.evaluate.methods import check_methods
    from dit_jax.evaluate.run import TOO_FEW_TOPICS
    from dit_jax.organisms.behaviours import get_behaviour
    from dit_jax.organisms.samples import check_samples
    from dit_jax.train.examples import check_attention, check_room

    stages = config.stages
    behaviour = None
    if "behaviour" in config.get("diffs", {}):
        behaviour = get_behaviour(config.diffs)  # one of the user's own becomes known to all stages
        check_samples(behaviour, config.diffs)
    if values.get("pretrain.parts", 1) > values.get("pretrain.batch_size", math.inf):
        raise DitError(
            f"config key 'pretrain.parts' is {values['pretrain.parts']}: a batch of pretrain.batch_size = "
            f"{values['pretrain.batch_size']} has no so many parts"
        )
    if "train" in stages and "batch_size" in config.get("train", {}):
        check_room(config.train)
        check_attention(config.train, values.get("model.attention", "xla"))
    if "evaluate" in stages:
        check_methods(config)
    if "source" in config.get("data", {}):
        organisms.check_counts(config.data)
    if "diffs" not in stages:
        return
    if behaviour is not None:
        _check_labels(behaviour, values)
    if "train" in stages and values.get("diffs.parameters") == "all":
        raise DitError(
            "an adapter cannot be trained on diffs of all parameters: set diffs.parameters to 'lora' or 'linear' for "
            "training, and give diffs of all parameters to the evaluation"
        )
    # Of rows of one's own 0 are all that there are.
    own = values.get("data.source") != "tiny_world"
    topics = {split: values.get(f"data.{split}_topics", 0) for split in ("train", "test")}
    known = {split: bool(count) or not own for split, count in topics.items()}
    if "data" in config and "evaluate" in stages and known["test"] and topics["test"] < 2:
        raise DitError(f"{TOO_FEW_TOPICS}: raise data.test_topics, which is {topics['test']}")
    if "data" in config and "train" in stages and known["train"]:
        most = values.get("train.max_diffs", 0)
        if topics["train"] < max(most, 1):
            raise DitError(
                f"training needs {f'train.max_diffs = {most} topics' if most else 'a topic or more'}: raise "
                f"data.train_topics, which is {topics['train']}"
            )


def _check_labels(behaviour: Any, values: Mapping[str, Any]) -> None:
    from dit_jax.deltas.store import LABEL_COLUMNS

    for key in ("train.label", "evaluate.label"):
        column = values.get(key, "label")
        if column not in LABEL_COLUMNS:
            hint = did_you_mean(column, LABEL_COLUMNS, f": choose from {', '.join(LABEL_COLUMNS)}")
            raise DitError(
                f"config key '{key}': {column!r} is no column of diffs/index.csv to name{hint}"
            )
        if column == "trigger" and behaviour.trigger:
            raise DitError(
                f"config key '{key}' is 'trigger', but diffs of the behaviour {behaviour.name} have no trigger of "
                "their own"
            )


# ------------------------------------------------------------------ keys that are not there


@contextlib.contextmanager
def explain_missing_key(config: Any) -> Iterator[None]:
    """Names the key of a config that the body asks for and that is not there. Raises DitError."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        key = _missing_key(error, config)
        if key is None:
            raise
        raise DitError(
            f"the config has no key '{key}', which is needed: add it, see configs/quickstart.py"
        ) from error


def _missing_key(error: BaseException, config: Any) -> str | None:
    """The dotted key of a config that was asked for and is not there; None if `error` is something else."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or not frames[-1][0].f_globals["__name__"].startswith("ml_collections."):
        return None
    known = frames[-1][0].f_locals
    name = known.get("attribute", known.get("key"))

    def sections(section: Any, prefix: str) -> Iterator[str]:
        if section is known.get("self"):
            yield prefix
        for key, value in section.items():
            if isinstance(value, ConfigDict):
                yield from sections(value, f"{prefix}{key}.")

    return None if name is None else f"{next(sections(config, ''), '')}{name}"
