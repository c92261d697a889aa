"""Parameters for programs with unrolled layers on a CPU: they are views, and the function stays the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dit_jax
from dit_jax.models import hf_checkpoint
from dit_jax.models.families import read_config
from dit_jax.models.layer_views import as_program_takes, unstack
from dit_jax.models.shardings import abstract_params
from dit_jax.runtime.parallel import make_mesh


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3", scan_layers=False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_views_share_the_memory_of_the_stacked_arrays(model, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    views = as_program_takes(params, model.config)["layers"]
    assert isinstance(views, tuple) and len(views) == model.config.num_hidden_layers
    for index, layer in enumerate(views):
        for one, whole in zip(
            jax.tree.leaves(layer), jax.tree.leaves(params["layers"]), strict=True
        ):
            np.testing.assert_array_equal(one, whole[index])
            # Otherwise a layer would start at an address that the compiler does not accept.
            if one.nbytes % 64 == 0:
                start = whole.unsafe_buffer_pointer() + index * one.nbytes
                assert one.unsafe_buffer_pointer() == start


def test_views_outlive_the_stacked_arrays(model):
    params = jax.tree.map(jnp.copy, model.params)
    expected = jax.device_get(params["layers"]["mlp"]["up_proj"]["kernel"])
    views = as_program_takes(params, model.config)["layers"]
    del params
    for index, layer in enumerate(views):
        np.testing.assert_array_equal(layer["mlp"]["up_proj"]["kernel"], expected[index])


def test_views_are_bound_to_a_device_only_where_the_parameters_are(model):
    # Otherwise the first training step takes a free state and returns a bound one, and the second step compiles again.
    free = as_program_takes(model.params, model.config)
    assert not any(x.committed for x in jax.tree.leaves(free))
    device = jax.devices()[1]
    bound = as_program_takes(jax.device_put(model.params, device), model.config)
    assert all(x.committed and x.devices() == {device} for x in jax.tree.leaves(bound))


def test_scanned_layers_and_meshes_keep_the_stacked_arrays(model):
    scanned = dataclasses.replace(model.config, scan_layers=True)
    assert as_program_takes(model.params, scanned) is model.params
    split = dit_jax.load_model(
        "tiny_qwen3", mesh=make_mesh({"data": 2, "fsdp": 1, "tensor": 1}), scan_layers=False
    )
    assert split.program_params is split.params


def test_logits_are_those_of_scanned_layers(model):
    tokens = np.random.default_rng(0).integers(1, 500, (2, 9))
    scanned = dit_jax.load_model("tiny_qwen3", scan_layers=True)
    np.testing.assert_allclose(model.logits(tokens), scanned.logits(tokens), atol=2e-5)


def test_parameters_that_stay_on_the_host_make_the_same_programs(model, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kept = dit_jax.load_model("tiny_qwen3", scan_layers=False)
    scanned = dit_jax.load_model("tiny_qwen3", scan_layers=True)
    monkeypatch.undo()
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(kept.params))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(kept.program_params))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(scanned.params))
    assert kept.digest() == model.digest()
    tokens = np.random.default_rng(0).integers(1, 500, (2, 9))
    np.testing.assert_array_equal(kept.logits(tokens), model.logits(tokens))


def test_abstract_parameters_have_the_form_of_the_real_ones(model):
    for config in (model.config, dataclasses.replace(model.config, scan_layers=True)):
        abstract = abstract_params(config, None)
        real = as_program_takes(model.params, config)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
            lambda x: (x.shape, x.dtype), real
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_the_arrays_that_files_are_read_into_are_the_parameters(monkeypatch, dtype):
    read, allocate = [], hf_checkpoint._aligned
    monkeypatch.setattr(
        hf_checkpoint, "_aligned", lambda *args: read.append(allocate(*args)) or read[-1]
    )
    folder = hf_checkpoint.find_folder(hf_checkpoint.TINY)
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    leaves = jax.tree.leaves(hf_checkpoint.load_params(folder, config))
    assert {x.unsafe_buffer_pointer() for x in leaves} == {x.ctypes.data for x in read}


def test_large_arrays_start_where_huge_pages_do():
    for shape, unit in (((3, 5), 64), ((5, 2**20), 2**21)):
        array = hf_checkpoint._aligned(shape, np.dtype(np.float32))
        assert array.shape == shape and array.flags.c_contiguous
        assert array.ctypes.data % unit == 0


def test_gradients_of_slices_are_stacked_and_not_padded():
    x = jnp.arange(6.0).reshape(3, 2)

    def loss(x):
        first, _, last = unstack(x)  # no gradient reaches the one between
        return jnp.sum(first * last)

    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    assert "stablehlo.concatenate" in text and "stablehlo.pad" not in text
    np.testing.assert_array_equal(jax.grad(loss)(x), [[4, 5], [0, 0], [0, 1]])
