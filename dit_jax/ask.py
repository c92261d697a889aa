"""`python -m dit_jax.ask` asks weight diffs what they did: `dit_jax.cli.ask_diffs`."""

import sys

from dit_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before the imports, which take seconds
    from dit_jax.cli.ask_diffs import main

    sys.exit(main())
else:
    from dit_jax.asking import ask

    # `dit_jax.ask` stays the public function, also after `import dit_jax.ask`.
    sys.modules[__name__] = ask  # type: ignore[assignment]
