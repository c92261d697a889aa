"""The Python interface: what is loaded and how, what may be given for a diff, and mistakes that are one line."""

import shutil

import jax
import numpy as np
import pytest
from test_qwen3 import random_lora

import dit_jax
from dit_jax.deltas import export
from dit_jax.models.hf_checkpoint import find_folder


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


@pytest.fixture(scope="module")
def lora(model):
    return jax.tree.map(np.asarray, random_lora(model.config, 1))


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", ["tiny_qwen3", "random:qwen3-0.6b"])
def test_only_ways_to_compute_are_options_of_load_model(name):
    with pytest.raises(dit_jax.DitError, match="no option 'rope_theta': how to compute is said by"):
        dit_jax.load_model(name, rope_theta=2.0)
    with pytest.raises(dit_jax.DitError, match="'scan_layer': did you mean 'scan_layers'"):
        dit_jax.load_model(name, scan_layer=False)


def test_a_tilde_is_the_home_folder_in_every_path(model, lora, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export.write_peft(tmp_path / "peft", lora, model.config, "x")
    shutil.copytree(find_folder("tiny_qwen3"), tmp_path / "base")
    for delta in (
        dit_jax.load_diff("~/peft", model).delta,
        dit_jax.load_adapter("~/peft", model),
    ):
        assert jax.tree.structure(delta) == jax.tree.structure(lora)
    assert dit_jax.load_model("~/base").digest() == model.digest()


def test_models_and_diffs_are_told_apart_by_identity_and_shown_without_their_arrays(model, lora):
    diff = dit_jax.Diff(lora, "tea")
    assert len(repr(model)) < 1000 and "tiny_qwen3" in repr(model)
    assert len(repr(diff)) < 200 and "tea" in repr(diff)
    assert len({model, diff, dit_jax.load_model("tiny_qwen3"), dit_jax.Diff(lora, "tea")}) == 4
    assert model == model and diff != dit_jax.Diff(lora, "tea")
