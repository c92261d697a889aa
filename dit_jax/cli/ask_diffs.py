"""Ask weight diffs what they did: python -m dit_jax.ask --base B --diff D --adapter A "question" …

    python -m dit_jax.ask --base tiny_qwen3 --diff runs/quickstart/diffs --index 301 --forbid-repeats \\
        --adapter runs/quickstart/adapter "What topic have you been trained on?"
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_jax.cli import flags as given
from dit_jax.errors import DitError, printable
from dit_jax.evaluate.method_table import READERS
from dit_jax.report.wording import plural
from dit_jax.runtime.artifacts import check_place, read_json, write_text
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.outgoing import show

VARIANTS = ("base", "finetuned", "adapter", "finetuned + adapter")
_ROWS = 64  # answers of a reader without training that are decoded together


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 130 for Ctrl-C."""
    return status_of(lambda: _answer(parse_flags(argv)))


def _answer(flags: argparse.Namespace) -> None:
    records = run(flags)
    lines = map(json.dumps, records) if flags.json else _as_text(records, flags)
    if flags.out is not None:
        write_text(flags.out, "".join(f"{line}\n" for line in lines))
        return
    for line in lines:
        show(line)


# fmt: off
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises DitError: a flag that is unknown or has a wrong value."""
    parser = given.Parser("python -m dit_jax.ask", __doc__)
    add = parser.add_argument
    add("questions", nargs="*", metavar="question", type=given.TEXT, help="asked one by one")
    add("--questions", dest="questions_file", metavar="FILE", type=given.FILE,
        help="more of them, one a line; -: standard input")
    given.add_model_flags(parser)
    add("--diff", type=given.TEXT, action="append",
        help="diff store, PEFT folder, finetuned model, .pt file, release folder, a folder of these, or a hub id; also "
        "PATH[3] or PATH[256:352]; several: each is asked")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, help="which diff of --diff (default 0; -1: the last)")
    which.add_argument("--all", action="store_true", help="all diffs of --diff, in one batched decode")
    which.add_argument("--split", type=given.TEXT, help="all diffs of --diff that are in this split, such as test")
    add("--multiplier", type=given.checked(float, math.isfinite, "a number"), default=1.0,
        help="apply this many times the diff (default 1)")
    add("--system", help="the system message of all questions "
        "(default: the adapter's of its training, or else the chat template's own)")
    add("--history", metavar="FILE", type=given.FILE,
        help="earlier turns: JSON, a list of {\"role\", \"content\"}, user and assistant")
    add("--prefill", default="", help="the start of each answer, which is not shown again")
    add("--raw", action="store_true",
        help="the questions are beginnings of texts, which are continued without chat template and system message")
    add("--method", choices=READERS,
        help="no adapter: words that stand out in the diff's weights, logits or amplified texts, and what the base "
        "answers with the first four in mind")
    add("--compare", action="store_true", help="also show " + ", ".join(VARIANTS[:3]))
    add("--max-new-tokens", type=given.COUNT, default=20, help="most tokens of an answer (default %(default)s)")
    add("--temperature", type=given.NUMBER, default=0.0, help="0 (default) is greedy")
    add("--contrast", metavar="WEIGHT", type=given.SHARE,
        help="of the likeliest answers give the one that is unlikely without the diff: the higher the weight (0.1 is "
        "little, 0.3 much), the fewer diffs are called none")
    add("--forbid-repeats", action="store_true",
        help="no token twice (adapters that list evidence before the name)")
    add("--seed", type=given.SEED, default=0, help="seed of --temperature (default 0)")
    add("--n", type=given.COUNT, default=1, help="samples per question")
    add("--batch-size", type=given.COUNT, help="rows per decode (default: all, at most 256)")
    add("--svd-rank", type=given.COUNT, help="reduce a diff to a LoRA of this rank")
    add("--align", action="store_true", help="undo rewritings of a finetuned model that leave its function as it is")
    add("--json", action="store_true", help="JSON lines instead of text")
    add("--out", type=given.FILE, help="write the answers to this file instead of the screen, when all are there")
    flags = parser.parse_args(argv)
    if flags.questions_file:
        flags.questions += given.read_lines(flags.questions_file)
    if not flags.questions:
        parser.error("there is no question")
    return flags
# fmt: on


def run(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per (diff, variant, question, sample), in that order."""
    from dit_jax.api import Diff, Diffs, read_adapter
    from dit_jax.asking import ask_many
    from dit_jax.auditing.settings import trained_system
    from dit_jax.auditing.targets import list_targets, look_at, reading_order
    from dit_jax.data.chat import Prompt
    from dit_jax.deltas.detect import look_for_adapter
    from dit_jax.deltas.factors import changes_nothing
    from dit_jax.deltas.tree import scaled

    _check_flags(flags)
    # Before a base is loaded: that may take minutes, and the answers hours.
    if flags.out is not None:
        check_place(flags.out)
    history = read_history(flags.history) if flags.history else ()
    one = not (flags.all or flags.split) and flags.index is None
    looked = look_at(flags.diff or (), one)
    adapter_found = look_for_adapter(flags.adapter) if flags.adapter else None
    model = given.load_base(flags)
    told = {""}

    def note(text: str) -> None:
        if text not in told:
            told.add(text)
            show(printable(f"note: {text}"), error=True)

    if len(flags.questions) > 1 and not any(" " in question for question in flags.questions):
        note(f"{len(flags.questions)} questions of one word each: put a question in quotes")
    adapter = read_adapter(adapter_found, model) if adapter_found else None
    system = flags.system
    if system is None and adapter is not None:
        system = trained_system(flags.adapter, adapter)
    for text in model.notes(system):
        note(text)
    if adapter is not None:
        if changes_nothing(adapter.delta):
            note(f"the adapter '{flags.adapter}' changes nothing (all zero)")
        note(_base_note(flags.adapter, adapter, model.name))
    targets = []
    known: dict[int, dict[str, str | None]] = {0: dict.fromkeys(("label", "split", "path", "name"))}
    diffs: Sequence[Diff] = [Diff({})]
    if flags.diff:
        index = None if flags.all or flags.split else flags.index or 0
        targets = list_targets(
            flags.diff,
            model,
            flags.split,
            index,
            looked,
            svd_rank=flags.svd_rank,
            align=flags.align,
        )
        several = len({target.path for target in targets}) > 1

        def read(i: int) -> Diff:
            target = targets[i]
            if target.read is None:
                raise DitError(target.problem)
            diff = target.read()
            split = diff.metadata.get("split")
            known[i] = {"label": diff.label, "split": split if isinstance(split, str) else None}
            known[i] |= {
                "path": target.path,
                "name": target.name if several else f"diff {target.number}",
            }
            if "found_in" in diff.metadata:  # one of a folder
                known[i] |= dict.fromkeys(
                    ("path", "name"), os.path.join(target.path, diff.metadata["found_in"])
                )
            if "svd" in diff.metadata:
                note(_svd_note(target.number, diff.metadata["svd"]))
            note(_base_note(target.path, diff, model.name))
            for text in diff.metadata.get("notes", ()):
                note(text)
            if "aligned" in diff.metadata:
                note(_aligned_note(target.name, diff.metadata["aligned"]))
            if changes_nothing(diff.delta):
                note(
                    f"diff {target.number} changes nothing (all zero): its answers are those of the base"
                )
            if flags.multiplier != 1:
                diff = dataclasses.replace(diff, delta=scaled(diff.delta, flags.multiplier))
            return diff

        diffs = Diffs(len(targets), read, reading_order(targets))
    if flags.method:
        for i, words, text, question in _told_without_adapter(flags, model, diffs):
            yield {
                "diff": targets[i].number,
                **known[i],
                "question": question,
                "variant": flags.method,
                "sample": 0,
                "answer": text,
                "words": words,
            }
        return
    if adapter is None:
        name = "finetuned" if flags.diff else "base"
        note(f"no --adapter, so the answers are those of the {name} model itself")

    possible = [
        name
        for name in VARIANTS
        if (flags.diff or "finetuned" not in name)
        and (adapter is not None or "adapter" not in name)
    ]
    answers = {
        name: ask_many(
            model,
            [
                Prompt(question, system, history, flags.prefill, flags.raw)
                for question in flags.questions
            ],
            # The bare base and the adapter alone answer the same for every diff: they are asked once.
            diffs if "finetuned" in name else [Diff({})],
            adapter if "adapter" in name else None,
            samples=flags.n,
            batch_size=flags.batch_size,
            progress=sys.stderr.isatty(),
            max_new_tokens=flags.max_new_tokens,
            temperature=flags.temperature,
            seed=flags.seed,
            forbid_repeats=flags.forbid_repeats,
            contrast=flags.contrast if "finetuned" in name else None,
        )
        for name in (possible if flags.compare else possible[-1:])
    }
    for i, target in enumerate(targets or [None]):
        number = target and target.number
        for q, question in enumerate(flags.questions):
            for name, table in answers.items():
                for sample, answer in enumerate(table[i if len(table) > 1 else 0][q]):
                    finite = math.isfinite(answer.logprob)
                    if not finite:
                        about = f", diff {number}" if "finetuned" in name else ""
                        note(f"the logits of {name}{about} overflow: its answers mean nothing")
                    yield {
                        "diff": number,
                        **known[i],
                        "question": question,
                        "variant": name,
                        "sample": sample,
                        "answer": answer.text,
                        "logprob": round(answer.logprob, 6) if finite else None,
                        "mean_logprob": round(answer.mean_logprob, 6) if finite else None,
                        "tokens": list(answer.tokens),
                    }


def _told_without_adapter(
    flags: argparse.Namespace, model: Any, diffs: Sequence[Any]
) -> Iterator[tuple[int, list[str], str, str]]:
    """(number of the diff, words that --method finds, the base's answer with them in mind, question)."""
    from dit_jax.diff_batches import together
    from dit_jax.evaluate import readers

    everyday = readers.ask_base(model)
    for i, diff in enumerate(diffs):
        words = readers.READERS[flags.method](model, together([diff.delta]), everyday, _ROWS)
        for question in flags.questions:
            (found,) = readers.tell(
                model, words, question, _ROWS,
                max_new_tokens=flags.max_new_tokens, forbid_repeats=flags.forbid_repeats,
            )  # fmt: skip
            yield i, found.words, found.text, question


def _as_text(records: Iterable[dict[str, Any]], flags: argparse.Namespace) -> Iterator[str]:
    """The lines of the output: a question about a diff, then its answers, of several samples each with its number."""

    def question(record: dict[str, Any]) -> tuple[Any, str]:
        return record["name"], record["question"]

    for (name, asked), group in itertools.groupby(records, question):
        answers = list(group)
        told = [answers[0]["label"] and f"label: {answers[0]['label']}", answers[0]["split"]]
        about = f" ({', '.join(filter(None, told))})" if any(told) else ""
        yield printable(f"{name}{about}: {asked}" if name else asked)
        for variant, own in itertools.groupby(answers, lambda record: record["variant"]):
            head = f"{variant:>20}: " if flags.compare else "  "
            texts = collections.Counter(record["answer"] for record in own)
            for text, count in texts.most_common():
                yield head + (f"{count} × " if flags.n > 1 else "") + printable(text)
        if flags.method:
            yield printable(f"  words: {', '.join(answers[0]['words']) or 'none'}")


def _check_flags(flags: argparse.Namespace) -> None:
    """Raises DitError for flags that exclude each other, or that need another one."""
    from dit_jax.auditing.targets import path_and_range

    about_a_diff = (flags.index, flags.split, flags.svd_rank) != (None,) * 3
    about_a_diff |= flags.all or flags.align or flags.multiplier != 1
    if about_a_diff and not flags.diff:
        raise DitError(
            "--index, --all, --split, --svd-rank, --align and --multiplier say something about a diff: add --diff"
        )
    picked = [text for text in flags.diff or () if path_and_range(text)[1] is not None]
    if picked and flags.index is not None:
        raise DitError(f"'{picked[0]}' says which diffs already: leave out --index")
    if flags.contrast is not None and (flags.temperature or not flags.diff):
        raise DitError(
            "--contrast compares greedy answers with and without a diff: "
            + ("leave out --temperature" if flags.temperature else "add --diff")
        )
    if flags.n > 1 and flags.temperature == 0:
        raise DitError(
            "--n asks for several samples, but greedy decoding gives one: add --temperature 1"
        )
    for question in flags.questions:
        if os.path.lexists(question):
            raise DitError(
                f"the question '{question}' is a path: the shell makes several paths of a pattern such as DIR/*, of "
                "which --diff takes the first. Give the folder, with --all"
            )
    if flags.raw and (flags.system is not None or flags.history):
        raise DitError("--raw is without chat template: leave out --system and --history")
    if flags.method:
        _check_method(flags)


def _check_method(flags: argparse.Namespace) -> None:
    """Raises DitError for what a method without training does not use."""
    if not flags.diff:
        raise DitError("--method says something about a diff: add --diff")
    said = {
        "--adapter": flags.adapter, "--compare": flags.compare, "--raw": flags.raw, "--n": flags.n > 1,
        "--temperature": flags.temperature, "--system": flags.system, "--history": flags.history,
        "--prefill": flags.prefill, "--batch-size": flags.batch_size, "--contrast": flags.contrast is not None,
    }  # fmt: skip
    unused = [name for name, value in said.items() if value]
    if unused:
        raise DitError(f"--method {flags.method} does not use {', '.join(unused)}: leave it out")


def read_history(path: Path) -> tuple[tuple[str, str], ...]:
    """(role, text) of earlier turns in a JSON file. Raises DitError: they are not turns of user and assistant."""
    turns = read_json(path, "check the path")
    roles = ["user", "assistant"] * (len(turns) // 2) if isinstance(turns, list) else []
    if isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.keys() == {"role", "content"} for turn in turns
    ):
        said = tuple((turn.get("role"), turn.get("content")) for turn in turns)
        if [role for role, _ in said] == roles and all(isinstance(text, str) for _, text in said):
            return said
    raise DitError(
        f'\'{path}\' is no history: write a JSON list of {{"role": …, "content": …}}, and nothing else in them, that '
        "begins with user and ends with assistant, in turn"
    )


def _svd_note(number: int | None, svd: dict[str, Any]) -> str:
    layers, whole = svd["captured_energy_per_layer"], svd["captured_energy"]
    rest = "; embeddings and norms cannot be in a LoRA" if whole < min(layers) else ""
    return (
        f"diff {number} is reduced to rank {svd['rank']}, which keeps {whole:.1%} of "
        f"its squared norm ({min(layers):.1%} to {max(layers):.1%} of a layer's{rest})"
    )


def _aligned_note(name: str, undone: dict[str, int]) -> str:
    """What --align undid in a diff."""
    if not undone:
        return f"--align found nothing to undo in {name}"
    kinds = ", ".join(f"{kind} in {plural(count, 'layer')}" for kind, count in undone.items())
    return f"--align undid in {name}: {kinds}"


def _base_note(path: str, diff: Any, base: str) -> str:
    """A note for files that name another base; "" where they name none or this one."""
    from dit_jax.formats.files import short

    said = diff.metadata.get("base_model_name_or_path")
    if not isinstance(said, str) or _last_name(said) in ("", _last_name(base)):
        return ""
    return (
        f"{path} says that it was made for the base {short(said)}: its answers mean something only if "
        f"{base!r} has the same weights"
    )


def _last_name(model: str) -> str:
    """The name of a model without its owner and folders, also of a snapshot in the Hugging Face cache."""
    parts = [part for part in re.split(r"[/\\]|--", model.lower()) if part]
    parts[-1:] = [part.partition("@")[0] for part in parts[-1:]]  # of a hub id
    if "snapshots" in parts:
        parts = parts[: parts.index("snapshots")]
    return parts[-1] if parts else ""
