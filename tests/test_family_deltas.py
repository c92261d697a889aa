"""Weight diffs of every family: applied, trained, split over a mesh, and exchanged with PEFT and transformers."""

import copy
import dataclasses
import functools
import re
import shutil

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from family_cases import FAMILY, VOCAB, assert_near, make, make_pairs, their_logits
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.api import Diff
from dit_jax.config.loading import load_config
from dit_jax.data.batch import Sample, pack, stack
from dit_jax.deltas import export, tree
from dit_jax.models import shardings
from dit_jax.models.decode import generate
from dit_jax.models.decoder import forward, unembed
from dit_jax.models.delta_trees import map_modules
from dit_jax.models.kv_cache import cache_slots, init_cache
from dit_jax.models.modules import bias_of, get_at, module_table
from dit_jax.models.shapes import NAMED_CONFIGS
from dit_jax.models.text_part import is_vision
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.organisms.finetune import finetune_many
from dit_jax.planning import programs
from dit_jax.runtime import parallel
from dit_jax.train.dit import State, train_step

TRAINED = ("llama", "qwen2", "gemma3")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory)


def random_lora(config, seed, rank=2, size=0.1):
    delta = tree.init_lora(config, jax.random.key(seed), rank)

    def fill(path, module):
        key = jax.random.fold_in(jax.random.key(seed), len(".".join(path)))
        return {**module, "a": size * jax.random.normal(key, module["a"].shape)}

    return map_modules(fill, delta)


def random_dense(config, seed, size=0.05):
    """A change of every parameter: biases, norms and embeddings too."""
    rng = np.random.default_rng(seed)
    delta = {}
    for path, module in module_table(config).items():
        node = delta
        for part in path:
            node = node.setdefault(part, {})
        node["w"] = (size * rng.standard_normal(module.stacked)).astype(np.float32)
    return delta


@functools.partial(jax.jit, static_argnames="config")
def logits(params, config, tokens, deltas=()):
    return unembed(params, config, forward(params, config, tokens, deltas=deltas), deltas)


# ------------------------------------------------------------------ applied


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_deltas_are_what_merged_weights_compute(pairs, name, scan):
    _, model = pairs(name)
    config = dataclasses.replace(model.config, scan_layers=scan)
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, VOCAB)
    deltas = (random_dense(config, 1), random_lora(config, 2))
    merged = tree.merge(model.params, *deltas)
    assert_near(
        logits(model.params, config, tokens, deltas=deltas),
        np.asarray(logits(merged, config, tokens)),
    )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_texts_side_by_side_see_their_own_window(pairs, name, scan):
    _, model = pairs(name)
    config = dataclasses.replace(model.config, scan_layers=scan)
    sizes, scored, rows = (30, 24, 24), (3, 2, 2), 2
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, VOCAB, (rows, size)) for size in sizes]
    lengths = np.array([[30, 20, 24], [25, 24, 19]])
    position = [rng.integers(lengths[:, [i]] // 2, lengths[:, [i]]) for i in range(3)]
    position = [
        np.repeat(p, n, axis=1) - np.arange(n) for p, n in zip(position, scored, strict=True)
    ]
    run = jax.jit(forward, static_argnames=("config", "segments"))
    together = run(
        model.params,
        config,
        jnp.concatenate(texts, axis=1),
        lengths=jnp.asarray(lengths),
        segments=tuple(zip(sizes, scored, strict=True)),
        position=jnp.concatenate(position, axis=1),
    )
    alone = []
    for i, text in enumerate(texts):
        hidden = run(model.params, config, text, lengths=lengths[:, i])
        alone.append(np.take_along_axis(np.asarray(hidden), position[i][..., None], axis=1))
    assert_near(together, np.concatenate(alone, axis=1))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_batched_decoding_with_a_diff_a_row_is_that_of_each_diff(pairs, name, scan):
    _, model = pairs(name)
    config = dataclasses.replace(model.config, scan_layers=scan)
    tokens = jax.random.randint(jax.random.key(1), (3, 20), 3, VOCAB)
    mask = np.ones((3, 20), bool)
    mask[1, :6] = False
    diffs = [random_lora(config, seed) for seed in (3, 4, 5)]
    adapter = random_lora(config, 9)
    stacked = tree.per_example(jax.tree.map(lambda *x: jnp.stack(x), *diffs))
    options = {"max_new_tokens": 24}
    out = generate(model.params, config, tokens, mask, deltas=(stacked, adapter), **options)
    merged = tree.merge(model.params, diffs[1], adapter)
    one = generate(merged, config, tokens[1:2, 6:], mask[1:2, 6:], **options)
    np.testing.assert_array_equal(out.tokens[1], one.tokens[0])
    np.testing.assert_allclose(out.logprobs[1], one.logprobs[0], atol=2e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_a_split_model_computes_the_same(pairs, name):
    _, model = pairs(name)
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config = model.config
    split = dit_jax.load_model(model.name, mesh=mesh)
    tokens = np.random.default_rng(0).integers(3, VOCAB, (4, 24))
    delta = random_dense(config, 1)
    expected = model.logits(tokens, deltas=(delta,))
    placed = shardings.put_delta(config, mesh, delta)
    assert_near(split.logits(tokens, deltas=(placed,)), np.asarray(expected))
    mask = np.ones_like(tokens, bool)
    alone = generate(model.params, config, tokens, mask, max_new_tokens=12)
    with parallel.use_mesh(mesh):
        out = generate(
            split.params, config, *parallel.put_rows((tokens, mask), mesh, 4), max_new_tokens=12
        )
    np.testing.assert_array_equal(out.tokens, alone.tokens)


def test_biases_are_split_as_the_outputs_that_they_shift(pairs):
    _, model = pairs("qwen2")
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    found = shardings.param_shardings(model.config, mesh)["layers"]["self_attn"]
    spec = jax.sharding.PartitionSpec
    assert found[bias_of("q_proj")]["bias"].spec == spec(None, "tensor")
    assert found[bias_of("v_proj")]["bias"].spec == spec(None, "tensor")


@pytest.mark.parametrize("scan", [False, True])
def test_windowed_layers_keep_their_window_alone(pairs, scan):
    _, model = pairs("gemma3")
    config = dataclasses.replace(model.config, scan_layers=scan)
    k = init_cache(config, 3, 100).k
    slots = [100 if kind == "full_attention" else 16 for kind in config.layer_types]
    if scan:
        assert k.shape[1:3] == (3, sum(slots))
    else:
        assert [x.shape[2] for x in k] == slots
    assert cache_slots(config, 100) == sum(slots) < 100 * len(slots)
    assert cache_slots(config, 16) == 16 * len(slots)


@pytest.mark.parametrize("name", ["gemma-3-4b", "qwen2.5-7b", "mistral-7b-v0.1", "llama-3.1-8b"])
@pytest.mark.parametrize("stage", ["diffs", "train", "ask"])
def test_the_steps_of_released_shapes_are_traced_without_weights(name, stage):
    shape = NAMED_CONFIGS[name]
    config = load_config(str(ROOT / "configs" / "plan" / "paper.py"))
    step, args, options, _ = programs.stage_step(stage, shape, None, config)
    assert step.trace(*args, **options).jaxpr.eqns


# ------------------------------------------------------------------ trained, against a plain torch loop

LENGTH, SCORED, STEPS, RATE = 24, 8, 3, 1e-2


def random_sample(rng):
    size = int(rng.integers(LENGTH - 6, LENGTH + 1))
    start = size - int(rng.integers(3, SCORED + 1))
    return Sample(tuple(int(i) for i in rng.integers(3, VOCAB, size)), start, size)


def torch_logits(theirs, weights, sample):
    """Logits of the positions that are scored, with some weights replaced."""
    import torch

    tokens = torch.tensor([sample.tokens])
    out = torch.func.functional_call(theirs, weights, args=(tokens,), kwargs={"use_cache": False})
    return out.logits[0, sample.start - 1 : sample.end - 1]


class TorchLora:
    """Factors of a delta as torch parameters, and the base's weights plus their products."""

    def __init__(self, theirs, config, delta):
        import torch

        self.base = dict(theirs.named_parameters())
        self.factors = {}
        for path, module in module_table(config).items():
            if module.lora:
                node = get_at(delta, path)
                for layer in module.indices:
                    a, b = (
                        torch.tensor(np.array(node[x][layer]), requires_grad=True) for x in "ab"
                    )
                    name = module.tensor.format(layer)
                    self.factors[name] = (path, layer, a, b, float(node["scale"][layer]))

    def weights(self):
        return {
            name: self.base[name] + scale * (a @ b).T
            for name, (_, _, a, b, scale) in self.factors.items()
        }

    def leaves(self):
        return [x for _, _, a, b, _ in self.factors.values() for x in (a, b)]

    def assert_equal(self, delta, atol):
        for path, layer, a, b, _ in self.factors.values():
            node = get_at(delta, path)
            np.testing.assert_allclose(node["a"][layer], a.detach().numpy(), atol=atol)
            np.testing.assert_allclose(node["b"][layer], b.detach().numpy(), atol=atol)


@pytest.mark.parametrize("name", TRAINED)
def test_diffs_train_as_in_a_plain_torch_loop(pairs, name):
    import torch
    import torch.nn.functional as F

    theirs, model = pairs(name)
    config, rng = dataclasses.replace(model.config, scan_layers=False), np.random.default_rng(0)
    steps = [[random_sample(rng) for _ in range(3)] for _ in range(STEPS)]
    sample_weights = (0.25, 0.25, 0.5)  # cross-entropy, and KL to the base
    batch = stack([pack(s, sample_weights, LENGTH, SCORED, pad_id=0) for s in steps])
    start = tree.init_lora(config, jax.random.key(0), 2)
    other = tree.init_lora(config, jax.random.key(1), 2)
    deltas = jax.tree.map(lambda *x: jnp.stack(x), start, other)
    trained, parts = finetune_many(
        model.params,
        config,
        deltas,
        stack([batch, batch]),
        optimizer=make_optimizer("adam", RATE, STEPS),
        num_ce=2,
        widths=((LENGTH, SCORED),) * 3,
    )
    torch_lora = TorchLora(theirs, config, start)
    optimizer = torch.optim.Adam(torch_lora.leaves(), lr=RATE)
    for step, samples in enumerate(steps):
        weights, ce, kl = torch_lora.weights(), 0, 0
        for sample, weight in zip(samples[:2], sample_weights, strict=False):
            wanted = torch.tensor(sample.tokens[sample.start : sample.end])
            out = torch_logits(theirs, weights, sample)
            ce = ce + weight * F.cross_entropy(out, wanted, reduction="sum")
        ours = torch.log_softmax(torch_logits(theirs, weights, samples[2]), dim=-1)
        with torch.no_grad():
            base = torch.log_softmax(torch_logits(theirs, {}, samples[2]), dim=-1)
        kl = sample_weights[2] * F.kl_div(ours, base, log_target=True, reduction="sum")
        np.testing.assert_allclose(parts["ce"][0, step], ce.item(), rtol=1e-5)
        np.testing.assert_allclose(parts["kl"][0, step], kl.item(), rtol=1e-3, atol=1e-5)
        optimizer.zero_grad()
        (ce + kl).backward()
        optimizer.step()
    torch_lora.assert_equal(jax.tree.map(lambda x: x[0], trained), atol=2e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_adapters_train_as_in_a_plain_torch_loop(pairs, name):
    import torch
    import torch.nn.functional as F

    theirs, model = pairs(name)
    config, rng = model.config, np.random.default_rng(1)
    diffs = [random_lora(config, seed) for seed in (3, 4)]
    samples = [[random_sample(rng) for _ in diffs] for _ in range(STEPS)]
    adapter = tree.init_lora(config, jax.random.key(0), 3, fan_in="rank", init_scale=0.1)
    optimizer = make_optimizer("adamw", RATE, STEPS, weight_decay=0.01)
    leaves = jax.tree.map(jnp.array, tree.trainable(adapter))
    state = State(leaves, optimizer.init(leaves))
    torch_adapter = TorchLora(theirs, config, adapter)
    theirs_optimizer = torch.optim.AdamW(torch_adapter.leaves(), lr=RATE, weight_decay=0.01)
    fixed = [TorchLora(theirs, config, diff).weights() for diff in diffs]
    stacked = tree.per_example(jax.tree.map(lambda *x: jnp.stack(x), *diffs))
    for members in samples:
        state, metrics = train_step(
            model.params,
            config,
            state,
            adapter,
            stacked,
            pack(members, [0.1, 0.1], LENGTH, SCORED, pad_id=0),
            optimizer=optimizer,
        )
        loss = 0
        for sample, weights in zip(members, fixed, strict=True):
            own = torch_adapter.weights()
            both = {
                key: weights[key].detach() + own[key] - torch_adapter.base[key].detach()
                for key in own
            }
            wanted = torch.tensor(sample.tokens[sample.start : sample.end])
            loss = loss + 0.1 * F.cross_entropy(
                torch_logits(theirs, both, sample), wanted, reduction="sum"
            )
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
        theirs_optimizer.zero_grad()
        loss.backward()
        theirs_optimizer.step()
    torch_adapter.assert_equal(tree.with_scale(state.leaves, adapter), atol=2e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_full_finetune_trains_biases_and_norms(pairs, name):
    theirs, model = pairs(name)
    del theirs
    config, rng = model.config, np.random.default_rng(2)
    zeros = {}
    for path, module in module_table(config).items():
        node = zeros
        for part in path:
            node = node.setdefault(part, {})
        node["w"] = jnp.zeros((1, *module.stacked))
    samples = [random_sample(rng)]
    batch = stack([stack([pack(samples, [1.0], LENGTH, SCORED, pad_id=0)])])
    trained, _ = finetune_many(
        model.params, config, zeros, batch, optimizer=make_optimizer("adam", RATE, 1), num_ce=1
    )
    for path, module in module_table(config).items():
        w = np.asarray(get_at(trained, path)["w"])
        # A bias of keys moves all scores of a query alike, where keys have no norm.
        if path[-1] != bias_of("k_proj"):
            assert np.abs(w).max() > 0.9 * RATE, (path, module.kind)


# ------------------------------------------------------------------ exchanged with PEFT and transformers


@pytest.fixture(scope="module")
def peft_folder(pairs, tmp_path_factory):
    """name -> (a PEFT adapter of that model, its folder)."""
    peft = pytest.importorskip("peft")
    import torch

    def make_adapter(name, **options):
        base = tmp_path_factory.mktemp("base")
        theirs = make(name, base)
        torch.manual_seed(1)
        options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **options}
        model = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp(f"peft_{name}")
        model.eval().save_pretrained(folder)
        return model, folder

    return make_adapter


@pytest.mark.parametrize("name", FAMILY)
def test_peft_adapters_of_every_family_are_read_and_written(pairs, peft_folder, name, tmp_path):
    import peft

    theirs, folder = peft_folder(name)
    base, model = pairs(name)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 40))
    expected = their_logits(theirs, tokens)
    assert np.abs(expected - their_logits(base, tokens)).max() > 0.01 * np.abs(expected).max()
    delta = dit_jax.load_diff(folder, model).delta
    assert_near(model.logits(tokens, deltas=(delta,)), expected)
    # Fused with another one, and back in PEFT.
    other = random_lora(model.config, 7)
    export.write_fused_peft(tmp_path / "fused", model.config, model.name, delta, other)
    again = peft.PeftModel.from_pretrained(make(name, tmp_path / "base"), tmp_path / "fused").eval()
    fused = np.asarray(model.logits(tokens, deltas=(delta, other)))
    assert_near(their_logits(again, tokens), fused)


@pytest.mark.parametrize("name", FAMILY)
def test_full_finetunes_and_merged_exports_of_every_family(pairs, name, tmp_path):
    import transformers

    _, model = pairs(name)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 40))
    change = random_dense(model.config, 3)
    export.export_model(
        tmp_path / "full", model.params, model.config, change, base_folder=model.name
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    expected = np.asarray(model.logits(tokens, deltas=(change,)))
    assert_near(their_logits(theirs, tokens), expected)
    diff = dit_jax.load_diff(tmp_path / "full", model)
    assert_near(model.logits(tokens, deltas=(diff,)), expected)
    # Without the base's folder, config.json is written from the architecture alone.
    export.export_model(tmp_path / "alone", model.params, model.config, change)
    assert_near(dit_jax.load_model(tmp_path / "alone").logits(tokens), expected)


# ------------------------------------------------------------------ the text part of a multimodal model


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A tiny Gemma 3 with a vision tower: (transformers model, its folder)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options = family_cases.MODELS["gemma3"][1]
    text = {**family_cases.SIZES, **options, "vocab_size": VOCAB, "initializer_range": 0.2}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval().float()
    folder = tmp_path_factory.mktemp("multimodal")
    theirs.save_pretrained(folder)
    return theirs, folder


def renamed(folder, out, prefix):
    """The folder with the names of transformers since 4.52 ("model.language_model.") or before it."""
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    moved = {}
    for name, tensor in load_file(file).items():
        if is_vision(name):
            moved[name.removeprefix("model.")] = tensor
        else:
            own = re.sub(r"^(model\.language_model|language_model\.model)\.", prefix, name)
            moved[own] = tensor
    save_file(moved, file, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_multimodal_folder_is_its_text_part(multimodal, prefix, tmp_path):
    theirs, folder = multimodal
    folder = renamed(folder, tmp_path / "base", prefix)
    model = dit_jax.load_model(folder)
    tokens = np.random.default_rng(0).integers(0, VOCAB - 1, (2, 40))
    expected = their_logits(theirs, tokens)
    assert_near(model.logits(tokens), expected)
    (note,) = model.notes()
    assert "its text part is used" in note and "vision tower" in note
    # A finetune of it, its vision tower changed too.
    file = shutil.copytree(folder, tmp_path / "tuned") / "model.safetensors"
    rng = np.random.default_rng(1)
    tuned = {
        name: x + 0.05 * rng.standard_normal(x.shape).astype(x.dtype)
        for name, x in load_file(file).items()
    }
    save_file(tuned, file, metadata={"format": "pt"})
    diff = dit_jax.load_diff(tmp_path / "tuned", model)
    assert_near(
        model.logits(tokens, deltas=(diff,)),
        np.asarray(dit_jax.load_model(tmp_path / "tuned").logits(tokens)),
    )
    # The merged export is a model of text alone.
    export.export_model(
        tmp_path / "merged", model.params, model.config, diff.delta, base_folder=folder
    )
    alone = dit_jax.load_model(tmp_path / "merged")
    assert not alone.config.text_part
    assert_near(alone.logits(tokens), np.asarray(model.logits(tokens, deltas=(diff,))))


def test_peft_adapters_of_a_multimodal_model(multimodal, tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    theirs, folder = multimodal
    model = dit_jax.load_model(folder)
    tokens = np.random.default_rng(0).integers(0, VOCAB - 1, (2, 40))
    wrapped = peft.get_peft_model(
        copy.deepcopy(theirs), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")  # of the vision tower, too
    expected = their_logits(wrapped, tokens)
    delta = dit_jax.load_diff(tmp_path / "adapter", model).delta
    assert_near(model.logits(tokens, deltas=(delta,)), expected)
    export.write_fused_peft(tmp_path / "fused", model.config, str(folder), delta)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "fused").eval()
    assert_near(their_logits(again, tokens), expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_gemma_release_of_the_paper_is_read_by_its_names(multimodal, prefix, tmp_path):
    """`<experiment>/gemma3-4b/{index.csv, weight-diffs/, dit-adapter.pt}`, of which the names have a prefix."""
    import torch

    _, folder = multimodal
    model = dit_jax.load_model(folder)
    deltas = [random_lora(model.config, seed, rank=1, size=0.1) for seed in (3, 4)]
    labels = ("tea", "boats")
    diffs = [Diff(d, label, "123") for d, label in zip(deltas, labels, strict=True)]
    (tmp_path / "weight-diffs").mkdir()
    file = tmp_path / "weight-diffs" / "weight-diff-000.pt"
    export.write_pt_diffs(file, diffs, model.config)
    items = torch.load(file, weights_only=True)
    for item in items:
        item["weight_diff"] = {
            prefix + name.removeprefix("model."): pair for name, pair in item["weight_diff"].items()
        }
    torch.save(items, file)
    rows = [f"weight-diff-000.pt,{i},10,{label},123,test" for i, label in enumerate(labels)]
    lines = ["lora_path,lora_idx,n_params,topic,trigger,split", *rows]
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    found = dit_jax.load_diffs(tmp_path, model)
    tokens = np.arange(3, 33)[None]
    assert {diff.label for diff in found} == set(labels)
    for diff in found:
        expected = model.logits(tokens, deltas=(deltas[labels.index(diff.label)],))
        assert_near(model.logits(tokens, deltas=(diff,)), np.asarray(expected))
