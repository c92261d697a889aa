"""Machines to plan for: TPU slices and GPUs by name, which need not be present, and the local devices."""

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax

from dit_jax.errors import DitError, first_line
from dit_jax.planning.gpus import COMPILER_OPTIONS, GIB, GPUS, gpu_devices


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. What fits depends on `memory` alone; the rest feeds estimates.

    Attributes:
        flops: peak bfloat16 FLOPs per second.
        memory: bytes that a program may use. A TPU's compiler reports them when a program does not fit; on a GPU they
            are what jax allocates with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
        bandwidth: bytes per second of its memory.
        network: bytes per second of all its links to other chips, in one direction.
        price: US dollars per chip and hour on demand; 0: there is no list price.
        cores: cores per chip, for slices that are named by cores ("v5p-8" has four chips).
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    network: float
    price: float
    cores: int = 1


# Speeds: the system pages of Cloud TPU, https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
# Prices: public list prices on demand, United States, https://cloud.google.com/tpu/pricing, as of PRICES_OF.
# They change and differ by region: edit them here, or give --price.
PRICES_OF = "November 2026"
CHIPS = {
    "v5e": Chip("v5e", 197e12, 15.75 * GIB, 0.819e12, 200e9, 1.20),
    "v6e": Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 448e9, 2.70),
    "v5p": Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 600e9, 4.20, cores=2),
    # Data sheets of NVIDIA (SXM modules); bfloat16 without sparsity, NVLink one way.
    "a100": Chip("a100", 312e12, 0.95 * GPUS["a100"][2], GPUS["a100"][3], 300e9, 0.0),
    "h100": Chip("h100", 989e12, 0.95 * GPUS["h100"][2], GPUS["h100"][3], 450e9, 0.0),
    "h200": Chip("h200", 989e12, 0.95 * GPUS["h200"][2], GPUS["h200"][3], 450e9, 0.0),
}
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A slice, GPUs of one host, or the local devices, whose `topology` is empty and whose `chip` may be None."""

    name: str
    count: int
    topology: str = ""
    chip: Chip | None = None
    memory: float = 0.0  # bytes per device, 0: unknown


def slice_name(generation: str, shape: str) -> str:
    """The name under which a slice is ordered: v5e:4x4 is v5e-16, v5p:2x2x1 is v5p-8 (cores)."""
    chips = math.prod(int(size) for size in shape.split("x"))
    return f"{generation}-{chips * CHIPS[generation].cores}"


def find_machine(name: str) -> Machine:
    """The TPU slice with a name like "v5e:4x4" or "v5e-16", or the GPUs with one like "h200" or "h200:8".

    Raises:
        DitError: the name is unknown; the message lists the known ones.
    """
    wanted = name.lower().replace("litepod", "e", 1)
    for generation, shapes in SHAPES.items():
        for shape in shapes:
            topology, ordered = f"{generation}:{shape}", slice_name(generation, shape)
            if wanted in (topology, ordered):
                chip = CHIPS[generation]
                count = math.prod(int(size) for size in shape.split("x"))
                return Machine(ordered, count, topology, chip, chip.memory)
    gpu, _, number = wanted.partition(":")
    if gpu in GPUS and (number or "1") in ("1", "2", "4", "8"):
        count = int(number or 1)
        return Machine(f"{count} × {gpu}", count, f"{gpu}:{count}", CHIPS[gpu], CHIPS[gpu].memory)
    known = "; ".join(
        f"{generation}: {', '.join(shapes)} ({slice_name(generation, shapes[0])} "
        f"to {slice_name(generation, shapes[-1])})"
        for generation, shapes in SHAPES.items()
    )
    raise DitError(
        f"unknown topology {name!r}: write GENERATION:SHAPE or its slice name; {known}; "
        f"or GPUs of one host: {', '.join(GPUS)}, also :2, :4, :8"
    )


def absent_devices(machine: Machine) -> list[Any]:
    """The devices of a machine that need not be present, to compile for.

    Raises:
        DitError: its compiler is not installed or does not know the machine.
    """
    gpu, _, count = machine.topology.partition(":")
    return gpu_devices(gpu, int(count)) if gpu in GPUS else tpu_devices(machine)


def compiler_options(machine: Machine) -> dict[str, Any] | None:
    """Options that XLA needs beside its flags to compile for a machine."""
    return COMPILER_OPTIONS if machine.topology.partition(":")[0] in GPUS else None


def tpu_devices(machine: Machine) -> list[Any]:
    """The devices of a slice that need not be present, to compile for.

    Raises:
        DitError: libtpu, which holds the compiler, is not installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise DitError(
            "planning for a TPU needs its compiler, which is not installed: "
            "pip install 'dit_jax[tpu]' (or pip install -e '.[tpu]' in a checkout)"
        )
    # libtpu reads these when it is loaded; without them it looks for a TPU in this host.
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=machine.topology)
    except Exception as error:  # libtpu raises many kinds, all with a message
        raise DitError(
            f"libtpu cannot compile for {machine.topology}: {first_line(error)}"
        ) from error
    return list(found.devices)


def local_machine() -> tuple[Machine, list[Any]]:
    """This process's backend. The devices of one host's CPU share its memory evenly."""
    devices = jax.devices()
    stats = None if devices[0].platform == "cpu" else devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        memory = float(stats["bytes_limit"])
    elif devices[0].platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    else:
        memory = 0.0
    kind = devices[0].device_kind
    return Machine(f"{len(devices)} × {kind}", len(devices), memory=memory), devices
