"""`python -m dit_jax.main` runs the stages of a config: `dit_jax.cli.run_stages`."""

from dit_jax.cli.run_stages import end, main

if __name__ == "__main__":
    end(main())
