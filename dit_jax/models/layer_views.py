"""Parameters with separate arrays for each layer, for programs that unroll the layers on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.decoder_config import DecoderConfig


def as_program_takes(params: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The same parameters on their device; `layers` is a tuple of L trees if the program unrolls the layers.

    XLA copies a slice of a stacked array before every matrix product that reads it. On a CPU the tuple's arrays are
    views of the stacked ones, which take no memory (except for a layer that starts at an odd address). On an
    accelerator they are copies, so the stacked ones are better kept on the host (`keep_on_host`).
    """
    leaves = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    devices = {device for x in leaves for device in x.devices()}
    if config.scan_layers or len(devices) > 1:
        return params
    # Committed to a device only if the parameters are: otherwise a program would return committed arrays (a training
    # state), and compile again when it gets them back.
    device = next((device for x in leaves if x.committed for device in devices), None)
    layers = cut_layers(
        params["layers"], config, lambda x, i: jax.device_put(np.asarray(x)[i], device)
    )
    rest = {name: node for name, node in params.items() if name != "layers"}
    return {**jax.device_put(rest, device), "layers": layers}


def cut_layers(layers: Any, config: DecoderConfig, take: Any = None) -> Any:
    """A tuple of L trees, made by take(x, i) from every stacked leaf (default: `unstack`). A tuple stays as it is."""
    if isinstance(layers, tuple):
        return layers
    count = config.num_hidden_layers
    if take is not None:
        return tuple(jax.tree.map(lambda x, i=i: take(x, i), layers) for i in range(count))
    leaves, structure = jax.tree.flatten(layers)
    cut = list(map(unstack, leaves))
    return tuple(jax.tree.unflatten(structure, [x[i] for x in cut]) for i in range(count))


@jax.custom_vjp
def unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    """The slices of x on its first axis. Gradients are stacked again in one pass.

    By default each slice's gradient would be padded to the shape of x, and a sum of L such arrays is the slowest kernel
    of a training step on a CPU.
    """
    return tuple(x[i] for i in range(x.shape[0]))


def _unstack_forward(x: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    return unstack(x), None


def _unstack_backward(_: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    return (jax.lax.optimization_barrier(jnp.stack(gradients)),)


unstack.defvjp(_unstack_forward, _unstack_backward)


def abstract_layers(layers: Any, config: DecoderConfig) -> Any:
    """`layers` of `as_program_takes` as ShapeDtypeStructs for one device, from the stacked ones."""
    if config.scan_layers:
        return layers
    return cut_layers(layers, config, lambda x, _: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))


def keep_on_host(config: DecoderConfig, mesh: Any) -> bool:
    """Whether a model's stacked parameters stay on the host, because its programs need a copy of each layer."""
    return mesh is None and not config.scan_layers and jax.default_backend() != "cpu"
