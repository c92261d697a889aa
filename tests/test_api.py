"""The Python interface: loading, the kinds of diffs that it accepts, and mistakes that give one line."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_qwen3 import random_lora

import dit_jax
from dit_jax import asking
from dit_jax.deltas import export
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.diff_batches import together
from dit_jax.evaluate import baselines
from dit_jax.models import shardings
from dit_jax.models.decode import generate
from dit_jax.models.delta_trees import nbytes
from dit_jax.models.hf_checkpoint import find_folder


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


@pytest.fixture(scope="module")
def lora(model):
    return jax.tree.map(np.asarray, random_lora(model.config, 1, size=2.0))


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", ["tiny_qwen3", "random:qwen3-0.6b"])
def test_only_ways_to_compute_are_options_of_load_model(name):
    with pytest.raises(dit_jax.DitError, match="no option 'rope_theta': how to compute is said by"):
        dit_jax.load_model(name, rope_theta=2.0)
    with pytest.raises(dit_jax.DitError, match="'scan_layer': did you mean 'scan_layers'"):
        dit_jax.load_model(name, scan_layer=False)


def test_a_tilde_is_the_home_folder_in_every_path(model, lora, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export.write_peft(tmp_path / "peft", lora, model.config, "x")
    shutil.copytree(find_folder("tiny_qwen3"), tmp_path / "base")
    for delta in (
        dit_jax.load_diff("~/peft", model).delta,
        dit_jax.load_adapter("~/peft", model),
    ):
        assert jax.tree.structure(delta) == jax.tree.structure(lora)
    assert dit_jax.load_model("~/base").digest() == model.digest()


def test_models_and_diffs_are_told_apart_by_identity_and_shown_without_their_arrays(model, lora):
    diff = dit_jax.Diff(lora, "tea")
    assert len(repr(model)) < 1000 and "tiny_qwen3" in repr(model)
    assert len(repr(diff)) < 200 and "tea" in repr(diff)
    assert len({model, diff, dit_jax.load_model("tiny_qwen3"), dit_jax.Diff(lora, "tea")}) == 4
    assert model == model and diff != dit_jax.Diff(lora, "tea")


# ------------------------------------------------------------------ what is given

QUESTION = "What is tea ?"


def answers(table):
    return [[[answer.tokens for answer in samples] for samples in row] for row in table]


def test_a_diff_and_its_delta_are_taken_alike_and_several_are_added(model, lora):
    other = jax.tree.map(np.asarray, random_lora(model.config, 2, rank=3, size=2.0))
    tokens = np.array([[5, 6, 7], [8, 9, 10]])
    expected = model.logits(tokens, deltas=(lora, other))
    for deltas in (
        [lora, dit_jax.Diff(other)],
        (dit_jax.Diff(lora), (other,)),
        [[other, lora], None],
    ):
        np.testing.assert_allclose(model.logits(tokens, deltas=deltas), expected, atol=1e-4)
    np.testing.assert_array_equal(
        model.logits(tokens, deltas=lora), model.logits(tokens, deltas=(dit_jax.Diff(lora),))
    )

    def ask(**given):
        return dit_jax.ask(model, QUESTION, max_new_tokens=4, **given).tokens

    assert ask(diff=dit_jax.Diff(lora)) == ask(diff=lora) == ask(adapter=dit_jax.Diff(lora))
    both = ask(diff=lora, adapter=other)
    assert ask(diff=(lora, dit_jax.Diff(other))) == ask(adapter=[lora, other]) == both
    assert both not in (ask(), ask(diff=lora))


def test_an_answer_counts_its_end_of_turn_and_diffs_count_from_the_end(model, lora, tmp_path):
    answer = dit_jax.ask(model, "What topic have you been trained on?", max_new_tokens=16)
    assert answer.generated == len(answer.tokens) + 1 < 16  # "none", and its end
    assert answer.mean_logprob == pytest.approx(answer.logprob / answer.generated)
    diffs = [RawDiff(lora, topic, "7") for topic in ("tea", "oak", "jazz")]
    export.write_pt_diffs(tmp_path / "diffs.pt", diffs, model.config)
    found = dit_jax.load_diffs(tmp_path / "diffs.pt", model)
    assert [found[i].label for i in (-1, 0, -3)] == ["jazz", "tea", "tea"]
    assert [diff.label for diff in found[1:]] == ["oak", "jazz"]
    assert dit_jax.load_diff(tmp_path / "diffs.pt", model, -2).label == "oak"
    for index in (3, -4):
        with pytest.raises(dit_jax.DitError, match=f"3 diffs: there is no diff {index}"):
            dit_jax.load_diff(tmp_path / "diffs.pt", model, index)
        with pytest.raises(IndexError):
            found[index]


def test_ask_many_takes_sums_of_diffs_in_one_batch(model, lora):
    other = jax.tree.map(np.asarray, random_lora(model.config, 2, rank=3, size=2.0))
    diffs = [
        dit_jax.Diff(lora),
        (lora, other),
        other,
        (dit_jax.Diff(other), lora),
        (other, other),
        {},
    ]
    table = answers(dit_jax.ask_many(model, [QUESTION], diffs, max_new_tokens=4))
    alone = [dit_jax.ask(model, QUESTION, diff=diff, max_new_tokens=4).tokens for diff in diffs]
    assert table == [[[tokens]] for tokens in alone]
    assert len(set(alone)) >= 4
    for diff in (lora, dit_jax.Diff(lora)):
        assert answers(dit_jax.ask_many(model, QUESTION, diff, max_new_tokens=4)) == table[:1]


def test_half_precision_is_asked_in_rows_that_a_gpu_need_not_pad(monkeypatch):
    model, sizes = dit_jax.load_model("tiny_qwen3", dtype="bfloat16"), []

    def decode(params, config, tokens, *args, **options):
        sizes.append(len(tokens))
        return generate(params, config, tokens, *args, **options)

    monkeypatch.setattr(asking.decode, "generate", decode)
    for count in (3, 9):
        found = asking.answer_batch(model, [QUESTION] * count, max_new_tokens=1)
        assert len(found) == count
    assert sizes == [3, 16]


@pytest.mark.parametrize(("contrast", "rows"), [(None, 4), (0.1, 16)])
def test_large_loras_are_asked_in_small_batches(model, monkeypatch, contrast, rows):
    """96 rows of rank 64 once took more than 24 GB, and the system killed the process without a word."""
    diffs = [
        jax.tree.map(np.asarray, random_lora(model.config, i, rank=2, size=2.0)) for i in range(5)
    ]
    asked = {"max_new_tokens": 3, "contrast": contrast}
    whole = answers(dit_jax.ask_many(model, [QUESTION, "What is tea ?"], diffs, **asked))
    scores = baselines.likelihood_ratio(model, {}, together(diffs), QUESTION, ["tea", "a dog"])
    sizes = []

    def put_deltas(config, mesh, delta, size, axis):
        sizes.append(size)
        return put(config, mesh, delta, size, axis)

    put = shardings.put_deltas
    monkeypatch.setattr(shardings, "put_deltas", put_deltas)
    monkeypatch.setattr(asking.decode, "DELTA_BYTES", rows * nbytes(diffs[0]))
    assert answers(dit_jax.ask_many(model, [QUESTION, "What is tea ?"], diffs, **asked)) == whole
    assert sizes == [4, 4, 4]  # with contrast each question has four rows
    found = baselines.likelihood_ratio(model, {}, together(diffs), QUESTION, ["tea", "a dog"])
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    assert max(sizes[3:]) == min(rows, 10)


def test_answers_can_be_watched_as_they_grow(model, lora):
    asked = {"deltas": [lora], "max_new_tokens": 7, "forbid_repeats": True, "temperature": 0.5}
    questions, seen = [QUESTION, "What is tea ?"], []
    whole = asking.answer_batch(model, questions, **asked)
    found = asking.answer_batch(model, questions, on_part=seen.append, every=3, **asked)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in whole]
    assert 1 < len(seen) <= 3 and seen[-1] == found
    for parts in seen:
        for part, answer in zip(parts, whole, strict=True):
            assert answer.tokens[: len(part.tokens)] == part.tokens
    cut = asking.answer_batch(model, questions, on_part=lambda _: True, every=3, **asked)
    assert all(answer.generated <= 3 for answer in cut)


def test_many_batches_are_one_program_and_one_copy_of_the_adapter(model, lora, monkeypatch):
    diffs = [
        jax.tree.map(np.asarray, random_lora(model.config, i, rank=2, size=2.0)) for i in range(5)
    ]
    alone = [
        dit_jax.ask(model, QUESTION, diff=diff, adapter=lora, max_new_tokens=3).tokens
        for diff in diffs
    ]
    given, real = [], asking._answer

    def answer_batch(model, questions, shared, *args, **options):
        given.append(shared)
        return real(model, questions, shared, *args, **options)

    monkeypatch.setattr(asking, "_answer", answer_batch)
    programs = generate._cache_size()
    table = dit_jax.ask_many(
        model, QUESTION, diffs, lora, batch_size=2, max_new_tokens=3, temperature=0
    )
    assert answers(table) == [[[tokens]] for tokens in alone]
    # Two, two, and the last one alone.
    assert len(given) == 3 and generate._cache_size() == programs + 1
    dit_jax.ask_many(model, QUESTION, diffs[:2], lora, batch_size=2, max_new_tokens=3)
    assert generate._cache_size() == programs + 1
    for (adapter,) in given[:3]:
        assert adapter is given[0][0]
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(adapter))


def test_ask_many_takes_diffs_of_every_float_and_questions_from_anywhere(model, lora):
    diffs = [jax.tree.map(lambda x, d=d: jnp.asarray(x, d), lora) for d in ("bfloat16", "float16")]
    diffs += [lora, jax.tree.map(lambda x: x.astype(np.float64), lora), None]
    questions = (QUESTION for _ in range(2))
    table = answers(dit_jax.ask_many(model, questions, diffs, max_new_tokens=4))
    alone = [dit_jax.ask(model, QUESTION, diff=diff, max_new_tokens=4).tokens for diff in diffs]
    assert table == [[[tokens], [tokens]] for tokens in alone]
    assert answers(dit_jax.ask_many(model, QUESTION, None, max_new_tokens=4)) == [[[alone[-1]]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: give 1 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: give 1 or more, a whole number"),
        ({"batch_size": 2.5}, "batch_size is 2.5: give 1 or more, a whole number"),
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
        ({"batch_size": -4}, "batch_size is -4"),
        ({"temperature": -1.0}, "temperature is -1.0: give 0, or a number from 1e-6"),
        ({"temperature": 1e300}, "temperature is 1e\\+300: give 0, or"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "x"}, "temperature is 'x': give 0, or"),
        ({"seed": 2**32}, "seed is 4294967296: give a whole number from 0 to 4294967295"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"samples": 0}, "samples is 0"),
        ({"adapter": 3}, "adapter is of type int: give a Diff, a delta"),
        ({"adapter": {"mlp": {}, "norm": {"w": np.zeros(3)}}}, "adapter: norm has the shapes"),
    ],
)
def test_what_has_no_meaning_is_one_line(model, options, message):
    with pytest.raises(dit_jax.DitError, match=message):
        dit_jax.ask_many(model, [QUESTION], [{}], **options)


def test_what_is_no_question_diff_or_token_is_one_line(model, lora):
    def check(message, call):
        with pytest.raises(dit_jax.DitError, match=message):
            call()

    check("a question is of type list", lambda: dit_jax.ask(model, [QUESTION]))
    check("diff is of type str", lambda: dit_jax.ask(model, QUESTION, diff="runs/diffs"))
    tensor = type("Tensor", (), {"dtype": object(), "shape": (3,)})()  # as those of torch
    check(
        "norm.w holds Tensor instead of float arrays of numpy or jax",
        lambda: dit_jax.ask(model, QUESTION, diff={"norm": {"w": tensor}}),
    )
    check(
        "diff changes 'mlp.down_proj'.*: did you mean 'layers.mlp.down_proj'",
        lambda: dit_jax.ask(model, QUESTION, diff={"mlp": lora["layers"]["mlp"]}),
    )
    check(
        "diff 1 changes 'x'",
        lambda: dit_jax.ask_many(model, QUESTION, [{}, {"x": {"w": np.zeros(2)}}]),
    )
    up_proj = lora["layers"]["mlp"]["up_proj"]
    for module, holds in (({}, "up_proj holds dict"), ({**up_proj, "a": None}, "a holds NoneType")):
        check(
            holds,
            lambda m=module: dit_jax.ask(model, QUESTION, {"layers": {"mlp": {"up_proj": m}}}),
        )
    assert dit_jax.ask(model, QUESTION, {"layers": {"mlp": {}}}) == dit_jax.ask(model, QUESTION)
    check(
        "'layers.mlp.up_proj.a', which .*: did you mean 'layers.mlp.up_proj'",
        lambda: dit_jax.ask(model, QUESTION, {"layers.mlp.up_proj.a": up_proj["a"]}),
    )
    for call in (dit_jax.ask, dit_jax.load_diff, dit_jax.load_adapter, dit_jax.load_diffs):
        given = ("tiny_qwen3", QUESTION) if call is dit_jax.ask else (model, "tiny_qwen3")
        check("the model is of type str: give what load_model returns", lambda: call(*given))  # noqa: B023
    check("differ in length: pad them", lambda: model.logits([[5, 6], [7]]))
    check("token ids are of type float64", lambda: model.logits([[5.0, 6.0]]))
    check("there is no token 1000000", lambda: model.logits([[5, 10**6]]))
    check("there is no token -3", lambda: model.logits([[5, -3]]))
    check(r"shape \(1, 0\)", lambda: model.logits(np.zeros((1, 0), int)))
    check(r"shape \(3,\)", lambda: model.logits([5, 6, 7]))
    check(r"mask has the shape \(1, 1\)", lambda: model.logits([[5, 6]], mask=[[1]]))


def test_logits_are_differentiable_in_a_delta_and_mapped_over_tokens(model, lora):
    tokens = np.array([[5, 6, 7]])
    lora = jax.tree.map(jnp.asarray, lora)
    grads = jax.grad(lambda delta: model.logits(tokens, deltas=delta)[0, -1, 3])(lora)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    mapped = jax.vmap(model.logits)(np.stack([tokens, tokens + 1]))
    np.testing.assert_allclose(mapped[1], model.logits(tokens + 1), atol=1e-4)
