"""`python -m dit_jax.sweep` runs one config many times: `dit_jax.cli.sweep_runs`."""

from dit_jax.runtime.exits import start

if __name__ == "__main__":
    start("dit_jax.cli.sweep_runs", "main_sweep")
