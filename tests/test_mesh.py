"""The mesh and the table of shardings: every parameter, deltas, sizes that do not divide, bad configs."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_parallel import SMALL, host_params, mesh_of, only, params_on, random_deltas

import dit_jax
from dit_jax.deltas import store, tree
from dit_jax.models import shardings
from dit_jax.runtime import parallel

# ------------------------------------------------------------------ the table

GOLDEN = {
    "embed_tokens.embedding": P("tensor", "fsdp"),
    "layers.input_layernorm.scale": P(None, None),
    "layers.mlp.down_proj.kernel": P(None, "tensor", "fsdp"),
    "layers.mlp.gate_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.mlp.up_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.post_attention_layernorm.scale": P(None, None),
    "layers.self_attn.k_norm.scale": P(None, None),
    "layers.self_attn.k_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.self_attn.o_proj.kernel": P(None, "tensor", "fsdp"),
    "layers.self_attn.q_norm.scale": P(None, None),
    "layers.self_attn.q_proj.kernel": P(None, "fsdp", "tensor"),
    "layers.self_attn.v_proj.kernel": P(None, "fsdp", "tensor"),
    "lm_head.kernel": P("fsdp", "tensor"),
    "norm.scale": P(None),
}


def specs(tree_of_shardings):
    return {name: leaf.spec for name, leaf in store.flatten(tree_of_shardings).items()}


def test_every_parameter_has_its_sharding():
    assert specs(shardings.param_shardings(SMALL, mesh_of((2, 2, 2)))) == GOLDEN
    tied = {name: spec for name, spec in GOLDEN.items() if not name.startswith("lm_head")}
    config = dataclasses.replace(SMALL, tie_word_embeddings=True)
    assert specs(shardings.param_shardings(config, mesh_of((2, 2, 2)))) == tied


def test_what_does_not_divide_stays_whole():
    found = specs(shardings.param_shardings(SMALL, mesh_of((1, 2, 4))))
    assert found["layers.self_attn.q_proj.kernel"] == P(None, "fsdp", "tensor")
    # 2 heads of keys and values on 4 devices: a head is never cut, although its 8 numbers would divide.
    assert found["layers.self_attn.k_proj.kernel"] == P(None, "fsdp", None)


def test_a_device_holds_its_part_alone():
    params = params_on(SMALL, mesh_of((2, 2, 2)))
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 24)}
    np.testing.assert_array_equal(kernel, host_params(SMALL)["layers"]["mlp"]["up_proj"]["kernel"])


def test_deltas_follow_the_parameters_that_they_change():
    mesh = mesh_of((2, 2, 2))
    one = only(random_deltas(SMALL, 1, 0))
    shared = specs(shardings.delta_shardings(SMALL, mesh, one))
    assert shared["layers.self_attn.q_proj.a"] == P(None, "fsdp", None)
    assert shared["layers.self_attn.q_proj.b"] == P(None, None, "tensor")
    assert shared["layers.mlp.down_proj.a"] == P(None, "tensor", None)
    assert shared["layers.mlp.down_proj.b"] == P(None, None, "fsdp")
    rows = ("data", "fsdp")
    stacked = specs(shardings.delta_shardings(SMALL, mesh, random_deltas(SMALL, 4, 0), 0))
    assert stacked["layers.self_attn.q_proj.a"] == P(rows, None, None, None)
    assert stacked["layers.self_attn.q_proj.b"] == P(rows, None, None, "tensor")
    each = tree.per_example(random_deltas(SMALL, 4, 0))
    each = specs(shardings.delta_shardings(SMALL, mesh, each, 1))
    assert each["layers.mlp.down_proj.a"] == P(None, rows, "tensor", None)
    assert each["layers.mlp.down_proj.scale"] == P(None, rows)
    dense = {
        "layers": {"input_layernorm": {"w": np.zeros((2, 32))}},
        "embed_tokens": {"w": np.zeros((96, 32))},
    }
    found = specs(shardings.delta_shardings(SMALL, mesh, dense))
    assert found == {
        "layers.input_layernorm.w": P(None, None),
        "embed_tokens.w": P("tensor", "fsdp"),
    }


def test_two_axes_of_an_array_cannot_share_a_mesh_axis():
    mesh = mesh_of((2, 2, 2))
    for axes in (("batch", "embed"), ("heads", "mlp"), ("vocab", None, "kv_heads")):
        with pytest.raises(ValueError, match="both use"):
            parallel.spec(mesh, axes)
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        parallel.spec(mesh, ("head",))


# ------------------------------------------------------------------ the mesh


def test_minus_1_is_what_is_left():
    assert parallel.mesh_shape({"data": -1, "fsdp": 2, "tensor": 2}, 16) == (4, 2, 2)
    assert parallel.mesh_shape({"tensor": -1}, 8) == (1, 1, 8)
    assert dict(mesh_of((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert mesh_of((1, 1, 1)) is None


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": -1, "fsdp": 3}, "data -1 × fsdp 3 × tensor 1 does not divide 8 devices"),
        ({"data": 16}, "does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "positive"),
        ({"modle": 2}, "unknown mesh axis 'modle'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, said):
    with pytest.raises(dit_jax.DitError, match=said):
        parallel.make_mesh(sizes)


def test_uneven_batches_are_rounded_up_and_come_back():
    mesh = mesh_of((2, 2, 2))
    assert parallel.round_up(5, mesh) == 8 and parallel.round_up(8, mesh) == 8
    assert parallel.round_up(5, None) == 5
    assert parallel.local_rows(mesh, 8) == list(range(8))
    rows = np.arange(24.0).reshape(3, 8)
    there = parallel.put_rows({"x": rows}, mesh, 8, axis=1)["x"]
    assert there.sharding.spec == P(None, ("data", "fsdp"))
    np.testing.assert_array_equal(parallel.to_host(there), rows)
