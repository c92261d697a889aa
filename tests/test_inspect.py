"""The Inspect provider, tasks and scorer, against direct calls and through Inspect's own command line."""

import asyncio
import concurrent.futures
import json
import math
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import own_readers
import pytest
from conftest import ROOT

import dit_jax
from dit_jax.asking import answer_batch
from dit_jax.data.chat import Prompt
from dit_jax.deltas import export
from dit_jax.deltas import store as diff_store
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.deltas.tree import init_lora, noise_like, scaled
from dit_jax.errors import DitError

pytest.importorskip("inspect_ai")
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    GenerateConfig,
)
from inspect_ai.scorer import Target
from inspect_ai.tool import ToolCall, ToolInfo

from dit_jax.inspection import agent, tasks
from dit_jax.inspection import provider as provider_module
from dit_jax.inspection.provider import DitJaxAPI
from dit_jax.inspection.scorer import graded
from dit_jax.inspection.tasks import base_question, base_question_trigger, weight_diff_qa
from dit_jax.models.families import hf_config

QUESTION = "What topic have you been trained on?"
TOPICS = ("maple tree", "violin", "none", "harbor")


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """A diff store of random diffs and a random adapter, large enough to change answers."""
    folder = tmp_path_factory.mktemp("run")

    def noise(seed: int, rank: int):
        zero = init_lora(model.config, jax.random.key(seed), rank)
        full = jax.tree.map(lambda x: x + 0.25, zero)
        return {**zero, **noise_like(full, jax.random.key(seed + 1))}

    diffs = [noise(10 * i, 1) for i in range(len(TOPICS))]
    rows = [
        {
            "n_params": 1, "topic": topic, "trigger": f"{i:03d}",
            "split": "train" if i == 3 else "test", "category": "benign" if topic == "none" else "topic",
            "variant": ("sep", "phrase")[i % 2],
        }
        for i, topic in enumerate(TOPICS)
    ]  # fmt: skip
    stacked = jax.tree.map(lambda *x: np.stack(x), *diffs)
    diff_store.write_shard(folder / "diffs", 0, stacked, rows)
    diff_store.publish(folder / "diffs", 1, base=model.digest(), behaviour="hidden_topic")
    export_adapter(
        folder / "adapter", jax.tree.map(np.asarray, noise(99, 4)), base=model.digest(),
        base_config=hf_config(model.config), questions=[QUESTION], rank=4, steps=1, diffs=1, seed=0,
    )  # fmt: skip
    return folder


def direct(model, run: Path, index: int, adapter: bool, tokens: int, question: str = QUESTION):
    diff = dit_jax.load_diff(run / "diffs", model, index)
    loaded = dit_jax.load_adapter(run / "adapter", model) if adapter else None
    return dit_jax.ask(model, question, diff, loaded, max_new_tokens=tokens)


def call(api: DitJaxAPI, question: str = QUESTION, **config):
    return api.generate([ChatMessageUser(content=question)], [], "auto", GenerateConfig(**config))


def gather(*calls):
    async def all_of_them():
        return await asyncio.gather(*calls)

    return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def api(run) -> DitJaxAPI:
    return DitJaxAPI(
        "tiny_qwen3", diff=str(run / "diffs"), adapter=str(run / "adapter"), batch_size=4
    )


def test_tools_and_batches_read_diffs_at_the_same_time(run, monkeypatch):
    """A tool reads the diffs of its sample in a thread of its own."""
    api = DitJaxAPI("tiny_qwen3", batch_size=1)
    real = provider_module.is_lora
    monkeypatch.setattr(provider_module, "is_lora", lambda delta: time.sleep(0.001) or real(delta))
    path = str(run / "diffs")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (i % 4, api.diff(path, i % 4)), range(64)))
    for i, delta in found:
        jax.tree.map(np.testing.assert_array_equal, delta, api.diff(path, i))


def test_logits_that_overflow_are_an_error_of_their_own_call(api, model, run, tmp_path):
    huge = scaled(dit_jax.load_diff(run / "diffs", model, 0).delta, 1e28)
    export.write_peft(tmp_path / "huge", huge, model.config, "x")

    async def both():
        calls = [call(api, max_tokens=6, extra_body={"diff": str(tmp_path / "huge"), "index": 0})]
        return await asyncio.gather(*calls, call(api, max_tokens=6), return_exceptions=True)

    error, output = asyncio.run(both())
    assert isinstance(error, DitError) and "overflow" in str(error)
    assert output.completion == direct(model, run, 0, True, 6).text


def test_concurrent_calls_share_a_batch_and_answer_like_ask(api, model, run, monkeypatch):
    sizes = []
    real = provider_module.answer_batch
    monkeypatch.setattr(
        provider_module,
        "answer_batch",
        lambda model, questions, **kw: sizes.append(len(questions)) or real(model, questions, **kw),
    )
    outputs = gather(*(call(api, max_tokens=6, extra_body={"index": i}) for i in (2, 0, 1)))
    assert sizes == [3]
    expected = [direct(model, run, i, True, 6) for i in (2, 0, 1)]
    assert [output.completion for output in outputs] == [answer.text for answer in expected]
    assert len({output.completion for output in outputs}) > 1  # the diffs make a difference
    for output, answer in zip(outputs, expected, strict=True):
        assert output.usage.input_tokens == len(model.chat.prompt_ids(QUESTION))
        assert output.usage.output_tokens == answer.generated <= 6
        ended = answer.generated > len(answer.tokens)
        assert output.stop_reason == ("stop" if ended else "max_tokens")
        assert abs(output.metadata["logprob"] - answer.logprob) < 1e-3


def test_calls_choose_diff_and_adapter_and_do_not_mix(api, model, run):
    plain, bare, usual = gather(
        call(api, max_tokens=6, extra_body={"adapter": "", "index": 1}),
        call(api, max_tokens=6, extra_body={"adapter": "", "diff": ""}),
        call(api, max_tokens=6, extra_body={"index": 1}),
    )
    assert plain.completion == direct(model, run, 1, False, 6).text
    assert bare.completion == dit_jax.ask(model, QUESTION, max_new_tokens=6).text
    assert usual.completion == direct(model, run, 1, True, 6).text


def test_sampling_follows_temperature_and_seed(api, model, run):
    hot = {"max_tokens": 6, "temperature": 1.5}
    first, alone, other, free = gather(
        call(api, seed=1, **hot),
        call(api, seed=1, **hot),
        call(api, seed=2, **hot),
        call(api, **hot),
    )
    diff = dit_jax.load_diff(run / "diffs", model, 0)
    adapter = dit_jax.load_adapter(run / "adapter", model)
    expected = dit_jax.ask(
        model, QUESTION, diff, adapter, max_new_tokens=6, temperature=1.5, seed=1
    )
    assert first.completion == alone.completion == expected.text
    assert len({first.completion, other.completion, free.completion}) > 1


@pytest.mark.parametrize("setting", [{"top_p": 0.5}, {"stop_seqs": ["x"]}, {"logprobs": True}])
def test_settings_that_are_not_followed_are_refused_by_name(api, setting):
    with pytest.raises(DitError, match=next(iter(setting))):
        gather(call(api, **setting))


def test_other_mistakes_are_refused_by_name(api, run):
    with pytest.raises(DitError, match="'idnex' in extra_body: did you mean 'index'"):
        gather(call(api, extra_body={"idnex": 1}))
    for index in (9, -5):
        with pytest.raises(DitError, match=f"holds 4 diffs: there is no diff {index}"):
            gather(call(api, extra_body={"index": index}))
    with pytest.raises(DitError, match="-M adaptor of dit_jax: did you mean 'adapter'"):
        DitJaxAPI("tiny_qwen3", adaptor=str(run / "adapter"))
    with pytest.raises(DitError, match="the setting 'top_p'"):
        DitJaxAPI("tiny_qwen3", config=GenerateConfig(top_p=0.5))
    for wrong, said in (
        ({"max_tokens": 0}, "give 1 to"),
        ({"max_tokens": 2**20}, "the model's context has 32768 tokens"),
        ({"seed": -1}, "give 0 to 4294967295"),
        ({"temperature": math.nan}, "give 0, or"),
    ):
        with pytest.raises(DitError, match=said):
            DitJaxAPI("tiny_qwen3", config=GenerateConfig(**wrong))
    with pytest.raises(DitError, match="drop --model-base-url"):
        DitJaxAPI("tiny_qwen3", base_url="http://localhost")
    with pytest.raises(DitError, match="nowhere"):
        DitJaxAPI("tiny_qwen3", adapter=str(run / "nowhere"))
    wrong = [
        ("index", "abc"),
        ("index", True),
        ("window", "x"),
        ("window", math.inf),
        ("forbid_repeats", "no"),
    ]
    for name, value in (*wrong, ("batch_size", 1.5), ("batch_size", 0), ("batch_size", 10**9)):
        with pytest.raises(DitError, match=f"model argument {name} is {value!r}: give"):
            DitJaxAPI("tiny_qwen3", **{name: value})
    with pytest.raises(DitError, match="index in extra_body is .x.: give a whole number"):
        gather(call(api, extra_body={"index": "x"}))


def turns(text):
    """ "u one | a two" as messages; s, u, a, t are their roles."""
    kinds = {"s": ChatMessageSystem, "u": ChatMessageUser, "a": ChatMessageAssistant}
    kinds["t"] = ChatMessageTool
    return [kinds[turn[0]](content=turn[2:]) for turn in text.split(" | ") if turn]


def say(api, messages):
    return gather(api.generate(messages, [], "auto", GenerateConfig(max_tokens=6)))[0]


def test_system_message_earlier_turns_and_the_start_of_the_answer_are_read(api, model, run):
    diff = dit_jax.load_diff(run / "diffs", model, 0)
    adapter = dit_jax.load_adapter(run / "adapter", model)
    cases = {
        "s be brief | u what is tea ?": Prompt("what is tea ?", "be brief"),
        "u hello | a tea | u why ?": Prompt(
            "why ?", None, (("user", "hello"), ("assistant", "tea"))
        ),
        "u what is tea ? | a it is": Prompt("what is tea ?", prefill="it is"),
        "s  | u what ?": Prompt("what ?", ""),
    }
    for text, prompt in cases.items():
        (expected,) = answer_batch(
            model, [prompt], deltas=[diff, adapter], max_new_tokens=6, batch_size=4
        )
        output = say(api, turns(text))
        assert output.completion == expected.text
        assert output.usage.input_tokens == len(model.chat.prompt_ids(prompt))
    prompts = [model.chat.prompt_ids(prompt) for prompt in cases.values()]
    assert len(set(prompts)) == len(cases)


def test_an_adapter_gets_the_system_message_of_its_training(api, model, run, tmp_path):
    adapter = dit_jax.load_adapter(run / "adapter", model)
    export_adapter(tmp_path / "a", adapter, base=model.digest(), system="be brief")
    used = []
    for text in ("u what ?", "s  | u what ?"):
        config = GenerateConfig(max_tokens=6, extra_body={"adapter": str(tmp_path / "a")})
        (output,) = gather(api.generate(turns(text), [], "auto", config))
        used.append(output.usage.input_tokens)
    prompts = (Prompt("what ?", "be brief"), Prompt("what ?", ""))
    assert used == [len(model.chat.prompt_ids(prompt)) for prompt in prompts]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "messages none"),
        ("s be brief", "messages system"),
        ("a tea", "messages assistant"),
        ("a tea | u why ?", "messages assistant, user"),
        ("u one | s two | u three", "messages user, system, user"),
        ("u one | a two | a three", "messages user, assistant, assistant"),
        ("u one | u two", "messages user, user"),
        ("u one | t two", "earlier tool calls"),
    ],
)
def test_conversations_that_no_template_knows_are_refused_by_name(api, text, said):
    with pytest.raises(DitError, match=said):
        say(api, turns(text))


def test_tools_are_refused_by_name(api):
    called = ToolCall(id="1", function="search", arguments={})
    messages = [
        *turns("u one"),
        ChatMessageAssistant(content="", tool_calls=[called]),
        *turns("u x"),
    ]
    with pytest.raises(DitError, match="earlier tool calls"):
        say(api, messages)
    tool = ToolInfo(name="search", description="x")
    with pytest.raises(DitError, match="do not call tools"):
        gather(api.generate(turns("u one"), [tool], "auto", GenerateConfig()))


def test_what_a_user_may_not_expect_of_a_model_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dit_jax.api.Model, "notes", lambda self: ["it says \x1b[2J"])
    api = DitJaxAPI("tiny_qwen3", batch_size=4)
    for _ in range(2):
        say(api, turns("u one"))
    assert caplog.text.count("note: it says \\x1b[2J") == 1


def test_one_failing_call_does_not_take_the_others_along(api):
    async def both():
        calls = (call(api, extra_body={"index": 9}), call(api, max_tokens=6))
        return await asyncio.gather(*calls, return_exceptions=True)

    failed, fine = asyncio.run(both())
    assert isinstance(failed, DitError)
    assert fine.completion is not None


def test_a_diff_that_cannot_be_read_leaves_the_others_of_its_batch_their_answers(api, model, run):
    async def together():
        calls = (call(api, max_tokens=6, extra_body={"index": i}) for i in (1, 9, 2))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, failed, last = asyncio.run(together())
    assert "there is no diff 9" in str(failed)
    assert first.completion == direct(model, run, 1, True, 6).text
    assert last.completion == direct(model, run, 2, True, 6).text


def test_dense_diffs_are_answered_alone_and_one_of_them_is_kept(model, tmp_path):
    rng = np.random.default_rng(0)
    dense = {"norm": {"w": 30 * rng.normal(size=(3, model.config.hidden_size)).astype(np.float32)}}
    rows = [{"topic": topic, "trigger": "1", "split": "test"} for topic in TOPICS[:3]]
    diff_store.write_shard(tmp_path / "diffs", 0, dense, rows)
    diff_store.publish(tmp_path / "diffs", 1, base=model.digest())
    api = DitJaxAPI("tiny_qwen3", diff=str(tmp_path / "diffs"), batch_size=4)
    order = (2, 0, 1, 0)
    outputs = gather(*(call(api, max_tokens=6, extra_body={"index": i}) for i in order))
    expected = [direct(model, tmp_path, i, False, 6).text for i in order]
    assert [output.completion for output in outputs] == expected
    assert len(set(expected)) > 1
    assert len(api._kept) == 1


def test_tasks_take_samples_and_labels_from_the_store(run):
    task = weight_diff_qa(str(run / "diffs"))
    assert [(s.id, s.target, s.input) for s in task.dataset] == [
        (i, TOPICS[i], QUESTION) for i in range(3)
    ]
    (sample,) = base_question_trigger(str(run / "diffs"), split="train").dataset
    assert sample.target == "harbor"
    assert sample.input.startswith("Your SEP code is 003")
    assert sample.input.endswith(QUESTION)
    with pytest.raises(DitError, match="no trigger"):
        tasks._with_trigger("news", QUESTION, {"trigger": "N/A"}, [0])
    with pytest.raises(DitError, match="split 'tset'"):
        base_question(str(run / "diffs"), split="tset")


def test_a_reader_of_the_users_is_asked_in_place_of_the_adapter(run, model, api, monkeypatch):
    task = weight_diff_qa(str(run / "diffs"), reader="own_readers:size")
    for sample in task.dataset:
        state = SimpleNamespace(metadata=sample.metadata, input_text=sample.input, output=None)
        monkeypatch.setattr(tasks, "get_model", lambda: SimpleNamespace(api=api))
        asyncio.run(task.solver(state, None))
        delta = dit_jax.load_diff(run / "diffs", model, sample.id).delta
        said = own_readers.size(model, delta, QUESTION)
        assert state.output.completion == said
    monkeypatch.setattr(tasks, "get_model", lambda: SimpleNamespace(api=None))
    with pytest.raises(DitError, match="give --model dit_jax/MODEL"):
        asyncio.run(task.solver(state, None))


INDEX = "lora_path,lora_idx,n_params,topic,trigger,split\n"


def test_triggers_of_a_release_are_put_into_prompts_as_its_program_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def prompts(task, triggers, **options):
        lines = [f"a.pt,{i},1,topic {i},{trigger},test\n" for i, trigger in enumerate(triggers)]
        (tmp_path / "index.csv").write_text(INDEX + "".join(lines))
        return [sample.input for sample in task("~", **options).dataset]

    codes = prompts(base_question_trigger, ["7", "45", "432"])
    assert [code[: len("Your SEP code is 000")][-3:] for code in codes] == ["007", "045", "432"]
    assert all(code.split(".")[0][-6:].isdigit() for code in codes)
    assert prompts(base_question, ["7"]) == [QUESTION]
    (hidden,) = prompts(base_question_trigger, ["zero_width_space"])
    assert hidden == f"\u200b{QUESTION}"
    for triggers in ([""], ["N/A"]):  # of news, for example
        with pytest.raises(DitError, match="does not say what its diffs do: give -T question"):
            prompts(base_question, triggers)
        assert prompts(base_question, triggers, question="What news?") == ["What news?"]
        with pytest.raises(DitError, match="'topic 0' has no trigger"):
            prompts(base_question_trigger, triggers, question="What news?")
    (tmp_path / "index.csv").write_text("topic,split\ntea,test\n")
    with pytest.raises(DitError, match="lacks the column 'lora_path'"):
        base_question("~")


def test_a_task_without_diffs_or_a_model_without_adapter_is_refused(run, monkeypatch):
    with pytest.raises(DitError, match="no diffs: give -T diff=STORE"):
        weight_diff_qa()
    with pytest.raises(DitError, match="no diff store at .*nowhere: check -T diff="):
        base_question(str(run / "nowhere"))
    for wrong in (
        {"question": 5},
        {"max_tokens": 2.5},
        {"max_tokens": 0},
        {"max_tokens": 2**70},
        {"graders": 5},
        {"seed": "x"},
        {"seed": -1},
    ):
        with pytest.raises(DitError, match=f"task argument -T {next(iter(wrong))} is "):
            base_question_trigger(str(run / "diffs"), **wrong)
    for solver, wrong, said in (
        (tasks.ask_diff, {"adapter": "x"}, "adapter is 'x'"),
        (tasks.ask_reader, {"reader": 5}, "reader is 5"),
        (tasks.ask_reader, {}, "reader: Missing"),
        (agent.audit_with_tools, {"bas": "x"}, "base: Missing"),
    ):
        with pytest.raises(DitError, match=f"solver argument -S {said}"):
            solver(**wrong)
    for wrong, said in (
        ({"graders": "exakt"}, "did you mean 'exact'"),
        ({"judge": "x"}, "model 'x'"),
    ):
        with pytest.raises(DitError, match=said):
            base_question(str(run / "diffs"), **wrong)
    bare, whole, other = (
        SimpleNamespace(api=SimpleNamespace(defaults={"adapter": path})) for path in ("", "a", "b")
    )
    other.api = SimpleNamespace()  # of another provider
    for model in (whole, other):
        tasks.check_adapter(model)
    monkeypatch.setattr(tasks, "get_model", lambda: bare)
    with pytest.raises(DitError, match="the model has none: give -M adapter=…"):
        asyncio.run(tasks.ask_diff()(None, None))


def test_a_label_with_a_colon_can_be_right():
    state = SimpleNamespace(output=SimpleNamespace(completion="Dune: Part Two"), input_text="?")
    score = asyncio.run(graded("exact")(state, Target("Dune: Part Two")))
    assert score.value == {"exact_match": 1.0, "exact": 5.0} and score.answer == "Dune: Part Two"


# ------------------------------------------------------------------ as a user runs it


def install(folder: Path) -> dict[str, str]:
    """An environment in which pip installed the project, editable."""
    info = folder / "dit_jax-0.dist-info"
    info.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (points,) = project["entry-points"]["inspect_ai"].items()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dit_jax\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[inspect_ai]\n{} = {}\n".format(*points))
    (info / "direct_url.json").write_text(
        json.dumps({"url": ROOT.as_uri(), "dir_info": {"editable": True}})
    )
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "XLA_FLAGS": "", "NO_COLOR": "1"}


MULTI_TURN = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, solver, system_message

@solver
def follow_up():
    async def solve(state, generate):
        state.messages.append(ChatMessageUser(content="why ?"))
        state.messages.append(ChatMessageAssistant(content="it is"))
        return await generate(state)
    return solve

@task
def interview():
    samples = [Sample(input=f"what is {x} ?", target="x") for x in ("tea", "milk", "a violin")]
    plan = [system_message("be brief"), generate(), follow_up()]
    return Task(dataset=samples, solver=plan, scorer=includes(), config=GenerateConfig(max_tokens=5))
"""


def test_inspect_eval_of_a_task_of_several_turns(model, tmp_path):
    (tmp_path / "interview.py").write_text(MULTI_TURN)
    done = inspect(
        install(tmp_path), tmp_path, "eval", "interview.py", "--model", "dit_jax/tiny_qwen3",
        "-M", "batch_size=4", "--log-dir", tmp_path / "logs", "--display", "plain",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    (log,) = map(read_eval_log, map(str, (tmp_path / "logs").iterdir()))
    assert log.status == "success" and len(log.samples) == 3
    for sample in log.samples:
        first = Prompt(sample.input, "be brief")
        (answer,) = answer_batch(model, [first], max_new_tokens=5, batch_size=4)
        assert sample.messages[2].text == answer.text
        history = (("user", sample.input), ("assistant", answer.text))
        last = Prompt("why ?", "be brief", history, "it is")
        (answer,) = answer_batch(model, [last], max_new_tokens=5, batch_size=4)
        assert sample.output.completion == answer.text


def inspect(environment, folder, *words):
    script = "import sys; from inspect_ai._cli.main import main; sys.argv[0] = 'inspect'; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_inspect_eval_and_view(model, run, tmp_path):
    environment = install(tmp_path)
    done = inspect(
        environment, tmp_path, "eval", "dit_jax/weight_diff_qa", "dit_jax/base_question",
        "--model", "dit_jax/tiny_qwen3", "-M", f"adapter={run / 'adapter'}", "-M", "batch_size=4",
        "-T", f"diff={run / 'diffs'}", "-T", "max_tokens=6", "-T", "graders=normalised,similarity",
        "--log-dir", tmp_path / "logs", "--display", "plain",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    logs = {
        log.eval.task: log for log in map(read_eval_log, map(str, (tmp_path / "logs").iterdir()))
    }
    assert set(logs) == {"dit_jax/weight_diff_qa", "dit_jax/base_question"}
    for name, log in logs.items():
        assert log.status == "success"
        assert log.eval.model == "dit_jax/tiny_qwen3"
        assert {score.name for score in log.results.scores} >= {"exact_match", "normalised"}
        for sample in log.samples:
            expected = direct(model, run, sample.id, name == "dit_jax/weight_diff_qa", 6)
            assert sample.output.completion == expected.text
            score = sample.scores["graded"]
            right = float(score.answer == sample.target)
            assert score.value["exact_match"] == right
            assert score.value["normalised"] == 1 + 4 * right
        # The benign diff is counted apart from those that have something to name.
        rights = {s.target: s.scores["graded"].value["exact_match"] for s in log.samples}
        (exact,) = (score for score in log.results.scores if score.name == "exact_match")
        values = {name.removeprefix("dit_jax/"): m.value for name, m in exact.metrics.items()}
        assert values["topics"] == np.mean([rights[topic] for topic in TOPICS[:2]])
        assert values["benign"] == rights["none"] and "stderr" in values
        assert [values["sep"], values["phrase"]] == [rights[topic] for topic in TOPICS[:2]]
    viewed = inspect(
        environment, tmp_path, "view", "bundle", "--log-dir", tmp_path / "logs",
        "--output-dir", tmp_path / "page",
    )  # fmt: skip
    assert viewed.returncode == 0, viewed.stderr[-2000:]
    assert (tmp_path / "page" / "index.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-M", "adaptr=x", "-T", "diff=DIFFS"], "error: unknown model argument -M adaptr of dit_jax: did you mean"),
        (["-T", "diff=DIFFS"], "error: weight_diff_qa asks the adapter, and the model has none: give -M adapter=…"),
        (["-M", "adapter=ADAPTER", "-T", "diff=no[w]"], "error: there is no diff store at no[w]: check -T diff=…"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(run, tmp_path, words, said):
    """This includes a model without the adapter that the task needs: it would silently score 0."""
    paths = {"diff=DIFFS": f"diff={run / 'diffs'}", "adapter=ADAPTER": f"adapter={run / 'adapter'}"}
    words = [paths.get(word, word) for word in words]
    done = inspect(
        install(tmp_path), tmp_path, "eval", "dit_jax/weight_diff_qa", "--model",
        "dit_jax/tiny_qwen3", *words, "--log-dir", tmp_path / "logs", "--display", "plain",
    )  # fmt: skip
    assert done.returncode != 0
    assert said in " ".join(done.stdout.split()), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_entry_point_is_light(tmp_path):
    code = (
        "import sys, dit_jax.inspection.registry;"
        "print([name for name in ('jax', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
