"""Adapters of PEFT that are no LoRA of this model: what each is, and the command that makes a readable diff of it."""

import shlex
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError
from dit_jax.formats.files import short

# These add inputs or layers and change no weight, or another change for each input.
_NO_WEIGHTS = {
    "PROMPT_TUNING": "virtual tokens",
    "MULTITASK_PROMPT_TUNING": "virtual tokens",
    "P_TUNING": "virtual tokens",
    "PREFIX_TUNING": "keys and values of virtual tokens",
    "CPT": "virtual tokens",
    "CARTRIDGE": "keys and values of virtual tokens",
    "ADAPTION_PROMPT": "virtual tokens in its layers",
    "XLORA": "a mixture of LoRAs that depends on the input",
    "POLY": "a mixture of LoRAs that depends on the task",
    "SHADOW": "a model beside the base",
}
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def merge_command(folder: Path) -> str:
    """How to make a whole model of a base and its adapter."""
    return (
        'merge it into its base: python -c "import sys; from peft import AutoPeftModelForCausalLM as A; '
        "A.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained('MERGED')\" "
        f"{shlex.quote(str(folder))} and give MERGED as the diff"
    )


def plain(value: Any) -> Any:
    """The name of an enum's member: "PeftType.LORA" is how some programs write "LORA"."""
    if isinstance(value, str):
        return value.removeprefix("PeftType.").removeprefix("TaskType.")
    return value


def type_error(raw: dict[str, Any], source: Path) -> DitError:
    """What an adapter is whose peft_type is not LORA."""
    kind = plain(raw.get("peft_type"))
    said = f"'{source}': peft_type {short(kind)} is not supported, only 'LORA'"
    if kind is None:
        return DitError(f"{said}: is it the adapter_config.json of PEFT? Get the folder again")
    if isinstance(kind, str) and kind in _NO_WEIGHTS:
        return DitError(
            f"{said}: it adds {_NO_WEIGHTS[kind]} and changes no weight, so it is no weight diff and cannot be merged; "
            "ask it with PEFT itself"
        )
    return DitError(
        f"{said}: {merge_command(source.parent)}, or convert it to a LoRA (peft.convert_to_lora)"
    )


def task_error(raw: dict[str, Any], source: Path) -> DitError:
    """What an adapter is whose task is not that of a language model."""
    task = plain(raw.get("task_type"))
    said = f"'{source}': task_type {short(task)} is not supported, only 'CAUSAL_LM'"
    if task in _CLASSIFIERS:
        return DitError(
            f"{said}: it is the adapter of a classifier or reward model, which answers no questions. Where its LoRA "
            "alone matters, set task_type to null and remove the tensors of its head (score)"
        )
    return DitError(f"{said}: use an adapter of a causal language model")


def option_error(name: str, value: Any, source: Path) -> DitError:
    """An option that is neither applied nor known to change nothing."""
    said = f"'{source}': the option {short(name)} = {short(value)} is not supported"
    if name == "layer_replication":
        return DitError(f"{said}: it makes a deeper model, so it is no weight diff of this base")
    if name == "alora_invocation_tokens":
        return DitError(f"{said}: it acts after certain tokens only, so it is no weight diff")
    if name in ("arrow_config", "megatron_config", "monteclora_config"):
        return DitError(f"{said}: it is no plain LoRA; train or export it as one")
    return DitError(
        f"{said}: {merge_command(source.parent)}, or remove the option where it changes nothing"
    )
