"""The optimizers of diffs and adapters."""

from typing import TYPE_CHECKING, Any

from dit_jax.config.keys import Key
from dit_jax.errors import DitError

if TYPE_CHECKING:
    import optax

OPTIMIZERS = ("adam", "adamw")
# Keys of the config sections `diffs` and `train`.
OPTIMIZER_KEYS = (
    Key("optimizer", str, "which optimizer", choices=OPTIMIZERS),
    Key("learning_rate", float, "peak learning rate"),
    Key("warmup_steps", int, "steps of linear warm-up"),
    Key("final_fraction", float, "the cosine decay ends at this share of the peak; 1: constant"),
)


def check_betas(betas: Any, name: str = "betas") -> None:
    """Raises DitError unless `betas` are two decay rates for Adam."""
    match betas:
        case [int() | float() as first, int() | float() as second]:
            if 0 <= first < 1 and 0 <= second < 1:
                return
    raise DitError(f"{name} must be two numbers from 0 up, below 1, not {betas}")


def make_optimizer(
    name: str,
    learning_rate: float,
    steps: int,
    *,
    warmup_steps: int = 0,
    final_fraction: float = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> "optax.GradientTransformation":
    """Adam or AdamW with linear warm-up, then cosine to `final_fraction` of the peak (1.0: constant).

    Raises DitError: the optimizer is unknown, or the betas are not two decay rates.
    """
    import optax  # not at the top, since keys are declared without JAX

    check_betas(betas)
    decay = max(steps - warmup_steps, 1)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1)),
            optax.cosine_decay_schedule(learning_rate, decay, final_fraction),
        ],
        [warmup_steps],
    )
    if name == "adam":
        return optax.adam(schedule, *betas)
    if name == "adamw":
        return optax.adamw(schedule, *betas, weight_decay=weight_decay)
    raise DitError(f"unknown optimizer {name!r}: choose from {', '.join(OPTIMIZERS)}")
