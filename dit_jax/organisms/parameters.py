"""What a finetune changes: LoRA factors, the weights of linear layers, or all parameters (paper, section 5.2)."""

from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta
from dit_jax.models.modules import module_table, set_at
from dit_jax.organisms.diffs_keys import DIFFS, PARAMETERS


def init_delta(config: DecoderConfig, key: jax.Array, diffs: Any) -> Delta:
    """A delta that changes nothing yet, as the `diffs` section of a config asks for.

    `diffs.parameters` is "lora" (the default: factors of `diffs.rank` on `diffs.projections`), "linear" (dense
    differences of those projections) or "all" (dense differences of every parameter, embeddings, norms and head
    included). Dense differences start at zero, are fp32, and are as large as what they change.

    Raises:
        DitError: `diffs.parameters` is anything else.
    """
    kind = DIFFS.get(diffs, "parameters")
    if kind == "lora":
        return init_lora(
            config,
            key,
            diffs.rank,
            projections=diffs.projections,
            init_scale=DIFFS.get(diffs, "init_scale"),
        )
    if kind not in PARAMETERS:
        raise DitError(
            f"unknown diffs.parameters {kind!r}: choose from {', '.join(map(repr, PARAMETERS))}"
        )
    delta: dict[str, Any] = {}
    for path, module in module_table(config).items():
        if kind == "all" or (module.lora and path[-1] in diffs.projections):
            set_at(delta, path, {"w": jnp.zeros(module.stacked, jnp.float32)})
    return delta
