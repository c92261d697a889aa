"""Judges: a local chat model decoded by dit_jax, and API models through Inspect's mock provider."""

import asyncio
import subprocess
import sys

import pytest
from conftest import ROOT

from dit_jax.errors import DitError
from dit_jax.graders import Cache, get_grader, grade
from dit_jax.graders.grades import Item

ITEMS = [("jazz", "blues"), ("jazz", "jazz"), ("tea", "coffee"), ("tea", "tea")]


# ------------------------------------------------------------------ a local model


def test_the_local_judge_decodes_the_prompt_as_ask_does(monkeypatch):
    import dit_jax
    from dit_jax.graders import judge as module

    # The embedded model knows no digits, so a prompt of its world shows the question and the reply.
    monkeypatch.setattr(module, "judge_prompt", lambda item: f"what is {item.label} ?")
    model = dit_jax.load_model("tiny_qwen3")
    judge = get_grader("judge", model=model, batch=4)
    graded = grade(judge, ITEMS)
    assert judge.name == "judge:tiny_qwen3" and judge.deterministic
    for label, (made,) in zip((label for label, _ in ITEMS), graded.grades, strict=True):
        expected = dit_jax.ask(model, f"what is {label} ?", max_new_tokens=module.MAX_NEW_TOKENS)
        assert made.raw == expected.text != ""
    assert graded.gaps == {"the judge's reply is no grade": 4}


def test_the_local_judge_grades_with_the_digit_it_says(monkeypatch):
    from dit_jax import asking

    asked = []

    def answer_batch(model, questions, **options):
        asked.append((list(questions), options["seed"], options["temperature"]))
        return [asking.Answer("4" if "coffee" in q else "1", (), 0.0, 1) for q in questions]

    monkeypatch.setattr(asking, "answer_batch", answer_batch)
    judge = get_grader("judge", model="tiny_qwen3", temperature=0.7, seed=5)
    graded = grade(judge, ITEMS[2:3], repeats=2)
    assert graded.scores() == [4] and graded.agreement().same == 1
    assert [seed for _, seed, _ in asked] == [5, 6]
    assert "coffee" in asked[0][0][0] and asked[0][2] == 0.7


def test_a_judge_without_a_model_or_tokenizer_is_refused():
    with pytest.raises(DitError, match="'nowhere' does not exist"):
        get_grader("judge", model="nowhere")
    with pytest.raises(DitError, match="temperature -1"):
        get_grader("judge", model="tiny_qwen3", temperature=-1)


# ------------------------------------------------------------------ Inspect


@pytest.fixture
def inspect_model():
    return pytest.importorskip("inspect_ai.model", reason="inspect_ai is not installed")


def output_of(inspect_model, text):
    """The mock's output with its usage; without usage it would fetch a tokenizer to count tokens."""
    usage = inspect_model.ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    made = inspect_model.ModelOutput.from_content("mockllm/model", text)
    return made.model_copy(update={"usage": usage})


def mock(inspect_model, outputs, wait=0.001):
    """A judge whose model replies with `outputs` in turn; an exception is raised."""
    replies = iter(outputs)

    def reply(*_):
        output = next(replies)
        if isinstance(output, Exception):
            raise output
        return output_of(inspect_model, output)

    options = {"custom_outputs": reply, "wait": wait, "attempts": 3, "connections": 1}
    judge = get_grader("inspect", model="mockllm/model", **options)
    # As a provider does for its client's errors.
    judge.model.api.should_retry = lambda error: isinstance(error, OSError)
    return judge


def test_inspect_grades_in_order(inspect_model):
    judge = mock(inspect_model, ["1", "5", "Grade: 2", "4"])
    graded = grade(judge, ITEMS)
    assert graded.scores() == [1, 5, 2, 4]
    assert graded.grader == "inspect:mockllm/model" and not judge.deterministic


def test_inspect_by_name_and_a_reply_that_is_no_grade(inspect_model):
    outputs = [output_of(inspect_model, "I would rather not say.")]
    judge = get_grader("inspect", model="mockllm/model", custom_outputs=outputs, memoize=False)
    graded = grade(judge, ITEMS[:1])
    assert graded.scores() == [None]
    assert graded.gaps == {"the judge's reply is no grade": 1}


def test_inspect_tries_again_and_waits_longer_each_time(inspect_model, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    judge = mock(inspect_model, [TimeoutError("slow"), ConnectionError("gone"), "4", "5"], 1.0)
    monkeypatch.setattr("anyio.sleep", sleep)
    assert grade(judge, ITEMS[:2]).scores() == [4, 5]
    assert len(waits) == 2 and 1 <= waits[0] <= 1.25 and 2 <= waits[1] <= 2.5


def test_inspect_gives_up_as_a_gap_that_is_not_kept(inspect_model, tmp_path):
    judge = mock(inspect_model, [OSError("down")] * 3 + ["3"])
    cache = Cache(tmp_path / "grades.jsonl")
    graded = grade(judge, ITEMS[:1], cache=cache)
    assert graded.scores() == [None]
    assert graded.gaps == {"no reply after 3 attempts (OSError)": 1}
    assert "down" in graded.grades[0][0].raw
    assert grade(judge, ITEMS[:1], cache=cache).scores() == [3]
    assert grade(judge, ITEMS[:1], cache=cache).from_cache == 1


def test_inspect_does_not_try_again_what_cannot_succeed(inspect_model):
    judge = mock(inspect_model, [PermissionError("wrong key"), "4", ValueError("bad"), "3"])
    judge.model.api.should_retry = lambda error: False
    graded = grade(judge, ITEMS)
    assert graded.scores() == [None, 4, None, 3]
    assert graded.gaps == {"no reply (PermissionError)": 1, "no reply (ValueError)": 1}


def test_inspect_works_inside_an_event_loop(inspect_model):
    judge = mock(inspect_model, ["2", "3"])

    async def both():
        awaited = await judge.grade_async([Item("a", "b")])
        return awaited[0].score, grade(judge, [("c", "d")]).scores()

    assert asyncio.run(both()) == (2, [3])


def test_inspect_says_what_is_missing(inspect_model, monkeypatch):
    with pytest.raises(DitError, match="Inspect cannot give the model 'nosuch/model'"):
        get_grader("inspect", model="nosuch/model")

    def needs_its_client(*_, **__):
        raise RuntimeError("[bold]ERROR[/bold]: Install with:\n\n[bold]pip install openai[/bold]")

    with monkeypatch.context() as patch:
        patch.setattr(inspect_model, "get_model", needs_its_client)
        with pytest.raises(DitError, match="'openai/x': Install with: pip install openai$"):
            get_grader("inspect", model="openai/x")
    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    with pytest.raises(DitError, match=r"pip install 'dit_jax\[grading\]'"):
        get_grader("inspect", model="mockllm/model")


# ------------------------------------------------------------------ imports


def test_offline_graders_import_no_optional_package():
    code = (
        "import sys; from dit_jax.graders import get_grader, grade;"
        "g = [get_grader(n) for n in ('exact', 'normalised', 'similarity', 'calibrated')];"
        "[grade(x, [('a b', 'a')]) for x in g];"
        "bad = {'torch', 'sklearn', 'inspect_ai', 'sentence_transformers', 'transformers'};"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
