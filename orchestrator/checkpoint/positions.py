"""The longest context that a model is made for: its positions, and what RoPE scaling makes of them."""

from collections.abc import Iterator
from typing import Any

from orchestrator.checkpoint.architectures import Architecture
from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.trust import as_json
from orchestrator.errors import CheckpointError

_ORIGINAL = "original_max_position_embeddings"
_KEYS = ("rope_scaling", "rope_parameters")  # in the order in which transformers 5 reads them, which writes the latter
_MAX = 2**40

STRETCHED = ("linear", "dynamic", "yarn")
"""The types whose factor makes a context longer than max_position_embeddings, as vLLM 0.26 derives it. Of the others
(llama3, longrope, su) max_position_embeddings is the long one already, and mrope and default stretch nothing."""


def longest_context(row: Architecture, config: ConfigValues, notes: list[str]) -> int:
    """Tokens of the longest sequence; a note says where config.json does not say it.

    Raises:
        CheckpointError: a length or a factor that is none.
    """
    said = config.maybe("max_position_embeddings") or config.maybe("seq_length")
    positions = said or row.max_context
    if said is None:
        notes.append(
            f"config.json does not say max_position_embeddings: {positions}, its architecture's default, is assumed"
        )
    stretched = [_stretched(config, key, rope, positions) for key, rope in _ropes(config)]
    return positions if row.counts_scaling else max([positions, *stretched])


def _ropes(config: ConfigValues) -> Iterator[tuple[str, dict[str, Any]]]:
    """What config.json says of its rotary embedding, and under which key; it may differ by the type of a layer."""
    key = next((key for key in _KEYS if config.raw(key)), None)
    if key is None:
        return
    rope = config.raw(key)
    if not isinstance(rope, dict):
        raise CheckpointError(f"{config.where}: {key} is {as_json(rope)}, not an object")
    yield key, rope
    yield from ((f"{key}.{kind}", inner) for kind, inner in rope.items() if isinstance(inner, dict))


def _stretched(config: ConfigValues, key: str, rope: dict[str, Any], positions: int) -> int:
    """The positions as one scaling stretches them."""
    kind = rope.get("rope_type") or rope.get("type")
    factor = _number(config, key, rope, "factor")
    if factor is None or kind not in STRETCHED:
        return positions
    start: float = positions
    if kind == "yarn":  # without it, transformers takes the positions; with it, they may be stretched ones
        start = config.maybe(_ORIGINAL) or _number(config, key, rope, _ORIGINAL) or positions
    if start * factor >= _MAX:
        raise CheckpointError(f"{config.where}: {key}.factor is {as_json(rope['factor'])}: no context is that long")
    return int(start * factor)


def _number(config: ConfigValues, key: str, rope: dict[str, Any], name: str) -> float | None:
    """A value as a positive number; None where it is missing or null."""
    value = rope.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX:
        raise CheckpointError(f"{config.where}: {key}.{name} is {as_json(value)}, not a positive number below 2^40")
    return value
