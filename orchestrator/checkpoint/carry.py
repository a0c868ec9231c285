"""config.json and the small files that a written model takes over from its source."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.folder import Checkpoint, carried_files
from orchestrator.checkpoint.tokenizer import tokenizer_files
from orchestrator.checkpoint.writer import write_text

_TYPE_KEY = {"linear": "type", "yarn": "type", "su": "type", "longrope": "type"}
"""Under which key rope_scaling names these; all others (llama3, dynamic, ...) under rope_type, as transformers did.
exllamav2 (config.py, 0.3.2) reads either, and stops where both are there."""


def carry_over(
    source: Checkpoint, out: Path, dtype: str, *, edits: Mapping[str, Any] | None = None, tokenizer: Path | None = None
) -> list[str]:
    """Copies the tokenizer, templates, generation config and so on byte for byte, and writes config.json.

    Args:
        dtype: torch's name of what the weights were written as ("bfloat16"); "" leaves it as it was.
        edits: keys of config.json that change; those of an object within it, one by one.
        tokenizer: a folder whose tokenizer takes the place of the source's.

    Returns:
        The names of the files written.
    """
    names = []
    files = carried_files(source.path)
    if tokenizer is not None:
        files = (*(set(files) - set(tokenizer_files(source.path))), *tokenizer_files(tokenizer))
    for file in sorted(files, key=lambda file: file.name):
        shutil.copyfile(file, out / file.name)
        names.append(file.name)
    config = written_config(edited(source.config, edits or {}), dtype)
    write_text(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return [*names, "config.json"]


def edited(config: dict[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some of its keys changed, in objects within it too."""
    result = dict(config)
    for key, value in edits.items():
        inner = result.get(key)
        result[key] = edited(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def written_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The source's config with the written dtype, and with both the old and the new form of the rope keys.

    In the old one the type has one key: transformers 4 left two, which exllamav2 does not take.
    """
    result = dict(config)
    for key in ("torch_dtype", "dtype"):
        if dtype and key in result:
            result[key] = dtype
    result.update(_new_rope(config) if not config.get("rope_parameters") else _old_rope(config))
    scaling = result.get("rope_scaling")
    if isinstance(scaling, dict):
        result["rope_scaling"] = _with_one_type(scaling)
    return result


def _with_one_type(scaling: dict[str, Any]) -> dict[str, Any]:
    """Without the second name of the same type."""
    kind = scaling.get("type")
    if not isinstance(kind, str) or kind != scaling.get("rope_type"):
        return scaling
    kept = _TYPE_KEY.get(kind, "rope_type")
    return {key: value for key, value in scaling.items() if key == kept or key not in ("type", "rope_type")}


def _new_rope(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's rope_parameters from rope_theta and rope_scaling."""
    theta, scaling = config.get("rope_theta"), config.get("rope_scaling") or {}
    if theta is None or not isinstance(scaling, dict):
        return {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "rope_theta")}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest}}


def _old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from rope_parameters, unless those differ by layer type."""
    rope = config["rope_parameters"]
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    rest = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    old: dict[str, Any] = {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    if kind != "default":
        old["rope_scaling"] = {_TYPE_KEY.get(str(kind), "rope_type"): kind, **rest}
    elif "partial_rotary_factor" in rest:
        old["partial_rotary_factor"] = rest["partial_rotary_factor"]
    return {key: value for key, value in old.items() if config.get(key) is None}
