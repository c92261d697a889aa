"""`python -m dit_jax.sweep` runs one config many times: `dit_jax.cli.sweep_runs`."""

import sys

from dit_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before the imports, which take seconds
    from dit_jax.cli.sweep_runs import main_sweep

    sys.exit(main_sweep())
