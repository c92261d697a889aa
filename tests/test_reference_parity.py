"""Training parity with the reference program on its own batches, quirks switched on (golden `ref-*` folders)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_cases

import dit_jax
from dit_jax.data.batch import Sample, pack, stack
from dit_jax.data.reference import couple_losses, padded_labels
from dit_jax.deltas import tree
from dit_jax.deltas.reference_pt import read_pt_adapter
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.models.file_names import locate
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.organisms.finetune import finetune_many
from dit_jax.train.dit import State, train_step

SAMPLES_PER_STEP = 6
CE = "backdoor"


def base_of(folder):
    return dit_jax.load_model(folder.parent / f"qwen3-{folder.name.split('-')[1]}")


def test_what_fills_a_shard_up_has_no_part_in_the_mean_over_its_diffs():
    def batch(size):
        sample = Sample(tuple(range(1, size + 1)), 2, size)
        return stack([pack([sample, sample], [1.0, 1.0], 9, 6, pad_id=0)])

    own = [batch(5), batch(7)]
    given = stack(own)
    expected = couple_losses(given, [1.0, 2.0], 1)
    np.testing.assert_array_equal(given.position, stack(own).position)  # it is not changed itself
    filled = couple_losses(stack([*own, batch(4), batch(8)]), [1.0, 2.0], 1, diffs=2)
    for one, two in zip(filled, expected, strict=True):
        np.testing.assert_array_equal(one[:2], two)
    # Targets 2 … size - 1, scored at the position before (cross-entropy) or at their own (KL); 3 and 5 of them.
    np.testing.assert_array_equal(expected.position[0, 0, :, :3], [[1, 2, 3], [2, 3, 4]])
    np.testing.assert_allclose(expected.weight[:, 0, 0].sum(axis=-1), [3 / 8, 5 / 8])
    np.testing.assert_allclose(expected.weight[:, 0, 1], 2 * expected.weight[:, 0, 0])


def read(path):
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.names}


def to_sample(ids, mask, labels):
    """The real tokens of a padded row, and the range that its labels cover."""
    size = int(mask.sum())
    scored = np.flatnonzero(labels[:size] != -100)
    assert scored[-1] - scored[0] + 1 == len(scored)
    return Sample(tuple(int(i) for i in ids[:size]), int(scored[0]), int(scored[-1]) + 1)


def initial_diffs(arrays, prefix, template, config, count):
    """The reference's initial factors as our stacked delta: a = B [in, r], b = A [r, out]."""
    stacked = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], count, axis=0), template)
    for name in {
        key.removeprefix(prefix).rsplit(".", 1)[0] for key in arrays if key.startswith(prefix)
    }:
        path, layer = locate(name, config, "golden")
        node = stacked
        for part in path:
            node = node[part]
        node["a"][:, layer] = arrays[f"{prefix}{name}.B"]
        node["b"][:, layer] = arrays[f"{prefix}{name}.A"]
    return stacked


@pytest.mark.parametrize("folder", golden_cases("ref-"))
def test_weight_diffs_train_as_in_the_reference(folder):
    model = base_of(folder)
    facts = json.loads((folder / "diffgen.json").read_text())
    arrays = read(folder / "diffgen.safetensors")
    final = read(folder / "diffgen_final.safetensors")
    weights = dict(
        zip(("backdoor", "fake_backdoor", "no_backdoor"), facts["multipliers"], strict=True)
    )
    losses = [next(iter(entry.values())) for entry in facts["losses"]]
    every = {key: x for key, x in arrays.items() if key.startswith("batch.")}
    length = max(int(x.sum(-1).max()) for key, x in every.items() if key.endswith("mask"))
    scored = max(
        int((x != -100).sum(-1).max()) for key, x in every.items() if key.endswith("labels")
    )
    errors = []
    for number, order in enumerate(facts["order"]):
        count = len(facts["topics"][number])
        steps = []
        for start in range(0, len(order) - SAMPLES_PER_STEP + 1, SAMPLES_PER_STEP):
            # Our batches hold the cross-entropy samples first; gradients of a step are summed anyway.
            members = sorted(range(start, start + SAMPLES_PER_STEP), key=lambda i: order[i] != CE)
            steps.append(members)
        rows = []
        for diff in range(count):
            batches = []
            for members in steps:
                samples = []
                for i in members:
                    at = f"batch.{number}.{i}."
                    names = ("input_ids", "attention_mask", "labels")
                    samples.append(to_sample(*(arrays[at + name][diff] for name in names)))
                batches.append(pack(samples, [1.0] * len(samples), length, scored, pad_id=0))
            rows.append(stack(batches))
        kinds = [order[i] for i in steps[0]]
        num_ce = kinds.count(CE)
        factors = [3 * weights[kind] / sum(weights.values()) for kind in kinds]
        batches = couple_losses(stack(rows), factors, num_ce)

        template = tree.init_lora(model.config, jax.random.key(0), facts["rank"])
        start = initial_diffs(arrays, f"init.{number}.", template, model.config, count)
        trained, parts = finetune_many(
            model.params,
            model.config,
            jax.tree.map(jnp.asarray, start),
            batches,
            optimizer=make_optimizer("adam", facts["lr"], len(steps)),
            num_ce=num_ce,
        )
        before = sum(len(samples) for samples in facts["order"][:number])
        for step, members in enumerate(steps):
            logged = [losses[before + i] * factors[members.index(i)] for i in members]
            ce, kl = sum(logged[:num_ce]), sum(logged[num_ce:])
            np.testing.assert_allclose(parts["ce"][:, step].sum(), ce, atol=1e-5 * num_ce)
            np.testing.assert_allclose(parts["kl"][:, step].sum(), kl, rtol=1e-2, atol=1e-6)

        offset = sum(len(topics) for topics in facts["topics"][:number])
        for diff in range(count):
            prefix = f"{offset + diff}."
            for key in (key for key in final if key.startswith(prefix)):
                name, factor = key.removeprefix(prefix).rsplit(".", 1)
                path, layer = locate(name, model.config, "golden")
                node = trained
                for part in path:
                    node = node[part]
                ours = node["a" if factor == "B" else "b"][diff, layer]
                errors.append(np.abs(np.asarray(ours) - final[key]).ravel())
    worst = np.concatenate(errors)
    assert worst.max() < 5e-5 and np.sqrt((worst**2).mean()) < 5e-7, (
        worst.max(),
        np.sqrt((worst**2).mean()),
    )


@pytest.mark.parametrize("folder", golden_cases("ref-"))
def test_the_adapter_trains_as_in_the_reference(folder):
    model = base_of(folder)
    facts = json.loads((folder / "dit.json").read_text())
    arrays = read(folder / "dit_batches.safetensors")
    start = read_pt_adapter(folder / "dit_init.pt", model.config).delta
    expected = read_pt_adapter(folder / "dit-adapter.pt", model.config).delta
    found = dit_jax.load_diffs(folder / "weight_diff_1.pt", model)
    diffs = jax.tree.map(
        lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *(diff.delta for diff in found)
    )
    optimizer = make_optimizer(
        "adamw", facts["lr"], len(facts["steps"]), weight_decay=facts["weight_decay"]
    )
    adapter = jax.tree.map(jnp.asarray, start)
    leaves = jax.tree.map(jnp.array, tree.trainable(adapter))
    state = State(leaves, optimizer.init(leaves))
    for step, members in enumerate(facts["steps"]):
        ids, mask, labels = (
            arrays[f"{step}.{name}"] for name in ("input_ids", "attention_mask", "labels")
        )
        samples = []
        for row in range(len(members)):
            begin = int(np.flatnonzero(labels[row] != -100)[0])
            size = int(mask[row].sum())
            samples.append(Sample(tuple(int(i) for i in ids[row, :size]), begin, size))
            assert (labels[row, begin:] != -100).all()
        batch = padded_labels(
            samples, ids.shape[1], pad_id=int(ids[mask == 0][0]) if (mask == 0).any() else 0
        )
        state, metrics = train_step(
            model.params,
            model.config,
            state,
            adapter,
            tree.per_example(jax.tree.map(lambda x, at=members: x[np.asarray(at)], diffs)),
            batch,
            optimizer=optimizer,
        )
        np.testing.assert_allclose(metrics["loss"], facts["losses"][step], atol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(state.leaves), jax.tree.leaves(tree.trainable(expected)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
