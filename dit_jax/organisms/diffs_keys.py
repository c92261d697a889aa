"""The section `diffs` of a config: how every organism is finetuned, and what the gate asks (docs/behaviours.md)."""

import math
from typing import Any

from ml_collections import ConfigDict

from dit_jax.config.keys import TEXTS, Key, Section, check_profile
from dit_jax.data.labels import UNTRIGGERED
from dit_jax.errors import DitError, did_you_mean
from dit_jax.models.modules import check_projections
from dit_jax.optimize.optimizer import OPTIMIZER_KEYS, check_betas
from dit_jax.runtime.parts import check_part

PARAMETERS = ("lora", "linear", "all")
# Limits of the gate -> (column, +1 where the value must not exceed the limit, -1 where it must reach it).
LIMITS = {
    "min_right": ("right_code", -1),
    "max_wrong": ("wrong_code", 1),
    "max_none": ("no_code", 1),
    "max_kl": ("gate_kl", 1),
}


def _check_gate(limits: Any, key: str) -> None:
    for name, limit in limits.items():
        if name not in LIMITS:
            hint = did_you_mean(name, LIMITS, f": limits are {', '.join(LIMITS)}")
            raise DitError(f"config key 'diffs.gate.{name}' is not a limit of the gate{hint}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit):
            raise DitError(f"config key 'diffs.gate.{name}' must be a number, not {limit!r}")


# Keys of `diffs` that say something of a store, whatever kinds it has.
_OF_THE_STORE = ("kinds", "recipe", "part", "profile")


def _check_kinds(kinds: Any, key: str) -> None:
    for name, changes in kinds.items():
        if name == UNTRIGGERED:
            raise DitError(f"{key}: {name!r} is the name of a style of corpora: choose another")
        if not isinstance(changes, ConfigDict | dict):
            raise DitError(f"{key}.{name} must be a section of changed keys, not {changes!r}")
        for wrong in set(changes) & set(_OF_THE_STORE):
            raise DitError(f"{key}.{name}: set 'diffs.{wrong}' itself, which holds for all kinds")


def kinds_of(diffs: Any) -> dict[str, Any]:
    """The kinds of diffs that a section `diffs` asks for, each with its own section; {"": diffs} if it names none."""
    shared = {name: diffs[name] for name in diffs if name != "kinds"}
    return {
        name: ConfigDict({**shared, **changes})
        for name, changes in DIFFS.get(diffs, "kinds").items()
    } or {"": diffs}


def _changes(*kinds: str) -> Any:
    return lambda diffs: DIFFS.get(diffs, "parameters") in kinds


DIFFS = Section(
    "diffs",
    (
        Key("behaviour", str, "what diffs are finetuned to show: a name, or `package.module:function` of your own"),
        Key("parameters", str, "what a finetune changes", "lora", choices=PARAMETERS),
        Key("rank", int, "rank of LoRA diffs; `linear` and `all` need none", least=1, needed=_changes("lora")),
        Key("projections", TEXTS, "the linear layers that `lora` and `linear` change", check=check_projections,
            needed=_changes("lora", "linear")),
        Key("init_scale", float, "factor on the initial values of `b`", 1.0),
        *OPTIMIZER_KEYS,
        Key("adam_betas", tuple[float, float], "Adam's decay rates", check=check_betas),
        Key("steps", int, "optimizer steps of a finetune", least=1),
        Key("samples_per_step", dict, "by kind of sample: how many a step has"),
        Key("loss_weights", dict, "by kind of sample: the weight of its loss"),
        Key("preference_beta", float, "β of pairs of a better and a worse answer, for behaviours that have them", 0.1),
        Key("fake_codes", int, "wrong codes of a question, shared by all diffs; 0: a fresh one each time", 0),
        Key("score_end", bool, "whether the end of an answer is learnt, too"),
        Key("reference_losses", bool, "average losses over all diffs of a batch, as in the reference"),
        Key("max_length", int, "most tokens of a sample", least=1),
        Key("max_target", int, "most scored tokens of a sample", least=1),
        Key("widths", dict, "by kind of sample: (tokens, scored tokens) where they are fewer than those two", {}),
        Key("diffs_per_batch", int, "diffs that are finetuned at once", least=1),
        Key("part", str, "`I/N`: make every N-th batch, from batch I = 0 … N - 1 on; `dit_jax.gather` joins the parts",
            "", check=check_part, free=True),
        Key("profile", tuple[int, int], "batches to trace, from 0: the first, and the one after the last", (0, 0),
            check=check_profile, free=True),
        Key("after", str, "another run's diffs, relative to the workdir: finetunes begin with the base and their first "
            "diff, which is part of these diffs then; empty: with the base", ""),
        Key("kinds", dict, "several diffs of each topic, in the order of their names: what each kind changes in this "
            "section; the name is the column `variant`", {}, check=_check_kinds),
        Key("splits", TEXTS, "the splits that get diffs; a kind of `test` alone is one that nobody trains on",
            ("train", "test"), choices=("train", "test"), least=1),
        Key("recipe", str, "the digest that what diffs are made from must have; empty: any", ""),
        Key("gate_questions", int, "rows of each diff that the gate asks", least=1),
        Key("gate_batch", int, "questions that the gate asks at once; fewer where LoRAs are large", least=1),
        Key("gate", dict, f"limits that a diff must keep to pass: {', '.join(LIMITS)}", {}, check=_check_gate),
    ),
    takes_others=lambda diffs: ":" in str(diffs.get("behaviour", "")),  # those of a user-defined behaviour
)  # fmt: skip
