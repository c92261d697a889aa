"""`python -m dit_jax.main` runs the stages of a config: `dit_jax.cli.run_stages`."""

from dit_jax.runtime.exits import start

if __name__ == "__main__":
    start("dit_jax.cli.run_stages", "main_run")
