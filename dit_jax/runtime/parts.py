"""Work that jobs share: which parts a job I/N does, and files of finished parts, each with its own digest."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError
from dit_jax.formats.json_parser import parse_json
from dit_jax.runtime import artifacts


def check_part(part: Any, key: str) -> None:
    """Raises DitError: neither "" nor I/N with I from 0 to N - 1."""
    numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    if part and not (numbers and int(numbers[1]) < int(numbers[2])):
        raise DitError(f"{key} must be I/N with I from 0 to N - 1, such as 0/8, not {part!r}")


def part_of(part: str, count: int) -> range:
    """Which of so many pieces of work the job "i/n" does, i from 0: every n-th one. "": all."""
    if not part:
        return range(count)
    first, parts = map(int, part.split("/"))
    return range(first, count, parts)


def write_part(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a finished part atomically, with a digest of its values."""
    artifacts.write_json(file, sealed(value))


def read_part(file: Path) -> dict[str, Any] | None:
    """What `write_part` wrote; None if there is no such part, or it differs from its digest."""
    if not file.is_file():
        return None
    try:
        found = artifacts.read_json(file)
    except DitError:
        return None
    return unsealed(found)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a digest of them."""
    content = parse_json(json.dumps(dict(value)), finite=False)  # as it is read
    return {**content, "digest": _digest(content)}


def unsealed(found: Any) -> dict[str, Any] | None:
    """What `sealed` was given; None if it differs from its digest, or has none."""
    digest = found.pop("digest", None) if isinstance(found, dict) else None
    return found if digest is not None and digest == _digest(found) else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
