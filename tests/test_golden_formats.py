"""Golden files of PEFT, the reference and transformers through the public interface."""

import json
import re

import numpy as np
import pytest
from conftest import golden_cases
from safetensors.numpy import load_file

import dit_jax
from dit_jax.deltas.detect import detect_format

ATOL = 1e-4
_models: dict = {}


def model_of(folder):
    """The base model in a golden folder, loaded once; a base of another family skips the test."""
    if not (folder / "config.json").exists():
        pytest.skip(f"the base {folder.name} is not beside the case")
    if json.loads((folder / "config.json").read_text())["model_type"] != "qwen3":
        with pytest.raises(dit_jax.DitError, match="model_type"):
            dit_jax.load_model(folder)
        pytest.skip(f"{folder.name} is refused by name: it is no dense Qwen3")
    if folder not in _models:
        _models[folder] = dit_jax.load_model(folder)
    return _models[folder]


def check_logits(model, tokens, wanted, *deltas):
    found = np.asarray(model.logits(tokens[None], deltas=deltas))[0]
    np.testing.assert_allclose(found, wanted, atol=ATOL)


EVERY_ADAPTER = {"r", "lora_alpha", "peft_type", "task_type", "target_modules", "inference_mode"}
ENDS = {
    "embed_tokens",
    "lm_head",
}  # a LoRA on one of them cannot be applied where the base ties both


@pytest.mark.parametrize("case", golden_cases("peft-"))
def test_peft(case):
    options = json.loads((case / "adapter_config.json").read_text())
    model = model_of(case.parent / options["base_model_name_or_path"])
    expected = load_file(case / "expected.safetensors")
    assert detect_format(case) == "peft"
    try:
        adapter = dit_jax.load_adapter(case, model)
    except dit_jax.DitError as error:
        # The message that refuses an unsupported kind names an option that is in use.
        used = {k for k, v in options.items() if v not in (None, False, "", "none", [], {})}
        used -= EVERY_ADAPTER
        if options["peft_type"] != "LORA":
            used = {"peft_type"}
        elif isinstance(options["target_modules"], str) or set(options["target_modules"]) & ENDS:
            used.add("target_modules")
        assert used & set(re.findall(r"\w+", str(error))), error
        with pytest.raises(dit_jax.DitError):
            dit_jax.load_diff(case, model)
        return
    check_logits(model, expected["ids"], expected["logits"], adapter)
    check_logits(model, expected["ids"], expected["logits"], dit_jax.load_diff(case, model).delta)


@pytest.mark.parametrize("case", golden_cases("full-finetune"))
def test_full_finetune(case):
    base = "qwen3-untied" if "untied" in case.name else "qwen3-tied"
    model = model_of(case.parent / base)
    expected = load_file(case / "expected.safetensors")
    for path in (case, *sorted(case.glob("*.pt"))):
        diff = dit_jax.load_diff(path, model)
        check_logits(model, expected["ids"], expected["logits"], diff.delta)
        assert path == case or diff.label


@pytest.mark.parametrize("case", golden_cases("ref-"))
def test_reference_logits(case):
    model = model_of(case.parent / f"qwen3-{case.name.split('-')[1]}")
    diffs = dit_jax.load_diffs(case / "weight_diff_1.pt", model)
    adapter = dit_jax.load_adapter(case / "dit-adapter.pt", model)
    expected = load_file(case / "logits.safetensors")
    names = sorted({name.rsplit(".", 1)[0] for name in expected})
    assert names
    for name in names:
        kind, _, with_adapter = name.split(".")[0].partition("+")
        deltas = []
        if kind.startswith("diff"):
            deltas.append(diffs[int(kind.removeprefix("diff"))].delta)
        if kind == "dit" or with_adapter:
            deltas.append(adapter)
        tokens, wanted = expected[f"{name}.input_ids"], expected[f"{name}.logits"]
        check_logits(model, tokens, wanted, *deltas)


@pytest.mark.parametrize("case", golden_cases("ref-"))
def test_reference_greedy_tokens(case):
    model = model_of(case.parent / f"qwen3-{case.name.split('-')[1]}")
    diffs = dit_jax.load_diffs(case / "weight_diff_1.pt", model)
    adapter = dit_jax.load_adapter(case / "dit-adapter.pt", model)
    recorded = json.loads((case / "logits.json").read_text())
    inputs = load_file(case / "logits.safetensors")
    for name, wanted in recorded["generations"].items():
        kind, _, with_adapter = name.split(".")[0].partition("+")
        deltas = [diffs[int(kind[4:])].delta] if kind.startswith("diff") else []
        deltas += [adapter] if kind == "dit" or with_adapter else []
        prompt = list(inputs[f"{name}.input_ids"])
        # In greedy decoding each token is the best one after those before it, so one pass checks them all.
        length = len(prompt) + len(wanted)
        padded = np.zeros((1, -(-length // 16) * 16), np.int32)  # few lengths, few programs
        padded[0, :length] = prompt + wanted
        logits = np.asarray(model.logits(padded, deltas=deltas))[0]
        for position, token in enumerate(wanted, start=len(prompt) - 1):
            margin = logits[position].max() - logits[position, token]
            assert margin < ATOL, (name, position, int(logits[position].argmax()), token)
