"""A base model is untrusted input: its chat template, tokenizer, token ids, weights and files cost and do little."""

import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.data import chat, tokenizer_process
from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.models.hf_checkpoint import find_folder, generation_eos

TINY = find_folder("tiny_qwen3")
QUESTION = "What topic have you been trained on ?"


@pytest.fixture
def base(tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    return tmp_path / "base"


def change(path, **values):
    """Sets entries of a JSON file."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}))


@pytest.fixture
def short_limits(monkeypatch):
    monkeypatch.setattr(budgets, "TOKENIZER_SECONDS", 0.5)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
DOUBLE = "{% set a = a ~ a %}"
SLOW = {
    "two loops": LOOPS,
    "power": "{{ 7 ** (7 ** 9) }}",
    "macro": "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(99) }}",
    "sort": "{% for i in range(99999) %}{% set _ = range(99999) | sort %}{% endfor %}",
    "only for some questions": "{% if 'topic' in messages[0].content %}" + LOOPS + "{% endif %}x",
}
LARGE = {
    "product": "{{ 'a' * 4000000000 }}",
    "list": "{{ ([0] * 4000000000) | length }}",
    "doubling": "{% set a = 'aaaaaaaa' %}" + DOUBLE * 40 + "{{ a }}",
    "join": "{{ (['aaaaaaaa' * 99999] * 99999) | join }}",
    "format": "{{ '%4000000000d' % 1 }}",
    "format method": "{{ '{:4000000000}'.format(1) }}",
    "center": "{{ 'a' | center(4000000000) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "indent": "{{ messages | tojson(indent=4000000000) }}",
}


@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
def test_a_template_that_takes_long_is_one_line(base, short_limits, template):
    (base / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    with pytest.raises(
        DitError, match=r"the chat template of .* fails \((it takes more|.*range|.*recursion)"
    ):
        chat.load_chat(base).prompt_ids(QUESTION)
    assert time.monotonic() - start < 30  # half a second of CPU time, on a busy machine


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_template_that_takes_memory_is_one_line(base, template, most_memory):
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(DitError, match=r"the chat template of .* fails \(.*(memory|tokens|CPU)"):
        chat.load_chat(base).prompt_ids(QUESTION)
    assert peak_of_children() <= most_memory


@pytest.mark.parametrize(
    "template", ["x", "{{ messages[0].role }}", "{{ messages[0].content[:5] }}"]
)
def test_a_template_that_leaves_the_question_out_is_one_line(base, template):
    """As one that was cut: every question would get one answer."""
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(DitError, match="fails .it leaves the question out"):
        chat.load_chat(base).prompt_ids(QUESTION)


def peak_of_children():
    """The most memory of any process that this one has waited for, bytes; other tests had children, too."""
    tokenizer_process._process.stop()
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


@pytest.fixture
def most_memory():
    """What a child may have taken after the test: no more than 1.5 GiB, than a child before it, or than this process.

    A child begins as a fork of this process, whose pages count as its own.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(peak_of_children(), own, 1.5 * 2**30)


def test_after_a_template_was_stopped_other_tokenizers_go_on(base, short_limits):
    good = chat.load_chat(TINY)
    before = good.prompt_ids(QUESTION)
    (base / "chat_template.jinja").write_text(
        "{% if messages[0].content in 'ab' %}" + LOOPS + "{% endif %}x"
    )
    bad = chat.load_chat(base)
    for question in ("a", "b"):
        with pytest.raises(DitError, match="CPU time"):
            bad.prompt_ids(question)
    good.prompt_ids.cache_clear()
    assert good.prompt_ids(QUESTION) == before
    assert good.decode(good.text_ids("green tea")) == "green tea"


def test_tokenizers_beyond_those_kept_are_loaded_again(monkeypatch):
    number = budgets.MAX_TOKENIZERS
    loaded = [chat.load_chat(TINY) for _ in range(number + 2)]
    assert len({c.text_ids("green tea") for c in loaded}) == 1


def test_threads_get_their_own_answers():
    loaded = chat.load_chat(TINY)
    texts = [f"tea {i} milk" for i in range(200)]
    want = [loaded.tokenizer.encode(text) for text in texts]
    got = {}

    def work(part):
        for i in range(part, 200, 4):
            got[i] = loaded.tokenizer.encode(texts[i])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(200)] == want


def test_the_process_outlives_signals_that_are_for_the_program():
    loaded = chat.load_chat(TINY)
    pid = tokenizer_process._process.start().pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert loaded.text_ids("green tea")
    assert tokenizer_process._process.start().pid == pid


def test_an_interruption_leaves_no_reply_for_the_next_question(monkeypatch):
    loaded = chat.load_chat(TINY)
    want = loaded.tokenizer.encode("green tea")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_process.tokenizer_worker, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loaded.tokenizer.encode("black coffee")
    assert loaded.tokenizer.encode("green tea") == want


def test_prompts_are_those_of_the_library():
    from transformers import PreTrainedTokenizerFast

    library = PreTrainedTokenizerFast.from_pretrained(str(TINY))
    loaded = chat.load_chat(TINY)
    for text in (QUESTION, "", "zwölf Ümläute \u200b 🙂", "<|im_end|> tea", "\ud800"[:0] + "a\nb"):
        turn = [{"role": "user", "content": text}]
        ids = library.apply_chat_template(
            turn, add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        assert loaded.prompt_ids(text) == tuple(ids)
        assert loaded.text_ids(text) == tuple(library.encode(text, add_special_tokens=False))
    assert loaded.decode([5, 6, 7]) == library.decode([5, 6, 7], skip_special_tokens=True).strip()


def test_a_text_that_is_no_unicode_is_one_line():
    loaded = chat.load_chat(TINY)
    for ids in (loaded.prompt_ids, loaded.text_ids):
        with pytest.raises(DitError, match="half a character"):
            ids("a \ud800 b")


SEQUENCE = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60
TOKENIZERS = {
    "regex": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$|(x+x+)+y|([a-zA-Z ]+)*!|(.*)*q"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "Precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "FixedLength": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "doubling": {"normalizer": {"type": "Sequence", "normalizers": SEQUENCE}},
    "unknown": {"normalizer": {"type": "Nothing"}},
    "no model": {"model": None},
}


@pytest.mark.parametrize("changed", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_panics_or_takes_too_much_is_one_line(
    base, short_limits, changed, capfd, most_memory
):
    change(base / "tokenizer.json", **changed)
    with pytest.raises(DitError, match="tokenizer .*cannot be read|template of .* fails"):
        chat.load_chat(base).prompt_ids("What have you been trained on , banana !" * 30)
    assert capfd.readouterr() == ("", "")  # the library tells of a panic itself
    assert peak_of_children() <= most_memory


def test_a_tokenizer_that_cuts_at_random_is_refused(base):
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": next(iter(vocabulary))}
    for dropout in (None, 0.5):
        change(base / "tokenizer.json", model={**model, "dropout": dropout})
        if dropout is None:
            assert chat.load_chat(base).text_ids("tea")
    with pytest.raises(DitError, match="cannot be read: its dropout cuts a text another way"):
        chat.load_chat(base)


NO_LENGTHS = ["many", -1, 0, [], {}]


@pytest.mark.parametrize("length", NO_LENGTHS)
def test_a_length_that_is_none_is_refused(base, length):
    change(base / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(DitError, match="tokenizer"):
        chat.load_chat(base)


@pytest.mark.parametrize("token", [-1, 999_999, 2**31, 2**40, 2**70, "7", 7.0, True, [7, [8]], {}])
def test_an_end_of_turn_that_the_model_lacks_is_refused_when_it_is_loaded(base, token):
    change(base / "generation_config.json", eos_token_id=token)
    with pytest.raises(
        DitError, match=r"eos_token_id.*generation_config|generation_config.*eos_token_id"
    ):
        dit_jax.load_model(base)


def test_generation_configs_of_every_kind_are_read(base):
    for said, want in ((7, [7]), ([7, 8], [7, 8]), (None, []), ([], [])):
        change(base / "generation_config.json", eos_token_id=said)
        assert generation_eos(base) == want
    change(base / "config.json", eos_token_id=9, text_config={"eos_token_id": 8})
    assert generation_eos(base) == []
    (base / "generation_config.json").unlink()
    assert generation_eos(base) == [
        9
    ]  # as transformers has it, which then makes one of config.json
    assert 9 in chat.load_chat(base, generation_eos(base)).eos_ids
    change(base / "config.json", eos_token_id=None)
    assert generation_eos(base) == [8]
    change(base / "config.json", eos_token_id=[0] * 2000)
    with pytest.raises(DitError, match="eos_token_id has 2000 ids"):
        generation_eos(base)


def add_special_tokens(folder):
    """Adds special tokens, the last of which the model has no row for. Returns that one."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    old = json.loads((folder / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number in range(len(old["model"]["vocab"]), size + 1):
        entry = {"id": number, "content": f"<far{number}>", "special": True, **plain}
        old["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(old))
    return f"<far{size}>"


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_special_tokens_that_the_model_lacks_are_refused_by_name(base, role):
    change(base / "tokenizer_config.json", **{role: add_special_tokens(base)})
    words = {"eos_token": "the end-of-turn token", "pad_token": "the padding token"}
    with pytest.raises(DitError, match=f"{words[role]} is token"):
        dit_jax.load_model(base)


def test_a_vocabulary_beyond_the_models_rows_is_refused_when_it_is_loaded(base):
    old = json.loads((base / "tokenizer.json").read_text())
    word = next(iter(old["model"]["vocab"]))
    old["model"]["vocab"][f"{word}{word}"] = 2**31
    (base / "tokenizer.json").write_text(json.dumps(old))
    with pytest.raises(DitError, match="the tokenizer's vocabulary reaches token 2147483648"):
        dit_jax.load_model(base)


def test_a_special_token_without_a_row_is_refused_where_a_text_holds_it(base):
    """Gemma 3 has such a token, for images."""
    last = add_special_tokens(base)
    loaded = dit_jax.load_model(base).chat
    assert loaded.prompt_ids(QUESTION) == chat.load_chat(TINY).prompt_ids(QUESTION)
    for ids in (loaded.prompt_ids, loaded.text_ids):
        with pytest.raises(DitError, match="there is no token .*: use the tokenizer that belongs"):
            ids(f"tea {last}")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_])
@pytest.mark.parametrize("part", ["proj", "norm", "embed"])
def test_weights_of_integers_are_refused_by_name(base, dtype, part):
    tensors = load_file(base / "model.safetensors")
    changed = [name for name in tensors if part in name]
    name = sorted(changed)[0]
    tensors[name] = (tensors[name] * 50).astype(dtype)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(DitError, match=f"{name} is of type {np.dtype(dtype)}"):
        dit_jax.load_model(base)


def test_weights_of_every_float_are_read(base):
    tensors = load_file(base / "model.safetensors")
    save_file({k: v.astype(np.float64) for k, v in tensors.items()}, base / "model.safetensors")
    assert dit_jax.load_model(base).digest() == dit_jax.load_model("tiny_qwen3").digest()


def make_pipe(path: pathlib.Path):
    os.mkfifo(path)


def make_socket(path: pathlib.Path):
    folder = os.getcwd()
    os.chdir(path.parent)  # addresses are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(folder)


def make_device(path: pathlib.Path):
    path.symlink_to("/dev/zero")


FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "model.safetensors", "additional_chat_templates/x.jinja",
]  # fmt: skip


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_device])
@pytest.mark.parametrize("name", FILES)
def test_pipes_sockets_and_devices_are_refused_before_they_are_opened(base, make, name):
    path = base / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(DitError, match=f"{path.name}' is not a regular file"):
        dit_jax.load_model(base)
