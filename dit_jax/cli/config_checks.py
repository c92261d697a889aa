"""What is wrong with the values of a config, as far as that can be told before the first stage, in one line.

Configs are programs, and a new one has no other config's types: every value may be anything. Checks that need the data,
the model or the workdir are made by the stages.
"""

from collections.abc import Iterable
from typing import Any

from dit_jax.cli.stages import RUN, Stage, chosen_stages, declared_sections
from dit_jax.config.loading import flatten
from dit_jax.data.data_keys import DATA
from dit_jax.data.labels import UNTRIGGERED
from dit_jax.errors import DitError, did_you_mean
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.organisms.corpus_keys import CORPUS
from dit_jax.organisms.diffs_keys import DIFFS, kinds_of
from dit_jax.train.train_keys import TRAIN


def check_config(config: Any) -> None:
    """Refuses a config with which a stage could not run, before the first one starts.

    Raises:
        DitError: the first mistake; the message names the key.
    """
    stages = chosen_stages(RUN.get(config, "stages"))
    check_values(config, stages)
    for stage in stages:
        for section in stage.all_sections:
            section.check_needed(config)
    for stage in stages:
        stage.check(config)
    _check_together(config, [stage.name for stage in stages])


def check_values(config: Any, stages: Iterable[Stage] = ()) -> None:
    """Checks each value by itself, for a plan too. Raises DitError: the first mistake.

    Args:
        stages: of the config; those of the package are known.
    """
    flatten(config)  # refuses values that are not set, and those that no file can hold
    for section in declared_sections(stages):
        section.check(config)


def check_ranks(config: Any, model: Any) -> None:
    """Refuses ranks that the model (its `DecoderConfig`) has no room for. Raises DitError."""
    from dit_jax.deltas.tree import check_lora_rank

    ranked = [("train", config.train)] if "train" in config.stages else []
    if "diffs" in config.stages:
        kinds = kinds_of(config.diffs).values()
        ranked += [("diffs", one) for one in kinds if DIFFS.get(one, "parameters") == "lora"]
    for name, section in ranked:
        key = f"config key '{name}.rank'"
        check_lora_rank(model, section.rank, section.projections, key)


def _check_together(config: Any, stages: list[str]) -> None:
    """Refuses values of several stages that exclude each other, before the earlier stages have taken their time."""
    from dit_jax.evaluate.run import TOO_FEW_TOPICS
    from dit_jax.organisms.behaviours import get_behaviour
    from dit_jax.organisms.samples import check_samples

    behaviour = None
    diffs = DIFFS.values(config)
    kinds = kinds_of(diffs)
    for section in kinds.values() if "behaviour" in diffs else ():
        DIFFS.check({"diffs": section})
        behaviour = get_behaviour(section)  # makes a user-defined one known to all stages
        names = ("samples_per_step", "loss_weights", "max_length", "max_target")
        DIFFS.check_needed({"diffs": section}, names)
        check_samples(behaviour, section)
        if "diffs" in stages:
            _check_labels(behaviour, config)
            if behaviour.triggered is None and "evaluate" in stages:
                _check_methods(config, f"diffs of the behaviour {behaviour.name}")
    if "diffs" not in stages:
        return
    if {"corpus", "evaluate"} <= set(stages) and UNTRIGGERED in CORPUS.get(config.corpus, "styles"):
        _check_methods(config, f"organisms of the style {UNTRIGGERED!r}")
    on_own = "train" in stages and not TRAIN.get(config.train, "stores")
    if on_own and any(DIFFS.get(section, "parameters") == "all" for section in kinds.values()):
        raise DitError(
            "an adapter cannot be trained on diffs of all parameters: set diffs.parameters to 'lora' or 'linear' for "
            "training, or name this store with an svd_rank in train.stores"
        )
    # For user-supplied rows, 0 means all: how many that is, the stage will see.
    unknown = config.data.source != "tiny_world"
    train, test = (DATA.get(config.data, f"{split}_topics") for split in ("train", "test"))
    if "evaluate" in stages and test < 2 and not (unknown and test == 0):
        raise DitError(f"{TOO_FEW_TOPICS}: raise data.test_topics, which is {test}")
    if on_own and not (unknown and train == 0):
        most = config.train.max_diffs
        if train < max(most, 1):
            raise DitError(
                f"training needs {f'train.max_diffs = {most} topics' if most else 'a topic or more'}: raise "
                f"data.train_topics, which is {train}"
            )


def _check_methods(config: Any, what: str) -> None:
    from dit_jax.evaluate.method_table import TRIGGER
    from dit_jax.evaluate.methods import find_method

    for name in EVALUATE.get(config.evaluate, "methods"):
        if TRIGGER in find_method(name).needs:
            raise DitError(
                f"config key 'evaluate.methods': {name!r} needs diffs with a trigger, and {what} have none: take it out"
            )


def _check_labels(behaviour: Any, config: Any) -> None:
    from dit_jax.deltas.store import LABEL_COLUMNS

    for section in (TRAIN, EVALUATE):
        key = f"config key '{section.name}.label'"
        column = section.get(section.values(config), "label")
        if column not in LABEL_COLUMNS:
            hint = did_you_mean(column, LABEL_COLUMNS, f": choose from {', '.join(LABEL_COLUMNS)}")
            raise DitError(f"{key}: {column!r} is no column of diffs/index.csv to name{hint}")
        if column == "trigger" and behaviour.trigger:
            raise DitError(
                f"{key} is 'trigger', but diffs of the behaviour {behaviour.name} have no trigger of their own"
            )
