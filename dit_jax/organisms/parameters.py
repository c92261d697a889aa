"""What a finetune may change: LoRA factors, the weights of linear layers, or all parameters (paper, section 5.2)."""

from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.models.decoder import init_params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta
from dit_jax.models.modules import projection_shapes

PARAMETERS = ("lora", "linear", "all")


def init_delta(config: DecoderConfig, key: jax.Array, diffs: Any) -> Delta:
    """A delta that changes nothing yet, of the kind that the `diffs` section of a config asks for.

    `diffs.parameters`: "lora" (the default): factors of `diffs.rank` on `diffs.projections`; "linear": dense
    differences of those projections; "all": of every parameter, embeddings, norms and head included. Dense ones
    start at zero, are fp32, and are as large as what they change.

    Raises:
        DitError: another word.
    """
    kind = diffs.get("parameters", "lora")
    if kind == "lora":
        return init_lora(
            config,
            key,
            diffs.rank,
            projections=diffs.projections,
            init_scale=diffs.get("init_scale", 1.0),
        )
    if kind not in PARAMETERS:
        raise DitError(
            f"unknown diffs.parameters {kind!r}: choose from {', '.join(map(repr, PARAMETERS))}"
        )
    if kind == "linear":
        layers: dict[str, Any] = {}
        for name, (parent, inputs, outputs) in projection_shapes(config).items():
            if name in diffs.projections:
                shape = (config.num_hidden_layers, inputs, outputs)
                layers.setdefault(parent, {})[name] = {"w": jnp.zeros(shape, jnp.float32)}
        return {"layers": layers}
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def zeros(node: Any) -> Any:
        # A module of the parameters holds one leaf, whatever it calls it.
        (child, *more) = node.values()
        if not more and not isinstance(child, dict):
            return {"w": jnp.zeros(child.shape, jnp.float32)}
        return {name: zeros(inner) for name, inner in node.items()}

    return {name: zeros(node) for name, node in shapes.items()}
