"""`python -m dit_jax.calibrate` says what the answers of an adapter are worth: `dit_jax.cli.calibrate_adapter`."""

import sys

if __name__ == "__main__":
    from dit_jax.cli.calibrate_adapter import main

    sys.exit(main())
