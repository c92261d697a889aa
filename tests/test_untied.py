"""Deltas that untie embedding and head: on bases that tie them, the two change apart (full finetunes, PEFT folders)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import VOCAB, assert_near, make, make_pairs, their_logits

import dit_jax
from dit_jax.data.batch import Sample, pack
from dit_jax.deltas import export, tree
from dit_jax.models import shardings
from dit_jax.models.decode import generate
from dit_jax.models.delta_trees import map_modules
from dit_jax.models.modules import EMBEDDING, HEAD, all_modules, set_at
from dit_jax.optimize.batch_loss import batch_loss
from dit_jax.runtime import parallel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHANGED = {"head": (HEAD,), "both": (EMBEDDING, HEAD)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory)


def lora(config, seed, rank=2):
    delta = tree.init_lora(config, jax.random.key(seed), rank)
    rng = np.random.default_rng(seed)
    fill = lambda _, m: {**m, "a": jnp.asarray(0.1 * rng.normal(size=m["a"].shape), jnp.float32)}  # noqa: E731
    return map_modules(fill, delta)


def unties(config, changed="both", seed=5):
    """A delta that changes the head, and perhaps the embedding by something else, beside a LoRA."""
    rng, delta = np.random.default_rng(seed), dict(lora(config, seed))
    for path in CHANGED[changed]:
        shape = all_modules(config)[path].shape
        set_at(delta, path, {"w": (0.1 * rng.standard_normal(shape)).astype(np.float32)})
    return delta


def tokens_of(seed=0, shape=(2, 24)):
    return np.random.default_rng(seed).integers(3, VOCAB, shape)


@pytest.mark.parametrize(("name", "changed"), [("qwen2", "head"), ("gemma3", "both")])
def test_logits_and_exports_are_those_of_an_untied_model(pairs, name, changed, tmp_path):
    _, model = pairs(name)
    assert model.config.tie_word_embeddings
    delta, tokens = unties(model.config, changed), tokens_of()
    found = np.asarray(model.logits(tokens, deltas=(delta,)))
    assert np.abs(found - np.asarray(model.logits(tokens))).max() > 0.1
    for source in (model.name, None):
        folder = tmp_path / str(source is None)
        export.export_model(folder, model.params, model.config, delta, base_folder=source)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        heads = theirs.lm_head.weight, theirs.get_input_embeddings().weight
        assert not torch.equal(*heads)
        assert_near(found, their_logits(theirs, tokens))
    # The export is a full finetune of the base, whose delta unties again.
    again = dit_jax.load_diff(tmp_path / "True", model)
    assert HEAD[0] in again.delta
    assert_near(np.asarray(model.logits(tokens, deltas=again)), found)
    # And as a base: it is no model with a tied head.
    alone = dit_jax.load_model(tmp_path / "True")
    assert not alone.config.tie_word_embeddings
    assert_near(np.asarray(alone.logits(tokens)), found)


@pytest.mark.parametrize(("name", "scan"), [("qwen2", False), ("gemma3", True)])
def test_decoding_is_that_of_the_merged_model(pairs, name, scan):
    _, model = pairs(name)
    config = dataclasses.replace(model.config, scan_layers=scan)
    delta, adapter = unties(config), lora(config, 9)
    merged = tree.merge(model.params, delta, adapter)
    own = tree.merged_config(config, delta, adapter)
    tokens, mask = tokens_of(), np.ones((2, 24), bool)
    mask[1, :5] = False
    out = generate(model.params, config, tokens, mask, deltas=(delta, adapter), max_new_tokens=16)
    one = generate(merged, own, tokens, mask, max_new_tokens=16)
    np.testing.assert_array_equal(out.tokens, one.tokens)
    np.testing.assert_allclose(out.logprobs, one.logprobs, atol=2e-3)


def test_a_split_model_computes_the_same(pairs):
    _, model = pairs("qwen2")
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = dit_jax.load_model(model.name, mesh=mesh)
    delta, tokens = unties(model.config), tokens_of(shape=(4, 24))
    placed = shardings.put_delta(model.config, mesh, delta)
    expected = np.asarray(model.logits(tokens, deltas=(delta,)))
    assert_near(np.asarray(split.logits(tokens, deltas=(placed,))), expected)
    mask, options = np.ones_like(tokens, bool), {"max_new_tokens": 12}
    alone = generate(model.params, model.config, tokens, mask, deltas=(delta,), **options)
    with parallel.use_mesh(mesh):
        rows = parallel.put_rows((tokens, mask), mesh, 4)
        out = generate(split.params, split.config, *rows, deltas=(placed,), **options)
    np.testing.assert_array_equal(out.tokens, alone.tokens)


@pytest.mark.parametrize(("name", "changed"), [("qwen2", "both"), ("gemma3", "head")])
def test_an_adapter_on_it_gets_the_gradients_of_the_merged_base(pairs, name, changed):
    _, model = pairs(name)
    config = dataclasses.replace(model.config, scan_layers=False)
    delta, adapter, rng = unties(config, changed), lora(config, 9), np.random.default_rng(3)
    samples = [Sample(rng.integers(3, VOCAB, 20).astype(np.int32), 12, 20) for _ in range(2)]
    batch = pack(samples, [1.0, 0.5], 20, 8, pad_id=0)
    merged = tree.merge(model.params, delta)

    def loss(leaves, params, own, below):
        both = (*below, tree.with_scale(leaves, adapter))
        return batch_loss(params, own, batch, both)[0]

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    leaves = tree.trainable(adapter)
    value, found = grad(leaves, model.params, config, (delta,))
    wanted, expected = grad(leaves, merged, tree.merged_config(config, delta), ())
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


PEFT = [
    ("qwen2", {"modules_to_save": ["lm_head"]}),
    ("gemma3", {"modules_to_save": ["embed_tokens"]}),
    ("gemma3", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
]


@pytest.mark.parametrize(("name", "options"), PEFT)
def test_peft_folders_that_untie_have_the_logits_of_peft(pairs, name, options, tmp_path):
    model = pairs(name)[1]
    wanted = peft_logits(name, tmp_path, **options)
    delta = dit_jax.load_diff(tmp_path / "peft", model).delta
    assert HEAD[0] in delta
    assert_near(np.asarray(model.logits(tokens_of(), deltas=(delta,))), wanted)


BIASES = [
    ("qwen2", {"bias": "all"}),
    ("qwen2", {"bias": "lora_only", "use_rslora": True}),
    ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    ("qwen2", {"bias": "all", "modules_to_save": ["k_proj"]}),
    ("llama_biases", {"lora_bias": True}),
]


@pytest.mark.parametrize(("name", "options"), BIASES)
def test_biases_that_peft_trains_have_the_logits_of_peft(pairs, name, options, tmp_path):
    model = pairs(name)[1]
    wanted = peft_logits(name, tmp_path, **options)
    for load in (lambda: dit_jax.load_diff(tmp_path / "peft", model).delta,
                 lambda: dit_jax.load_adapter(tmp_path / "peft", model)):  # fmt: skip
        delta = load()
        parts = [part for half in delta["layers"].values() for part in half]
        assert any(part.endswith("_bias") for part in parts)
        assert_near(np.asarray(model.logits(tokens_of(), deltas=(delta,))), wanted)


def peft_logits(name, tmp_path, **options):
    """Logits of PEFT with a random adapter, which it writes and reads again."""
    peft = pytest.importorskip("peft")
    options = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        **options,
    }
    saved = options.get("modules_to_save", [])
    options["target_modules"] = [x for x in options["target_modules"] if x not in saved]
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(make(name, tmp_path / "base"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(make(name, tmp_path / "base"), tmp_path / "peft").eval()
    return their_logits(again, tokens_of())
