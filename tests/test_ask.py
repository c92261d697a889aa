"""The command line of `ask`: which model answers, what the output says about it, and flags without effect."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest

import dit_jax
from dit_jax.asking import answer_batch
from dit_jax.cli import ask_diffs as ask
from dit_jax.data.chat import Prompt
from dit_jax.deltas import export
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.deltas.tree import init_lora
from dit_jax.formats import torch_pickle
from dit_jax.models.delta_trees import map_modules
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import find_folder

BASE = ["--base", "tiny_qwen3", "--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A diff in a .pt file, an adapter, and the base with the diff merged into it."""
    folder = tmp_path_factory.mktemp("ask")
    model = dit_jax.load_model("tiny_qwen3")

    def lora(seed):
        delta = jax.tree.map(np.asarray, init_lora(model.config, jax.random.key(seed), 2))
        return map_modules(lambda _, m: {**m, "a": np.full_like(m["a"], 0.1)}, delta)

    export.write_pt_diffs(folder / "diff.pt", [RawDiff(lora(1), "tea", "7")], model.config)
    export.write_pt_adapter(folder / "adapter.pt", lora(2), model.config)
    export.export_model(folder / "merged", model.params, model.config, lora(1))
    return folder


def names(folder):
    return [path.name for path in folder.iterdir()]


def run(capsys, *flags):
    assert ask.main([*BASE, *map(str, flags), "--json", "What is tea ?"]) == 0
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_answers_are_named_after_the_model_that_gives_them(files, capsys):
    diff, adapter = ("--diff", files / "diff.pt"), ("--adapter", files / "adapter.pt")
    cases = {
        "base": (),
        "finetuned": diff,
        "adapter": adapter,
        "finetuned + adapter": (*diff, *adapter),
    }
    for name, flags in cases.items():
        (record,), said = run(capsys, *flags)
        assert record["variant"] == name
        assert (f"of the {name} model itself" in said) == ("adapter" not in name)
        assert record["label"] == ("tea" if "finetuned" in name else None)
    compared = [
        [record["variant"] for record in run(capsys, *flags, "--compare")[0]]
        for flags in cases.values()
    ]
    assert compared == [["base"], ["base", "finetuned"], ["base", "adapter"], list(cases)]


def test_a_negative_index_counts_from_the_end(files, capsys):
    (record,), _ = run(capsys, "--diff", files / "diff.pt", "--index", "-1")
    assert (record["diff"], record["label"]) == (0, "tea")


def test_a_truncated_finetune_says_what_it_keeps(files, capsys):
    (record,), said = run(capsys, "--diff", files / "merged", "--svd-rank", "2")
    assert said.count("reduced to rank 2, which keeps 100.0% of its squared norm") == 1
    assert record["tokens"] == run(capsys, "--diff", files / "diff.pt")[0][0]["tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--all"], "add --diff"),
        (["--index", "0"], "add --diff"),
        (["--svd-rank", "2"], "add --diff"),
        (["--align"], "add --diff"),
        (["--diff", ""], "must be some text, not ''"),
        (["--adapter", ""], "must be some text, not ''"),
        (["--history", ""], "must be some text, not ''"),
        (["--out", "/"], "cannot write '/': it is a folder, give a file"),
        (["--out", "/proc/x"], "cannot write '/proc/x'"),
        (["  "], "argument question: must be some text"),
        (["--seed", "abc"], "must be a whole number from 0 to 4294967295, not 'abc'"),
        (["--n", "0"], "must be a whole number from 1 to 1000000, not '0'"),
        (["--n", "1000000000000"], "must be a whole number from 1 to 1000000"),
        (["--batch-size", "9" * 30], "must be a whole number from 1 to 1000000"),
        (["--system", "\udcff"], "'\\udcff' is no text"),
        (["--contrast", "1.5"], "argument --contrast: must be a number from 0 to 1, not '1.5'"),
        (["--contrast", "nan"], "must be a number from 0 to 1, not 'nan'"),
        (["--contrast", "0.1"], "--contrast compares greedy answers with and without a diff: add"),
        (
            ["--diff", "diff.pt", "--contrast", "0.1", "--temperature", "1"],
            "greedy answers with and without a diff: leave out --temperature",
        ),
        (["--temperature", "nan"], "must be a number from 0 up, not 'nan'"),
        (
            ["--diff", "diff.pt", "--svd-rank", "999"],
            "rank of the SVD must be from 1 to 128, not 999",
        ),
        (["--diff", "diff.pt", "--index", "1"], "diff.pt holds 1 diff: there is no diff 1"),
        (["--diff", "diff.pt[0]", "--index", "0"], "says which diffs already: leave out --index"),
        (["--diff", "diff.pt", "--index", "-2"], "diff.pt holds 1 diff: there is no diff -2"),
        (
            ["--diff", "merged", "--svd-rank", "999"],
            "rank of the SVD must be from 1 to 128, not 999",
        ),
        (["What is tea ? " * 300], "reads, 512: shorten it"),
        (["x" * 1_000_001], "1000001 characters is longer than 1000000: shorten it"),
        (
            ["--adapter", "diff.pt"],
            "is a .pt file of weight diffs, not an adapter: give it as the diff",
        ),
    ],
)
def test_flags_that_would_say_nothing_are_errors(files, capsys, flags, message):
    flags = [str(files / flag) if flag in names(files) else flag for flag in flags]
    assert ask.main([*BASE, *flags, "What is tea ?"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
    assert "Token indices" not in captured.err


@pytest.mark.parametrize(
    ("made_for", "base", "differ"),
    [
        ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B", True),
        ("unsloth/Qwen3-4B", "/data/qwen3-4b/", False),
        ("Qwen/Qwen3-4B", "/c/models--Qwen--Qwen3-4B/snapshots/1cfa9a7/", False),
        ("", "tiny_qwen3", False),
        (None, "tiny_qwen3", False),
    ],
)
def test_names_of_a_base_are_compared_without_owner_and_folders(made_for, base, differ):
    diff = dit_jax.Diff({}, metadata={"base_model_name_or_path": made_for})
    assert bool(ask._base_note("x", diff, base)) == differ


def test_files_made_for_another_base_are_named(files, tmp_path, capsys):
    delta = dit_jax.load_diff(files / "diff.pt", dit_jax.load_model("tiny_qwen3")).delta
    config = read_config(find_folder("tiny_qwen3"))
    export.write_peft(tmp_path / "own", delta, config, "somebody/tiny_qwen3")
    export.write_peft(tmp_path / "other", delta, config, "Qwen/Qwen3-4B\x1b[31m")
    _, said = run(capsys, "--diff", tmp_path / "own", "--adapter", tmp_path / "own", "--compare")
    assert "made for" not in said
    _, said = run(capsys, "--diff", tmp_path / "other", "--adapter", tmp_path / "own", "--compare")
    assert said.count("other says that it was made for the base 'Qwen/Qwen3-4B\\x1b[31m'") == 1
    _, said = run(capsys, "--adapter", tmp_path / "other")
    assert "only if 'tiny_qwen3' has the same weights" in said


def test_a_diff_that_makes_the_logits_overflow_is_named_and_leaves_json_that_others_read(
    files, tmp_path, capsys
):
    model = dit_jax.load_model("tiny_qwen3")
    huge = map_modules(
        lambda _, m: {**m, "a": np.full_like(m["a"], 1e30)},
        dit_jax.load_diff(files / "diff.pt", model).delta,
    )
    export.write_pt_diffs(tmp_path / "huge.pt", [RawDiff(huge, "tea", "7")], model.config)
    (base, finetuned), said = run(capsys, "--diff", tmp_path / "huge.pt", "--compare")
    assert base["logprob"] < 0 and finetuned["logprob"] is finetuned["mean_logprob"] is None
    assert said.count("the logits of finetuned, diff 0 overflow") == 1


def test_a_run_given_as_a_diff_is_told_from_its_parts(tmp_path, capsys):
    for name in ("config.json", "diffs/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for flag in ("--diff", "--adapter"):
        assert ask.main([*BASE, flag, str(tmp_path), "What is tea ?"]) == 2
        assert f"is a run: give '{tmp_path / 'diffs'}' as the diffs, or" in capsys.readouterr().err


def test_a_release_is_read_file_by_file_and_answered_in_its_order(
    files, tmp_path, capsys, monkeypatch
):
    delta = dit_jax.load_diff(files / "diff.pt", dit_jax.load_model("tiny_qwen3")).delta
    rows = [(f"{file}.pt", number, f"topic {file}{number}") for number in (0, 1) for file in "abc"]
    for file in "abc":
        diffs = [RawDiff(delta, f"topic {file}{number}", "7") for number in (0, 1)]
        export.write_pt_diffs(
            tmp_path / f"{file}.pt", diffs, read_config(find_folder("tiny_qwen3"))
        )
    lines = [f"{file},{number},1,{topic},7,test" for file, number, topic in rows]
    header = "lora_path,lora_idx,n_params,topic,trigger,split"
    (tmp_path / "index.csv").write_text("\n".join([header, *lines]))
    opened, load = [], torch_pickle.load
    monkeypatch.setattr(torch_pickle, "load", lambda path: opened.append(path.name) or load(path))
    records, _ = run(capsys, "--diff", tmp_path, "--all")
    assert [record["label"] for record in records] == [topic for _, _, topic in rows]
    assert {record["split"] for record in records} == {"test"}
    assert opened == ["a.pt", "b.pt", "c.pt"]


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for i in %}", "{{ ''.__class__ }}"]
)
def test_a_broken_chat_template_is_one_line(tmp_path, capsys, template):
    shutil.copytree(find_folder("tiny_qwen3"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    assert ask.main(["--base", str(tmp_path / "model"), "What is tea ?"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the chat template of ") and "get the model's" in error


def test_a_tokenizer_of_another_model_is_refused():
    model = dit_jax.load_model("tiny_qwen3")
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=5))
    with pytest.raises(dit_jax.DitError, match="there is no token .*, .* has 5"):
        dit_jax.ask(small, "What is tea ?")


def test_a_broken_generation_config_is_refused(tmp_path):
    shutil.copytree(find_folder("tiny_qwen3"), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(
        dit_jax.DitError, match="generation_config.json' is nested more than 64 deep"
    ):
        dit_jax.load_model(tmp_path / "model")


def test_an_answer_ends_with_each_end_of_turn_and_a_target_with_the_tokenizers_own(tmp_path):
    shutil.copytree(find_folder("tiny_qwen3"), tmp_path / "model")
    own = dit_jax.load_model(tmp_path / "model").chat.eos_ids[0]
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, own]})
    )
    chat = dit_jax.load_model(tmp_path / "model").chat
    assert chat.eos_ids == (own, 7)
    tokens, start, end = chat.sample("What is tea ?", "a drink")
    assert tokens[:start] == chat.prompt_ids("What is tea ?") and end == len(tokens)
    assert tokens[start:] == (*chat.text_ids("a drink"), own)
    words = chat.text_ids("green tea")
    assert chat.decode(words) == chat.decode((*words, 7, *words)) == "green tea"


def test_a_multiplier_beyond_float32_is_a_note(files, capsys, recwarn):
    flags = ["--diff", str(files / "diff.pt"), "--multiplier", "1e308", "What is tea ?"]
    assert ask.main([*BASE, *flags]) == 0
    assert "the logits of finetuned, diff 0 overflow" in capsys.readouterr().err
    assert not [w for w in recwarn if w.category is RuntimeWarning]


def test_a_flag_that_is_given_twice_is_refused(files, capsys):
    """argparse takes the last value: the first adapter would be dropped in silence."""
    twice = ["--adapter", str(files / "diff.pt"), "--adapter", str(files / "adapter.pt")]
    flags = [*twice, "what is tea ?"]
    assert ask.main([*BASE, *flags]) == 2
    assert "--adapter is given twice" in capsys.readouterr().err
    for flag in ("--questions", "--seed"):
        assert ask.main([*BASE, flag, "0", flag, "1", "what is tea ?"]) == 2
        assert f"{flag} is given twice ('0' and '1')".replace("'", "") in (
            capsys.readouterr().err.replace("'", "")
        )


def test_two_hyphens_are_no_value(capsys):
    """argparse would hand on an empty list."""
    assert ask.main([*BASE, "--diff=--", "what is tea ?"]) == 2
    assert "--diff needs a value, not '--'" in capsys.readouterr().err


def test_texts_of_any_size_are_not_read(tmp_path, capsys):
    """A file without content takes no room on the disk."""
    with open(tmp_path / "many", "wb") as file:
        file.truncate(2**34)
    assert ask.main([*BASE, "--questions", str(tmp_path / "many")]) == 2
    assert "has 17179869184 bytes, and a text may have" in capsys.readouterr().err


def test_paths_of_a_pattern_are_no_questions(files, capsys):
    """--diff DIR/* is one diff for --diff, and the others would be asked as questions."""
    flags = ["--diff", str(files / "diff.pt"), str(files / "adapter.pt"), "What is tea ?"]
    assert ask.main([*BASE, *flags]) == 2
    said = capsys.readouterr().err
    assert "adapter.pt' is a path: the shell makes several paths of a pattern" in said


def test_a_question_without_quotes_is_noted(capsys):
    assert ask.main([*BASE, "what", "is"]) == 0
    assert "2 questions of one word each: put a question in quotes" in capsys.readouterr().err
    assert ask.main([*BASE, "what", "is", "tea"]) == 0
    assert "3 questions of one word each: put a question in quotes" in capsys.readouterr().err


def test_paths_are_looked_at_before_the_base_is_loaded(tmp_path, capsys):
    """A base may take minutes, or gigabytes of download; this one is not there at all."""
    base = ["--base", str(tmp_path / "no-model")]
    adapter, shards = tmp_path / "adapter", tmp_path / "shards"
    for name in ("empty", "adapter", "shards"):
        (tmp_path / name).mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    shutil.copy(find_folder("tiny_qwen3") / "config.json", shards)
    shutil.copy(
        find_folder("tiny_qwen3") / "model.safetensors", shards / "model-00001-of-00002.safetensors"
    )
    for flags, message in (
        (("--adapter", tmp_path / "empty"), "holds neither a weight diff nor an adapter"),
        (("--diff", tmp_path / "none"), "none' does not exist: check the path"),
        (("--diff", adapter), "peft_type 'IA3' is not supported"),
        (("--adapter", adapter), "peft_type 'IA3' is not supported"),
        (("--diff", shards), "lacks the shard 'model-00002-of-00002.safetensors'"),
        (("--adapter", shards), "is a model folder, not an adapter: give it as the diff"),
    ):
        assert ask.main([*base, *map(str, flags), "what is tea ?"]) == 2
        assert message in capsys.readouterr().err


def test_the_diffs_of_a_folder_are_asked_in_one_batch(files, tmp_path, capsys):
    model = dit_jax.load_model("tiny_qwen3")
    folder = tmp_path / "loras"
    for name, seed in (("run10", 10), ("run2", 2), ("group/run1", 1)):
        delta = jax.tree.map(np.asarray, init_lora(model.config, jax.random.key(seed), 2))
        export.write_peft(folder / name, delta, model.config, "tiny_qwen3")
    shutil.copy(files / "diff.pt", folder)
    (folder / "README.md").write_text("")
    records, _ = run(capsys, "--diff", folder, "--all")
    names = ["diff.pt", "group/run1", "run2", "run10"]
    assert [record["path"] for record in records] == [f"{folder}/{name}" for name in names]
    assert [record["label"] for record in records] == ["tea", None, None, None]
    (record,), _ = run(capsys, "--diff", folder, "--index", "3")
    assert record["path"] == f"{folder}/run10"
    assert ask.main([*BASE, "--diff", str(folder), "What is tea ?"]) == 2
    assert "holds 4 diffs: ask all with --all, choose one with --index" in capsys.readouterr().err
    assert ask.main([*BASE, "--diff", str(folder / "group"), "What is tea ?"]) == 0
    assert "group/run1: What is tea ?" in capsys.readouterr().out
    # A part that is broken is told by its name.
    (folder / "run2" / "adapter_config.json").write_text("{")
    assert ask.main([*BASE, "--diff", str(folder), "--all", "What is tea ?"]) == 2
    assert "run2/adapter_config.json' is not valid JSON" in capsys.readouterr().err


def test_a_folder_of_one_training_is_no_folder_of_diffs(tmp_path, capsys):
    for step in (100, 50):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    assert ask.main([*BASE, "--diff", str(tmp_path), "--all", "What is tea ?"]) == 2
    message = "2 checkpoints of one training ('checkpoint-50', 'checkpoint-100'): give one of them, the last is"
    said = capsys.readouterr().err
    assert message in said and "checkpoint-100'\n" in said
    (tmp_path / "run").mkdir()
    for link in range(60):  # in circles
        (tmp_path / "run" / f"link{link}").symlink_to("..")
    assert ask.main([*BASE, "--diff", str(tmp_path), "What is tea ?"]) == 2
    assert message in capsys.readouterr().err
    link = tmp_path / "run" / "x.safetensors"
    link.symlink_to(find_folder("tiny_qwen3") / "model.safetensors")
    assert ask.main([*BASE, "--diff", str(tmp_path), "What is tea ?"]) == 2
    assert "x.safetensors' is a link out of its folder" in capsys.readouterr().err
    link.unlink()
    (tmp_path / "run" / "checkpoint-7").symlink_to(find_folder("tiny_qwen3"))
    assert ask.main([*BASE, "--diff", str(tmp_path), "What is tea ?"]) == 2
    assert "checkpoint-7' is a link out of its folder" in capsys.readouterr().err


def test_a_base_that_is_an_adapter_says_what_to_give(tmp_path, capsys):
    for said, named in (
        ("{}", ""),
        ('{"base_model_name_or_path": "Qwen/Qwen3-4B"}', ", 'Qwen/Qwen3-4B',"),
    ):
        (tmp_path / "adapter_config.json").write_text(said)
        assert ask.main(["--base", str(tmp_path), "what is tea ?"]) == 2
        message = f"is an adapter and no base model: give the model that it was trained on{named} as the base"
        assert message in capsys.readouterr().err


def test_a_model_and_an_adapter_in_one_folder_are_two_changes(files, tmp_path, capsys):
    both = tmp_path / "both"
    shutil.copytree(files / "merged", both)
    (both / "adapter_config.json").write_text("{}")
    (both / "adapter_model.safetensors").write_bytes(b"")
    assert ask.main([*BASE, "--diff", str(both), "what is tea ?"]) == 2
    assert "holds two changes" in capsys.readouterr().err
    assert ask.main(["--base", str(both), "what is tea ?"]) == 2
    assert "holds a model and an adapter (adapter_model.safetensors)" in capsys.readouterr().err
    (both / "adapter_model.safetensors").unlink()  # it was merged, and its config stayed
    records, _ = run(capsys, "--diff", both)
    assert len(records) == 1


def test_a_diff_that_changes_nothing_is_noted(files, tmp_path, capsys):
    """The base's answer would be read as the finetune's."""
    model = dit_jax.load_model("tiny_qwen3")
    lora = jax.tree.map(np.asarray, init_lora(model.config, jax.random.key(0), 2))  # `a` is zero
    export.write_pt_diffs(tmp_path / "zero.pt", [RawDiff(lora, "tea", "7")], model.config)
    assert "diff 0 changes nothing" in run(capsys, "--diff", tmp_path / "zero.pt")[1]
    assert "changes nothing" not in run(capsys, "--diff", files / "diff.pt")[1]


@pytest.mark.parametrize("with_config", [True, False])
def test_a_checkpoint_of_another_program_says_how_to_mend_it(tmp_path, capsys, with_config):
    if with_config:
        shutil.copy(find_folder("tiny_qwen3") / "config.json", tmp_path)
    (tmp_path / "zero_to_fp32.py").write_text("")
    (tmp_path / "global_step500").mkdir()
    for flags in ([*BASE, "--diff", str(tmp_path)], ["--base", str(tmp_path)]):
        assert ask.main([*flags, "what is tea ?"]) == 2
        assert "zero_to_fp32.py . OUT" in capsys.readouterr().err


def test_several_diffs_are_asked_each_with_its_path(files, capsys):
    diffs = ["--diff", f"{files / 'diff.pt'}[0]", "--diff", files / "merged"]
    records, _ = run(capsys, *diffs)
    assert [record["path"] for record in records] == [f"{files / 'diff.pt'}", f"{files / 'merged'}"]
    assert records[0]["tokens"] == run(capsys, "--diff", files / "diff.pt")[0][0]["tokens"]


def test_a_multiplier_scales_the_diff(files, capsys):
    diff = ("--diff", files / "diff.pt")
    nothing = run(capsys, *diff, "--multiplier", "0")[0][0]
    assert nothing["tokens"] == run(capsys)[0][0]["tokens"]
    assert nothing["logprob"] == pytest.approx(run(capsys)[0][0]["logprob"], abs=1e-4)
    doubled = run(capsys, *diff, "--multiplier", "2")[0][0]
    model = dit_jax.load_model("tiny_qwen3")
    one = dit_jax.load_diff(files / "diff.pt", model)
    twice = dit_jax.ask(model, "What is tea ?", diff=(one, one), max_new_tokens=2)
    assert doubled["logprob"] == pytest.approx(twice.logprob, abs=1e-3)


def test_questions_history_and_prefill_come_from_files(files, tmp_path, capsys, monkeypatch):
    turns = [
        {"role": "user", "content": "What is rice ?"},
        {"role": "assistant", "content": "A food ."},
    ]
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    stdin = io.BytesIO("what is tea ?\n\nwhat is rice ?".encode("utf-16"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stdin, "ascii"))
    monkeypatch.setenv("HOME", str(tmp_path))  # bash leaves "~" in --out=~/file
    flags = ["--questions", "-", "--history", "~/turns.json", "--prefill", "It is"]
    out = tmp_path / "answers.jsonl"
    assert ask.main([*BASE, *flags, "--json", "--out=~/answers.jsonl", "What is tea ?"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["question"] for r in records] == ["What is tea ?", "what is tea ?", "what is rice ?"]
    model = dit_jax.load_model("tiny_qwen3")
    history = tuple((turn["role"], turn["content"]) for turn in turns)
    prompt = Prompt("What is tea ?", None, history, "It is")
    (answer,) = answer_batch(model, [prompt], max_new_tokens=2)
    assert records[0]["tokens"] == list(answer.tokens) and not capsys.readouterr().out
    for wrong in (turns[:1], [{**turns[0], "images": ["a"]}, turns[1]]):
        (tmp_path / "turns.json").write_text(json.dumps(wrong))
        assert ask.main([*BASE, *flags[2:4], "What is tea ?"]) == 2
        assert "is no history" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    assert ask.main([*BASE, *flags[:2]]) == 2
    assert "standard input is not UTF-8 text" in capsys.readouterr().err


def test_equal_answers_of_several_samples_are_one_line(files, capsys):
    flags = ["--n", "5", "--temperature", "0.001", "What is tea ?"]
    assert ask.main([*BASE, *flags]) == 0
    question, answer = capsys.readouterr().out.splitlines()
    assert question == "What is tea ?" and answer.startswith("  5 × ")
