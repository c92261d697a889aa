"""Dtypes of the matrix products of the two training programs, as jax hands them to the compiler."""

import dataclasses
import re

import pytest

from dit_jax.config.loading import load_config
from dit_jax.deltas.tree import abstract_lora
from dit_jax.models.shapes import NAMED_CONFIGS
from dit_jax.organisms import generate
from dit_jax.organisms.finetune import finetune_many
from dit_jax.train import dit

CONFIG = load_config("configs/quickstart.py")
PRODUCT = re.compile(r"dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>")


def products(stage, dtype, remat):
    """The lines of a program's text that are products."""
    config = dataclasses.replace(NAMED_CONFIGS["qwen3-0.6b"], dtype=dtype, remat=remat)
    if stage == "train":
        diff = abstract_lora(config, 1)
        step, (args, options) = dit.train_step, dit.abstract_step(config, None, CONFIG.train, diff)
    else:
        step, (args, options) = finetune_many, generate.abstract_step(config, None, CONFIG.diffs)
    lines = [
        line
        for line in step.lower(*args, **options).as_text().splitlines()
        if "dot_general" in line
    ]
    assert len(lines) > 70
    return lines


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("stage", ["train", "diffs"])
def test_bfloat16_products_have_bfloat16_factors(stage, remat):
    """A product of float32 factors takes many times as long on a GPU, and needs copies of its factors."""
    for line in products(stage, "bfloat16", remat):
        assert [shape.rpartition("x")[2] for shape in PRODUCT.search(line).groups()[:2]] == [
            "bf16"
        ] * 2


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("stage", ["train", "diffs"])
def test_float32_products_are_exact_also_backward(stage, remat):
    for line in products(stage, "float32", remat):
        assert "precision = [HIGHEST, HIGHEST]" in line
