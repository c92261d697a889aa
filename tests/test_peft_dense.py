"""PEFT folders that change more than LoRA factors of projections: DoRA, whole modules, embeddings, token rows."""

import json

import numpy as np
import pytest
from format_cases import BF16, CONFIG, TOKENS, UNTIED, assert_same, hf_model, torch_logits
from safetensors.numpy import load_file, save_file
from test_peft import ALL, edit

import dit_jax
from dit_jax.deltas import peft
from dit_jax.deltas.factors import modules
from dit_jax.errors import DitError

torch = pytest.importorskip("torch")
peft_library = pytest.importorskip("peft")

CONFIGS = {"tied": CONFIG, "untied": UNTIED}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> (transformers model, our model)."""
    found = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("bases") / name
        theirs = hf_model(folder, config)
        found[name] = (folder, theirs, dit_jax.load_model(folder))
    return found


def make(bases, kind, folder, **options):
    """A random adapter that PEFT makes and writes; returns the logits of PEFT after reading it again."""
    path, model, _ = bases[kind]
    options = {"r": 3, "lora_alpha": 5, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(3)
    model = type(model).from_pretrained(path)
    made = peft_library.get_peft_model(model, peft_library.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    again = peft_library.PeftModel.from_pretrained(type(model).from_pretrained(path), folder)
    return torch_logits(again.eval(), TOKENS)


DENSE = {
    "dora": ("tied", {"use_dora": True}),
    "dora_some_layers": (
        "untied",
        {
            "use_dora": True,
            "use_rslora": True,
            "layers_to_transform": [1],
            "rank_pattern": {"q_proj": 5},
        },
    ),
    "bias_where_there_is_none": ("tied", {"bias": "all"}),
    "head_and_embedding": ("untied", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms": ("tied", {"modules_to_save": ["norm", "q_norm", "input_layernorm"]}),
    "a_projection": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}),
    "lora_on_the_head": ("untied", {"target_modules": ["q_proj", "lm_head"]}),
    "lora_on_the_embedding": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "lora_on_both": ("untied", {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True}),
    "rows": ("untied", {"trainable_token_indices": [3, 1, 60]}),
    "rows_tied": ("tied", {"trainable_token_indices": [3, 1, 60]}),
    "rows_of_both": (
        "untied",
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}},
    ),
    "dora_on_both": ("untied", {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}),
    # A delta that unties: PEFT changes one of a tied pair, or both apart.
    "tied_head": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied_embedding": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied_head_and_embedding": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied_lora_on_the_head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied_lora_on_the_embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied_lora_on_both": ("tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied_dora_on_the_head": ("tied", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "tied_dora_on_the_embedding": (
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ),
    "tied_rows_of_the_head": ("tied", {"trainable_token_indices": {"lm_head": [3, 4]}}),
    "tied_rows_of_both": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}},
    ),
    "tied_same_rows_of_both": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
    ),
    # ensure_weight_tying keeps them tied, and changes nothing where they are not trained.
    **{
        f"kept_tied_{name}": ("tied", {**options, "ensure_weight_tying": True})
        for name, options in {
            "plain": {},
            "head": {"modules_to_save": ["lm_head"]},
            "embedding": {"modules_to_save": ["embed_tokens"]},
            "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
            "lora_on_the_head": {"target_modules": ["q_proj", "lm_head"]},
            "lora_on_the_embedding": {"target_modules": ["q_proj", "embed_tokens"]},
            "lora_on_both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
            "rows": {"trainable_token_indices": [3, 1]},
        }.items()
    },
}


@pytest.mark.parametrize("case", DENSE)
def test_logits_are_those_of_peft(bases, tmp_path, case):
    kind, options = DENSE[case]
    wanted = make(bases, kind, tmp_path, **options)
    model = bases[kind][2]
    delta = dit_jax.load_diff(tmp_path, model).delta
    np.testing.assert_allclose(model.logits(TOKENS, deltas=(delta,)), wanted, atol=3e-5)
    assert np.abs(model.logits(TOKENS) - wanted).max() > 1e-2


UNTIES = {"tied_head": {"lm_head"}, "tied_embedding": {"lm_head", "embed_tokens"}}


@pytest.mark.parametrize("case", [name for name in DENSE if name.startswith(("tied", "kept_tied"))])
def test_a_delta_unties_where_peft_does(bases, tmp_path, case):
    make(bases, *DENSE[case][:1], tmp_path, **DENSE[case][1])
    found = dit_jax.load_diff(tmp_path, bases["tied"][2]).delta
    outside = set(found) - {"layers"}
    if case.startswith("kept_tied") or case == "tied_same_rows_of_both":
        assert "lm_head" not in outside
    else:
        assert outside == UNTIES.get(case, outside) and "lm_head" in outside


def test_lora_factors_beside_dense_parts_keep_their_dtype(bases, tmp_path):
    make(bases, "untied", tmp_path, modules_to_save=["lm_head"])
    weights = tmp_path / peft.WEIGHTS
    tensors = {k: v.astype(BF16) if "lora_" in k else v for k, v in load_file(weights).items()}
    save_file(tensors, weights)
    delta = dit_jax.load_diff(tmp_path, bases["untied"][2]).delta
    found = dict(modules(delta))
    assert found[("lm_head",)]["w"].dtype == np.float32
    assert found[("layers", "mlp", "up_proj")]["a"].dtype == BF16


def check(bases, kind, folder, message):
    with pytest.raises(DitError, match=message) as caught:
        dit_jax.load_diff(folder, bases[kind][2])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("dora", {"use_dora": False}, "use_dora is False, but the lora_magnitude_vector of"),
        (
            "head_and_embedding",
            {"modules_to_save": ["lm_head", "embed_tokens", "score"]},
            "targets 'score', but",
        ),
        ("lora_on_the_head", {"target_modules": ["q_proj"]}, "'lm_head', which is not targeted"),
        ("norms", {"target_modules": [*ALL, "lm_head"]}, "targets 'lm_head', but"),
        ("rows", {"trainable_token_indices": None}, "does not name 'model.embed_tokens'"),
        ("rows", {"trainable_token_indices": [1, 2]}, r"this model needs \[2, 32\]"),
        (
            "rows",
            {"trainable_token_indices": [1, 2, 2]},
            "instead of a list of different token ids",
        ),
        ("rows", {"trainable_token_indices": [1, 2, 10**9]}, "instead of ids below 67"),
        ("rows", {"trainable_token_indices": {f"x{i}": [1] for i in range(17)}}, "at most 16"),
        ("rows", {"trainable_token_indices": "x"}, "trainable_token_indices is 'x'"),
        ("rows", {"trainable_token_indices": {"lm_head": [1, 2, 3]}}, "does not name"),
        (
            "rows_of_both",
            {"trainable_token_indices": {"embed_tokens": [1, 2]}},
            "does not name 'lm_head'",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(bases, tmp_path, case, changes, message):
    kind, options = DENSE[case]
    make(bases, kind, tmp_path, **options)
    edit(tmp_path, **changes)
    check(bases, kind, tmp_path, message)


def test_tensors_that_do_not_fit_are_refused(bases, tmp_path):
    make(bases, "untied", tmp_path, use_dora=True, target_modules=["q_proj", "k_proj"])
    weights = tmp_path / peft.WEIGHTS
    good = load_file(weights)
    magnitude = next(name for name in good if "magnitude" in name)
    factor = magnitude.replace("lora_magnitude_vector", "lora_A.weight")

    def write(**changes):
        save_file({k: v for k, v in {**good, **changes}.items() if v is not None}, weights)

    write(**{magnitude: None})
    check(bases, "untied", tmp_path, "lora_magnitude_vector of .* is missing")
    write(**{magnitude: good[magnitude][1:].copy()})
    check(bases, "untied", tmp_path, "this model needs")
    write(**{magnitude: np.full_like(good[magnitude], np.inf)})
    check(bases, "untied", tmp_path, "holds NaN or infinity")
    write(**{factor: None})
    check(bases, "untied", tmp_path, "lora_B, lora_magnitude_vector of .* which is not supported")
    write(**{"base_model.model.model.norm.weight": np.ones(32, np.float32)})
    check(bases, "untied", tmp_path, "the whole weight of 'model.norm', which is not in")
    write(**{"base_model.model.lm_head.lora_A.bias": np.ones(32, np.float32)})
    check(bases, "untied", tmp_path, "lora_bias")


BROUGHT = "the adapter brings an embedding or head of its own, trained or of another base"


def reload(bases, kind, folder):
    """The logits of PEFT's reading of an adapter."""
    path, model, _ = bases[kind]
    base = type(model).from_pretrained(path)
    return torch_logits(peft_library.PeftModel.from_pretrained(base, folder).eval(), TOKENS)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]},
     {"target_modules": ["lm_head", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
    ids=["neither", "embedding", "head", "both", "saved head"],
)  # fmt: skip
def test_an_embedding_and_head_that_peft_saves_take_the_place_of_the_bases(
    bases, tmp_path, kind, options
):
    """save_embedding_layers stores them whole. Untrained they are the base's; others PEFT writes into the base."""
    make(bases, kind, tmp_path / "plain", **options)
    path, model, ours = bases[kind]
    made = peft_library.PeftModel.from_pretrained(
        type(model).from_pretrained(path), tmp_path / "plain"
    )
    made.save_pretrained(tmp_path / "copies", save_embedding_layers=True)
    weights = tmp_path / "copies" / peft.WEIGHTS
    tensors = load_file(weights)
    end = ".weight" if not options else (".base_layer.weight", ".weight")
    saved = options.get("modules_to_save", [])
    copies = [name for name in tensors if "lora_" not in name and name.endswith(end)]
    copies = [name for name in copies if not any(x in name for x in saved)]
    assert copies
    plain, found = (dit_jax.load_diff(tmp_path / x, ours) for x in ("plain", "copies"))
    assert_same(found.delta, plain.delta)
    assert "notes" not in found.metadata
    before = reload(bases, kind, tmp_path / "copies")
    for i, name in enumerate(copies):
        tensors[name] = tensors[name] + np.float32(0.3 + i)
        save_file(tensors, weights)
        found = dit_jax.load_diff(tmp_path / "copies", ours)
        wanted = reload(bases, kind, tmp_path / "copies")
        np.testing.assert_allclose(ours.logits(TOKENS, deltas=found.delta), wanted, atol=1e-4)
        # Of a tied pair PEFT writes the head's copy last, where the file has one.
        changed = np.abs(wanted - before).max() > 1e-3
        assert changed or (kind == "tied" and saved)
        assert found.metadata.get("notes", []) == [BROUGHT] * int(changed)


def test_factors_of_a_targeted_embedding_are_needed(bases, tmp_path):
    make(bases, "untied", tmp_path / "plain")
    path, model, _ = bases["untied"]
    made = peft_library.PeftModel.from_pretrained(
        type(model).from_pretrained(path), tmp_path / "plain"
    )
    made.save_pretrained(tmp_path / "copies", save_embedding_layers=True)
    edit(tmp_path / "copies", target_modules=[*ALL, "embed_tokens"])
    check(bases, "untied", tmp_path / "copies", "lacks the factors of 'model.embed_tokens'")


def test_the_base_is_needed(bases, tmp_path):
    make(bases, "tied", tmp_path, use_dora=True)
    with pytest.raises(DitError, match="the base model is needed"):
        peft.read_peft(tmp_path, CONFIG)
    assert json.loads((tmp_path / peft.CONFIG).read_text())["use_dora"]
