"""transformers' `generate`, asking diffs one after another, merged or through PEFT, or the base, in batches or not."""

import pathlib
from typing import Any

import numpy as np
import torch

from benchmarks import torch_model as tm
from benchmarks.peft_loop import lora_config, lora_layers, set_factors, with_lora
from benchmarks.workload import Workload


class GenerateLoop(tm.Torch):
    """Prompts to the unchanged base, `part` of them at once."""

    part = 1

    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        self.work, self.factors = work, factors
        self.device = tm.device_of(work)
        self.model = tm.load(work, folder)
        self.prompt = torch.from_numpy(data["prompt"].astype(np.int64)).to(self.device)
        if "compile" in variant:
            tm.compile_layers(self.model)
        self.facts = tm.facts(work, variant)

    def apply(self, index: int) -> None:
        """Turns the model into that of one diff and the adapter, where there are diffs."""

    def warm_up(self) -> None:
        self._ask(slice(0, self.part))

    def run(self) -> dict[str, np.ndarray]:
        parts = tm.slices(self.work.diffs, self.part)
        return {"tokens": np.concatenate([self._ask(part) for part in parts])}

    @torch.inference_mode()
    def _ask(self, part: slice) -> np.ndarray:
        self.apply(part.start)
        prompt = self.prompt[part] if len(self.prompt) > 1 else self.prompt
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.work.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, prompt.shape[1] :].cpu().numpy().astype(np.int32)


class Batched(GenerateLoop):
    def __init__(self, work: Workload, data: Any, factors: Any, folder: pathlib.Path, variant: str):
        super().__init__(work, data, factors, folder, variant)
        self.part = min(work.batch, work.diffs)


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
    kinds = {"generate-merged": Merged, "generate-peft": Peft, "generate-batched": Batched}
    return kinds.get(name, GenerateLoop)(work, data, factors, folder, variant)
