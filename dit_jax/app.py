"""`python -m dit_jax.app` serves a page to ask and audit weight diffs: `dit_jax.cli.serve_app`."""

from dit_jax.runtime.exits import start

if __name__ == "__main__":
    start("dit_jax.cli.serve_app")
