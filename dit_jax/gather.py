"""`python -m dit_jax.gather` joins the parts of a store of diffs: `dit_jax.cli.gather_parts`."""

import sys

from dit_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before the imports, which take seconds
    from dit_jax.cli.gather_parts import main_gather

    sys.exit(main_gather())
