"""PEFT's adapter_config.json: checks its options, and says which modules they apply to."""

import math
import re
from pathlib import Path
from typing import Any

from dit_jax.deltas.patterns import Budget, Pattern
from dit_jax.deltas.peft_refusals import merge_command, option_error, plain, task_error, type_error
from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.formats.files import short

MAX_PATTERNS = 5_000

_HANDLED = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
    "task_type",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "lora_bias",
}
# These say how the adapter was trained or saved, and do not change what it computes.
_IRRELEVANT = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
    # of older versions, and of Unsloth, ms-swift and LLaMA-Factory
    "enable_lora",
    "merge_weights",
    "base_model_class",
    "parent_library",
    "unsloth_fixed",
    "unsloth_version",
    "swift_version",
    "lora_dtype",
    "lorap_lr_ratio",
    "lorap_emb_lr",
    "loraplus_lr_ratio",
    "loraplus_lr_embedding",
    "additional_target",
    "create_new_adapter",
    "task",
    "library_name",
    "tags",
}
_TWINS = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}
# Initialisations that keep the base weights; others (PiSSA, OLoRA, …) change them.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


class PeftOptions:
    """The options of adapter_config.json, with PEFT's rules for the modules they apply to."""

    def __init__(self, raw: dict[str, Any], source: Path):
        self.raw, self.source = raw, source
        if plain(raw.get("peft_type")) != "LORA":
            raise type_error(raw, source)
        for name, value in raw.items():
            default = value is None or value is False or value in ({}, [], "")
            if not default and name not in _HANDLED | _IRRELEVANT:
                raise option_error(name, value, source)
        if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
            raise DitError(
                f"'{source}': init_lora_weights {short(raw['init_lora_weights'])} changes the "
                "base weights, which is not supported: save the adapter with path_initial_model_for_weight_conversion, "
                f"or {merge_command(source.parent)}"
            )
        if raw.get("bias") not in (None, "none", "all", "lora_only"):
            raise DitError(f"'{source}': bias {short(raw['bias'])} is not supported")
        if plain(raw.get("task_type")) not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
            raise task_error(raw, source)
        self._r = self._number("r", raw.get("r", 8), integer=True)
        self._alpha = self._number("lora_alpha", raw.get("lora_alpha", 8))
        self._rslora = self._typed("use_rslora", bool, False)
        self.dora = self._typed("use_dora", bool, False)
        self.ties_weights = self._typed("ensure_weight_tying", bool, False)
        self.trains_biases = raw.get("bias") in ("all", "lora_only")
        saved = self._names("modules_to_save") or []
        self.modules_to_save = [saved] if isinstance(saved, str) else saved
        self.token_rows = self._token_rows(raw.get("trainable_token_indices"))
        self._ranks = self._pattern("rank_pattern", integer=True)
        self._alphas = self._pattern("alpha_pattern")
        self.target_modules = self._names("target_modules")
        self._exclude = self._names("exclude_modules")
        self.all_linear = (
            isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"
        )
        self._regexes: dict[str, Pattern] = {}
        self._budget = Budget()
        self._layers = self._layer_set(raw.get("layers_to_transform"))
        patterns = self._names("layers_pattern") or []
        self._layer_patterns = [patterns] if isinstance(patterns, str) else patterns
        if len(self._layer_patterns) > budgets.MAX_LAYER_PATTERNS:
            raise DitError(
                f"'{source}': layers_pattern has {len(self._layer_patterns)} entries: more than "
                f"{budgets.MAX_LAYER_PATTERNS}"
            )
        for pattern in self._layer_patterns:
            if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", pattern):
                raise DitError(
                    f"'{source}': layers_pattern {short(pattern)} is not supported, only plain names"
                )
        if (
            isinstance(self.target_modules, str)
            and self._layers is not None
            and not self.all_linear
        ):
            raise DitError(
                f"'{source}': layers_to_transform is not supported with a pattern in target_modules"
            )

    def rank(self, module: str) -> int:
        return int(self._lookup("rank_pattern", self._ranks, module, self._r))

    def alpha(self, module: str) -> float:
        return self._lookup("alpha_pattern", self._alphas, module, self._alpha)

    def scale(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.rank(module), self.alpha(module)
        scale = alpha / (math.sqrt(rank) if self._rslora else rank)
        if not abs(scale) < 1e30:
            raise DitError(f"'{self.source}': lora_alpha {short(alpha)} is not a usable number")
        return scale

    def saves(self, module: str) -> bool:
        """Whether PEFT trains and saves the whole weight of this module (`_set_trainable`)."""
        parts = [name.split(".") for name in self._with_twin(module)]
        above = [".".join(of[:i]) for of in parts for i in range(1, len(of) + 1)]
        return any(name.endswith(tuple(self.modules_to_save)) for name in above)

    def _with_twin(self, module: str) -> list[str]:
        """The module, and with ensure_weight_tying the one of embedding and head that it is tied to."""
        twin = _TWINS.get(module.rpartition(".")[2]) if self.ties_weights else None
        return [module, twin] if twin else [module]

    def tokens(self, module: str, vocab_size: int) -> list[int]:
        """The rows of a module that trainable_token_indices lists."""
        for name, rows in self.token_rows.items():
            if module == name or module.endswith(f".{name}"):
                if any(row >= vocab_size for row in rows):
                    raise self._error(
                        "trainable_token_indices", max(rows), f"ids below {vocab_size}"
                    )
                return rows
        raise DitError(
            f"'{self.source}': trainable_token_indices does not name {short(module)}, which is changed"
        )

    def targets(self, module: str) -> bool:
        """Whether PEFT puts a LoRA on this module."""
        return any(self._targets(name) for name in self._with_twin(module))

    def _targets(self, module: str) -> bool:
        """Whether PEFT puts a LoRA on this projection (`check_target_module_exists`)."""
        if self._exclude and self._listed("exclude_modules", self._exclude, module):
            return False
        if self.target_modules is None:
            return True
        if not self.all_linear and not self._listed("target_modules", self.target_modules, module):
            return False
        # PEFT checks the layer only where a name is the end of the module's name.
        if self._layers is None:
            return True
        if isinstance(self.target_modules, list) and module in self.target_modules:
            return True
        if self._layer_patterns:
            parts = [rf"(?:^|.*?\.){p}\.(?P<idx>[0-9]+)\." for p in self._layer_patterns]
        else:
            parts = [r".*?\.[^.]*\.(?P<idx>[0-9]+)\."]
        for part in parts:
            if match := re.match(part, module):
                return int(match["idx"]) in self._layers
        return False

    def _listed(self, option: str, chosen: str | list[str], module: str) -> bool:
        if isinstance(chosen, str):
            return self._regex(option, chosen).fullmatch(module)
        return any(module == name or module.endswith(f".{name}") for name in chosen)

    def _lookup(
        self, option: str, patterns: dict[str, float], module: str, default: float
    ) -> float:
        """The value of the first pattern that fits (PEFT's `get_pattern_key`)."""
        for key, value in patterns.items():
            # In a plain name, as in any pattern, a dot is any character.
            if re.fullmatch(r"[A-Za-z0-9_.]+", key):
                tail = module[-len(key) :]
                fits = len(tail) == len(key) and all(
                    k in (".", c) for k, c in zip(key, tail, strict=True)
                )
                fits = fits and (len(module) == len(key) or module[-len(key) - 1] == ".")
            else:
                fits = self._regex(option, rf"(.*\.)?({key})$").match(module)
            if fits:
                return value
        return default

    def _regex(self, option: str, pattern: str) -> Pattern:
        if pattern not in self._regexes:
            try:
                self._regexes[pattern] = Pattern(pattern, self._budget)
            except DitError as error:
                raise DitError(f"'{self.source}': {option}: {error}") from None
        return self._regexes[pattern]

    def _error(self, name: str, value: Any, wanted: str) -> DitError:
        return DitError(
            f"'{self.source}': {name} is {short(value)} instead of {wanted}: get the file again, or correct it"
        )

    def _number(self, name: str, value: Any, *, integer: bool = False) -> float:
        if type(value) is int and integer and 1 <= value <= 2**20:
            return value
        if type(value) in (int, float) and not integer and abs(value) < 1e30:
            return float(value)
        raise self._error(name, value, "a positive integer" if integer else "a finite number")

    def _typed(self, name: str, kind: type, default: Any) -> Any:
        value = self.raw.get(name)
        if value is not None and type(value) is not kind:
            raise self._error(name, value, f"a {kind.__name__}")
        return default if value is None else value

    def _pattern(self, name: str, *, integer: bool = False) -> dict[str, float]:
        value = self._typed(name, dict, {})
        if len(value) > MAX_PATTERNS:
            raise DitError(
                f"'{self.source}': {name} has {len(value)} entries: more than {MAX_PATTERNS}"
            )
        return {
            key: self._number(f"{name}[{short(key)}]", v, integer=integer)
            for key, v in value.items()
        }

    def _names(self, name: str) -> str | list[str] | None:
        value = self.raw.get(name)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(name, value, "a text or a list of texts")
        if len(value) > MAX_PATTERNS:
            raise DitError(
                f"'{self.source}': {name} has {len(value)} entries: more than {MAX_PATTERNS}"
            )
        return value

    def _token_rows(self, value: Any) -> dict[str, list[int]]:
        """Rows by module; a bare list means rows of the embedding."""
        by_module = value if isinstance(value, dict) else {"embed_tokens": value or []}
        if len(by_module) > 16:  # only two modules have rows of tokens
            raise self._error("trainable_token_indices", value, "the rows of at most 16 modules")
        for rows in by_module.values():
            if (
                not isinstance(rows, list)
                or not all(type(row) is int and row >= 0 for row in rows)
                or len(set(rows)) < len(rows)
            ):
                raise self._error("trainable_token_indices", value, "a list of different token ids")
        return {name: rows for name, rows in by_module.items() if rows}

    def _layer_set(self, value: Any) -> set[int] | None:
        if value is None or value == []:
            return None
        values = value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in values):
            raise self._error("layers_to_transform", value, "an integer or a list of integers")
        return set(values)
