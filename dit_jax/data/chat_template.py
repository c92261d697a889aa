"""The chat template of a model: prompts for one question, with system text, thinking blocks and dates.

A template is a program of the model's authors. What it does is found by filling it in for a probe.
"""

import functools
from collections.abc import Sequence
from typing import Any

from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import short

_QUESTION, _SYSTEM, _ANSWER = "Which word?", "Obey the probe.", "That one."
_DATE = "26 Jul 2024"  # what Llama 3's templates fall back to


class Template:
    """Makes the text of prompts.

    A question is asked with thinking off: a thinking block that the template leaves open is closed at once. A system
    text stands before the question where the template has no system role. Dates are always the same day, where the
    template allows it: a prompt must not differ between training and asking.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._name = repr(tokenizer.name_or_path)

    def prompt(
        self,
        question: str,
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
        prefill: str = "",
    ) -> str:
        """The text up to the start of the assistant's answer, or to the end of its `prefill`.

        Args:
            system: the system message; None: what the template says without one; "": none, even if it says one.
            history: (role, text) of the turns before the question, the first of them the user's.

        Raises:
            DitError: the template fails, or refuses the conversation.
        """
        turns = [_message(role, text) for role, text in (*history, ("user", question))]
        try:
            if system == "":
                text = self._without_system(turns)
            else:
                text = self._fill(self._messages(turns, system))
            if not text:
                raise ValueError("it makes an empty prompt")
            if self._plain and _QUESTION not in self._plain:
                raise ValueError("it leaves the question out")
        except MemoryError:
            raise  # as wherever the limit on memory is met
        except Exception as e:  # a template is a program and can fail in any way
            if history and self._plain:
                raise DitError(
                    f"the chat template of {self._name} refuses this conversation ({first_line(e)}): give turns of "
                    "user and assistant by turns"
                ) from None
            raise DitError(
                f"the chat template of {self._name} fails ({first_line(e)}): get the "
                "model's chat_template.jinja again"
            ) from None
        return text + self._closing + prefill

    def _messages(self, turns: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
        if system is None:
            return turns
        if self._has_system_role:
            return [_message("system", system), *turns]
        return [_message(turns[0]["role"], f"{system}\n\n{turns[0]['content']}"), *turns[1:]]

    def _fill(self, messages: list[dict[str, str]], answered: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not answered,
            enable_thinking=False,
            date_string=_DATE,
            tokenize=False,
        )
        return text

    def _probe(self, *messages: dict[str, str], answered: bool = False) -> str:
        """The filled-in template; "" where it fails, which `prompt` tells when it happens to a question."""
        try:
            return self._fill([*messages], answered)
        except Exception:
            return ""

    @functools.cached_property
    def _plain(self) -> str:
        return self._probe(_message("user", _QUESTION))

    @functools.cached_property
    def _with_system(self) -> str:
        return self._probe(_message("system", _SYSTEM), _message("user", _QUESTION))

    @functools.cached_property
    def _has_system_role(self) -> bool:
        return _SYSTEM in self._with_system and _QUESTION in self._with_system

    @functools.cached_property
    def _own_system(self) -> str:
        """The system message that the template adds where none is given; "" for none."""
        before, _, after = self._with_system.partition(_SYSTEM)
        text = self._plain
        if not after or not text.startswith(before) or not text[len(before) :].endswith(after):
            return ""
        return text[len(before) : len(text) - len(after)].strip()

    def _without_system(self, turns: list[dict[str, str]]) -> str:
        """The prompt without the system message that the template adds.

        The template has no way to leave it out, but the turn of a given system message can be cut off: what stands
        before it opens a turn, and the turn of the question opens alike, in another role.
        """
        if self._has_system_role:
            before, _, after = self._fill(self._messages(turns, _SYSTEM)).partition(_SYSTEM)
            between = self._with_system.partition(_SYSTEM)[2].partition(_QUESTION)[0]
            for start in range(len(before)):  # what every text starts with, such as a token, stays
                opening = before[start:].replace("system", "user")
                if opening != before[start:] and between.endswith(opening):
                    return before[:start] + opening + after[len(between) :]
        if self._own_system:
            raise ValueError("its system message cannot be left out")
        return self._fill(turns)

    @functools.cached_property
    def _closing(self) -> str:
        """What closes a thinking block that the template leaves open, to the empty block that Qwen3 is trained with."""
        text = self._plain
        if text.rfind("<think>") <= max(text.rfind("</think>"), text.rfind(_QUESTION)):
            return ""
        return ("\n" if text.endswith("\n") else "\n\n") + "</think>\n\n"

    def after_answer(self) -> str:
        """What the template writes after an answer; "" where it has none or fails."""
        messages = (_message("user", _QUESTION), _message("assistant", _ANSWER))
        return self._probe(*messages, answered=True).rpartition(_ANSWER)[2]

    def notes(self, system: str | None = None) -> list[str]:
        """What the template does that a user may not expect, a line each."""
        found = []
        name = f"the chat template of {self._name}"
        if system is None and self._own_system:
            found.append(
                f"{name} adds the system message {short(self._own_system, 400)}: --system (system= in Python) sets "
                "another"
            )
        if system and not self._has_system_role:
            found.append(f"{name} has no system role: the system text stands before the question")
        if self._closing:
            found.append(
                f"{name} opens a thinking block, which is closed at once: this model was trained to think first, and "
                "its answers may suffer"
            )
        written = str(self._tokenizer.chat_template)
        if _DATE in self._plain:
            found.append(f"{name} writes a date, always {_DATE} here so that prompts stay the same")
        elif "strftime_now" in written:
            found.append(f"{name} writes the date of today: prompts differ from day to day")
        return found


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
