"""`python -m dit_jax.sweep` runs one config many times: `dit_jax.cli.sweep_runs`."""

import sys

from dit_jax.cli.sweep_runs import main_sweep

if __name__ == "__main__":
    sys.exit(main_sweep())
