"""`dit-jax PROGRAM …`, or `python -m dit_jax PROGRAM …`, starts one of the programs: `dit_jax.cli.commands`."""

from dit_jax.runtime import exits


def main() -> None:
    """The console script."""
    exits.start("dit_jax.cli.commands")


if __name__ == "__main__":
    main()
