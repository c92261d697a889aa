"""`python -m dit_jax.plan` says what fits where: `dit_jax.cli.plan_runs`."""

import sys

from dit_jax.cli.plan_runs import main

if __name__ == "__main__":
    sys.exit(main())
