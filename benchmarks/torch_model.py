"""Parts that the PyTorch contenders share: transformers' model with SDPA attention, LoRA terms on its linears, losses.

It is as fast as PyTorch allows within its idioms: no attention mask (right padding is invisible to causal
attention, and without a mask SDPA takes its fast path), batches trimmed to their longest sample, the head only
at scored positions (`full` for the usual way: logits everywhere), fused Adam.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks import measure
from benchmarks.workload import Workload

Term = Callable[[torch.Tensor], torch.Tensor]


def device_of(work: Workload) -> torch.device:
    return torch.device("cuda" if work.platform == "gpu" else "cpu")


def load(work: Workload, folder: pathlib.Path) -> Any:
    """transformers' model with frozen weights."""
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32 on both sides
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, work.dtype), attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    model.to(device_of(work)).eval()
    return model


def facts(work: Workload, variant: str) -> dict[str, Any]:
    device = device_of(work)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "head": "all positions" if "full" in variant else "scored positions",
        "compile": "compile" in variant,
        "remat": work.remat,
    }


class Torch:
    """Memory and machine, as every PyTorch contender reports them."""

    def device_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def ceilings(self, dtype: str, platform: str) -> dict[str, float]:
        return measure.torch_ceilings(dtype, platform)


def enable_remat(model: Any, work: Workload) -> None:
    """Gradient checkpointing of layers, where the workload recomputes all of them ("dots" has no counterpart here)."""
    if work.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; these models have no dropout


class DeltaLinear(torch.nn.Module):
    """A frozen linear layer plus terms that the caller sets for the current batch."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.terms: tuple[Term, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        for term in self.terms:
            y = y + term(x)
        return y


def wrap_linears(model: Any) -> dict[str, list[DeltaLinear]]:
    """Puts a `DeltaLinear` around the seven projections; returns them by name, in the order of layers."""
    wrapped: dict[str, list[DeltaLinear]] = {}
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if name.endswith("_proj"):
                    module = DeltaLinear(child)
                    setattr(part, name, module)
                    wrapped.setdefault(name, []).append(module)
    return wrapped


def compile_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def row_lora(a: torch.Tensor, b: torch.Tensor, scale: float) -> Term:
    """LoRA per group of rows: a [G, in, r], b [G, r, out]; the batch's rows are G equal, contiguous groups."""

    def term(x: torch.Tensor) -> torch.Tensor:
        grouped = x.reshape(a.shape[0], -1, x.shape[-1])
        y = torch.bmm(torch.bmm(grouped, a.to(x.dtype)) * scale, b.to(x.dtype))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return term


def row_dense(a: torch.Tensor, b: torch.Tensor, scale: float) -> Term:
    """The same with ΔW [G, in, out] formed for every row (as the paper's program does)."""

    def term(x: torch.Tensor) -> torch.Tensor:
        delta = torch.bmm(a.to(x.dtype) * scale, b.to(x.dtype))
        return torch.bmm(x, delta)

    return term


def shared_lora(a: torch.Tensor, b: torch.Tensor, scale: float) -> Term:
    """One LoRA for all rows: a [in, r], b [r, out]."""
    return lambda x: ((x @ a.to(x.dtype)) * scale) @ b.to(x.dtype)


class Batch:
    """One right-padded batch on the device, and where its scored positions are (flat indices, made on the host)."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device):
        longest = int(arrays["lengths"].max())
        tokens = arrays["tokens"][:, :longest]
        self.sample, entry = np.nonzero(arrays["weight"])
        position = arrays["position"][self.sample, entry]

        def put(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

        self.tokens = put(tokens)
        self.flat = put(self.sample * longest + position)
        self.target = put(arrays["target"][self.sample, entry].astype(np.int64))
        self.weight = put(arrays["weight"][self.sample, entry])


def scored_logits(model: Any, batch: Batch, full: bool) -> torch.Tensor:
    """fp32 logits [scored, V] of a batch; `model` is a causal language model, or one wrapped by PEFT."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if full:
        logits = base(batch.tokens, use_cache=False).logits.float()
        return logits.reshape(-1, logits.shape[-1])[batch.flat]
    hidden = base.model(batch.tokens, use_cache=False).last_hidden_state
    return base.lm_head(hidden.reshape(-1, hidden.shape[-1])[batch.flat]).float()


def cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted terms [scored]."""
    return batch.weight * F.cross_entropy(logits, batch.target, reduction="none")


def kl(logits: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted KL(base ‖ base ⊕ δ) terms [scored]."""
    logp, base = torch.log_softmax(logits, dim=-1), torch.log_softmax(teacher, dim=-1)
    return batch.weight * F.kl_div(logp, base, log_target=True, reduction="none").sum(-1)


def adam(parameters: list[torch.Tensor], learning_rate: float, weight_decay: float) -> Any:
    """Adam, or AdamW with weight decay, fused."""
    if weight_decay:
        return torch.optim.AdamW(
            parameters, lr=learning_rate, weight_decay=weight_decay, fused=True
        )
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True)


def slices(size: int, part: int) -> Iterator[slice]:
    for start in range(0, size, part):
        yield slice(start, min(start + part, size))
