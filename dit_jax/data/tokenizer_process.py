"""Tokenizers and chat templates of untrusted bases, used through a process with limits (`tokenizer_worker`)."""

import atexit
import contextlib
import itertools
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from dit_jax.data import tokenizer_worker
from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.formats.files import is_decoded, short
from dit_jax.formats.recognise import HEAD_BYTES, what_file
from dit_jax.runtime.os_errors import explain_os_errors


class Failure(Exception):
    """What the process could not do, in words that end a sentence."""


class _Process:
    """The one process of this program: it starts when it is first needed, and again after a text has killed it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the process unless it runs."""
        if self._running is None:
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-m", tokenizer_worker.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # panics are told there
                start_new_session=True,  # Ctrl-C is for this program
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(place or "." for place in sys.path),
                    "HF_HUB_OFFLINE": "1",  # no file of a base makes it ask elsewhere
                    "TOKENIZERS_PARALLELISM": "false",
                    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
                },
            )
        return self._running

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request that may take so many seconds of CPU time.

        Raises:
            Failure: the process needed more time or memory, or a library failed.
        """
        with self._lock:
            try:
                process = self.start()
            except OSError as error:
                raise Failure(f"its process does not start: {error.strerror}") from None
            assert process.stdin is not None and process.stdout is not None
            reply = None
            try:
                tokenizer_worker.send(process.stdin, {**request, "seconds": seconds})
                reply = tokenizer_worker.receive(process.stdout, budgets.MAX_REPLY_BYTES)
            except (BrokenPipeError, ValueError):
                pass  # it died while it was asked, or did not reply in JSON
            finally:
                # An interruption, too, leaves a reply that would be taken for the next.
                if reply is None:
                    code = self.stop(0.5)
            if reply is None:
                if code == -signal.SIGPROF:
                    raise Failure(f"it takes more than {seconds:.0f} s of CPU time")
                raise Failure(f"its process ended, status {code}: too much memory, or a crash")
        if reply.get("memory"):
            raise Failure(f"it takes more than {budgets.TOKENIZER_BYTES >> 20} MB of memory")
        if "error" in reply:
            raise DitError(reply["error"]) if reply["ours"] else Failure(reply["error"])
        return reply

    def stop(self, patience: float = 0.0) -> int | None:
        """Ends the process. Returns its exit status, None where none ran."""
        process, self._running = self._running, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not written yet has no reader
                    stream.close()
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


_process = _Process()
_numbers = itertools.count()


_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def check_files(folder: pathlib.Path) -> None:
    """Refuses files that are not what their name says: as a chat template, any text would be taken.

    Raises:
        DitError: a Git LFS pointer, a web page, or a byte-order mark, which would be part of every prompt.
    """
    for file in (folder / name for name in _FILES):
        if not file.is_file():
            continue
        with explain_os_errors("read", file), file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
        if what := what_file(head):
            raise DitError(f"'{file}' {what}")
        for mark, encoding in _MARKS.items():
            if head.startswith(mark):
                raise DitError(
                    f"'{file}' begins with a byte-order mark, which no tokenizer reads: python -c \"import pathlib, "
                    f"sys; f = pathlib.Path(sys.argv[1]); f.write_bytes(f.read_text('{encoding}').encode())\" "
                    f"{shlex.quote(str(file))}"
                )


class Tokenizer:
    """A tokenizer and its chat template, by the files of a model folder or by a GGUF file.

    Attributes:
        name_or_path: the folder or file.
        has_chat_template: whether there is a chat template.
        eos_token_id, pad_token_id, unk_token_id: ids, or None.
        model_max_length: the most tokens of a prompt.
        largest: the largest id of its vocabulary without special tokens.

    Raises:
        DitError: the tokenizer cannot be read, see also `check_files`.
    """

    def __init__(self, path: pathlib.Path):
        self.name_or_path = str(path)
        self._path = path
        self._number = next(_numbers)
        check_files(path)
        try:
            facts = self._load()
        except Failure as error:
            raise DitError(f"{path}: the tokenizer cannot be read: {error}") from None
        self.has_chat_template = bool(facts["chat_template"])
        self.eos_token_id: int | None = facts["eos_token_id"]
        self.pad_token_id: int | None = facts["pad_token_id"]
        self.unk_token_id: int | None = facts["unk_token_id"]
        self.largest: int = facts["largest"]
        self.model_max_length: float = facts["model_max_length"]
        most = self.model_max_length
        if type(most) not in (int, float) or math.isnan(most) or most < 1:
            raise DitError(
                f"{path}: model_max_length of the tokenizer is {short(most)}, no number of tokens: "
                "get tokenizer_config.json again"
            )

    def prompt(self, question: str, system: str | None = None, **turns: Any) -> str:
        """The text of a prompt (`chat_template.Template`). Raises DitError."""
        return self._fill("prompt", question, system, **turns)["text"]

    def prompt_ids(self, question: str, system: str | None = None, **turns: Any) -> list[int]:
        """The ids of a prompt (`chat_template.Template`). Raises DitError."""
        return self._fill("prompt_ids", question, system, **turns)["ids"]

    def after_answer_ids(self) -> list[int]:
        """The ids of what the template writes after an answer. Raises DitError."""
        return self._fill("after_answer_ids", "", None)["ids"]

    def notes(self, system: str | None = None) -> list[str]:
        """What the template does that a user may not expect, a line each. Raises DitError."""
        return self._fill("notes", "", system)["notes"]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it. Raises DitError."""
        _check(text)
        try:
            return self._ask({"do": "encode", "text": text}, len(text))["ids"]
        except Failure as error:
            raise self._error(error) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids. Raises DitError."""
        request = {
            "do": "decode",
            "ids": list(map(int, ids)),
            "skip_special_tokens": skip_special_tokens,
        }
        try:
            return self._ask(request, len(ids))["text"]
        except Failure as error:
            raise self._error(error) from None

    def raw_ids(self, text: str) -> list[int]:
        """Ids of a text with the tokens that the tokenizer puts around it, and no chat template. Raises DitError."""
        _check(text)
        try:
            return self._ask({"do": "encode", "text": text, "special": True}, len(text))["ids"]
        except Failure as error:
            raise self._error(error) from None

    def _load(self) -> dict[str, Any]:
        request = {"do": "load", "tokenizer": self._number, "path": os.path.abspath(self._path)}
        return _process.ask(request, budgets.LOADING_SECONDS)

    def _fill(
        self,
        do: str,
        question: str,
        system: str | None,
        history: Sequence[tuple[str, str]] = (),
        prefill: str = "",
    ) -> dict[str, Any]:
        prompt = {"question": question, "system": system, "history": history, "prefill": prefill}
        texts = (question, system or "", prefill, *(text for _, text in history))
        _check(*texts)
        try:
            return self._ask({"do": do, "prompt": prompt}, sum(map(len, texts)))
        except Failure as error:
            raise DitError(
                f"the chat template of {self.name_or_path!r} fails ({error}): get the model's chat_template.jinja again"
            ) from None

    def _ask(self, request: dict[str, Any], characters: int) -> dict[str, Any]:
        request = {**request, "tokenizer": self._number}
        seconds = budgets.tokenizer_seconds(characters)
        reply = _process.ask(request, seconds)
        if reply.get("unknown"):  # the process is another one by now, or holds too many
            self._load()
            reply = _process.ask(request, seconds)
        return reply

    def _error(self, error: Failure) -> DitError:
        return DitError(
            f"the tokenizer of {self.name_or_path!r} fails ({error}): get the model's tokenizer.json again"
        )


def _check(*texts: str) -> None:
    """Raises DitError for half a character (bytes of a shell that are not UTF-8, JSON's \\ud800), or too many."""
    for text in texts:
        if not is_decoded(text):
            raise DitError(
                f"{short(text)} is no text: it holds half a character or bytes that are not UTF-8"
            )
    if (size := sum(map(len, texts))) > budgets.MAX_CHARACTERS:
        raise DitError(
            f"a text of {size} characters is longer than {budgets.MAX_CHARACTERS}: shorten it"
        )
