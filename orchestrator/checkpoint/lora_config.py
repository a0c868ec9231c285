"""adapter_config.json: the few facts that a merge uses, and a reason for every feature that is refused.

Names and meanings are those of PEFT's LoraConfig (0.21). A key that is not listed here is refused unless it is
off: nothing that an adapter asks for is silently ignored.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.checkpoint.trust import as_json, shown
from orchestrator.errors import CheckpointError

_Value = TypeVar("_Value", int, float)

_MAX_PATTERN = 1000
_PEFT = "Merge it with PEFT (merge_and_unload) and give the merged model."

# fmt: off
_HARMLESS = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "use_dora", "lora_bias", "trainable_token_indices", "target_parameters",
))
# fmt: on
"""Used below, or of no consequence for a trained adapter (which modules were chosen, how it was started)."""

_REFUSED = {
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron layers",
    "corda_config": "CorDA",
    "lora_ga_config": "LoRA-GA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "kasa_config": "KaSA",
}

_BIASES = ("none", "all", "lora_only")

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""init_lora_weights that leave the base as it was. Others (pissa, olora, corda, loftq, lora_ga) change it, so
that the adapter alone is not the difference to the original base."""


@dataclass(frozen=True)
class LoraConfig:
    """What a merge needs of adapter_config.json.

    Attributes:
        bias: "none", "all" or "lora_only": which of the base's biases were trained.
        token_indices: (end of a module's path, row numbers in the order of the saved rows); the path "" stands
            for whatever module has trained rows.
        parameters: ends of the paths of parameters (not modules) that have a LoRA: experts.
        base: the name of the model it was trained on.
        modules: which modules have a LoRA; None where the config does not say.
    """

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    rslora: bool
    fan_in_fan_out: bool
    dora: bool
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]
    token_indices: tuple[tuple[str, tuple[int, ...]], ...]
    parameters: tuple[str, ...]
    base: str
    modules: "TargetModules | None" = None
    weight_tying: bool = False  # ensure_weight_tying: what tied modules have is shared

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module or parameter: the first pattern that matches, else `rank`."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """s of W += s*B@A: alpha/r, or alpha/sqrt(r) with rank-stabilized LoRA (arXiv:2312.03732)."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether `module` is one of modules_to_save or lies in one: as PEFT, by the path's end, letter by letter."""
        steps = module.split(".")
        return any(".".join(steps[:end]).endswith(self.modules_to_save) for end in range(1, len(steps) + 1))

    def targets_parameter(self, path: str) -> bool:
        """Whether `path` is one of target_parameters: as PEFT, whole or by its last names."""
        return any(path == name or path.endswith(f".{name}") for name in self.parameters)

    def rows_of(self, module: str) -> list[tuple[int, ...]]:
        """Every list of trained rows that the config gives a module (one, unless its keys overlap)."""
        return [rows for name, rows in self.token_indices if names_rows_of(name, module)]


@dataclass(frozen=True)
class TargetModules:
    """target_modules and the options that narrow it, as PEFT's check_target_module_exists reads them.

    Attributes:
        names: ends of modules' paths; or one regular expression for whole paths (a text).
        excluded: the same, for exclude_modules.
        layers: numbers of the layers (layers_to_transform); None for all.
        patterns: names of the lists of layers (layers_pattern); empty for any.
    """

    names: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    patterns: tuple[str, ...] = ()

    def take(self, module: str) -> bool:
        """Whether a module gets a LoRA by this config."""
        if not _named(self.names, module) or (self.excluded and _named(self.excluded, module)):
            return False
        if self.layers is None:
            return True
        lists = self.patterns or (r"[^.]*",)
        found = next((match for name in lists if (match := re.match(rf".*\.{name}\.(\d+)\.", module))), None)
        return found is not None and int(found[1]) in self.layers


def names_rows_of(name: str, module: str) -> bool:
    """Whether a key of trainable_token_indices means a module: the end of its path, or "" for whatever has rows."""
    return name in ("", module) or module.endswith(f".{name}")


def _named(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: tuple[tuple[str, _Value], ...], module: str, default: _Value) -> _Value:
    # As PEFT's get_pattern_key does.
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), default)


def parse_lora_config(config: Mapping[str, Any], where: str) -> LoraConfig:
    """Checks an adapter_config.json; `where` names it in messages.

    Raises:
        CheckpointError: not LoRA, a feature that is not merged here (named), or a value that makes no sense.
    """
    _refuse_features(config, where)
    lora = LoraConfig(
        rank=_rank(config.get("r", 8), "r", where),
        alpha=_number(config.get("lora_alpha", 8), "lora_alpha", where),
        rank_pattern=_patterns(config, "rank_pattern", _rank, where),
        alpha_pattern=_patterns(config, "alpha_pattern", _number, where),
        rslora=_flag(config, "use_rslora", where),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", where),
        dora=_flag(config, "use_dora", where),
        lora_bias=_flag(config, "lora_bias", where),
        bias=_bias(config.get("bias", "none"), where),
        modules_to_save=_names(config, "modules_to_save", where),
        token_indices=_token_indices(config.get("trainable_token_indices"), where),
        parameters=_names(config, "target_parameters", where),
        base=shown(config.get("base_model_name_or_path") or ""),
        modules=_target_modules(config, where),
        weight_tying=_flag(config, "ensure_weight_tying", where),
    )
    _check_alpha(lora, where)
    return lora


_ALL_LINEAR = "all-linear"


def _target_modules(config: Mapping[str, Any], where: str) -> TargetModules | None:
    names = config.get("target_modules")
    if not names or (isinstance(names, str) and names.lower() == _ALL_LINEAR):
        return None
    layers = config.get("layers_to_transform")
    if layers is not None:
        layers = layers if isinstance(layers, list) else [layers]
        if not all(type(layer) is int for layer in layers):
            raise CheckpointError(f"{where}: layers_to_transform is no list of layers' numbers")
    return TargetModules(
        _names_or_pattern(config, "target_modules", where),
        _names_or_pattern(config, "exclude_modules", where),
        tuple(layers) if layers is not None else None,
        tuple(re.escape(name) for name in _names_or_one(config, "layers_pattern", where)),
    )


def _names_or_pattern(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...] | str:
    value = config.get(key)
    if not isinstance(value, str):
        return _names(config, key, where)
    try:
        if len(value) > _MAX_PATTERN:
            raise re.error("too long")
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: {key} is the pattern {shown(value)}: {error}") from error
    return value


def _names_or_one(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = config.get(key)
    return (value,) if isinstance(value, str) else _names(config, key, where)


def _refuse_features(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind is None:
        raise CheckpointError(
            f"{where} has no peft_type: it is no adapter's configuration", "Set model.adapter=FOLDER."
        )
    if kind != "LORA":
        raise CheckpointError(f"{where}: the adapter is {shown(kind)}, not LORA: it cannot be merged here", _PEFT)
    for key, feature in _REFUSED.items():
        if config.get(key) not in (None, False, {}, []):
            raise CheckpointError(f"{where}: the adapter uses {feature}, which is not merged here", _PEFT)
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{where}: init_lora_weights={shown(start, 40)} changed the base that the adapter was trained on",
            "Save it converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion).",
        )
    for key, value in config.items():
        if key not in _HARMLESS and key not in _REFUSED and value not in (None, False, {}, [], ""):
            raise CheckpointError(f"{where}: the option {shown(key)} is not known here", _PEFT)


def _check_alpha(lora: LoraConfig, where: str) -> None:
    """Refuses a scale of zero, unless something is trained that it does not scale."""
    unscaled = lora.dora or lora.modules_to_save or lora.token_indices or lora.bias != "none"
    if lora.alpha == 0 and not lora.alpha_pattern and not unscaled:
        raise CheckpointError(
            f"{where}: lora_alpha is 0: the adapter would change nothing", "Set it to what the training had."
        )


def _rank(value: object, key: str, where: str) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"{where}: {key} is {as_json(value)}, not a positive whole number")
    return value


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise CheckpointError(f"{where}: {key} is {as_json(value)}, not a number")
    return value


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {as_json(value)}, not true or false")
    return value


def _patterns(config: Mapping[str, Any], key: str, check: Any, where: str) -> tuple[tuple[str, Any], ...]:
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{where}: {key} is no object")
    for pattern in given:
        try:
            if len(pattern) > _MAX_PATTERN:
                raise re.error("too long")
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{where}: {key} has the pattern {shown(pattern)}: {error}") from error
    return tuple((pattern, check(value, f"{key}.{shown(pattern)}", where)) for pattern, value in given.items())


def _names(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise CheckpointError(f"{where}: {key} is no list of names")
    return tuple(value)


def _bias(value: object, where: str) -> str:
    if value not in _BIASES:
        raise CheckpointError(f"{where}: bias is {as_json(value)}, not one of {', '.join(_BIASES)}")
    return str(value)


def _token_indices(value: object, where: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    lists = value if isinstance(value, dict) else {"": value} if value else {}
    return tuple((name, _row_numbers(name, rows, where)) for name, rows in lists.items())


def _row_numbers(name: str, rows: object, where: str) -> tuple[int, ...]:
    what = f"trainable_token_indices.{shown(name)}" if name else "trainable_token_indices"
    if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
        raise CheckpointError(f"{where}: {what} is no list of row numbers")
    if len(set(rows)) != len(rows):
        twice = Counter(rows).most_common(1)[0][0]
        raise CheckpointError(f"{where}: {what} names the row {twice} twice", "Its config was edited: restore it.")
    return tuple(rows)
