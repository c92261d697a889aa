"""Many diffs at once in PyTorch: transformers' model with a LoRA per group of rows (batched products)."""

import pathlib
from typing import Any

import numpy as np
import torch

from benchmarks import torch_model as tm
from benchmarks.workload import LEARNING_RATE, Workload

_FIELDS = ("tokens", "lengths", "position", "target", "weight")


class TorchBatched(tm.Torch):
    """Finetunes `group` diffs together: the workload's batch, halved until it fits into memory."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        self.work, self.data, self.factors = work, data, factors
        self.full = "full" in variant
        self.device = tm.device_of(work)
        self.model = tm.load(work, folder)
        self.linears = tm.wrap_linears(self.model)
        tm.enable_remat(self.model, work)
        if "compile" in variant:
            tm.compile_layers(self.model)
        self.group = min(work.batch, work.diffs)
        self.facts = tm.facts(work, variant)

    def warm_up(self) -> None:
        while True:
            try:
                self._finetune(slice(0, self.group), steps=1)
                break
            except torch.cuda.OutOfMemoryError:
                if self.group == 1:
                    raise
                self.group //= 2
            torch.cuda.empty_cache()
        self.facts["group"] = self.group

    def run(self) -> dict[str, np.ndarray]:
        parts = tm.slices(self.work.diffs, self.group)
        return {"losses": np.concatenate([self._finetune(p, self.work.steps) for p in parts])}

    def _finetune(self, part: slice, steps: int) -> np.ndarray:
        """Losses [diffs of the part, steps]."""
        count = part.stop - part.start
        leaves: dict[str, list[torch.Tensor]] = {}
        for name, modules in self.linears.items():
            a, b = (torch.from_numpy(self.factors[f"diffs.{name}.{k}"][part]) for k in "ab")
            for layer in range(len(modules)):
                leaves[f"{name}.{layer}"] = [
                    x[:, layer].clone().to(self.device).requires_grad_() for x in (a, b)
                ]
        optimizer = tm.adam(
            [x for pair in leaves.values() for x in pair], LEARNING_RATE["diffs"], 0
        )
        losses = []
        for step in range(steps):
            arrays = {name: self.data[name][part, step] for name in _FIELDS}
            loss_of_diff = self._losses(arrays, leaves, count)
            loss_of_diff.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_of_diff.detach())
        for pair in leaves.values():
            for x in pair:
                x.detach().cpu()
        return torch.stack(losses, dim=1).cpu().numpy()

    def _losses(self, arrays: Any, leaves: Any, count: int) -> torch.Tensor:
        """Losses [diffs] of one step; arrays [diffs, samples, …]."""
        num_ce, samples = self.work.num_ce, self.work.samples
        out = torch.zeros(count, device=self.device)

        def batch(part: slice) -> tuple[tm.Batch, torch.Tensor]:
            picked = {k: x[:, part].reshape(-1, *x.shape[2:]) for k, x in arrays.items()}
            made = tm.Batch(picked, self.device)
            size = len(range(samples)[part])
            return made, torch.from_numpy(made.sample // size).to(self.device)

        teacher = None
        if num_ce < samples:
            kl_batch, _ = batch(slice(num_ce, None))
            self._set(None)
            with torch.no_grad():
                teacher = tm.scored_logits(self.model, kl_batch, self.full)
        self._set(leaves)
        whole, owner = batch(slice(None))
        logits = tm.scored_logits(self.model, whole, self.full)
        is_ce = torch.from_numpy(whole.sample % samples < num_ce).to(self.device)
        ce = _pick(whole, is_ce)
        out = out.index_add(0, owner[is_ce], tm.cross_entropy(logits[is_ce], ce))
        if teacher is not None:
            terms = tm.kl(logits[~is_ce], teacher, _pick(whole, ~is_ce))
            out = out.index_add(0, owner[~is_ce], terms)
        return out

    def _set(self, leaves: Any) -> None:
        for name, modules in self.linears.items():
            for layer, module in enumerate(modules):
                module.terms = ()
                if leaves is not None:
                    a, b = leaves[f"{name}.{layer}"]
                    module.terms = (tm.row_lora(a, b, 1 / self.work.rank),)


def _pick(batch: tm.Batch, which: torch.Tensor) -> Any:
    """The targets and weights of some of a batch's scored positions."""
    part = tm.Batch.__new__(tm.Batch)
    part.target, part.weight = batch.target[which], batch.weight[which]
    return part


def make(
    work: Workload, data: Any, factors: Any, folder: pathlib.Path, name: str, variant: str
) -> TorchBatched:
    return TorchBatched(work, data, factors, folder, variant)
