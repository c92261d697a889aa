"""The adapter in PyTorch, a batch of diffs at once: the diff of each example as a dense ΔW, or factored."""

import pathlib
from typing import Any

import numpy as np
import torch

from benchmarks import torch_model as tm
from benchmarks.workload import LEARNING_RATE, WEIGHT_DECAY, Workload

_FIELDS = ("tokens", "lengths", "position", "target", "weight")


class TorchAdapter(tm.Torch):
    """Adapter steps. `dense` forms ΔW for every example and layer, which autograd keeps until the backward pass.

    All diffs stay on the device. A batch that does not fit is split, and gradients are accumulated.
    """

    def __init__(
        self,
        work: Workload,
        data: Any,
        factors: Any,
        folder: pathlib.Path,
        dense: bool,
        variant: str,
    ):
        self.work, self.data, self.factors = work, data, factors
        self.full = "full" in variant
        self.device = tm.device_of(work)
        self.model = tm.load(work, folder)
        self.linears = tm.wrap_linears(self.model)
        tm.enable_remat(self.model, work)
        if "compile" in variant:
            tm.compile_layers(self.model)
        self.row_term = tm.row_dense if dense else tm.row_lora
        self.diffs = {
            name: [
                torch.from_numpy(
                    np.ascontiguousarray(factors[f"diffs.{name}.{k}"].swapaxes(0, 1))
                ).to(self.device)
                for k in "ab"
            ]
            for name in self.linears
        }
        self.part = work.batch
        self.facts = tm.facts(work, variant)

    def warm_up(self) -> None:
        while True:
            try:
                self._train(steps=1)
                break
            except torch.cuda.OutOfMemoryError:
                if self.part == 1:
                    raise
                self.part //= 2
            torch.cuda.empty_cache()
        self.facts["examples_at_once"] = self.part

    def run(self) -> dict[str, np.ndarray]:
        return {"losses": self._train(self.work.steps)}

    def _train(self, steps: int) -> np.ndarray:
        work = self.work
        adapter = {
            name: [
                [
                    torch.from_numpy(self.factors[f"adapter.{name}.{k}"][layer])
                    .clone()
                    .to(self.device)
                    .requires_grad_()
                    for k in "ab"
                ]
                for layer in range(len(modules))
            ]
            for name, modules in self.linears.items()
        }
        leaves = [x for layers in adapter.values() for pair in layers for x in pair]
        optimizer = tm.adam(leaves, LEARNING_RATE["train"], WEIGHT_DECAY["train"])
        losses = []
        for step in range(steps):
            total = torch.zeros((), device=self.device)
            for part in tm.slices(work.batch, self.part):
                rows = torch.from_numpy(self.data["rows"][step][part].astype(np.int64))
                self._set(adapter, rows.to(self.device))
                arrays = {name: self.data[name][step][part] for name in _FIELDS}
                batch = tm.Batch(arrays, self.device)
                logits = tm.scored_logits(self.model, batch, self.full)
                loss = tm.cross_entropy(logits, batch).sum()
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        return torch.stack(losses)[None].cpu().numpy()

    def _set(self, adapter: Any, rows: torch.Tensor) -> None:
        for name, modules in self.linears.items():
            a, b = self.diffs[name]
            for layer, module in enumerate(modules):
                own = self.row_term(a[layer][rows], b[layer][rows], 1 / self.work.rank)
                shared = tm.shared_lora(*adapter[name][layer], 1 / self.work.adapter_rank)
                module.terms = (own, shared)


def make(
    work: Workload, data: Any, factors: Any, folder: pathlib.Path, name: str, variant: str
) -> TorchAdapter:
    return TorchAdapter(work, data, factors, folder, name == "torch-dense", variant)
