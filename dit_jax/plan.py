"""`python -m dit_jax.plan` says what fits where: `dit_jax.cli.plan_runs`."""

import sys

from dit_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before the imports, which take seconds
    from dit_jax.cli.plan_runs import main

    sys.exit(main())
