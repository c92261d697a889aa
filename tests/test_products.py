"""Matrix products of bfloat16: their values, and their dtypes as jax hands both training programs to the compiler."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config.loading import load_config
from dit_jax.deltas.tree import abstract_lora
from dit_jax.models.products import product
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
def test_bfloat16_products_have_bfloat16_factors_and_float32_sums(stage, remat):
    """Float32 factors take many times as long on a GPU and need copies; bfloat16 sums are the slow way of a CPU."""
    for line in products(stage, "bfloat16", remat):
        dtypes = [shape.rpartition("x")[2] for shape in PRODUCT.search(line).groups()]
        assert dtypes == ["bf16", "bf16", "f32"]


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("TD,DF->TF", [(40, 24), (24, 48)]),
        ("BTR,BRF->BTF", [(3, 40, 2), (3, 2, 48)]),
        ("BKGTS,BSKH->BTKGH", [(2, 3, 2, 10, 12), (2, 12, 3, 8)]),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_bfloat16_product_and_its_gradients_are_those_of_float32_rounded(
    equation, shapes, mapped
):
    x, y, slope = (
        jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
        for i, shape in enumerate(
            [
                *shapes,
                jax.eval_shape(
                    functools.partial(jnp.einsum, equation), *map(np.zeros, shapes)
                ).shape,
            ]
        )
    )

    def outputs(dtype, multiply):
        value, back = jax.vjp(
            functools.partial(multiply, equation), x.astype(dtype), y.astype(dtype)
        )
        return value, *back(slope.astype(dtype))

    found = outputs(jnp.bfloat16, product)
    expected = outputs(jnp.float32, functools.partial(jnp.einsum, precision="highest"))
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), two, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("stage", ["train", "diffs"])
def test_float32_products_are_exact_also_backward(stage, remat):
    for line in products(stage, "float32", remat):
        assert "precision = [HIGHEST, HIGHEST]" in line
