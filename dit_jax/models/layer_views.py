"""The layers' parameters as arrays of their own, without a copy: for programs that unroll the layers on a CPU."""

from typing import Any

import jax
import numpy as np

from dit_jax.models.config import Qwen3Config


def as_program_takes(params: dict[str, Any], config: Qwen3Config) -> dict[str, Any]:
    """The same parameters, `layers` a tuple of L trees where a CPU program has unrolled layers.

    XLA's CPU programs copy a slice of a stacked array before every matrix product that reads it. The tuple's arrays
    are views of the stacked ones: they take no memory (but for a layer that starts at an odd address).
    """

    def is_on_one_cpu(x: Any) -> bool:
        return isinstance(x, jax.Array) and [d.platform for d in x.devices()] == ["cpu"]

    if config.scan_layers or not all(map(is_on_one_cpu, jax.tree.leaves(params["layers"]))):
        return params

    def layer(index: int) -> Any:
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x)[index]), params["layers"])

    return {**params, "layers": tuple(layer(i) for i in range(config.num_hidden_layers))}
