"""`python -m dit_jax.plan` says what fits where: `dit_jax.cli.plan_runs`."""

from dit_jax.runtime.exits import start

if __name__ == "__main__":
    start("dit_jax.cli.plan_runs")
