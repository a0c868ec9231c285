"""config.json's values, checked one by one as they are asked for: they are a stranger's."""

from collections.abc import Mapping
from typing import Any

from orchestrator.checkpoint.trust import as_json, shown
from orchestrator.errors import CheckpointError

_MAX = 2**40


class ConfigValues:
    """The values of the language part: `text_config` where there is one, then config.json, then the defaults."""

    def __init__(self, config: dict[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        if text is not None and not isinstance(text, dict):
            raise CheckpointError(f"{where}: text_config is {shown(text, 40)}, not an object")
        self._layers: tuple[Mapping[str, Any], ...] = (text or {}, config, defaults)
        self.where = where

    def raw(self, key: str) -> Any:
        """The value as it stands; null counts as said, a missing key as the default."""
        return next((values[key] for values in self._layers if key in values), None)

    def said(self, *keys: str) -> int | None:
        """What config.json itself says under the first of the keys that is not null, as a size."""
        there = (key for key in keys if any(values.get(key) is not None for values in self._layers[:2]))
        key = next(there, None)
        return None if key is None else self.maybe(key)

    def maybe(self, key: str, least: int = 1) -> int | None:
        value = self.raw(key)
        if value is None:
            return None
        if type(value) is not int or not least <= value < _MAX:
            kind = f"a {'positive ' if least else ''}whole number"
            kind += " below 2^40" if type(value) is int and value >= _MAX else ""
            raise CheckpointError(f"{self.where}: {key} is {as_json(value)}, not {kind}")
        return value

    def need(self, key: str) -> int:
        value = self.maybe(key)
        if value is None:
            raise CheckpointError(f"{self.where} has no {key}")
        return value

    def flag(self, key: str) -> bool:
        """Whether a key is true, or a number other than 0."""
        value = self.raw(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        return bool(self.maybe(key, 0))

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers; empty where it is missing."""
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise CheckpointError(f"{self.where}: {key} is {as_json(value)}, not a list of whole numbers")
        return value
