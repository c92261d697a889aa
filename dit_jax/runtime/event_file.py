"""TensorBoard event files with scalars only: framed records, each the protobuf bytes of one event, with checksums.

No library, because those that write event files import torch wherever it is installed, which takes longer than the
training of a small run.
"""

import struct
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord files: CRC-32C, rotated and shifted, so that data that holds checksums is safe too."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ------------------------------------------------------------------ protobuf

# Event: 1 wall_time (double), 2 step (int64), 3 file_version (string), 5 summary; Summary: 1 value (repeated);
# Value: 1 tag (string), 2 simple_value (float). A field starts with its number << 3 | its wire type.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(wall_time: float, rest: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time) + rest


def _scalars(step: int, values: dict[str, float]) -> bytes:
    summary = b"".join(
        _bytes_field(1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        for tag, value in values.items()
    )
    return b"\x10" + _varint(step) + _bytes_field(5, summary)


# ------------------------------------------------------------------ the file


class EventFile:
    """A new event file: `write(step, time, {"loss": 1.0})`, then `close()`.

    Args:
        path: TensorBoard finds it only if its name holds `tfevents`; an existing file is replaced.
        wall_time: start of the curves, in seconds since 1970.
    """

    def __init__(self, path: Path, wall_time: float):
        path.unlink(missing_ok=True)  # it may be a link or a pipe
        self._file = open(path, "xb")  # noqa: SIM115  closed by close()
        self._record(_event(wall_time, _bytes_field(3, b"brain.Event:2")))

    def write(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        """Adds the scalars of one step (≥ 0)."""
        self._record(_event(wall_time, _scalars(step, values)))

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
