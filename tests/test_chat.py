"""Chat templates of other families: system texts, thinking blocks, dates, and the end of a turn."""

import shutil

import jax
import numpy as np
import pytest
import transformers
from hostile import NAME, run_told

import dit_jax
from dit_jax.data.chat import Prompt, load_chat
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.models.hf_checkpoint import find_folder

QUESTION = "What is tea ?"
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ADDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
    "{% endif %}" + TURNS
)
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
)
IGNORES_SYSTEM = "{% set messages = messages if messages[0].role != 'system' else messages[1:] %}"
# As Gemma 3's: the text stands in the user's turn.
IN_USER_TURN = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (first if loop.first else '') + m.content"
    " + '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)
# As Llama 3's.
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\\nToday: ' + date_string + '\\n\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<|im_end|>\\n' }}" + TURNS
)
USER = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def chat_of(tmp_path):
    """template -> the chat of the embedded model's folder with this template."""

    def make(template: str, **files):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(find_folder("tiny_qwen3") / name, tmp_path / name)
        (tmp_path / "chat_template.jinja").write_text(template)
        return load_chat(tmp_path, **files)

    return make


def test_a_plain_template_needs_no_word(chat_of):
    chat = chat_of(TURNS)
    assert chat.tokenizer.prompt(QUESTION) == USER
    assert chat.tokenizer.prompt(QUESTION, "Be short.") == (
        f"<|im_start|>system\nBe short.<|im_end|>\n{USER}"
    )
    assert chat.tokenizer.notes() == chat.tokenizer.notes("Be short.") == []


def test_the_embedded_models_prompt_is_that_of_transformers():
    from transformers import PreTrainedTokenizerFast

    chat = load_chat(find_folder("tiny_qwen3"))
    library = PreTrainedTokenizerFast.from_pretrained(str(find_folder("tiny_qwen3")))
    ids = library.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    assert list(chat.prompt_ids(QUESTION)) == ids
    assert chat.tokenizer.notes() == []


def test_a_system_message_of_the_template_is_told_and_can_be_replaced(chat_of):
    template = chat_of(ADDS_SYSTEM).tokenizer
    assert template.prompt(QUESTION) == f"<|im_start|>system\nBe kind.<|im_end|>\n{USER}"
    (note,) = template.notes()
    assert "adds the system message 'Be kind.': --system" in note
    assert "Be kind" not in template.prompt(QUESTION, "Be short.")
    assert template.notes("Be short.") == template.notes("") == []


@pytest.mark.parametrize("start", ["", "{{ '<s>' }}"])
def test_the_system_message_of_a_template_can_be_left_out(chat_of, start):
    template = chat_of(start + ADDS_SYSTEM).tokenizer
    assert template.prompt(QUESTION, "") == ("<s>" if start else "") + USER
    assert template.notes("") == []
    assert chat_of(TURNS).tokenizer.prompt(QUESTION, "") == USER
    other = chat_of(start + ADDS_SYSTEM.replace("\\nBe kind.", "\\n# Be kind."))
    assert other.tokenizer.prompt(QUESTION, "") == template.prompt(QUESTION, "")
    assert chat_of(IN_USER_TURN).tokenizer.prompt(QUESTION, "") == USER
    rules = ADDS_SYSTEM.replace("m.role", "(m.role if m.role == 'user' else 'rules')")
    with pytest.raises(dit_jax.DitError, match="its system message cannot be left out"):
        chat_of(rules.replace("start|>system", "start|>rules")).tokenizer.prompt(QUESTION, "")


def test_a_chat_has_a_system_message_of_its_own(chat_of):
    chat = chat_of(ADDS_SYSTEM, system="")
    assert chat.prompt_ids(QUESTION) == chat.text_ids(USER)
    assert chat.prompt_ids(QUESTION, "Be short.") == chat.text_ids(
        f"<|im_start|>system\nBe short.<|im_end|>\n{USER}"
    )


@pytest.mark.parametrize("start", [REFUSES_SYSTEM, IGNORES_SYSTEM])
def test_without_a_system_role_the_text_stands_before_the_question(chat_of, start):
    template = chat_of(start + TURNS).tokenizer
    assert template.prompt(QUESTION) == USER and template.notes() == []
    expected = USER.replace(QUESTION, f"Be short.\n\n{QUESTION}")
    assert template.prompt(QUESTION, "Be short.") == expected
    (note,) = template.notes("Be short.")
    assert "has no system role" in note


def test_a_system_text_in_the_users_turn_is_the_templates_own_way(chat_of):
    template = chat_of(IN_USER_TURN).tokenizer
    assert template.prompt(QUESTION) == USER
    expected = USER.replace(QUESTION, f"Be short.\n\n{QUESTION}")
    assert template.prompt(QUESTION, "Be short.") == expected
    assert template.notes() == template.notes("Be short.") == []


@pytest.mark.parametrize("opened", ["<think>\n", "<think>"])
def test_an_open_thinking_block_is_closed_as_qwen3_closes_it(chat_of, opened):
    template = chat_of(TURNS + "{% if add_generation_prompt %}" + opened + "{% endif %}").tokenizer
    assert template.prompt(QUESTION) == USER + "<think>\n\n</think>\n\n"
    assert "opens a thinking block, which is closed at once" in template.notes()[0]
    # A question about the tag opens nothing.
    asked = chat_of(TURNS).tokenizer.prompt("Why <think> ?")
    assert asked.endswith("assistant\n")


def test_dates_do_not_change_from_day_to_day(chat_of):
    template = chat_of(DATED).tokenizer
    assert "Today: 26 Jul 2024" in template.prompt(QUESTION)
    assert "always 26 Jul 2024" in template.notes()[0] and len(template.notes()) == 1
    fickle = chat_of("{{ strftime_now('%Y') }}" + TURNS).tokenizer
    assert "prompts differ from day to day" in fickle.notes()[0]


def test_an_answer_ends_with_what_ends_its_turn(chat_of):
    """Gemma's tokenizer names the end of a text, its chats end turns with another token."""
    (end,), (other,) = map(
        load_chat(find_folder("tiny_qwen3")).text_ids, ("<|im_end|>", "<|im_start|>")
    )
    chat = chat_of(TURNS.replace("<|im_end|>\\n", "<|im_start|>\\n"))
    assert chat.eos_ids == (end,)
    chat = chat_of(TURNS.replace("<|im_end|>\\n", "<|im_start|>\\n"), generation_eos=[end, other])
    assert chat.eos_ids == (other, end)
    assert chat.sample(QUESTION, "tea").tokens[-1] == other


def test_a_template_that_fails_is_named(chat_of):
    chat = chat_of("{{ raise_exception('broken') }}")
    with pytest.raises(dit_jax.DitError, match="chat template of .* fails .*broken"):
        chat.prompt_ids(QUESTION)


def test_ask_takes_a_system_message(tmp_path, capfd):
    from dit_jax.cli.ask_diffs import main

    model = dit_jax.load_model("tiny_qwen3")
    plain = dit_jax.ask(model, QUESTION, max_new_tokens=8)
    other = dit_jax.ask(model, QUESTION, max_new_tokens=8, system="talk about sun")
    assert plain.logprob != other.logprob
    with pytest.raises(dit_jax.DitError, match="system is of type int"):
        dit_jax.ask(model, QUESTION, system=3)
    flags = ["--base", "tiny_qwen3", "--max-new-tokens", "8", "--json", QUESTION]
    assert main([*flags, "--system", "talk about sun"]) == 0
    assert f'"answer": "{other.text}"' in capfd.readouterr().out
    # An adapter says what its training said.
    adapter = jax.tree.map(np.zeros_like, init_lora(model.config, jax.random.key(0), 1))
    facts = {"base": model.digest(), "system": "talk about sun"}
    export_adapter(tmp_path / "adapter", adapter, **facts)
    flags += ["--adapter", str(tmp_path / "adapter")]
    for given, expected in (([], other), (["--system", ""], plain)):
        assert main([*flags, *given]) == 0
        assert f'"logprob": {expected.logprob:.4f}' in capfd.readouterr().out


CONVERSATION = Prompt(
    "And milk ?", "Be short.", (("user", QUESTION), ("assistant", "A drink.")), "It is "
)


def text_of(chat, asked):
    return chat.tokenizer.prompt(
        asked.question, asked.system, history=asked.history, prefill=asked.prefill
    )


@pytest.mark.parametrize("template", [TURNS, ADDS_SYSTEM, IN_USER_TURN, DATED])
def test_a_conversation_is_what_transformers_makes_of_it(chat_of, tmp_path, template):
    chat = chat_of(template)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    messages = [{"role": "system", "content": CONVERSATION.system}]
    messages += [{"role": role, "content": text} for role, text in CONVERSATION.history]
    messages += [{"role": "user", "content": CONVERSATION.question}]
    for prefill in ("", "It is"):
        asked = CONVERSATION._replace(prefill=prefill)
        start = [{"role": "assistant", "content": prefill}] if prefill else []
        expected = tokenizer.apply_chat_template(
            messages + start,
            add_generation_prompt=not prefill,
            continue_final_message=bool(prefill),
            date_string="26 Jul 2024",
            tokenize=False,
        )
        assert text_of(chat, asked) == expected
        assert list(chat.prompt_ids(asked)) == tokenizer.encode(expected, add_special_tokens=False)


def test_a_system_message_goes_where_the_template_lets_it_go(chat_of):
    chat = chat_of(IGNORES_SYSTEM + TURNS)
    text = text_of(chat, CONVERSATION)
    assert text.startswith(f"<|im_start|>user\nBe short.\n\n{QUESTION}<|im_end|>")
    assert text.endswith("<|im_start|>assistant\nIt is ") and text.count("Be short.") == 1
    none = text_of(chat_of(ADDS_SYSTEM), CONVERSATION._replace(system=""))
    assert none.startswith(f"<|im_start|>user\n{QUESTION}") and "Be" not in none
    own = load_chat(find_folder("tiny_qwen3"), system="Be odd.")
    assert own.prompt_ids(QUESTION) == own.prompt_ids(Prompt(QUESTION, "Be odd."), "Be even.")


def test_a_template_that_refuses_a_conversation_is_not_broken(chat_of):
    alone = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + TURNS
    chat = chat_of(alone)
    with pytest.raises(DitError, match=r"refuses this conversation \(one turn\)"):
        chat.prompt_ids(CONVERSATION)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "run 'git lfs pull'",
        ),
        (lambda _: b"<!DOCTYPE html><html></html>", "is a web page"),
        (lambda raw: b"\xef\xbb\xbf" + raw, "byte-order mark"),
        (lambda raw: raw.decode().encode("utf-16"), "byte-order mark"),
    ],
)
def test_files_that_are_no_tokenizer_say_what_they_are(
    tmp_path, monkeypatch, name, change, message
):
    """A pointer as a chat template would silently be every prompt."""
    here, tmp_path = tmp_path, tmp_path / NAME
    tmp_path.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(find_folder("tiny_qwen3") / file, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(change(whole))
    with pytest.raises(DitError) as error:
        load_chat(tmp_path)
    assert message in str(error.value) and f"/{name}' " in str(error.value)
    if message == "byte-order mark":  # the command that is told mends it
        run_told(str(error.value), here, monkeypatch)
        assert (tmp_path / name).read_bytes() == whole
