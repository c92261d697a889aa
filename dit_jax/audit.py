"""`python -m dit_jax.audit` audits weight diffs: `dit_jax.cli.audit_diffs`."""

import sys

if __name__ == "__main__":
    from dit_jax.cli.audit_diffs import main

    sys.exit(main())
