"""`python -m dit_jax.gather` joins the parts of a store of diffs: `dit_jax.cli.gather_parts`."""

from dit_jax.runtime.exits import start

if __name__ == "__main__":
    start("dit_jax.cli.gather_parts", "main_gather")
