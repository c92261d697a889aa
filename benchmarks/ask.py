"""Benchmark of asking many diffs: one batched decode against the loops that people write instead.

    python -m benchmarks.ask --diffs 100 --new-tokens 16

Three ways to put one question to N rank-1 diffs of one base, greedy, same dtype, same tokens out:

    batched       dit_jax.ask_many: one decode, every row with its own diff
    loop          dit_jax.ask, one diff at a time (model loaded once, compiled once)
    transformers  merge each diff into the weights and call generate (model loaded once)

Prints one JSON line per way and a Markdown table. A row is valid only if its tokens equal those of `batched`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Diff, Model, load_model
from dit_jax.asking import ask, ask_many
from dit_jax.deltas import tree
from dit_jax.models import delta_trees
from dit_jax.models.families import hf_config
from dit_jax.models.hf_checkpoint import iterate_tensors
from dit_jax.runtime.artifacts import package_versions

QUESTION = "How should I start my day?"  # answered in a sentence, whatever the diff


def random_diffs(model: Model, count: int, rank: int = 1) -> list[Diff]:
    """Diffs of about the size that finetuning gives (their values do not change the time)."""

    def one(key: jax.Array) -> Any:
        delta = tree.init_lora(model.config, key, rank)
        return delta_trees.map_modules(
            lambda path, m: {
                **m,
                "a": 0.05 * jax.random.normal(jax.random.fold_in(key, len(path[-1])), m["a"].shape),
            },
            delta,
        )

    keys = jax.random.split(jax.random.key(0), count)
    stacked = jax.device_get(jax.jit(jax.vmap(one))(keys))
    return [Diff(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(count)]


def batched(model: Model, diffs: list[Diff], new_tokens: int) -> list[tuple[int, ...]]:
    return [a.tokens for ((a,),) in ask_many(model, [QUESTION], diffs, max_new_tokens=new_tokens)]


def loop(model: Model, diffs: list[Diff], new_tokens: int) -> list[tuple[int, ...]]:
    return [ask(model, QUESTION, diff=diff, max_new_tokens=new_tokens).tokens for diff in diffs]


def transformers_generate(
    model: Model, diffs: list[Diff], new_tokens: int
) -> list[tuple[int, ...]]:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**hf_config(model.config))
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    parameters = dict(theirs.named_parameters())
    tokens, mask = model.chat.prompts([QUESTION])
    prompt = torch.tensor(tokens[:, mask[0]].astype(np.int64))
    merge = jax.jit(lambda params, delta: tree.merge(params, delta))
    answers = []
    for diff in diffs:
        merged = jax.device_get(merge(model.params, jax.tree.map(jnp.asarray, diff.delta)))
        with torch.no_grad():
            for name, array in iterate_tensors(merged, model.config):
                parameters[name].copy_(torch.from_numpy(np.array(array)))
            out = theirs.generate(
                prompt,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(model.chat.eos_ids),
                pad_token_id=model.chat.pad_id,
            )
        ids = out[0, prompt.shape[1] :].tolist()
        answers.append(
            tuple(i for i in ids if i not in model.chat.eos_ids and i != model.chat.pad_id)
        )
    return answers


WAYS: dict[str, Callable[[Model, list[Diff], int], list[tuple[int, ...]]]] = {
    "batched": batched,
    "loop": loop,
    "transformers": transformers_generate,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ask", description=__doc__)
    parser.add_argument("--model", default="tiny_qwen3", help="model folder, hub id, or tiny_qwen3")
    parser.add_argument("--diffs", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS))
    flags = parser.parse_args()
    model = load_model(flags.model)
    diffs = random_diffs(model, flags.diffs)
    rows, reference = [], batched(model, diffs, flags.new_tokens)
    for name in flags.ways.split(","):
        WAYS[name](model, diffs[:2], flags.new_tokens)  # compilation, imports
        found, times = reference, []
        WAYS[name](model, diffs, flags.new_tokens) if name == "batched" else None
        for _ in range(flags.repeats):
            start = time.perf_counter()
            found = WAYS[name](model, diffs, flags.new_tokens)
            times.append(time.perf_counter() - start)
        equal = sum(one == two for one, two in zip(found, reference, strict=True)) / len(diffs)
        row = {"way": name, "seconds": statistics.median(times), "answers_equal": equal}
        rows.append(row)
        print(
            json.dumps(
                {**row, "diffs": flags.diffs, "model": flags.model, "versions": package_versions()}
            )
        )
    fastest = rows[0]["seconds"]
    print(
        f"\n| way | seconds for {flags.diffs} diffs | answers/s | slower than {rows[0]['way']} | equal answers |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        rate, ratio = flags.diffs / row["seconds"], row["seconds"] / fastest
        print(
            f"| {row['way']} | {row['seconds']:.2f} | {rate:.1f} | {ratio:.1f} × | {row['answers_equal']:.0%} |"
        )


if __name__ == "__main__":
    main()
