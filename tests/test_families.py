"""The families of models against transformers: logits, padding, decoding, and what is refused by name."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import FAMILY, MODELS, VOCAB, YARN, assert_near, make, make_pairs, their_logits

import dit_jax
from dit_jax.models.decode import generate
from dit_jax.models.decoder import forward, init_params, unembed
from dit_jax.models.families import hf_config, parse_config
from dit_jax.models.family_table import FAMILIES
from dit_jax.models.modules import abstract_weights, count_parameters, module_table
from dit_jax.models.shapes import NAMED_CONFIGS, find_shape


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_beyond_500_tokens(pairs, name):
    theirs, ours = pairs(name)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 520))
    expected = their_logits(theirs, tokens)
    assert_near(ours.logits(tokens), expected)
    other = dataclasses.replace(ours.config, scan_layers=not ours.config.scan_layers)
    hidden = forward(ours.params, other, jnp.asarray(tokens))
    assert_near(unembed(ours.params, other, hidden), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILY)
def test_padded_logits_equal_transformers(pairs, name, side):
    theirs, ours = pairs(name)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 40))
    mask = np.ones((3, 40), int)
    for row, padding in enumerate((0, 7, 23)):
        mask[row, slice(0, padding) if side == "left" else slice(40 - padding, 40)] = 0
    found, expected = ours.logits(tokens, mask), their_logits(theirs, tokens, mask)
    assert_near(found[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("length, scan", [(12, True), (40, False)])
@pytest.mark.parametrize("name", FAMILY)
def test_greedy_tokens_past_the_window_equal_transformers_on_a_left_padded_batch(
    pairs, name, length, scan
):
    import torch

    theirs, ours = pairs(name)
    tokens = np.random.default_rng(2).integers(3, VOCAB, (3, length))
    mask = np.ones((3, length), int)
    mask[1, :5], mask[2, : length - 3] = 0, 0
    expected = theirs.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=40, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[:, length:]  # fmt: skip
    config = dataclasses.replace(ours.config, scan_layers=scan)
    out = generate(ours.params, config, jnp.asarray(tokens), jnp.asarray(mask), max_new_tokens=40)
    np.testing.assert_array_equal(out.tokens, expected)


@pytest.mark.parametrize("name", MODELS)
def test_config_json_is_written_as_it_was_read_and_transformers_reads_it(pairs, name):
    theirs, ours = pairs(name)
    written = hf_config(ours.config)
    assert parse_config(written, "x") == ours.config
    read = type(theirs.config)(**{k: v for k, v in written.items() if k != "model_type"})
    for key, value in theirs.config.to_dict().items():
        if key in written and key not in ("architectures", "dtype"):
            assert read.to_dict()[key] == value, key


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_modules_describes_every_parameter(pairs, name):
    theirs, ours = pairs(name)
    shapes = jax.eval_shape(lambda: init_params(ours.config, jax.random.key(0)))
    assert shapes == abstract_weights(ours.config)
    names = {m.tensor.format(i) for m in module_table(ours.config).values() for i in m.indices}
    assert names == {name for name, _ in theirs.named_parameters()}
    assert count_parameters(ours.config) == sum(p.numel() for p in theirs.parameters())


# ------------------------------------------------------------------ config.json


LLAMA_2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def test_absent_entries_of_a_llama_are_those_of_transformers():
    config = parse_config(LLAMA_2, "x")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 1e4)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.biases) == (1e-6, False, ())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*4096.*remove"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope.*only linear"),
        ({"rope_scaling": {"type": "linear"}}, "linear.*'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3.*high_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": YARN},
            "'yarn'.*'linear'.*remove one",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"is_causal": False}, "is_causal False"),
        ({"is_causal": None}, "is_causal None"),
        ({"transformers_weights": "other.safetensors"}, "'other.safetensors' is not supported"),
        ({"per_layer_config": {"0": {"rope_theta": 5.0}}}, "per_layer_config"),
        ({"layer_types": ["sliding_attention"] * 32, "sliding_window": 8}, "a Llama whose 'layer_"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 77},
            "'original_max_position_embeddings' of the rope scaling differs from that at top level",
        ),
        ({"rope_scaling": {"type": "yarn"}, "factor": 8.0}, "needs a positive number as 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": False}}, "'factor', not False"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "'factor', not True"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "true or false as 'truncate'"),
        ({"rope_scaling": {**YARN, "rope_theta": 1.0}}, "'rope_theta' above 1"),
        (
            {
                "original_max_position_embeddings": 8192,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                },
            },
            "must be below 'high_freq_factor'",
        ),
        (
            {"rope_scaling": {**YARN, "factor": 3.0}, "rope_parameters": YARN},
            "different 'factor': remove one",
        ),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_computed_exactly_is_refused_by_name(change, named):
    with pytest.raises(dit_jax.DitError) as error:
        parse_config({**LLAMA_2, **change}, "config.json")
    assert re.search(named, str(error.value))


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_config_holds_it_is_one_line_or_a_config(family):
    values = (
        None,
        True,
        -1,
        0,
        5,
        2**70,
        10**400,
        1e308,
        float("nan"),
        "",
        "x" * 9000,
        [],
        {},
        [[]],
        {"a": 1},
    )
    more = (
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "mlp_bias",
        "attention_bias",
    )
    more += (
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window_pattern",
        "is_causal",
        "per_layer_config",
    )
    raw = {**LLAMA_2, "model_type": family}
    changes = [{key: value} for key in (*raw, *more) for value in values]
    changes += [{"rope_parameters": {**YARN, key: value}} for key in YARN for value in values]
    changes += [{"use_sliding_window": True, key: value} for key in more for value in values]
    for change in changes:
        try:
            parse_config({**raw, **change}, "config.json")
        except dit_jax.DitError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, change


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("qwen3_moe", "Qwen3, a mixture of experts"),
        ("qwen3_5_text", "Qwen3.5 or 3.6, with hybrid"),
        ("phi3", "Phi"),
        ("olmo2", "OLMo"),
        ("olmoe", "OLMoE, a mixture of experts"),
        ("gemma2", "Gemma 2, with softcapped logits"),
        ("somemoe", "a mixture of experts"),
    ],
)
def test_other_families_are_refused_by_their_name_with_what_is_supported(kind, named):
    with pytest.raises(dit_jax.DitError) as error:
        parse_config({**LLAMA_2, "model_type": kind}, "config.json")
    message = str(error.value)
    assert message.startswith(f"config.json: model_type {kind!r} is not supported ({named}")
    for name, family in FAMILIES.items():
        assert f"{family.title} ({name!r})" in message
    with pytest.raises(dit_jax.DitError, match="'num_local_experts' is not supported"):
        parse_config({**LLAMA_2, "num_local_experts": 4}, "config.json")
    with pytest.raises(dit_jax.DitError, match=r"model_type \['x'\] is not supported\. Supp"):
        parse_config({**LLAMA_2, "model_type": ["x"]}, "config.json")


GEMMA_4B = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "image_token_index": 262144,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def test_a_multimodal_gemma_is_read_as_its_text_part():
    config = parse_config(GEMMA_4B, "x")
    assert config == dataclasses.replace(NAMED_CONFIGS["gemma-3-4b"], text_part=True)
    wrong = {**GEMMA_4B, "text_config": 3}
    with pytest.raises(dit_jax.DitError, match="'text_config' must be an object"):
        parse_config(wrong, "x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"layer_types": ["chunked_attention"] * 34}, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types.*34 layers"),
        ({"sliding_window": 0}, "'sliding_window' must be"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "'full_attention' and 'sliding_attention'"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "of layers with sliding windows",
        ),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
        ({"rope_local_base_freq": None}, "rope_theta"),
    ],
)
def test_what_is_not_computed_of_gemma_is_refused_by_name(change, named):
    raw = {**GEMMA_4B, "text_config": {**GEMMA_4B["text_config"], **change}}
    with pytest.raises(dit_jax.DitError) as error:
        parse_config(raw, "config.json")
    assert re.search(named, str(error.value))


def test_the_angles_that_old_llamas_store_are_no_surprise(tmp_path):
    from safetensors.numpy import load_file, save_file

    theirs = make("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    save_file({**load_file(path), **more}, path)
    tokens = np.arange(9)[None]
    assert_near(dit_jax.load_model(tmp_path).logits(tokens), their_logits(theirs, tokens))


BILLIONS = {
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-3b": 3.086,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.770,
    "qwen2.5-32b": 32.764,
    "qwen2.5-72b": 72.706,
    "mistral-7b-v0.1": 7.242,
    "mistral-7b-v0.3": 7.248,
    "gemma-3-270m": 0.2681,
    "gemma-3-1b": 0.9999,
    "gemma-3-4b": 3.880,
    "gemma-3-12b": 11.766,
    "gemma-3-27b": 27.009,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.554,
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
}


def test_names_of_released_models_lead_to_their_shapes():
    for name, wanted in (
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b"),
        ("random:Qwen3-4B", "qwen3-4b"),
    ):
        assert find_shape(name) is NAMED_CONFIGS[wanted]
    assert find_shape("mistralai/Mistral-7B-v0.4") is None


@pytest.mark.parametrize("name", [name for name in NAMED_CONFIGS if "qwen3" not in name])
def test_named_shapes_have_the_published_sizes(name):
    config = NAMED_CONFIGS[name]
    assert config.model_type in FAMILIES
    assert parse_config(hf_config(config), name) == config
    assert count_parameters(config) / 1e9 == pytest.approx(BILLIONS[name], rel=0.001)
