"""Calls of the Inspect provider share batches, and nothing else: errors and cancellations stay with their call."""

import asyncio
import random
import threading
import time

import anyio
import pytest

from dit_jax.errors import DitError

pytest.importorskip("inspect_ai")
from inspect_ai.model import (
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
)

from dit_jax.inspection.batching import Batcher
from dit_jax.inspection.provider import DitJaxAPI

QUESTION = "What topic have you been trained on?"


@pytest.fixture(scope="module")
def api():
    return DitJaxAPI("tiny_qwen3", batch_size=4, window=0.1)


def generate(api, messages, **settings):
    """The answers to messages asked at once; an error in the place of an answer."""
    found = {}

    async def one(i, content):
        try:
            turn = [ChatMessageUser(content=content)]
            config = GenerateConfig(**{"max_tokens": 4, **settings})
            found[i] = (await api.generate(turn, [], "auto", config)).completion
        except Exception as error:
            found[i] = error

    async def everything():
        async with anyio.create_task_group() as group:
            for i, content in enumerate(messages):
                group.start_soon(one, i, content)

    anyio.run(everything)
    return [found[i] for i in range(len(messages))]


@pytest.mark.parametrize("wrong", ["tea " * 5000, "a \ud800 b"])
def test_an_error_of_one_call_stays_there(api, wrong):
    (alone,) = generate(api, [QUESTION])
    *answers, error = generate(api, [QUESTION, QUESTION, wrong])
    assert answers == [alone, alone] and isinstance(error, DitError)


@pytest.mark.parametrize(
    "part",
    [
        ContentImage(image="data:image/png;base64,AAAA"),
        ContentAudio(audio="data:audio/wav;base64,AAAA", format="wav"),
        ContentReasoning(reasoning="hm"),
    ],
)
def test_what_is_no_text_is_refused_by_name(api, part):
    (error,) = generate(api, [[ContentText(text=QUESTION), part]])
    assert isinstance(error, DitError) and f"a part of type '{part.type}'" in str(error)


def test_parts_of_text_are_read(api):
    assert generate(api, [[ContentText(text=QUESTION)]]) == generate(api, [QUESTION])


NUMBERS = [
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2**40}, {"max_tokens": 2**70},
    {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
    {"temperature": 1e300}, {"temperature": 1e-300},
    {"seed": -1, "temperature": 1.0}, {"seed": 2**32, "temperature": 1.0}, {"seed": 2**64},
    {"extra_body": {"forbid_repeats": "no"}},
]  # fmt: skip


@pytest.mark.parametrize("settings", NUMBERS, ids=str)
def test_numbers_that_jax_does_not_take_are_refused(api, settings):
    (error,) = generate(api, [QUESTION], **settings)
    name = next(iter(settings.get("extra_body", settings)))
    assert isinstance(error, DitError) and str(error).startswith(f"{name} is ")


def test_ten_thousand_calls_with_errors_cancellations_and_time_outs_get_their_own_answers():
    rng = random.Random(0)
    wrong = set(rng.sample(range(10_000), 1_500))
    worked = []

    def work(items):
        worked.append(len(items))
        time.sleep(rng.random() / 2000)
        # Half of the errors are given in the place of a result, half fail the whole batch.
        if any(i in wrong and i % 2 for i in items):
            raise ValueError(str([i for i in items if i in wrong]))
        return [ValueError(f"[{i}]") if i in wrong else ("answer", i) for i in items]

    batcher = Batcher(work, 16, 0.0)
    found, patient = {}, set()

    async def one(i, seconds, cancelled):
        with anyio.move_on_after(seconds) as scope:
            if cancelled:
                scope.cancel()
            try:
                found[i] = await batcher(i % 3, i)
            except ValueError as error:
                found[i] = str(error)

    async def everything():
        for start in range(0, 10_000, 200):
            async with anyio.create_task_group() as group:
                for i in range(start, start + 200):
                    kind = rng.random()
                    seconds = rng.random() / 50 if kind < 0.1 else float("inf")
                    if 0.1 <= kind <= 0.9:
                        patient.add(i)
                    group.start_soon(one, i, seconds, kind > 0.9)

    anyio.run(everything)
    assert found == {i: f"[{i}]" if i in wrong else ("answer", i) for i in found}
    # How many of the hurried calls are in time depends on the machine; who waits gets an answer.
    assert patient <= set(found) and len(found) < 10_000
    assert max(worked) == 16


@pytest.mark.parametrize("cancelled", [0, 2])
def test_what_asyncio_cancels_leaves_its_batch_as_it_is(cancelled):
    """`Task.cancel` and `asyncio.wait_for`, which no shield of anyio's keeps off: the app's own way."""
    at_work, worked = [], []
    begun, may_end = threading.Event(), threading.Event()

    def work(items):
        at_work.append(1)
        worked.append((len(items), len(at_work)))
        begun.set()
        assert may_end.wait(60)
        at_work.pop()
        return items

    async def everything():
        batcher = Batcher(work, 4, 0.05)
        calls = [asyncio.ensure_future(batcher("key", i)) for i in range(4)]
        assert await asyncio.to_thread(begun.wait, 60)
        calls[cancelled].cancel()
        calls.append(asyncio.ensure_future(batcher("key", 4)))
        await asyncio.sleep(0.2)  # time enough to begin beside the first batch
        may_end.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(everything())
    assert isinstance(found.pop(cancelled), asyncio.CancelledError)
    assert found == [i for i in range(5) if i != cancelled]
    assert worked == [(4, 1), (1, 1)]


def test_a_panic_of_a_native_library_is_the_error_of_its_call():
    class Panic(BaseException):
        pass

    def work(items):
        if 1 in items:
            raise Panic("no Exception")
        return items

    async def everything():
        batcher = Batcher(work, 4, 0.01)
        return await asyncio.gather(*(batcher("key", i) for i in range(3)), return_exceptions=True)

    first, panic, last = asyncio.run(everything())
    assert (first, last) == (0, 2) and isinstance(panic, Panic)
