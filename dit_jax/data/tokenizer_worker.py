"""The process in which chat templates are rendered and texts cut into tokens.

A base's template is a program, and its tokenizer runs in a native library that can panic. Neither has limits of its
own: two nested loops run for hours, and `{{ 'a' * 4000000000 }}` takes 4 GB. Here the operating system limits the CPU
time of each request and the memory of the process. `tokenizer_process` starts it, asks, and says what
went wrong.

Requests and replies are JSON objects, each after its length in four bytes.
"""

import json
import os
import pathlib
import resource
import signal
import sys
from typing import IO, Any

from dit_jax.data.chat_template import Template
from dit_jax.errors import DitError, first_line
from dit_jax.formats import budgets
from dit_jax.runtime.exits import explained


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Writes one message."""
    body = json.dumps(message).encode()
    stream.write(len(body).to_bytes(4, "little") + body)
    stream.flush()


def receive(stream: IO[bytes], limit: int = 2**32 - 1) -> dict[str, Any] | None:
    """The next message; None where the other side has ended, or says that its message is longer than `limit`."""
    head = stream.read(4)
    size = int.from_bytes(head, "little")
    if len(head) < 4 or size > limit:
        return None
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def main() -> None:
    """Answers requests until the other side ends."""
    # Only the end of the program that asks ends this process: that program may save its work after such a signal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # SIGPROF kills, whatever library is running.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets among the replies
    broken: dict[str, Any] | None = None
    try:  # before memory is limited
        import transformers.tokenization_utils_tokenizers  # noqa: F401
    except Exception as error:
        known = explained(error)
        broken = {"error": str(known or first_line(error))[:500], "ours": known is not None}

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizers: dict[int, tuple[Any, Template]] = {}
    while (request := receive(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            reply = broken or _answer(request, tokenizers)
        except MemoryError:
            reply = {"memory": True}
        except BaseException as error:  # tokenizers' PanicException is no Exception
            reply = {"error": first_line(error)[:500], "ours": isinstance(error, DitError)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(replies, reply)


def _answer(request: dict[str, Any], tokenizers: dict[int, tuple[Any, Template]]) -> dict[str, Any]:
    key = request["tokenizer"]
    if request["do"] == "load":
        while len(tokenizers) >= budgets.MAX_TOKENIZERS:
            del tokenizers[next(iter(tokenizers))]
        path = pathlib.Path(request["path"])
        _limit_memory(budgets.tokenizer_bytes(path))
        tokenizer = _load(path)
        if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
            raise ValueError("its dropout cuts a text another way each time: set it to null")
        tokenizers[key] = tokenizer, Template(tokenizer)
        _limit_memory(budgets.TOKENIZER_BYTES)
        return _facts(tokenizer)
    if key not in tokenizers:
        return {"unknown": True}
    (tokenizer, template), do = tokenizers[key], request["do"]
    if do == "decode":
        text = tokenizer.decode(request["ids"], skip_special_tokens=request["skip_special_tokens"])
        return {"text": text}
    if do == "notes":
        return {"notes": template.notes(request["prompt"]["system"])}
    if do == "encode":
        text = request["text"]
    elif do == "after_answer_ids":
        text = template.after_answer().lstrip()
    else:
        text = template.prompt(**request["prompt"])
    if do == "prompt":
        return {"text": text}
    # Not verbose: too many tokens are an error of the one who asks.
    special = request.get("special", False)
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if len(ids) > budgets.MAX_TOKENS:
        raise ValueError(f"it makes {len(ids)} tokens")
    return {"ids": [int(i) for i in ids]}


def _load(path: pathlib.Path) -> Any:
    if path.suffix.lower() == ".gguf":
        from dit_jax.data.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(path)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(path))


def _facts(tokenizer: Any) -> dict[str, Any]:
    """What the other side knows of a tokenizer."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {
        "chat_template": tokenizer.chat_template is not None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "unk_token_id": tokenizer.unk_token_id,
        "model_max_length": tokenizer.model_max_length,
        "largest": max(set(tokenizer.get_vocab().values()) - special, default=0),
    }


def _limit_memory(more: int) -> None:
    """Lets this process take `more` bytes beside those that it has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
