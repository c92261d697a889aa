"""GGUF files (llama.cpp): metadata and tensors, read and dequantised by the library `gguf`.

The library maps the file and trusts what it says of itself; here its lists are counted before they are read, and its
tensors may neither overlap nor leave the file.
"""

import functools
import pathlib
from typing import Any

import numpy as np

from dit_jax.errors import DitError, first_line
from dit_jax.formats import budgets
from dit_jax.formats.files import regular_file, short

MAX_LIST = 2_000_000  # entries of all lists; those of a vocabulary of 300,000 tokens are four
MAX_ENTRIES = 100_000  # keys and tensors


class GgufFile:
    """One file: `metadata`, `shapes()`, `read(name)`.

    Raises:
        DitError: at construction: the library is not installed, or the file is no well-formed GGUF file.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        regular_file(self.path)
        try:
            from gguf import GGUFReader, GGUFValueType
        except ImportError:
            raise DitError(
                f"'{self.path}' is a GGUF file: install what reads it, pip install 'dit_jax[gguf]'"
            ) from None

        most = min(MAX_LIST, budgets.held_bytes(self.path.stat().st_size) // budgets.GGUF_ENTRY)

        class Bounded(GGUFReader):
            entries = 0

            def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
                if raw_type == GGUFValueType.ARRAY:
                    if self._get(orig_offs, np.uint32)[0] == raw_type:  # which llama.cpp refuses
                        raise ValueError("lists in lists")
                    self.entries += int(self._get(orig_offs + 4, np.uint64)[0])
                    if self.entries > most:
                        raise ValueError(f"lists of more than {most} entries")
                return super()._get_field_parts(orig_offs, raw_type)

            def _build_fields(self, offs: int, count: int) -> int:
                if count > MAX_ENTRIES:
                    raise ValueError(f"more than {MAX_ENTRIES} keys")
                return super()._build_fields(offs, count)

            def _build_tensor_info(self, offs: int, count: int) -> Any:
                if count > MAX_ENTRIES:
                    raise ValueError(f"more than {MAX_ENTRIES} tensors")
                return super()._build_tensor_info(offs, count)

        try:
            with np.errstate(over="raise"):  # of offsets
                reader = Bounded(self.path)
            if reader.byte_order == "S":  # of quantised tensors the library swaps no scales
                raise ValueError("it is of a machine of another byte order")
            self.metadata: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except Exception as e:  # the library raises whatever numpy does beyond the end of the file
            raise DitError(
                f"'{self.path}' is no readable GGUF file ({first_line(e)}): get it again"
            ) from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        end = 0
        for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
            if tensor.data_offset < end:
                raise DitError(
                    f"'{self.path}' is no well-formed GGUF file (the tensor {short(tensor.name)} overlaps "
                    "another): get it again"
                )
            end = tensor.data_offset + int(tensor.n_bytes)

    @property
    def architecture(self) -> Any:
        """What the file calls its architecture, such as "llama"."""
        return self.metadata.get("general.architecture")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name, rows first as numpy has them."""
        return {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32.

        Raises:
            DitError: its quantisation is none that the library can undo.
        """
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise DitError(
                f"'{self.path}': the quantisation {tensor.tensor_type.name} of {short(name)} cannot be undone: use "
                "another of the model's GGUF files (docs/formats.md has the list)"
            ) from None
        return values.astype(np.float32, copy=False).reshape(self.shapes()[name])


@functools.lru_cache(maxsize=1)
def open_gguf(path: pathlib.Path) -> GgufFile:
    """The file, parsed once for its config, weights and tokenizer. Raises DitError: see `GgufFile`."""
    return GgufFile(path)
