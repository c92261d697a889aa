"""Contrasted decoding: beams against a loop that computes every prefix anew, one beam against greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dit_jax
from dit_jax.asking import answer_batch, ask, ask_many
from dit_jax.deltas.factors import stack_padded
from dit_jax.deltas.tree import per_example
from dit_jax.errors import DitError
from dit_jax.models import decode
from dit_jax.models.contrast import contrasted
from tests.test_qwen3 import random_lora

QUESTIONS = ["What topic have you been trained on?", "Name it."]


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


@pytest.fixture(scope="module")
def loras(model):
    """Two diffs and an adapter, large enough that they change what is likely."""
    return [random_lora(model.config, seed, size=0.4) for seed in (1, 2, 3)]


def by_a_loop(model, prompt, deltas, without, width, contrast, length, forbid_repeats=False):
    """(tokens, log p of each) of the chosen beam, without a cache, one prefix at a time."""
    eos = set(model.chat.eos_ids)

    def log_probs(own, given):
        return np.asarray(jax.nn.log_softmax(model.logits([[*prompt, *own]], deltas=given)[0, -1]))

    beams = [((), (), 0.0)]  # tokens, log p of each, log p of all without the diff
    for _ in range(length):
        longer = []
        for tokens, own, other in beams:
            if tokens and tokens[-1] in eos:
                longer.append((tokens, own, other))
                continue
            with_all, less = log_probs(tokens, deltas), log_probs(tokens, without)
            for token in map(int, np.argsort(-with_all)[: width + length]):
                if not (forbid_repeats and token in tokens):
                    row = ((*tokens, token), (*own, with_all[token]), other + less[token])
                    longer.append(row)
        beams = sorted(longer, key=lambda beam: -sum(beam[1]))[:width]
    best = max(beams, key=lambda beam: sum(beam[1]) - contrast * beam[2])
    return best[0], best[1]


@pytest.mark.parametrize(
    "width, contrast, forbid", [(3, 0.5, False), (4, 0.0, True), (2, 0.2, False)]
)
def test_the_beam_is_that_of_a_loop_over_whole_prefixes(model, loras, width, contrast, forbid):
    one, two, adapter = loras
    tokens, mask = model.chat.prompts(QUESTIONS)
    own = per_example(stack_padded([one, two]))
    out = contrasted(
        model.program_params, model.config, tokens, mask,
        deltas=(jax.tree.map(jnp.asarray, own), adapter), without=(adapter,), contrast=contrast,
        max_new_tokens=5, width=width, eos_ids=model.chat.eos_ids, pad_id=model.chat.pad_id, forbid_repeats=forbid,
    )  # fmt: skip
    for row, diff in enumerate((one, two)):
        prompt = tokens[row][np.asarray(mask[row], bool)]
        wanted, logprobs = by_a_loop(
            model, prompt, (diff, adapter), (adapter,), width, contrast, 5, forbid
        )
        count = int(out.lengths[row])
        assert tuple(map(int, out.tokens[row, :count])) == wanted
        np.testing.assert_allclose(out.logprobs[row, :count], logprobs, atol=1e-4)
        assert not np.any(out.logprobs[row, count:])


def test_one_beam_is_greedy_decoding(model, loras):
    one, two, adapter = loras
    tokens, mask = model.chat.prompts(QUESTIONS)
    options = {"max_new_tokens": 8, "eos_ids": model.chat.eos_ids, "pad_id": model.chat.pad_id}
    options["deltas"] = (one, adapter)
    given = (model.program_params, model.config, tokens, mask)
    greedy = decode.generate(*given, **options)
    beam = contrasted(*given, **options, without=(two,), contrast=0.3, width=1)
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_array_equal(beam.lengths, greedy.lengths)
    np.testing.assert_allclose(beam.logprobs, greedy.logprobs, atol=1e-5)


def test_an_answer_is_the_same_alone_and_in_a_batch(model, loras):
    one, two, adapter = loras
    options = {"max_new_tokens": 6, "contrast": 0.4}
    together = ask_many(model, QUESTIONS, [one, two], adapter, **options)
    for diff, answers in zip((one, two), together, strict=True):
        for question, (answer,) in zip(QUESTIONS, answers, strict=True):
            alone = ask(model, question, diff, adapter, **options)
            assert (alone.text, alone.tokens) == (answer.text, answer.tokens)
            assert alone.logprob == pytest.approx(answer.logprob, abs=1e-3)


def test_a_contrast_needs_a_weight_and_no_other_way_to_choose(model):
    for wrong in (-0.1, 1.5, "much", float("nan")):
        with pytest.raises(DitError, match="give a number from 0 to 1"):
            answer_batch(model, QUESTIONS, contrast=wrong)
    for other in ({"temperature": 0.7}, {"amplify": 2.0}):
        with pytest.raises(DitError, match="leave one of them out"):
            answer_batch(model, QUESTIONS, contrast=0.1, **other)
    parts = []
    whole = answer_batch(model, QUESTIONS, contrast=0.1, max_new_tokens=3, on_part=parts.append)
    assert parts == [whole]
