"""Asks diffs one after another with transformers' `generate`: each merged into the weights, or through PEFT."""

import pathlib
from typing import Any

import numpy as np
import torch

from benchmarks import torch_model as tm
from benchmarks.peft_loop import lora_config, lora_layers, set_factors, with_lora
from benchmarks.workload import Workload


class GenerateLoop(tm.Torch):
    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        self.work, self.factors = work, factors
        self.device = tm.device_of(work)
        self.model = tm.load(work, folder)
        self.prompt = torch.from_numpy(data["prompt"].astype(np.int64))[None].to(self.device)
        if "compile" in variant:
            tm.compile_layers(self.model)
        self.facts = tm.facts(work, variant)

    def apply(self, index: int) -> None:
        """Turns the model into that of one diff and the adapter."""
        raise NotImplementedError

    def warm_up(self) -> None:
        self._ask(0)

    def run(self) -> dict[str, np.ndarray]:
        return {"tokens": np.stack([self._ask(i) for i in range(self.work.diffs)])}

    @torch.inference_mode()
    def _ask(self, index: int) -> np.ndarray:
        self.apply(index)
        out = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.work.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, self.prompt.shape[1] :].cpu().numpy().astype(np.int32)


class Merged(GenerateLoop):
    """Merges the adapter once and a diff before each answer; keeps the weights without the diff."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        super().__init__(work, data, factors, folder, variant)
        self.changed = []
        for layer, block in enumerate(self.model.model.layers):
            for part in (block.self_attn, block.mlp):
                for name, module in part.named_children():
                    if isinstance(module, torch.nn.Linear):
                        weight = module.weight
                        a, b = (self._factor(f"adapter.{name}.{k}", None, layer) for k in "ab")
                        with torch.no_grad():
                            original = weight + ((b / work.adapter_rank).T @ a.T).to(weight.dtype)
                        self.changed.append((name, layer, weight, original))

    def _factor(self, name: str, index: int | None, layer: int) -> torch.Tensor:
        array = self.factors[name]
        return torch.from_numpy((array if index is None else array[index])[layer]).to(self.device)

    def apply(self, index: int) -> None:
        for name, layer, weight, original in self.changed:
            a, b = (self._factor(f"diffs.{name}.{k}", index, layer) for k in "ab")
            a, b = a.to(weight.dtype), (b / self.work.rank).to(weight.dtype)
            torch.addmm(original, b.T, a.T, out=weight.data)


class Peft(GenerateLoop):
    """Two unmerged LoRAs; copies the diff's factors in before each answer."""

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        super().__init__(work, data, factors, folder, variant)
        self.model = with_lora(self.model, work.rank, "diff")
        self.model.add_adapter("dit", lora_config(work.adapter_rank))
        self.model.base_model.set_adapter(["diff", "dit"])
        self.layers = lora_layers(self.model)
        set_factors(self.layers, "dit", factors, "adapter", None)

    def apply(self, index: int) -> None:
        set_factors(self.layers, "diff", self.factors, "diffs", index)


def make(
    work: Workload, data: Any, factors: Any, folder: pathlib.Path, name: str, variant: str
) -> GenerateLoop:
    kind = Merged if name == "generate-merged" else Peft
    return kind(work, data, factors, folder, variant)
