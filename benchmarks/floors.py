"""The floor of a workload: the FLOPs and bytes that no program can avoid, counted by hand.

N is the number of parameters of the projections, D V that of the head. The base is frozen, so a token costs
2N forward and 2N backward (the gradient of its activations): 4N; with full remat 6N, which is a program's
own choice and not part of the floor. A teacher's token costs 2N, once for equal samples. The
head costs 2DV forward and 2DV backward at each scored position, 2DV more for a teacher. Padding does not count.
LoRA products (rank 1 to 16 against thousands) and norms are left out: under 2 %.
"""

import dataclasses

import numpy as np

from benchmarks.workload import Workload
from dit_jax.models.kv_cache import cache_slots
from dit_jax.models.modules import count_parameters


@dataclasses.dataclass(frozen=True)
class Floor:
    """tokens: real tokens run through the trained (or answering) model. flops; bytes: read at least once."""

    tokens: int
    scored: int
    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def floor(work: Workload, data: dict[str, np.ndarray]) -> Floor:
    """Counts a whole run of the workload."""
    config = work.config
    n, head = count_parameters(config, lora_only=True), config.hidden_size * config.vocab_size
    weights = (n + head) * (2 if work.dtype == "bfloat16" else 4)
    if work.suite in ("ask", "corpus"):
        return _ask(work, n, head, weights)
    lengths, used = data["lengths"], data["weight"] > 0
    terms = used.sum(axis=-1)
    kl = np.arange(lengths.shape[-1]) >= (
        work.num_ce if work.suite == "diffs" else lengths.shape[-1]
    )
    # Forward once, backward twice: both factors of an attention product have gradients.
    taught = kl & _first_of_equals(data["tokens"])
    attention = 3 * _attention(work, lengths).sum() + (_attention(work, lengths) * taught).sum()
    flops = (
        4 * n * lengths.sum()
        + 2 * n * (lengths * taught).sum()
        + head * (4 * terms.sum() + 2 * (terms * kl).sum())
        + attention
    )
    # Every optimizer step of a batch reads the weights forward and backward.
    passes = 2 * work.steps
    if work.suite == "diffs":
        passes = (3 if kl.any() else 2) * work.steps * -(-work.diffs // work.batch)
    return Floor(int(lengths.sum()), int(terms.sum()), float(flops), float(weights * passes))


def _first_of_equals(tokens: np.ndarray) -> np.ndarray:
    """Whether no earlier sample has the same tokens, [...] bool: the base needs to see equal samples once."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    _, first = np.unique(flat, axis=0, return_index=True)
    return np.isin(np.arange(len(flat)), first).reshape(tokens.shape[:-1])


def _ask(work: Workload, n: int, head: int, weights: int) -> Floor:
    config = work.config
    rows, prompt, new = work.diffs, work.length, work.new_tokens
    # The first answer token comes from the prompt's pass, the last is not fed back.
    fed = prompt + new - 1
    flops = rows * (2 * n * fed + 2 * head * new + _attention(work, np.array(fed)).sum())
    item = 2 if work.dtype == "bfloat16" else 4
    slot = 2 * config.num_key_value_heads * config.head_dim * item
    reads = rows * slot * sum(cache_slots(config, seen) for seen in range(prompt, fed))
    batches = -(-work.diffs // work.batch)
    return Floor(rows * new, rows * new, float(flops), float(weights * new * batches + reads))


def _attention(work: Workload, lengths: np.ndarray) -> np.ndarray:
    """FLOPs of scores and weighted values of causal sequences, forward."""
    config = work.config
    heads = config.num_attention_heads * config.head_dim
    return 2.0 * config.num_hidden_layers * heads * lengths.astype(np.float64) ** 2
