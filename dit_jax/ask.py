"""`python -m dit_jax.ask` asks weight diffs what they did: `dit_jax.cli.ask_diffs`."""

import sys

if __name__ == "__main__":
    from dit_jax.runtime.exits import start

    start("dit_jax.cli.ask_diffs")
else:
    from dit_jax.asking import ask

    # `dit_jax.ask` stays the public function, also after `import dit_jax.ask`.
    sys.modules[__name__] = ask  # type: ignore[assignment]
