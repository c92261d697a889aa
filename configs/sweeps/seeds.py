"""How much the result depends on chance: the quickstart with three seeds, each of which makes everything again.

    python -m dit_jax.sweep --sweep configs/sweeps/seeds.py --workdir runs/seeds

`:5` takes five seeds.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/quickstart.py"
SWEPT = "seed"
METRIC = "methods.dit.exact_match"


def get_sweep(arg: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    for seed in range(int(arg or 3)):
        yield f"seed_{seed}", {"seed": seed}
