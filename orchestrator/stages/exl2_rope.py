"""A config.json's rotary embedding as exllamav2 reads it: refused where it would be read wrong, or stop the engine.

All of it is of exllamav2 0.3.2's config.py and rope.py: it reads rope_theta and rope_scaling, in the old form only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.architectures import layout_of
from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.positions import longest_context
from orchestrator.checkpoint.trust import as_json, shown
from orchestrator.errors import ConfigError

_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
_NEEDS = {"linear": ("factor",), "yarn": ("factor", _ORIGINAL), "llama3": _LLAMA3}  # positive numbers, by the type
_LISTS = ("long_factor", "short_factor")  # of su and longrope, beside config.json's own _ORIGINAL
_LISTED = ("su", "longrope")
_NOTHING = ("default", "dynamic", "mrope")  # it scales by none of them; mrope is of the images'
_MAX = 2**53
_OTHER = "Correct config.json, or use another backend."


@dataclass(frozen=True)
class _Read:
    """What it finds in a config.json; `where`: that file, for a message."""

    config: dict[str, Any]
    where: str

    def value(self, key: str) -> Any:
        """That of the whole config before that of its language part, as it looks for them."""
        text = self.config.get("text_config")
        found = self.config.get(key)
        return text.get(key) if found is None and isinstance(text, dict) else found

    @property
    def scaling(self) -> dict[str, Any]:
        found = self.value("rope_scaling")
        return found if isinstance(found, dict) else {}

    @property
    def kind(self) -> str:
        return shown(self.scaling.get("type") or self.scaling.get("rope_type") or "default", 40)


def check_rope(config: dict[str, Any], path: Path, context: int) -> None:
    """Refuses what exllamav2 does not read, does not know, or would stop at.

    Args:
        config: config.json as exllamav2 will find it, in the folder `path`.
        context: tokens that it is to be used for.

    Raises:
        ConfigError: what is wrong, and what to write or to type instead.
    """
    read = _Read(config, f"{shown(path, 400)}/config.json")
    _check_theta(read)
    _check_scaling(read)
    _check_context(read, context)


def _check_theta(read: _Read) -> None:
    theta = read.value("rope_theta")
    if theta is not None and not _is_positive(theta):
        raise ConfigError(f"{read.where}: rope_theta is {as_json(theta)}, not a positive number", _OTHER)


def _check_scaling(read: _Read) -> None:
    scaling, kind = read.scaling, read.kind
    if scaling.get("type") and scaling.get("rope_type"):
        raise ConfigError(
            f"{read.where}: rope_scaling has both type ({shown(scaling['type'], 40)}) and rope_type "
            f"({shown(scaling['rope_type'], 40)}), at which exllamav2 stops",
            "Leave one of them in config.json.",
        )
    if kind not in (*_NEEDS, *_LISTED, *_NOTHING):
        known = ", ".join((*_NEEDS, *_LISTED))
        raise ConfigError(
            f"{read.where}: exllamav2 does not know the rope_scaling {kind}, and would leave it out (it knows {known})",
            _OTHER,
        )
    for key in _NEEDS.get(kind, ()):
        if not _is_positive(scaling.get(key)):
            raise _missing(read, key, "a positive number", scaling.get(key))
    if kind not in _LISTED:
        return
    for key in _LISTS:
        found = scaling.get(key)
        if not isinstance(found, list) or not found or not all(map(_is_positive, found)):
            raise _missing(read, key, "a list of positive numbers", found)
    lengths = [len(scaling[key]) for key in _LISTS]
    wanted = _half(read) or lengths[0]
    if lengths != [wanted, wanted]:
        found = " and ".join(f"{key} {length}" for key, length in zip(_LISTS, lengths, strict=True))
        raise ConfigError(f"{read.where}: {found} numbers, and exllamav2 needs {wanted} of each", _OTHER)
    if not _is_positive(read.config.get(_ORIGINAL)):
        raise ConfigError(
            f"{read.where} has no {_ORIGINAL}, which exllamav2 needs for {kind}", "Add it to config.json."
        )


def _check_context(read: _Read, context: int) -> None:
    """It scales by rope_scaling only, and not by its type dynamic: past its positions a model answers nonsense."""
    row = layout_of(read.config)
    scaling = read.value("rope_scaling") if read.kind != "dynamic" else None
    seen = read.config | {"rope_parameters": None, "rope_scaling": scaling}
    most = longest_context(row, ConfigValues(seen, read.where, row.defaults), []) if row else context
    if context > most:
        raise ConfigError(
            f"{read.where}: exllamav2 does not scale beyond {most} tokens as it says, and this is for {context}",
            f"Set model.max_context={most} or less, or use another backend.",
        )


def _half(read: _Read) -> int | None:
    """Numbers that a list of factors has: one for two of the dimensions of a head that are rotated."""
    head, hidden, heads = (read.value(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    partial = read.value("partial_rotary_factor")
    if not _is_positive(head) and _is_positive(hidden) and _is_positive(heads):
        head = hidden // heads
    return int(head * (partial if _is_positive(partial) else 1.0)) // 2 if _is_positive(head) else None


def _missing(read: _Read, key: str, wanted: str, found: Any) -> ConfigError:
    said = "is not there" if found is None else f"is {shown(as_json(found), 60)}"
    return ConfigError(f"{read.where}: {key} of rope_scaling ({read.kind}) {said}; it is {wanted}", _OTHER)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MAX
