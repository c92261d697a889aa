"""Several diff stores for one adapter: shares, questions, labels, one layout of all diffs, and what is refused."""

import collections

import jax
import numpy as np
import pytest
from format_cases import CONFIG, random_lora

from dit_jax.config.loading import load_config
from dit_jax.data.labels import NONE
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.factors import modules
from dit_jax.errors import DitError
from dit_jax.train.examples import make_pipeline
from dit_jax.train.mixture import (
    NO_DIFF,
    diff_reader,
    digest_of,
    members_of,
    open_parts,
    trained_on,
)
from dit_jax.train.variation import vary


def change(module, *at):
    """scale * a b of one module, dense."""
    if "w" in module:
        return module["w"]
    return np.einsum(
        "lir,lro,l->lio", *(np.asarray(module[name][at]) for name in ("a", "b", "scale"))
    )


def dense(delta):
    return {path: change(module) for path, module in modules(delta)}


def write(folder, deltas, topics, **made):
    """A store: topics with a "-" are held out, `NONE` is benign."""
    rows = [
        {
            "n_params": 1, "topic": topic, "label": topic, "trigger": f"{i:03d}",
            "evidence": "[]" if topic == NONE else '["x", "y"]',
            "split": "test" if topic.startswith("-") else "train",
            "category": "benign" if topic == NONE else "topic",
        }
        for i, topic in enumerate(topics)
    ]  # fmt: skip
    diff_store.write_shard(folder, 0, jax.tree.map(lambda *xs: np.stack(xs), *deltas), rows)
    diff_store.publish(folder, 1, base="0", config={"diffs": made})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three stores: LoRAs of rank 1; of rank 3 on two projections; dense ones of all layers and a norm."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mixed").mkdir()  # the workdir of the runs, which other paths start from
    lora = {"parameters": "lora"}
    write(
        folder / "one/diffs", [random_lora(seed=i, rank=1) for i in range(4)], ["tea", "jazz", "-ice", NONE],
        behaviour="hidden_topic", rank=1, **lora,
    )  # fmt: skip
    some = [random_lora(seed=i, rank=3, projections=("q_proj", "up_proj")) for i in range(4, 7)]
    write(folder / "two/diffs", some, ["tea", "rain", "-ice"], behaviour="news", rank=3, **lora)
    full = []
    for seed in (8, 9):
        delta = {"norm": {"w": np.ones(CONFIG.hidden_size, np.float32)}, "layers": {}}
        for path, module in modules(random_lora(seed=seed, rank=2)):
            delta["layers"].setdefault(path[1], {})[path[2]] = {"w": change(module).astype("f")}
        full.append(delta)
    write(folder / "full/diffs", full, ["tea", "-ice"], behaviour="hidden_topic", parameters="all")
    return folder


def settings(**stores):
    config = load_config("configs/quickstart.py").copy_and_resolve_references().unlock()
    config.train.update({"batch_size": 12, "no_diff_per_batch": 2, "benign_per_batch": 1})
    config.train.stores = stores
    return config.train


def store(name, **more):
    return {"path": f"../{name}/diffs", **more}


def test_stores_share_the_examples_and_each_is_asked_in_its_own_way(runs):
    train = settings(
        one=store("one"),
        two=store("two", share=2, questions=("Which code?",), label="trigger", list_evidence=False),
        full=store("full", share=0),
    )
    parts = open_parts(runs / "no/diffs", train, runs / "mixed")
    members = members_of(parts)
    batches = make_pipeline(parts, train, 3)
    examples = [example for i in range(12) for example in batches[i]]
    assert examples == [e for i in range(12) for e in make_pipeline(parts, train, 3)[i]]
    counts = collections.Counter()
    for example in examples:
        asked = "two" if example.question == "Which code?" else "one"
        if example.diff == NO_DIFF:
            counts[f"nothing {asked}"] += 1
            assert example.answer == NONE
            continue
        part, index = members[example.diff]
        row = part.store.rows[index]
        assert part.store.path == runs / "mixed" / f"../{asked}/diffs" and row["split"] == "train"
        counts[f"{row['category']} {asked}"] += 1
        wanted = {"one": ("x y: " + row["topic"], "y x: " + row["topic"]), "two": (row["trigger"],)}
        assert example.answer in ((NONE,) if row["topic"] == NONE else wanted[asked])
    # Nine topics, two without a diff and one benign in each batch; `two` has no benign diffs.
    expected = {
        "topic one": 36,
        "topic two": 72,
        "nothing one": 8,
        "nothing two": 16,
        "benign one": 12,
    }
    assert counts.keys() == expected.keys()
    for name, count in expected.items():
        assert abs(counts[name] - count) <= 2, counts
    told = trained_on(parts, train)
    assert told == {
        "behaviour": "hidden_topic, news", "parameters": "lora", "rank": None, "label": None,
        "list_evidence": False, "none_examples": 3 / 12,
    }  # fmt: skip
    alone = open_parts(runs / "one/diffs", settings(), runs)
    assert digest_of(alone) not in (None, digest_of(parts)) and digest_of(parts) is not None


def test_diffs_of_several_kinds_get_one_layout_and_keep_their_values(runs):
    train = settings(one=store("one"), two=store("two"), full=store("full", svd_rank=2))
    members = members_of(open_parts(runs / "no", train, runs / "mixed"))
    assert len(members) == 6
    for most_bytes in (2**31, 0):  # read once, and by each batch
        read = diff_reader(members, CONFIG, most_bytes)
        layouts = set()
        for asked in ([0, NO_DIFF, 5], [NO_DIFF], [4, 4, 2, 1]):
            given = read(asked)
            layouts.add(str(jax.tree.map(lambda x: x.shape[1:], given)))
            for row, diff in enumerate(asked):
                part, index = (None, 0) if diff == NO_DIFF else members[diff]
                wanted = dense(part.store.read(index)) if part else {}
                for path, module in modules(given):
                    found = change(module, row)
                    np.testing.assert_allclose(found, wanted.get(path, 0 * found), atol=1e-5)
        assert len(layouts) == 1


@pytest.mark.parametrize(
    ("stores", "said"),
    [
        ({"full": store("full")}, "an adapter cannot be trained on diffs that change 'norm'.*svd_rank"),
        ({"full": store("full", svd_rank=99)}, "rank of the SVD must be from 1 to 32, not 99"),
        ({"leak": store("leak"), "one": store("one")}, "has 'ice' for training, and .* holds it out"),
        ({"gone": store("gone")}, "gone"),
    ],
)  # fmt: skip
def test_stores_that_cannot_be_trained_on_together_are_refused(runs, stores, said):
    if not (runs / "leak").exists():
        write(runs / "leak/diffs", [random_lora(rank=1)], ["ice"])
    with pytest.raises(DitError, match=said):
        members = members_of(open_parts(runs / "no", settings(**stores), runs / "mixed"))
        diff_reader(members, CONFIG)


def test_varied_diffs_are_the_diffs_times_numbers_of_their_own():
    """Each layer is multiplied as a whole, but for projections that are left out; LoRAs and dense diffs alike."""
    train = {"vary_size": 0.5, "vary_layers": 0.3, "drop_share": 0.25}
    seeds = [11, 2**32 - 1, 11]
    stacked = jax.tree.map(lambda *x: np.stack(x), *(random_lora(seed=i) for i in range(3)))
    varied = dict(modules(vary(stacked, seeds, train)))
    factors = []
    for path, module in modules(stacked):
        factors.append(np.asarray(varied[path]["scale"]) / np.asarray(module["scale"]))
        np.testing.assert_array_equal(varied[path]["a"], module["a"])
        np.testing.assert_array_equal(varied[path]["b"], module["b"])
    of_layer = np.moveaxis(np.stack(factors), 0, -1)  # [n, L, projections]
    np.testing.assert_array_equal(of_layer[0], of_layer[2])  # the seed alone decides
    assert 0.1 < np.mean(of_layer == 0) < 0.4
    largest = of_layer.max(axis=-1, keepdims=True)
    assert np.all((of_layer == 0) | np.isclose(of_layer, largest))
    assert (
        len(np.unique(largest[:2].round(5))) == largest[:2].size
    )  # of each diff and layer another one
    alone = vary(jax.tree.map(lambda x: x[1:2], stacked), seeds[1:2], train)
    for path, module in modules(alone):
        np.testing.assert_array_equal(module["scale"][0], varied[path]["scale"][1])

    whole = {path: {"w": np.ones((3, 2, 4, 5), np.float32)} for path in ("up_proj", "down_proj")}
    for module in vary({"layers": whole}, seeds, train)["layers"].values():
        assert module["w"].shape == (3, 2, 4, 5)
        np.testing.assert_array_equal(module["w"], module["w"][..., :1, :1] * whole["up_proj"]["w"])
    assert vary(stacked, seeds, {}) is stacked
