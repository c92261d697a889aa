"""Ask weight diffs what they did: python -m dit_jax.ask --base B --diff D --adapter A "question" …

    python -m dit_jax.ask --base tiny_qwen3 --diff runs/quickstart/diffs --index 301 --forbid-repeats \\
        --adapter runs/quickstart/adapter "What topic have you been trained on?"
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dit_jax.cli import flags as given
from dit_jax.errors import DitError, Parser, printable
from dit_jax.runtime.exits import exit_on_error

VARIANTS = ("base", "finetuned", "adapter", "finetuned + adapter")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a problem the user can fix, 130 for Ctrl-C."""
    try:
        with exit_on_error():
            flags = parse_flags(argv)
            for record in run(flags):
                print(json.dumps(record) if flags.json else _as_text(record, flags), flush=True)
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; Python's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# fmt: off
def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line. Raises DitError: a flag that is unknown or has a wrong value."""
    parser = Parser("python -m dit_jax.ask", __doc__)
    add = parser.add_argument
    add("questions", nargs="+", metavar="question", type=given.TEXT, help="asked one by one")
    given.add_model_flags(parser)
    add("--diff", type=given.TEXT, action=given.Once,
        help="diff store, PEFT folder, finetuned model, .pt file, release folder, a folder of these, or a hub id")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, help="which diff of --diff (default 0; -1: the last)")
    which.add_argument("--all", action="store_true", help="all diffs of --diff, in one batched decode")
    add("--system", help="the system message of all questions "
        "(default: the adapter's of its training, or else the chat template's own)")
    add("--compare", action="store_true", help="also show " + ", ".join(VARIANTS[:3]))
    add("--max-new-tokens", type=given.COUNT, default=20, help="most tokens of an answer (default %(default)s)")
    add("--temperature", type=given.NUMBER, default=0.0, help="0 (default) is greedy")
    add("--forbid-repeats", action="store_true",
        help="no token twice (adapters that list evidence before the name)")
    add("--seed", type=given.SEED, default=0, help="seed of --temperature (default 0)")
    add("--n", type=given.COUNT, default=1, help="samples per question")
    add("--batch-size", type=given.COUNT, help="rows per decode (default: all, at most 256)")
    add("--svd-rank", type=given.COUNT, help="reduce a diff to a LoRA of this rank")
    add("--json", action="store_true", help="JSON lines instead of text")
    return parser.parse_args(argv)
# fmt: on


def run(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per (diff, variant, question, sample), in that order."""
    from dit_jax.api import Diff, Diffs, load_diffs, read_adapter
    from dit_jax.asking import ask_many
    from dit_jax.deltas.detect import look_for_adapter, look_for_diffs
    from dit_jax.deltas.factors import changes_nothing

    if not flags.diff and (flags.all or flags.index is not None or flags.svd_rank):
        raise DitError("--index, --all and --svd-rank say something about a diff: add --diff")
    if flags.n > 1 and flags.temperature == 0:
        raise DitError(
            "--n asks for several samples, but greedy decoding gives one: add --temperature 1"
        )
    # Before a base is loaded: that may take minutes.
    diff_found = look_for_diffs(flags.diff) if flags.diff else None
    adapter_found = look_for_adapter(flags.adapter) if flags.adapter else None
    model = given.load_base(flags)
    told = {""}

    def note(text: str) -> None:
        if text not in told:
            told.add(text)
            print(f"note: {text}", file=sys.stderr)

    if len(flags.questions) > 2 and not any(" " in question for question in flags.questions):
        note(f"{len(flags.questions)} questions of one word each: put a question in quotes")
    adapter = read_adapter(adapter_found, model) if adapter_found else None
    system = flags.system
    if system is None and adapter is not None:
        system = _trained_with(flags.adapter, adapter)
    for text in model.notes(system):
        note(text)
    if adapter is not None:
        if changes_nothing(adapter.delta):
            note(f"the adapter '{flags.adapter}' changes nothing (all zero)")
        note(_base_note(flags.adapter, adapter, model.name))
    numbers: list[int | None] = [None]
    known: dict[int, dict[str, str | None]] = {0: {"label": None, "split": None}}
    diffs: Sequence[Diff] = [Diff({})]
    if diff_found:
        found = load_diffs(diff_found, model, flags.svd_rank)
        if diff_found.kind == "folder" and len(found) > 1 and not flags.all and flags.index is None:
            raise DitError(
                f"'{flags.diff}' holds {len(found)} diffs: ask all with --all, choose one with --index, or give its "
                "own path"
            )
        chosen = range(len(found)) if flags.all else [found.number(flags.index or 0)]
        numbers = list(chosen)

        def read(i: int) -> Diff:
            diff = found[chosen[i]]
            split = diff.metadata.get("split")
            known[i] = {"label": diff.label, "split": split if isinstance(split, str) else None}
            if "found_in" in diff.metadata:
                known[i]["path"] = diff.metadata["found_in"]
            if "svd" in diff.metadata:
                note(_svd_note(numbers[i], diff.metadata["svd"]))
            note(_base_note(flags.diff, diff, model.name))
            for text in diff.metadata.get("notes", ()):
                note(text)
            if changes_nothing(diff.delta):
                note(
                    f"diff {numbers[i]} changes nothing (all zero): its answers are those of the base"
                )
            return diff

        diffs = Diffs(len(numbers), read, found.order if flags.all else None)
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
            flags.questions,
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
            system=system,
        )
        for name in (possible if flags.compare else possible[-1:])
    }
    for i, number in enumerate(numbers):
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


def _as_text(record: dict[str, Any], flags: argparse.Namespace) -> str:
    lines = []
    first = record["sample"] == 0 and (not flags.compare or record["variant"] == "base")
    if first:
        about = "" if record["diff"] is None else f"diff {record['diff']}"
        told = [
            record.get("path"),
            record["label"] and f"label: {record['label']}",
            record["split"],
        ]
        if any(told):
            about += f" ({printable(', '.join(filter(None, told)))})"
        lines.append(f"{about + ': ' if about else ''}{record['question']}")
    name = f"{record['variant']:>20}: " if flags.compare else "  "
    lines.append(name + printable(record["answer"]))
    return "\n".join(lines)


def _svd_note(number: int | None, svd: dict[str, Any]) -> str:
    layers, whole = svd["captured_energy_per_layer"], svd["captured_energy"]
    rest = "; embeddings and norms cannot be in a LoRA" if whole < min(layers) else ""
    return (
        f"diff {number} is reduced to rank {svd['rank']}, which keeps {whole:.1%} of "
        f"its squared norm ({min(layers):.1%} to {max(layers):.1%} of a layer's{rest})"
    )


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


def _trained_with(path: str, adapter: Any) -> str | None:
    """The system message of an adapter's training. Raises DitError: the file says something else than a text."""
    system = adapter.metadata.get("system")
    if system is None or isinstance(system, str):
        return system
    raise DitError(f"{path} names a system message that is no text: give one with --system")


def _last_name(model: str) -> str:
    """The name of a model without its owner and folders, also of a snapshot in the Hugging Face cache."""
    parts = [part for part in re.split(r"[/\\]|--", model.lower()) if part]
    parts[-1:] = [part.partition("@")[0] for part in parts[-1:]]  # of a hub id
    if "snapshots" in parts:
        parts = parts[: parts.index("snapshots")]
    return parts[-1] if parts else ""
