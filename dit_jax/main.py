"""`python -m dit_jax.main` runs the stages of a config: `dit_jax.cli.run_stages`."""

from dit_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before the imports, which take seconds
    from dit_jax.cli.run_stages import end, main

    end(main())
