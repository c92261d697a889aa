"""The entries of rotary position embeddings in config.json. Reading a config needs no jax."""

from typing import Any

from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig, Scaling

# The kinds of scaling that are computed, and the numbers of each; those of the second tuple may be absent.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


_BEFORE = "original_max_position_embeddings"
# What may also stand at the top level of config.json.
_OUTSIDE = ("rope_theta", "partial_rotary_factor", _BEFORE)


def read_rope(raw: dict[str, Any], where: str) -> tuple[float, Scaling]:
    """(theta, scaling) of a config.json, as written before ("rope_theta", "rope_scaling") and since transformers 5.

    Raises:
        DitError: no theta, or a scaling that is not computed exactly.
    """
    parameters, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise DitError(f"{where}: 'rope_parameters' and 'rope_scaling' must be objects")
    kinds = [_kind(source) for source in (parameters, scaling) if source]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise DitError(
            f"{where}: 'rope_parameters' asks for rope scaling of type {kinds[0]!r}, 'rope_scaling' for "
            f"{kinds[1]!r}: remove one of them"
        )
    for name in sorted((parameters.keys() & scaling.keys()) - {"type", "rope_type"}):
        if parameters[name] != scaling[name]:  # programs differ in which they take
            raise DitError(
                f"{where}: 'rope_parameters' and 'rope_scaling' have different {name!r}: remove one of them"
            )
    outside = {name: raw[name] for name in _OUTSIDE if raw.get(name) is not None}
    given = {**outside, **scaling, **parameters}
    if outside.get(_BEFORE, given.get(_BEFORE)) != given.get(_BEFORE):
        raise DitError(
            f"{where}: {_BEFORE!r} of the rope scaling differs from that at top level: remove one of them"
        )
    theta = given.get("rope_theta")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < 1e30:
        raise DitError(f"{where}: no usable 'rope_theta' at top level or in 'rope_parameters'")
    if given.get("partial_rotary_factor", 1) not in (1, None):
        raise DitError(f"{where}: 'partial_rotary_factor' is not supported")
    kind = kinds[-1] if kinds else "default"
    return float(theta), _read_scaling(kind, float(theta), given, raw, where)


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The object "rope_parameters" of a config.json, as transformers >= 5 writes it."""
    default = {"rope_theta": config.rope_theta, "rope_type": "default"}
    return {**default, **dict(config.rope_scaling)}


def _kind(source: dict[str, Any]) -> Any:
    return source.get("rope_type", source.get("type", "default"))


def _read_scaling(
    kind: Any, theta: float, given: dict[str, Any], raw: dict[str, Any], where: str
) -> Scaling:
    if kind == "default":
        return ()
    longest = raw.get("max_position_embeddings")
    if kind == "dynamic":
        raise DitError(
            f"{where}: rope scaling of type 'dynamic' is not supported: its angles change with the length of a text. "
            f"Texts of up to {longest} tokens need none: for these remove 'rope_scaling' from config.json"
        )
    if not isinstance(kind, str) or kind not in SCALINGS:
        known = ", ".join(SCALINGS)
        raise DitError(f"{where}: rope scaling of type {kind!r} is not supported, only {known}")
    needed, optional = SCALINGS[kind]
    given = {_BEFORE: longest, **given}
    values: dict[str, Any] = {"rope_type": kind}
    for name in (*needed, *optional):
        value: Any = given.get(name)
        if value is None and name in optional:
            continue
        if name == "truncate":
            fits, wanted = isinstance(value, bool), "true or false"
        else:
            fits, wanted = type(value) in (int, float) and 0 < value < 1e30, "a positive number"
        if not fits:
            raise DitError(
                f"{where}: rope scaling of type {kind!r} needs {wanted} as {name!r}, not {value!r}"
            )
        values[name] = value
    if kind == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        raise DitError(f"{where}: 'low_freq_factor' must be below 'high_freq_factor'")
    if kind == "yarn" and theta <= 1:
        raise DitError(f"{where}: rope scaling of type 'yarn' needs a 'rope_theta' above 1")
    return tuple(sorted(values.items()))
