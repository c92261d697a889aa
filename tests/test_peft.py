"""PEFT folders: dit_jax computes what PEFT computes, and PEFT reads what dit_jax writes, bit for bit."""

import contextlib
import copy
import json
import re
import shutil
import time

import numpy as np
import pytest
from format_cases import (
    BF16,
    CONFIG,
    TOKENS,
    UNTIED,
    assert_same,
    from_torch,
    hf_model,
    merged_logits,
    our_logits,
    random_lora,
    torch_logits,
)
from safetensors.numpy import load_file, save_file

from dit_jax.deltas import detect, export, peft
from dit_jax.deltas.factors import fuse, modules
from dit_jax.deltas.patterns import Budget, Pattern
from dit_jax.errors import DitError
from dit_jax.runtime.stage_records import peak_memory_bytes

torch = pytest.importorskip("torch")
peft_library = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REGEX = r"model\.layers\.(0|2)\.(?:self_attn\.[qv]|mlp\.(?!gate).*?)_proj"


class Base:
    """A random base model that transformers made."""

    def __init__(self, folder):
        self.folder = str(folder)
        self._model = hf_model(folder)
        self._model.name_or_path = self._model.config._name_or_path = self.folder

    def model(self):
        return copy.deepcopy(self._model)

    def logits(self, *deltas):
        return merged_logits(self._model, TOKENS, *deltas)

    def peft_logits(self, folder):
        """Logits of PEFT with the adapter in `folder`."""
        return torch_logits(peft_library.PeftModel.from_pretrained(self.model(), folder), TOKENS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("peft") / "base")


def make_adapter(base, folder, dtype=torch.float32, **options):
    """A random adapter that PEFT makes and writes; returns its logits."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(3)
    model = peft_library.get_peft_model(base.model(), peft_library.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return torch_logits(model.eval(), TOKENS) if dtype == torch.float32 else None


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, message):
    with pytest.raises(DitError, match=re.escape(message)) as caught:
        peft.read_peft(folder, CONFIG)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# ------------------------------------------------------------------ reading

SUPPORTED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_1": {"r": 1, "lora_alpha": 1},
    "large_rank": {"r": 40},
    "two_projections": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "full_names": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.k_proj"]},
    "regex": {"target_modules": REGEX},
    "all_linear": {"target_modules": "all-linear"},
    "exclude": {"exclude_modules": ["v_proj", "layers.1.mlp.up_proj"]},
    "exclude_regex": {"exclude_modules": r".*\.1\..*"},
    "layers": {"layers_to_transform": [0, 2]},
    "full_name_and_layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "one_layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {"q_proj": 5, r"layers\.[12]\.mlp\..*": 2, "up_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 11, "model.layers.0.mlp.up_proj": 0.5}},
    "patterns_rslora": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.1.self_attn.k_proj": 6},
        "alpha_pattern": {r"self_attn\.(q|k)_proj": 3},
    },
    "eva_not_needed": {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
}


@pytest.mark.parametrize("case", SUPPORTED)
def test_logits_are_those_of_peft(base, tmp_path, case):
    wanted = make_adapter(base, tmp_path, **SUPPORTED[case])
    assert detect.detect_format(tmp_path) == "peft"
    found = peft.read_peft(tmp_path, CONFIG)
    np.testing.assert_allclose(base.logits(found.delta), wanted, atol=2e-5)
    assert np.abs(base.logits() - wanted).max() > 1e-2
    assert found.metadata["base_model_name_or_path"] == base.folder
    # and written again, PEFT computes the same
    peft.write_peft(tmp_path / "again", found.delta, CONFIG, base.folder)
    found_logits = base.peft_logits(tmp_path / "again")
    np.testing.assert_allclose(found_logits, wanted, atol=2e-5)
    tensors, again = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again")
    )
    assert_same(again, tensors)


def test_our_model_computes_it_too(base, tmp_path):
    wanted = make_adapter(base, tmp_path, use_rslora=True)
    found = peft.read_peft(tmp_path, CONFIG)
    np.testing.assert_allclose(our_logits(base.folder, TOKENS, found.delta), wanted, atol=2e-5)


def test_an_adapter_saved_with_torch_is_read(base, tmp_path):
    make_adapter(base, tmp_path)
    wanted = peft.read_peft(tmp_path, CONFIG)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_same(peft.read_peft(tmp_path, CONFIG).delta, wanted.delta)
    (tmp_path / "adapter_model.bin").unlink()
    refused(tmp_path, "has neither adapter_model.safetensors nor adapter_model.bin")


# ------------------------------------------------------------------ refusals

REFUSED = {
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    "target_parameters": (
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
        "target_parameters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(base, tmp_path, case):
    options, message = REFUSED[case]
    make_adapter(base, tmp_path, **options)
    refused(tmp_path, message)


def test_biases_are_refused_by_name_also_when_the_config_hides_them(base, tmp_path):
    make_adapter(base, tmp_path, lora_bias=True)
    edit(tmp_path, lora_bias=False)
    refused(tmp_path, "lora_bias")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_of_tomorrow": 3}, "'use_of_tomorrow' = 3"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"r": 4}, "this model needs [4, "),
        ({"r": 0}, "r is 0 instead of a positive integer"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": 10**400}, "lora_alpha is a huge integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"use_rslora": 1}, "use_rslora is 1 instead of a bool"),
        ({"rank_pattern": [1]}, "rank_pattern is a list"),
        ({"rank_pattern": {"q_proj": 2}}, "this model needs [2, 32]"),
        ({"alpha_pattern": {"(": 2}}, "'(.*\\\\.)?(()$' is not a valid regular expression"),
        ({"alpha_pattern": {r"(q_proj)\1": 2}}, "groupref, which is not supported"),
        ({"target_modules": ["q_proj"]}, "which adapter_config.json does not target"),
        ({"target_modules": [1]}, "target_modules is a list instead of"),
        ({"exclude_modules": ["q_proj"]}, "does not target"),
        ({"layers_to_transform": [0]}, "does not target"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x'"),
        ({"layers_to_transform": 1, "layers_pattern": "(a+)+"}, "layers_pattern '(a+)+'"),
        ({"target_modules": ".*", "layers_to_transform": 1}, "layers_to_transform"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(base, tmp_path, changes, message):
    make_adapter(base, tmp_path)
    edit(tmp_path, **changes)
    refused(tmp_path, message)


def test_tensors_that_do_not_fit_are_refused(base, tmp_path):
    make_adapter(base, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    good = load_file(weights)
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"

    def check(changes, message):
        save_file({k: v for k, v in {**good, **changes}.items() if v is not None}, weights)
        refused(tmp_path, message)

    a = good[name]
    other = name.replace("lora_A", "lora_B")
    check({name: None}, "lacks model.layers.1.self_attn.k_proj.lora_A.weight")
    check({name: None, other: None}, "targets 'model.layers.1.self_attn.k_proj', but")
    check({name: a[:, :-1].copy()}, "has shape [3, 31], this model needs [3, 32]")
    check({name: np.full_like(a, np.nan)}, "holds NaN or infinity")
    check({name: a.astype(np.int32)}, "int32 values")
    check({name.replace("k_proj", "x_proj"): a}, "no module of this model")
    check({"something": a}, "no part of a PEFT LoRA")
    check({name.replace("layers.1", "layers.7"): a}, "the model has 3 layers")
    check({name.replace("model.layers", "layers"): a, other.replace("model.layers", "layers"): good[other]},
          "twice, under two names")  # fmt: skip
    for key in good:
        good[key] = None
    check({}, "holds no tensors: save the adapter again")


def test_slow_patterns_end_soon(base, tmp_path):
    make_adapter(base, tmp_path)
    for pattern in ("(.*a)*" * 30 + "x", "(((((.*)*)*)*)*)*x", "(a|a|[a-z._0-9])*" * 20 + "!"):
        for changes in ({"target_modules": pattern}, {"rank_pattern": {pattern: 3}}):
            edit(tmp_path, **{"target_modules": ALL, "rank_pattern": {}, **changes})
            start = time.monotonic()
            with contextlib.suppress(DitError):
                peft.read_peft(tmp_path, CONFIG)
            assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.\d+\.self_attn\.[qkv]_proj", r".*\.(q|v)_proj", r"(?!.*mlp).*", r".*(?=_proj)",
        r"^model.*?proj$", r"\bmodel\b.*", r".*[^q]_proj", r"(model|x)(\.\w+){4}", r"m{1}o{0,2}del.+",
        r".*\.layers\.(?:0|[1-9]\d*)\..*", r"", r"(a*)*", r"(a*)+b?", r"(|m)odel.*", r"[\w.]{31,}",
        r"(?:model|layers|\.)*1.*", r".{10,12}", r"((.)*?l)+.*", r"x?" * 20 + "model.*", r"\D*1\D*",
        r".*(?<=q)_proj", r".*(?<!q)_proj", r"(?<=m)odel.*", r"m(?<=m)(?<!x)odel.*", r"(?<!a{3})b",
    ],
)  # fmt: skip
def test_patterns_match_as_in_re(pattern):
    texts = [
        "model.layers.1.self_attn.q_proj",
        "model.layers.12.mlp.up_proj",
        "",
        "aaa",
        "lm_head",
        "b",
    ]
    for text in texts:
        regex = Pattern(pattern)
        assert regex.fullmatch(text) == bool(re.fullmatch(pattern, text)), text
        assert regex.match(text) == bool(re.match(pattern, text)), text


SLOW = r"((?:.|.){1,2}){1,40}(?<!j)"


def test_the_patterns_of_a_file_share_their_time():
    budget, text = Budget(0.2), "model.layers.1.self_attn.q_proj"
    with pytest.raises(DitError, match="too many"):
        Pattern(SLOW, budget).fullmatch(text)
    with pytest.raises(DitError, match="too many"):
        Pattern("model", budget)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a?){1000000}", "((a?){1000}){1000}", "(?:(?:a?b?c?){4000}){4000}", "a{500000}" * 1000, "(.?){4294967294}",
        "(?:(a)|b){500000}", "(?:(?:ab){30000}){30000}", "." * 10_001, "(" * 3000 + ")" * 3000,
        "".join(f"[{chr(0x4E00 + i)}-{chr(0x9000 + i)}a]" for i in range(1800)) + "{20}",
    ],
)  # fmt: skip
def test_patterns_that_would_fill_the_memory_are_refused_at_once(pattern):
    start, held = time.process_time(), peak_memory_bytes()
    with pytest.raises(DitError, match=r"too (many|long)|not a valid"):
        Pattern(pattern)
    assert time.process_time() - start < 2
    assert peak_memory_bytes() - held < 200 * 2**20


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(?P<x>q)_(?P=x)", "groupref"), (r"(q)\1", "groupref"), ("(?i)q", "flags"), ("(?>q)", r"'\(\?>'"),
        ("(q)(?(1)a|b)", r"'\(\?\('"), ("(?R)", r"'\(\?R'"), ("(?:q_proj){e<=1}", "brace"), ("q{1", "brace"),
    ],
)  # fmt: skip
def test_what_re_and_regex_read_in_two_ways_is_refused(pattern, message):
    with pytest.raises(DitError, match=message):
        Pattern(pattern)


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize("scale", [None, 2.0, 0.1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_round_trips_are_bit_exact(tmp_path, dtype, scale):
    delta = random_lora(rank=3, dtype=dtype, scale=scale)
    peft.write_peft(tmp_path / "x", delta, CONFIG, "base")
    found = peft.read_peft(tmp_path / "x", CONFIG)
    assert_same(found.delta, delta)
    assert found.metadata == {"base_model_name_or_path": "base"}
    raw = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert raw["r"] == 3 and raw["lora_alpha"] == {None: 1, 2.0: 6, 0.1: 0.3}[scale]
    assert sorted(raw["target_modules"]) == sorted(ALL)


def test_scales_and_ranks_per_layer_survive(base, tmp_path):
    delta = random_lora(rank=4, projections=("k_proj", "up_proj"))
    module = delta["layers"]["self_attn"]["k_proj"]
    module["scale"][:] = [0.5, 3, 0.3]
    module["a"][1, :, 2:], module["b"][1, 2:] = 0, 0  # rank 2 in layer 1
    delta["layers"]["mlp"]["up_proj"]["a"][2] = delta["layers"]["mlp"]["up_proj"]["b"][2] = 0
    peft.write_peft(tmp_path / "x", delta, CONFIG, base.folder)
    found = peft.read_peft(tmp_path / "x", CONFIG).delta
    assert_same(found, delta)
    found_logits = base.peft_logits(tmp_path / "x")
    np.testing.assert_allclose(found_logits, base.logits(delta), atol=2e-5)
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert not any("layers.2.mlp" in name for name in tensors)


def test_peft_holds_the_bits_we_wrote(base, tmp_path):
    delta = random_lora(rank=2, dtype=BF16)
    peft.write_peft(tmp_path / "x", delta, CONFIG, base.folder)
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(tmp_path / "x" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.mlp.gate_proj"
    module = delta["layers"]["mlp"]["gate_proj"]
    for letter, ours in (("A", module["a"][2].T), ("B", module["b"][2].T)):
        stored = from_torch(tensors[f"{name}.lora_{letter}.weight"])
        assert stored.tobytes() == np.ascontiguousarray(ours).tobytes()
    found_logits = base.peft_logits(tmp_path / "x")
    np.testing.assert_allclose(found_logits, base.logits(delta), atol=2e-3)


def test_a_delta_of_zeros_and_what_cannot_be_written(tmp_path):
    zeros = random_lora(rank=2)
    for _, module in modules(zeros):
        module["a"][:], module["b"][:] = 0, 0
    peft.write_peft(tmp_path / "zeros", zeros, CONFIG, "base")
    assert_same(peft.read_peft(tmp_path / "zeros", CONFIG).delta, zeros)
    for delta, message in (
        ({}, "empty"),
        ({"norm": {"w": np.ones(32)}}, "norm is a dense difference"),
    ):
        with pytest.raises(DitError, match=message):
            peft.write_peft(tmp_path / "x", delta, CONFIG, "base")
    with pytest.raises(DitError, match="exists already"):
        peft.write_peft(tmp_path / "zeros", random_lora(), CONFIG, "base")
    peft.write_peft(tmp_path / "zeros", random_lora(), CONFIG, "base", replace=True)
    assert_same(peft.read_peft(tmp_path / "zeros", CONFIG).delta, random_lora())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zeros"]


def test_ranks_that_are_zero_at_the_end_survive(tmp_path):
    delta = random_lora(rank=5, dtype=BF16)
    for number, (_, module) in enumerate(modules(delta)):
        module["a"][:, :, number:], module["b"][:, number:] = 0, 0
    peft.write_peft(tmp_path / "x", delta, CONFIG, "base")
    assert_same(peft.read_peft(tmp_path / "x", CONFIG).delta, delta)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_fused_adapter_is_the_sum_of_both(base, tmp_path, dtype):
    diff = random_lora(seed=1, rank=3, dtype=dtype, scale=0.7)
    adapter = random_lora(seed=2, rank=2, dtype=dtype, projections=("q_proj", "up_proj"))
    fused = fuse(diff, adapter)
    peft.write_peft(tmp_path / "x", fused, CONFIG, base.folder)
    found = peft.read_peft(tmp_path / "x", CONFIG).delta
    assert_same(found, fused)
    assert all((m["scale"] == 1).all() for _, m in modules(found))
    assert found["layers"]["mlp"]["up_proj"]["a"].shape[-1] == 5
    wanted = base.logits(diff, adapter)
    np.testing.assert_allclose(base.peft_logits(tmp_path / "x"), wanted, atol=1e-4)
    # Servers read one rank and one alpha for all modules.
    export.write_fused_peft(tmp_path / "y", CONFIG, str(base.folder), diff, adapter)
    told = json.loads((tmp_path / "y" / peft.CONFIG).read_text())
    assert (told["r"], told["lora_alpha"], told["rank_pattern"], told["alpha_pattern"]) == (
        5,
        5,
        {},
        {},
    )
    tensors = load_file(tmp_path / "y" / peft.WEIGHTS)
    assert {min(x.shape) for x in tensors.values()} == {5}
    np.testing.assert_allclose(base.peft_logits(tmp_path / "y"), wanted, atol=1e-4)


def test_fusing_is_exact_in_the_stored_dtype():
    delta = random_lora(dtype=BF16, scale=0.5)
    module = fuse(delta)["layers"]["mlp"]["up_proj"]
    assert module["a"].dtype == module["b"].dtype == BF16  # half of a bfloat16 is one
    assert (
        module["b"].tobytes()
        == (delta["layers"]["mlp"]["up_proj"]["b"] * 0.5).astype(BF16).tobytes()
    )
    module = fuse(random_lora(dtype=BF16, scale=1 / 3))["layers"]["mlp"]["up_proj"]
    assert module["a"].dtype == module["b"].dtype == np.float32
    with pytest.raises(DitError, match="norm is a dense difference"):
        fuse(delta, {"norm": {"w": np.ones(32)}})
    with pytest.raises(DitError, match="nothing to fuse"):
        fuse({}, {})


def test_an_untied_model_reads_the_same_adapter(tmp_path):
    peft.write_peft(tmp_path / "x", random_lora(), CONFIG, "base")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    assert_same(peft.read_peft(tmp_path / "y", UNTIED).delta, random_lora())
