"""What to plan: a model's shape, a machine and a config; each step is compiled once and remembered."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dit_jax import __version__
from dit_jax.config.loading import flatten
from dit_jax.errors import DitError
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.json_shape import Shape, each, fits, is_count, is_number, is_switch, is_text
from dit_jax.models.decoder_config import COMPUTE, DecoderConfig
from dit_jax.models.families import read_config
from dit_jax.models.hf_checkpoint import find_folder
from dit_jax.models.shapes import NAMED_CONFIGS, find_shape
from dit_jax.planning import programs
from dit_jax.planning.machines import Machine, absent_devices, compiler_options
from dit_jax.planning.programs import Program
from dit_jax.runtime import parallel
from dit_jax.runtime.artifacts import make_dir, read_text
from dit_jax.runtime.os_errors import explain_os_errors
from dit_jax.runtime.parts import sealed, unsealed

# The config keys on which a stage's program depends, beside its batch.
_SHAPES = ("parameters", "rank", "projections", "optimizer", "max_length", "max_target")
_KEYS = {
    "diffs": (
        "diffs.behaviour",
        "diffs.steps",
        "diffs.samples_per_step.*",
        "diffs.widths.*",
        "diffs",
    ),
    "train": ("diffs.rank", "diffs.projections", "train"),
    "ask": (
        "diffs.rank",
        "diffs.projections",
        "train.rank",
        "train.projections",
        "train.max_length",
        "evaluate.max_new_tokens",
    ),
}


class OutOfTime(Exception):
    """No time is left for compiling; what was compiled is remembered."""


def model_shape(config: Any, name: str = "") -> DecoderConfig:
    """The shape of the config's model, or of another one by name, computed as the config says.

    Raises:
        DitError: the name is neither a released shape nor a folder with a `config.json`.
    """
    wanted = name or config.model.path
    shape = find_shape(wanted)
    if shape is None:
        if wanted != "tiny_qwen3" and not pathlib.Path(wanted).is_dir():
            raise DitError(
                f"unknown model {wanted!r}: give a folder with a config.json, or one of "
                f"{', '.join(NAMED_CONFIGS)}"
            )
        shape = read_config(find_folder(wanted))
    compute = {key: config.model[key] for key in COMPUTE if key in config.model}
    return dataclasses.replace(shape, dtype=config.model.dtype, **compute)


class Compiler:
    """Compiles steps for one machine, and remembers the results in a file of JSON lines.

    Args:
        devices: the machine's devices; None for an absent machine, whose compiler is loaded at first use.
        level: see `programs.compile_step`.
        cache: the file, made at first use; None: remember nothing.
        deadline: time of `time.monotonic` after which nothing more is compiled.
    """

    def __init__(
        self,
        machine: Machine,
        devices: list[Any] | None = None,
        level: str = "default",
        cache: pathlib.Path | None = None,
        deadline: float | None = None,
    ):
        self.machine, self.level = machine, level
        self._devices, self._cache, self._deadline = devices, cache, deadline
        self._known = read_cache(cache)

    def mesh(self, sizes: tuple[int, int, int]) -> Mesh | None:
        """The mesh of all the machine's devices. Raises DitError: the sizes do not fill it or fit its links."""
        if self._devices is None:
            self._devices = absent_devices(self.machine)
        named = dict(zip(parallel.MESH_AXES, sizes, strict=True))
        shape = parallel.mesh_shape(named, self.machine.count)
        if self.machine.topology and shape[0] * shape[1] * shape[2] != self.machine.count:
            raise DitError(
                f"mesh {','.join(map(str, shape))} leaves devices of {self.machine.name} unused: "
                f"its product must be {self.machine.count}, or one axis -1"
            )
        return parallel.make_mesh(named, self._devices)

    def compile(
        self, stage: str, model: DecoderConfig, config: Any, sizes: tuple[int, int, int], batch: int
    ) -> Program:
        """One stage's step.

        Raises:
            OutOfTime: the deadline has passed.
            DitError: the machine lacks a way to compute, or see `programs.compile_step`.
        """
        config = programs.with_batch(stage, config, batch)
        key = self._key(stage, model, config, sizes, batch)
        if key in self._known:
            return self._known[key]
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime
        memory = self.machine.memory
        mesh = self.mesh(sizes)
        first = (self._devices or jax.devices())[0]
        model.check_platform(first.platform)
        device = first if self.machine.topology else None
        options = compiler_options(self.machine)
        found = programs.compile_step(
            stage, model, mesh, config, memory, self.level, device, options
        )
        self._known[key] = found
        if self._cache is not None:
            record = sealed({"key": key, "program": dataclasses.asdict(found)})
            make_dir(self._cache.parent)
            with (
                explain_os_errors("write", self._cache),
                self._cache.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(record) + "\n")
        return found

    def _key(
        self, stage: str, model: DecoderConfig, config: Any, sizes: tuple[int, int, int], batch: int
    ) -> str:
        wanted = _KEYS[stage]
        values = {
            key: value
            for key, value in flatten(config).items()
            if key in wanted
            or any(pattern.endswith(".*") and key.startswith(pattern[:-1]) for pattern in wanted)
            or (key.rpartition(".")[0] in wanted and key.rpartition(".")[2] in _SHAPES)
        }
        parts: Mapping[str, Any] = {
            "machine": self.machine.topology or self.machine.name,
            "stage": stage,
            "mesh": list(sizes),
            "batch": batch,
            "level": self.level,
            "model": dataclasses.asdict(model),
            "config": values,
            "versions": [__version__, jax.__version__, _sources()],
        }
        return json.dumps(parts, sort_keys=True)


@functools.lru_cache
def _sources() -> str:
    """A digest of the code of the compiled steps and of the compiler's options."""
    root = pathlib.Path(__file__).parents[1]
    folders = ("models", "optimize", "organisms")
    files = [file for folder in folders for file in root.glob(f"{folder}/*.py")]
    names = ("train/dit", "deltas/tree", "runtime/parallel", "runtime/xla_flags", "planning/gpus")
    files += [root / f"{name}.py" for name in names]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


_PROGRAM: dict[str, Shape] = {
    "stage": is_text,
    "batch": is_count,
    "fits": is_switch,
    "seconds": is_number,
    "memory": each(is_number),
    "collectives": each((is_count, is_number)),
}
_RECORD: Shape = {"key": is_text, "program": _PROGRAM}


def read_cache(cache: pathlib.Path | None) -> dict[str, Program]:
    """Programs by key; lines that are damaged, or cut off by a kill, are dropped."""
    known: dict[str, Program] = {}
    if cache is None or not cache.exists():
        return known
    for line in read_text(cache, "give another --cache").splitlines():
        try:
            record = unsealed(parse_json(line))
        except BadJson:
            continue
        if record and fits(record, _RECORD) and record["program"].keys() == _PROGRAM.keys():
            fields = record["program"]
            counts = {kind: (n, float(size)) for kind, (n, size) in fields["collectives"].items()}
            known[record["key"]] = Program(**{**fields, "collectives": counts})
    return known
