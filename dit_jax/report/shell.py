"""Shell commands that pages show, to ask a diff again."""

import shlex


def ask_command(
    base: str,
    diff: str,
    question: str,
    *,
    index: int | None = None,
    adapter: str | None = None,
    dtype: str = "float32",
    forbid_repeats: bool = False,
    contrast: float | None = None,
    max_new_tokens: int,
) -> str:
    """A command of `dit_jax.ask`, quoted for a shell."""
    parts = ["python", "-m", "dit_jax.ask", "--base", base]
    if dtype != "float32":
        parts += ["--dtype", dtype]
    parts += ["--diff", diff]
    if index is not None:
        parts += ["--index", str(index)]
    if adapter:
        parts += ["--adapter", adapter]
    if forbid_repeats:
        parts.append("--forbid-repeats")
    if contrast is not None:
        parts += ["--contrast", str(contrast)]
    return shlex.join([*parts, "--max-new-tokens", str(max_new_tokens), question])
