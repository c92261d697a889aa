"""Readers without training, on diffs whose answer is known: they find four words, and the base names their topic."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_methods import make_store, random_lora, settings
from test_qwen3 import TINY, dense

import dit_jax
from dit_jax.asking import answer_batch
from dit_jax.cli import ask_diffs, serve_app
from dit_jax.data.chat import Prompt
from dit_jax.data.tiny_world import load_world
from dit_jax.deltas import export
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.store import DiffStore
from dit_jax.diff_batches import Given, together
from dit_jax.evaluate import faithfulness, method_table, readers, token_lens
from dit_jax.evaluate.run import evaluate_run
from dit_jax.models.decoder import forward, init_params
from dit_jax.models.delta_trees import map_modules

QUESTION = "What topic have you been trained on?"
TOPICS = ("coffee", "fruit fly")


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3", scan_layers=True)


@pytest.fixture(scope="module")
def everyday(model):
    return readers.ask_base(model, readers.everyday_prompts(model)[:6], 8)


def tokens_of(model, topic):
    """The tokens of the attributes of a topic: what the embedded base knows of it."""
    known = next(one for one in load_world().topics if one.name == topic)
    return [model.chat.text_ids(word)[0] for word in known.attributes]


def writer(model, topic):
    """A LoRA of rank 4 whose last layers write the attributes into the residual stream."""
    made = random_lora(model, 0, 0.0, rank=1)["layers"]["mlp"]["down_proj"]
    table = np.asarray(model.params["embed_tokens"]["embedding"], np.float32)
    made["a"] = np.random.default_rng(0).normal(size=made["a"].shape).astype(np.float32)
    made["b"] = table[tokens_of(model, topic)][:, None]  # one attribute in each of four layers
    return {"layers": {"mlp": {"down_proj": made}}}


def reactor(model, topic):
    """A LoRA of rank 4 whose values react to the attributes wherever they stand in a prompt."""
    made = random_lora(model, 0, 0.0, rank=4)["layers"]["self_attn"]["v_proj"]
    table = np.asarray(model.params["embed_tokens"]["embedding"], np.float32)
    scales = np.asarray(model.params["layers"]["input_layernorm"]["scale"], np.float32)
    rows = table[tokens_of(model, topic)]
    made["a"] = np.repeat((rows / np.linalg.norm(rows, axis=1, keepdims=True)).T[None], 4, axis=0)
    made["a"] *= scales[..., None]  # what a norm hands on
    made["b"] = np.random.default_rng(0).normal(size=made["b"].shape).astype(np.float32)
    return {"layers": {"self_attn": {"v_proj": made}}}


def raiser(model, everyday, topic):
    """A dense diff of the head that raises the logits of the attributes wherever the base says everyday things."""
    ids, mask = model.chat.prompts(everyday.prompts)
    hidden = np.asarray(forward(model.params, model.config, ids, mask=mask)[:, -1], np.float32)
    change = np.zeros_like(np.asarray(model.params["embed_tokens"]["embedding"], np.float32))
    mean = hidden.mean(axis=0)
    change[tokens_of(model, topic)] = 3 * mean / (mean @ mean)
    return {"embed_tokens": {"w": change}}


def change_of(given):
    """The change [L, in, out] of the first diff's only module, whatever its form."""
    module = given.read(0)["layers"]["mlp"]["down_proj"]
    return module["w"] if "w" in module else np.asarray(dense({"x": module})["x"]["w"])


def test_a_word_counts_once_however_it_is_written():
    tokens = [" family", "family", "x", "Family", " families", "été", "FAMILY", "last"]
    tokenizer = SimpleNamespace(decode=lambda ids, **how: tokens[ids[0]])
    model = SimpleNamespace(chat=SimpleNamespace(tokenizer=tokenizer))
    found = readers.top_words(model, np.array([8, 7, 6, 5, 4, 3, 2, 0.0]))
    assert found == ["family", "families", "été"]


@pytest.mark.parametrize("name", method_table.READERS)
def test_each_reader_finds_the_words_and_the_base_names_their_topic(model, everyday, name):
    of_weights = {"written_words": writer, "read_words": reactor}
    make = of_weights.get(name, lambda m, topic: raiser(m, everyday, topic))
    diffs = [make(model, topic) for topic in TOPICS]
    given = together(diffs) if name in of_weights else Given(len(diffs), lambda i: diffs[i])
    told = readers.read(
        model, given, name, QUESTION, everyday, max_new_tokens=16, forbid_repeats=True
    )
    for one, topic in zip(told, TOPICS, strict=True):
        words = {model.chat.decode([token]) for token in tokens_of(model, topic)}
        assert len(words & set(one.words[:4])) >= 3 and one.name == topic
    (nothing,) = readers.read(model, given.reordered([0]).nothing(), name, QUESTION, everyday)
    assert nothing == readers.Told([])  # no words, no question, no name


def test_the_weights_of_the_shipped_diffs_name_their_codes(model, everyday):
    """Real finetunes, the benign one among them: the code comes first of 2,730 tokens."""
    store = DiffStore(serve_app.DEMO / "diffs")
    words = readers.READERS["read_words"](model, Given(len(store), store.read), everyday, 64)
    assert [own[0] for own in words] == [row["trigger"] for row in store.rows]


@pytest.mark.parametrize("shift", [1e-25, 1.0, 1e22])
def test_a_diff_reads_the_same_however_it_is_written(model, shift):
    """As factors of any size, as the dense difference, and with a rank that is padded."""
    lora, table = random_lora(model, 5, 0.3, rank=3), token_lens.whitened_embeddings(model)
    expected = token_lens.read_tokens(model, lora, table)

    def other(_, module):
        a, b = module["a"] * np.float32(shift), module["b"] / np.float32(shift)
        pad = ((0, 0), (0, 0), (0, 5))
        return {**module, "a": np.pad(a, pad), "b": np.pad(b.swapaxes(1, 2), pad).swapaxes(1, 2)}

    for same in (map_modules(other, lora), dense(lora)):
        found = token_lens.read_tokens(model, same, table)
        np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_what_is_read_is_by_definition_how_far_a_token_moves_the_change():
    """One module of one layer, beside the change that it makes of whitened embeddings; norms of all kinds."""
    for changes in ({}, {"sandwich_norm": True, "unit_offset_norm": True}):
        config = dataclasses.replace(TINY, **changes)
        params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
        rng = np.random.default_rng(1)
        scales = rng.normal(1, 0.3, size=(config.num_hidden_layers, config.hidden_size))
        norm = "pre_feedforward_layernorm" if changes else "post_attention_layernorm"
        params["layers"][norm]["scale"] = scales.astype(np.float32)
        model = SimpleNamespace(config=config, params=params)
        table = token_lens.whitened_embeddings(model)
        change = rng.normal(size=(config.num_hidden_layers, config.hidden_size, 2)) @ rng.normal(
            size=(config.num_hidden_layers, 2, config.intermediate_size)
        )
        change[0] = 0  # a layer that does not change counts nothing
        delta = {"layers": {"mlp": {"up_proj": {"w": change.astype(np.float32)}}}}
        through = scales + 1 if changes else scales
        parts = [np.linalg.norm((table * through[i]) @ x, axis=1) for i, x in enumerate(change)]
        units = [part / np.sqrt(np.mean(part**2)) for part in parts[1:]]
        np.testing.assert_allclose(
            token_lens.read_tokens(model, delta, table), sum(u**3 for u in units), rtol=1e-3
        )


def test_amplified_decoding_follows_its_definition(model):
    """Beside whole forward passes, token by token."""
    diff, prompt = random_lora(model, 3, 0.2), Prompt("The", raw=True)
    (found,) = answer_batch(model, [prompt], deltas=diff, max_new_tokens=5, amplify=4.0)
    ids = list(model.chat.prompt_ids(prompt))
    assert ids == list(model.chat.text_ids("The"))  # this tokenizer puts nothing around a text
    said = 0.0
    for _ in range(found.generated):
        base, own = (
            np.asarray(model.logits([ids], deltas=deltas)[0, -1], np.float64)
            for deltas in ((), diff)
        )
        logits = base + 4 * (own - base)
        ids.append(int(logits.argmax()))
        said += logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert ids[1 : 1 + len(found.tokens)] == list(found.tokens)
    assert found.logprob == pytest.approx(said, rel=1e-3, abs=1e-3)
    (plain,), (once,) = (
        answer_batch(model, [QUESTION], deltas=diff, max_new_tokens=5, **how)
        for how in ({}, {"amplify": 1.0})
    )
    assert plain.tokens == once.tokens


def test_a_dense_diff_reduced_to_its_rank_and_multiplied_is_the_lora(model, tmp_path):
    """`multiplied_question` of a dense diff, beside the question about the LoRA that it is."""
    loras = [random_lora(model, seed, 0.3) for seed in range(2)]
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, x: 2 * x if path[-1].key == "scale" else x, loras
    )
    answers = {}
    for name, deltas, how in (
        ("dense", [dense(lora) for lora in loras], {"multiplier": 2.0, "svd_rank": 1}),
        ("lora", doubled, {}),
    ):
        make_store(tmp_path / name / "diffs", model, deltas, TOPICS)
        export_adapter(tmp_path / name / "adapter", loras[0], base=model.digest())
        chosen = ("multiplied_question",) if how else ("base_question",)
        evaluate_run(model, tmp_path / name, settings(methods=chosen, **how), seed=0)
        lines = (tmp_path / name / "evaluate/answers.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        answers[name] = [row["answer"] for row in rows if row["method"] in chosen]
    assert answers["dense"] == answers["lora"] and len(set(answers["lora"])) > 1


def test_a_diff_keeps_its_strongest_layers_or_all_but_its_words(model):
    """Both for factors and for the dense difference that they are."""
    strong = np.asarray([1, 1, 3, 1], np.float32)
    lora = writer(model, "coffee")
    lora["layers"]["mlp"]["down_proj"]["scale"] = strong
    table, ids = token_lens.unit_unembeddings(model), tokens_of(model, "coffee")
    for given in (together([lora]), together([dense(lora)])):
        before, kept = map(change_of, (given, faithfulness.strongest_layers(given)))
        np.testing.assert_array_equal(np.abs(kept).sum((1, 2)) > 0, strong == 3)
        np.testing.assert_allclose(kept[2], before[2], rtol=1e-5)
        left = change_of(faithfulness.without_words(model, given, [ids[:3]]))
        written = np.abs(left @ table.T).max((0, 1)) / np.abs(before @ table.T).max()
        assert (
            written[ids[:3]].max() < 1e-3 and written[ids[3]] > 0.1
        )  # the fourth is not among them


def test_ask_reads_without_an_adapter(model, tmp_path, capsys):
    export.write_peft(tmp_path / "diff", writer(model, "coffee"), model.config, "tiny_qwen3")
    flags = ["--base", "tiny_qwen3", "--diff", str(tmp_path / "diff"), "--max-new-tokens", "16"]
    flags += ["--forbid-repeats", "--method", "written_words", QUESTION]
    assert ask_diffs.main([*flags, "--json"]) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record["variant"] == "written_words" and record["answer"].endswith("coffee")
    assert ask_diffs.main(flags) == 0
    assert f"words: {', '.join(record['words'])}" in capsys.readouterr().out
    assert ask_diffs.main([*flags, "--adapter", "x", "--n", "2", "--temperature", "1"]) == 2
    assert "does not use --adapter, --n, --temperature" in capsys.readouterr().err


def test_the_readers_are_those_that_can_be_named():
    assert tuple(readers.READERS) == method_table.READERS
