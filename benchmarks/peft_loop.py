"""PEFT and transformers, one diff at a time: a loop of finetunes, and an adapter trained on top of diffs."""

import pathlib
from typing import Any

import numpy as np
import torch

from benchmarks import torch_model as tm
from benchmarks.workload import LEARNING_RATE, WEIGHT_DECAY, Workload

_FIELDS = ("tokens", "lengths", "position", "target", "weight")


def with_lora(model: Any, rank: int, name: str) -> Any:
    """The model wrapped by PEFT, with one LoRA on all seven projections, scale 1 / rank."""
    import peft

    return peft.get_peft_model(model, lora_config(rank), adapter_name=name)


def lora_config(rank: int) -> Any:
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=1, target_modules="all-linear", bias="none")


def lora_layers(model: Any) -> dict[tuple[str, int], Any]:
    """(projection, layer) -> PEFT's LoRA layer."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            parts = name.split(".")
            found[parts[-1], int(parts[parts.index("layers") + 1])] = module
    return found


@torch.no_grad()
def set_factors(
    layers: dict[tuple[str, int], Any], adapter: str, factors: Any, which: str, index: int | None
) -> None:
    """Copies factors (of diff `index`, if they are stacked) into the LoRA named ADAPTER."""
    for (name, layer), module in layers.items():
        a, b = (factors[f"{which}.{name}.{k}"] for k in "ab")
        if index is not None:
            a, b = a[index], b[index]
        module.lora_A[adapter].weight.copy_(torch.from_numpy(a[layer].T))
        module.lora_B[adapter].weight.copy_(torch.from_numpy(b[layer].T))


class DiffsOneByOne(tm.Torch):
    """For each diff: fresh LoRA weights, fresh Adam, `steps` steps of cross-entropy and KL to the base."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        self.work, self.data, self.factors = work, data, factors
        self.full = "full" in variant
        self.device = tm.device_of(work)
        base = tm.load(work, folder)
        self.model = with_lora(base, work.rank, "diff")
        self.layers = lora_layers(self.model)
        tm.enable_remat(base, work)
        if "compile" in variant:
            tm.compile_layers(base)
        self.facts = tm.facts(work, variant)

    def warm_up(self) -> None:
        self._finetune(0, steps=1)

    def run(self) -> dict[str, np.ndarray]:
        found = [self._finetune(i, self.work.steps) for i in range(self.work.diffs)]
        return {"losses": np.stack(found)}

    def _finetune(self, index: int, steps: int) -> np.ndarray:
        set_factors(self.layers, "diff", self.factors, "diffs", index)
        leaves = [x for x in self.model.parameters() if x.requires_grad]
        optimizer = tm.adam(leaves, LEARNING_RATE["diffs"], 0)
        losses = []
        for step in range(steps):
            arrays = {name: self.data[name][index, step] for name in _FIELDS}
            loss = self._loss(arrays)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        for leaf in leaves:
            leaf.detach().cpu()
        return torch.stack(losses).cpu().numpy()

    def _loss(self, arrays: Any) -> torch.Tensor:
        num_ce = self.work.num_ce
        teacher = None
        if num_ce < self.work.samples:
            rest = tm.Batch({k: x[num_ce:] for k, x in arrays.items()}, self.device)
            with torch.no_grad(), self.model.disable_adapter():
                teacher = tm.scored_logits(self.model, rest, self.full)
        batch = tm.Batch(arrays, self.device)
        logits = tm.scored_logits(self.model, batch, self.full)
        split = int((batch.sample < num_ce).sum())  # scored positions come in the order of samples
        target, weight = batch.target, batch.weight
        batch.target, batch.weight = target[:split], weight[:split]
        loss = tm.cross_entropy(logits[:split], batch).sum()
        if teacher is not None:
            batch.weight = weight[split:]
            loss = loss + tm.kl(logits[split:], teacher, batch).sum()
        return loss


class AdapterOneByOne(tm.Torch):
    """Two LoRAs in one model, the diff's (frozen, swapped for every example) and the adapter's."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        self.work, self.data, self.factors = work, data, factors
        self.full = "full" in variant
        self.device = tm.device_of(work)
        base = tm.load(work, folder)
        self.model = with_lora(base, work.rank, "diff")
        self.model.add_adapter("dit", lora_config(work.adapter_rank))
        self.model.base_model.set_adapter(["diff", "dit"])
        for name, leaf in self.model.named_parameters():
            leaf.requires_grad_(".dit." in name)
        self.layers = lora_layers(self.model)
        tm.enable_remat(base, work)
        if "compile" in variant:
            tm.compile_layers(base)
        self.facts = tm.facts(work, variant)

    def warm_up(self) -> None:
        self._train(steps=1)

    def run(self) -> dict[str, np.ndarray]:
        return {"losses": self._train(self.work.steps)}

    def _train(self, steps: int) -> np.ndarray:
        set_factors(self.layers, "dit", self.factors, "adapter", None)
        leaves = [x for x in self.model.parameters() if x.requires_grad]
        optimizer = tm.adam(leaves, LEARNING_RATE["train"], WEIGHT_DECAY["train"])
        losses = []
        for step in range(steps):
            total = torch.zeros((), device=self.device)
            for i, row in enumerate(self.data["rows"][step]):
                set_factors(self.layers, "diff", self.factors, "diffs", int(row))
                arrays = {name: self.data[name][step][i : i + 1] for name in _FIELDS}
                batch = tm.Batch(arrays, self.device)
                logits = tm.scored_logits(self.model, batch, self.full)
                loss = tm.cross_entropy(logits, batch).sum()
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        return torch.stack(losses)[None].cpu().numpy()


def make(
    work: Workload, data: Any, factors: Any, folder: pathlib.Path, name: str, variant: str
) -> Any:
    kind = DiffsOneByOne if work.suite == "diffs" else AdapterOneByOne
    return kind(work, data, factors, folder, variant)
