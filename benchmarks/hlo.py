"""Reads a compiled GPU program's text: kernels, bytes through device memory, FLOPs of products."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SLICES = ("slice", "dynamic-slice", "gather")
_VIEWS = ("bitcast", "reshape", "get-tuple-element")
# Instructions that start a kernel, a copy or a call of a library; the rest is bookkeeping.
_KERNELS = (
    "fusion",
    "custom-call",
    "copy",
    "transpose",
    "reduce",
    "sort",
    "scatter",
    "gather",
    "dot",
)
_PRODUCT = re.compile(r"__cublas\$(?:lt\$)?(?:matmul|gemm)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    root: bool
    name: str
    shape: str
    kind: str
    operands: list[str]
    attributes: str

    @property
    def calls(self) -> str:
        found = re.search(r"(?:calls|to_apply|body)=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kind of kernel launch. times: how often a run of the program starts it. where: its place in the source."""

    times: int
    flops: float
    bytes: float
    where: str


class Program:
    """A compiled program's text, `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", ""
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head[2]
                self.computations[current] = {}
                self.entry = current if head[1] else self.entry
            elif line.startswith("}"):
                current = ""
            elif current and (found := _INSTRUCTION.match(line)):
                root, name, shape, kind, rest = found.groups()
                operands, attributes = _split(rest)
                self.computations[current][name] = Instruction(
                    bool(root), name, shape, kind, re.findall(r"%([\w.\-]+)", operands), attributes
                )

    def kernels(self, trips: int = 1) -> list[Kernel]:
        """All kernels of one run. trips: iterations of loops for which the program does not know the number."""
        return list(self._kernels(self.entry, 1, trips))

    def _kernels(self, computation: str, times: int, trips: int) -> Iterator[Kernel]:
        body = self.computations[computation]
        for one in body.values():
            if one.kind == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', one.attributes)
                yield from self._kernels(
                    one.calls, times * (int(known[1]) if known else trips), trips
                )
            elif one.kind == "conditional":
                branches = re.findall(r"%([\w.\-]+)", one.attributes.partition("branch_comp")[2])
                yield from self._kernels(branches[-1], times, trips)
            elif one.kind in ("call", "async-start"):
                yield from self._kernels(one.calls, times, trips)
            elif one.kind in _KERNELS:
                place = re.search(r'op_name="([^"]*)"', one.attributes)
                where = place[1] if place else re.sub(r"[\d.]+$", "", one.name)
                yield Kernel(times, self._flops(one, body), self._moved(one, body), where)

    def _flops(self, one: Instruction, body: dict[str, Instruction]) -> float:
        if one.kind == "fusion":
            inner = self.computations[one.calls]
            return sum(self._flops(x, inner) for x in inner.values())
        is_product = one.kind == "dot" or _PRODUCT.search(one.attributes)
        if not is_product:
            return 0.0
        contracted = re.search(
            r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d",]*)', one.attributes
        )
        left = _dimensions(body[one.operands[0]].shape)
        axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
        result = math.prod(_dimensions(one.shape))
        return 2.0 * result * math.prod(left[axis] for axis in axes)

    def _moved(self, one: Instruction, body: dict[str, Instruction]) -> float:
        """Bytes read and written; of a sliced stacked array, only the slice counts."""
        if one.kind != "fusion":
            # A library's product names its scratch space beside its result.
            result = _ARRAY.search(one.shape) if _PRODUCT.search(one.attributes) else None
            shape = result[0] if result else one.shape
            return _size(shape) + sum(_size(body[x].shape) for x in one.operands if x in body)
        inner = self.computations[one.calls]
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for x in inner.values():
            for operand in x.operands:
                users[operand].append(x)

        def uses(name: str) -> Iterator[tuple[Instruction, str]]:
            for user in users[name]:
                if user.kind in _VIEWS:
                    yield from uses(user.name)
                else:
                    yield user, name

        def read(parameter: Instruction) -> float:
            found = [(x, x.operands[0] == name) for x, name in uses(parameter.name)]
            if found and all(
                first and x.kind in (*_SLICES, "dynamic-update-slice") for x, first in found
            ):
                return sum(_size(x.shape) for x, _ in found if x.kind in _SLICES)
            return _size(parameter.shape)

        def written(x: Instruction) -> float:
            if x.kind == "tuple":
                return sum(written(inner[name]) for name in x.operands)
            if x.kind == "dynamic-update-slice":
                return _size(inner[x.operands[1]].shape)
            if x.kind in _VIEWS and x.operands[0] in inner:
                return written(inner[x.operands[0]])
            return _size(x.shape)

        (root,) = [x for x in inner.values() if x.root]
        return sum(read(x) for x in inner.values() if x.kind == "parameter") + written(root)


def _split(rest: str) -> tuple[str, str]:
    """The operands of an instruction, and the text after their closing bracket."""
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:at], rest[at:]
    return rest, ""


def _dimensions(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _size(shape: str) -> float:
    return float(
        sum(
            math.prod(int(size) for size in dims.split(",") if size) * _BYTES.get(dtype, 4)
            for dtype, dims in _ARRAY.findall(shape)
        )
    )
