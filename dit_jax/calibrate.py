"""`python -m dit_jax.calibrate` says what the answers of an adapter are worth: `dit_jax.cli.calibrate_adapter`."""

from dit_jax.runtime.exits import start

if __name__ == "__main__":
    start("dit_jax.cli.calibrate_adapter")
