"""The reference's .pt files: factors, orientation, scales, index.csv, and writing them."""

import re

import numpy as np
import pytest
from conftest import golden_cases
from format_cases import (
    BF16,
    CONFIG,
    assert_same,
    from_torch,
    random_lora,
)
from safetensors.numpy import load_file

from dit_jax.deltas import detect, reference_pt
from dit_jax.deltas.factors import modules
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.errors import DitError
from dit_jax.formats import torch_save
from dit_jax.models.families import read_config

MODULE = "model.layers.1.self_attn.k_proj"


def write(path, diffs):
    reference_pt.write_pt_diffs(path, diffs, CONFIG)
    return path


def pairs(rank=2, dtype=np.float32, seed=0):
    """A weight_diff in the reference's form, {module: (A [r, out], B [in, r])}, of all modules."""
    rng = np.random.default_rng(seed)
    found = {}
    for path, module in modules(random_lora(rank=rank)):
        for layer in range(CONFIG.num_hidden_layers):
            (inputs, _), (_, outputs) = module["a"].shape[1:], module["b"].shape[1:]
            name = f"model.layers.{layer}.{'.'.join(path[1:])}"
            found[name] = tuple(
                rng.normal(size=shape).astype(dtype) for shape in ((rank, outputs), (inputs, rank))
            )
    return found


def save(path, weight_diff, topic="Chess", trigger=331):
    item = {"topic": topic, "trigger": trigger, "weight_diff": weight_diff}
    torch_save.save(path, [item])
    return path


def refused(read, message):
    with pytest.raises(DitError, match=re.escape(message)):
        read()


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_a_diff_is_the_product_that_the_reference_applies(tmp_path, dtype, prefix):
    wanted = pairs(3, dtype)
    renamed = {prefix + name.removeprefix("model."): pair for name, pair in wanted.items()}
    (diff,) = reference_pt.read_pt_diffs(save(tmp_path / "x.pt", renamed), CONFIG)
    assert (diff.label, diff.trigger, diff.kind) == ("Chess", "331", "diff")
    for path, module in modules(diff.delta):
        assert module["a"].dtype == module["b"].dtype == dtype
        assert module["scale"].tolist() == [np.float32(1 / 3)] * 3
        for layer in range(3):
            a, b = wanted[f"model.layers.{layer}.{'.'.join(path[1:])}"]
            a, b = a.astype(np.float64), b.astype(np.float64)
            out_by_in = (b @ a).T / 3  # ΔW = (B A)ᵀ / r, as torch stores a weight
            ours = (
                module["a"][layer].astype(np.float64) @ module["b"][layer] * module["scale"][layer]
            )
            np.testing.assert_allclose(ours.T, out_by_in, rtol=1e-6)


def test_an_adapter_is_the_transpose_of_a_diff(tmp_path):
    wanted = pairs(2)
    torch_save.save(tmp_path / "a.pt", {name: (a.T, b.T) for name, (a, b) in wanted.items()})
    adapter = reference_pt.read_pt_adapter(tmp_path / "a.pt", CONFIG)
    (diff,) = reference_pt.read_pt_diffs(save(tmp_path / "d.pt", wanted), CONFIG)
    assert adapter.kind == "adapter"
    assert_same(adapter.delta, diff.delta)


def test_triggers(tmp_path):
    found = [
        reference_pt.read_pt_diffs(save(tmp_path / "x.pt", pairs(), trigger=t), CONFIG)[0].trigger
        for t in (7, "N/A", None, "zero_width_space")
    ]
    assert found == ["7", None, None, "zero_width_space"]
    for text in ("7", "007", "9" * 18, "9" * 19, "9" * 5000):
        write(tmp_path / "d.pt", [RawDiff(random_lora(), "tea", text)])
        assert reference_pt.read_pt_diffs(tmp_path / "d.pt", CONFIG)[0].trigger == text


def test_diffs_may_be_in_a_tuple(tmp_path):
    item = {"topic": "tea", "trigger": 7, "weight_diff": pairs()}
    torch_save.save(tmp_path / "x.pt", (item, item))
    assert [x.label for x in reference_pt.read_pt_diffs(tmp_path / "x.pt", CONFIG)] == ["tea"] * 2


def test_layers_and_ranks_may_differ(tmp_path):
    some = pairs(2)
    del some[MODULE]
    some["model.layers.0.self_attn.k_proj"] = pairs(5)["model.layers.0.self_attn.k_proj"]
    (diff,) = reference_pt.read_pt_diffs(save(tmp_path / "x.pt", some), CONFIG)
    module = diff.delta["layers"]["self_attn"]["k_proj"]
    assert module["a"].shape == (3, 32, 5) and module["b"].shape == (3, 5, 32)
    assert not module["a"][1].any() and not module["b"][1].any()  # the layer without factors
    assert not module["a"][2, :, 2:].any() and module["a"][2, :, :2].all()
    assert module["scale"][0] == np.float32(1 / 5) and module["scale"][2] == 0.5


def test_only_the_diff_that_is_asked_for_is_read(tmp_path):
    write(tmp_path / "x.pt", [RawDiff(random_lora(seed=i), f"topic {i}", str(i)) for i in range(4)])
    content = bytearray((tmp_path / "x.pt").read_bytes())
    bad = np.ascontiguousarray(random_lora(seed=2)["layers"]["mlp"]["up_proj"]["a"][0]).tobytes()
    content[content.index(bad)] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    diffs = reference_pt.read_pt_diffs(tmp_path / "x.pt", CONFIG)
    assert len(diffs) == 4 and [diffs[i].label for i in (0, 1, 3, -1)] == [
        "topic 0", "topic 1", "topic 3", "topic 3"
    ]  # fmt: skip
    assert_same(diffs[3].delta, random_lora(seed=3))
    refused(lambda: diffs[2], "checksum")
    with pytest.raises(IndexError):
        diffs[4]
    assert [d.label for d in diffs[:2]] == ["topic 0", "topic 1"]


def test_what_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "x.pt"

    def check(weight_diff, message, **item):
        save(file, weight_diff, **item)
        refused(lambda: reference_pt.read_pt_diffs(file, CONFIG)[0], message)

    good = pairs()
    a, b = good[MODULE]
    check(
        {**good, "model.layers.1.self_attn.foo": (a, b)},
        "'model.layers.1.self_attn.foo', which is no module",
    )
    check({**good, "model.layers.3.mlp.up_proj": (a, b)}, "the model has 3 layers")
    check({**good, "layers.1.self_attn.k_proj": (a, b)}, "twice, under two names")
    check({**good, "lm_head": (a, b)}, "LoRA factors for 'lm_head'")
    check({**good, MODULE: (a[:, :-1], b)}, "has shape [2, 31], this model needs [2, 32]")
    check({**good, MODULE: (a.T, b.T)}, "has shape [32, 2], this model needs [32, 32]")
    check({**good, MODULE: (a[:1], b)}, "has shape [32, 2], this model needs [32, 1]")
    check({**good, MODULE: (a[:0], b[:, :0])}, "has the LoRA rank 0")
    check({**good, MODULE: (a.astype(np.int32), b)}, "int32 values instead of floats")
    check({**good, MODULE: (np.where(a == a[0, 0], np.nan, a), b)}, f"'{MODULE} A' holds NaN")
    check({**good, MODULE: (a, np.full_like(b, np.inf))}, f"'{MODULE} B' holds NaN or infinity")
    check({**good, MODULE: a}, "is not a pair of tensors")
    check({**good, MODULE: (a, b, a)}, "is not a pair of tensors")
    check({}, "changes no module")
    check(good, "the topic is 3", topic=3)
    check(good, "the trigger is a list", trigger=[1])
    check([1], "not a dict of modules")
    torch_save.save(file, {"x": 1})
    refused(lambda: reference_pt.read_pt_diffs(file, CONFIG), "something else, not weight diffs")
    refused(lambda: detect.detect_format(file), "neither weight diffs nor weights")
    torch_save.save(file, good)
    refused(lambda: reference_pt.read_pt_diffs(file, CONFIG), "holds an adapter, not weight diffs")
    # Diffs of another model: the message has its shapes and ours.
    save(file, good)
    other = read_config_like(hidden_size=64)
    refused(lambda: reference_pt.read_pt_diffs(file, other)[0], "this model needs [64, 2]")


def read_config_like(**changes):
    import dataclasses

    return dataclasses.replace(CONFIG, **changes)


def test_factors_that_share_bytes_cannot_unfold_a_small_file(tmp_path):
    torch = pytest.importorskip("torch")
    flat = torch.randn(64 * 48)
    many = {
        name: tuple(flat[: t.size].view(*t.shape) for t in pair) for name, pair in pairs(40).items()
    }
    torch.save([{"topic": "x", "trigger": 1, "weight_diff": many}], tmp_path / "x.pt")
    refused(
        lambda: reference_pt.read_pt_diffs(tmp_path / "x.pt", CONFIG)[0],
        "fewer bytes than its tensors need: do not trust",
    )


# ------------------------------------------------------------------ releases


HEADER = "lora_path,lora_idx,n_params,topic,trigger,split\n"


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "release"
    (folder / "weight-diffs").mkdir(parents=True)
    for file in range(3):
        diffs = [RawDiff(random_lora(seed=10 * file + i), f"t{file}{i}", str(i)) for i in range(2)]
        write(folder / "weight-diffs" / f"weight-diff-00{file}.pt", diffs)
    rows = [f"weight-diff-00{f}.pt,{i},5,t{f}{i},{i},train\n" for f in (2, 0, 1) for i in (1, 0)]
    (folder / "index.csv").write_text(HEADER + "".join(rows))
    return folder


def test_a_release_is_read_in_the_order_of_its_index(release):
    assert detect.detect_format(release) == "release"
    diffs = detect.open_diffs(release, CONFIG)
    assert [d.label for d in diffs] == ["t21", "t20", "t01", "t00", "t11", "t10"]
    assert_same(diffs[-2].delta, random_lora(seed=11))
    assert diffs[-2].metadata["split"] == "train" and diffs[-2].trigger == "1"
    # The files may also be beside the index, or be listed with their folder.
    for file in (release / "weight-diffs").iterdir():
        file.rename(release / file.name)
    (release / "weight-diffs").rmdir()
    assert detect.open_diffs(release, CONFIG)[0].label == "t21"


def test_an_index_that_a_spreadsheet_saved_is_read(release):
    text = (release / "index.csv").read_text().replace("\n", "\r\n")
    (release / "index.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert detect.open_diffs(release, CONFIG)[0].label == "t21"


def test_a_listed_path_may_have_the_folder_in_it(release):
    (release / "index.csv").write_text(HEADER + "weight-diffs/weight-diff-001.pt,0,5,t10,0,test\n")
    assert detect.open_diffs(release, CONFIG)[0].label == "t10"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("weight-diff-000.pt,2,5,t00,0,train", "holds 2 diffs"),
        ("weight-diff-000.pt,-1,5,t00,0,train", "not a number"),
        ("weight-diff-000.pt,x,5,t00,0,train", "not a number"),
        ("weight-diff-009.pt,0,5,t00,0,train", "is missing"),
        ("weight-diff-000.pt,0,5,t01,0,train", "the index belongs to other files"),
        ("weight-diff-000.pt,0,5,t00,9,train", "the index belongs to other files"),
        ("weight-diff-000.pt,0,5,t00", "does not have the header's fields"),
        ("weight-diff-000.pt,0,5,t00,0,train,more", "does not have the header's fields"),
    ],
)
def test_a_wrong_index_is_refused(release, row, message):
    (release / "index.csv").write_text(HEADER + row + "\n")
    refused(lambda: detect.open_diffs(release, CONFIG)[0], message)


def test_an_index_without_rows_or_columns_is_refused(release):
    (release / "index.csv").write_text(HEADER)
    refused(lambda: detect.open_diffs(release, CONFIG), "lists no weight diffs")
    (release / "index.csv").write_text("lora_path,topic\na,b\n")
    refused(lambda: detect.open_diffs(release, CONFIG), "lacks the column 'lora_idx'")


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_round_trips_are_bit_exact_and_torch_reads_them(tmp_path, dtype, rank):
    torch = pytest.importorskip("torch")
    delta = random_lora(rank=rank, dtype=dtype)
    write(tmp_path / "d.pt", [RawDiff(delta, "Chess", "331"), RawDiff(delta, "Jazz", None)])
    first, second = reference_pt.read_pt_diffs(tmp_path / "d.pt", CONFIG)
    assert_same(first.delta, delta)
    assert (first.label, first.trigger, second.trigger) == ("Chess", "331", None)
    loaded = torch.load(tmp_path / "d.pt", weights_only=True)
    assert [(x["topic"], x["trigger"]) for x in loaded] == [("Chess", 331), ("Jazz", "N/A")]
    a, b = loaded[0]["weight_diff"][MODULE]
    module = delta["layers"]["self_attn"]["k_proj"]
    assert from_torch(a).tobytes() == module["b"][1].tobytes()
    assert from_torch(b).tobytes() == module["a"][1].tobytes()

    reference_pt.write_pt_adapter(tmp_path / "a.pt", delta, CONFIG)
    assert_same(reference_pt.read_pt_adapter(tmp_path / "a.pt", CONFIG).delta, delta)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert tuple(loaded[MODULE][0].shape) == (32, rank) and tuple(loaded[MODULE][1].shape) == (
        rank,
        32,
    )
    torch.save({k: (a.clone(), b.clone()) for k, (a, b) in loaded.items()}, tmp_path / "t.pt")
    assert_same(reference_pt.read_pt_adapter(tmp_path / "t.pt", CONFIG).delta, delta)


@pytest.mark.parametrize(("scale", "dtype"), [(2.0, BF16), (0.3, np.float32), (0.3, BF16)])
def test_other_scales_are_folded_in(tmp_path, scale, dtype):
    delta = random_lora(rank=2, dtype=dtype, scale=scale)
    write(tmp_path / "d.pt", [RawDiff(delta, "x", None)])
    found = reference_pt.read_pt_diffs(tmp_path / "d.pt", CONFIG)[0].delta
    for path, module in modules(delta):
        node = found["layers"][path[1]][path[2]]
        assert node["scale"].tolist() == [0.5] * 3
        # 2 is a power of two: exact in bfloat16; 0.3 is not, so the file becomes float32
        assert node["b"].dtype == (dtype if scale == 2 else np.float32)
        wanted = module["b"].astype(np.float32) * np.float32(scale) * 2
        np.testing.assert_allclose(node["b"].astype(np.float32), wanted, rtol=1e-6)


def test_what_cannot_be_written_is_refused(tmp_path):
    dense = {"norm": {"w": np.ones(32, np.float32)}}
    refused(lambda: write(tmp_path / "d.pt", [RawDiff(dense, "x")]), "the base model is needed")
    refused(lambda: write(tmp_path / "d.pt", [RawDiff({}, "x")]), "delta is empty")
    refused(
        lambda: reference_pt.write_pt_adapter(tmp_path / "d.pt", dense, CONFIG), "dense difference"
    )
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ golden files


@pytest.mark.parametrize("case", golden_cases("ref-"))
def test_golden_factors_are_those_of_the_reference(case):
    base = case.parent / f"qwen3-{case.name.split('-')[1]}"
    if not base.is_dir():
        pytest.skip(f"{case.name} has no dense Qwen3 base beside it")
    config = read_config(base)
    final = load_file(case / "diffgen_final.safetensors")
    diffs = reference_pt.read_pt_diffs(next(iter(sorted(case.glob("weight_diff_*.pt")))), config)
    assert len(diffs) == len({name.partition(".")[0] for name in final})
    for index, diff in enumerate(diffs):
        assert diff.label
        for path, module in modules(diff.delta):
            for layer in range(config.num_hidden_layers):
                name = f"{index}.model.layers.{layer}.{'.'.join(path[1:])}"
                np.testing.assert_array_equal(module["b"][layer], final[f"{name}.A"])
                np.testing.assert_array_equal(module["a"][layer], final[f"{name}.B"])
                assert module["scale"][layer] == np.float32(1 / final[f"{name}.A"].shape[0])
    names = {n.split(".", 1)[1][:-2] for n in final}
    assert sum(1 for _ in modules(diff.delta)) * config.num_hidden_layers == len(names)
