"""`python -m dit_jax.audit` audits weight diffs: `dit_jax.cli.audit_diffs`."""

from dit_jax.runtime.exits import start

if __name__ == "__main__":
    start("dit_jax.cli.audit_diffs")
