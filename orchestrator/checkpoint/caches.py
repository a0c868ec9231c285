"""What each layer of a model keeps for every token of a sequence."""

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.checkpoint.architectures import Architecture
from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.dimensions import Sizes
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError


@dataclass(frozen=True)
class LayerCache:
    """One layer's share of the cache.

    Attributes:
        elements: kept for each token: keys and values of all key-value heads, or the latent vector.
        window: tokens that a query sees, itself included; None: all of them.
        kind: "full", "sliding" or "mla".
    """

    elements: int
    window: int | None = None
    kind: str = "full"

    def tokens(self, context: int) -> int:
        """Tokens that have to be kept for a sequence of `context` tokens; an engine may keep more."""
        return context if self.window is None else min(context, self.window)


def _pattern(layer: int, config: ConfigValues) -> bool:
    return bool((layer + 1) % config.need("sliding_window_pattern"))


SLIDING: dict[str, Callable[[int, ConfigValues], bool]] = {
    "none": lambda layer, config: False,
    "all": lambda layer, config: True,
    "even": lambda layer, config: layer % 2 == 0,
    "pattern": _pattern,
    "after": lambda layer, config: layer >= (config.maybe("max_window_layers", 0) or 0),
    "even below": lambda layer, config: layer % 2 == 0 and layer < (config.maybe("max_window_layers", 0) or 0),
}
"""Whether a layer has a sliding window, by the rule that its architecture has where `layer_types` does not say."""

_KINDS = {"full_attention": False, "sliding_attention": True}


def layer_caches(row: Architecture, config: ConfigValues, sizes: Sizes, layers: int) -> tuple[LayerCache, ...]:
    """One for each layer.

    Raises:
        CheckpointError: a config value that is none, or a kind of layer that is not known.
    """
    if sizes.key_rank:
        return (LayerCache(sizes.key_rank + sizes.rope_dim, None, "mla"),) * layers
    window = _window(row, config)
    full = LayerCache(2 * sizes.kv_heads * sizes.head_dim)
    if window is None:
        return (full,) * layers
    slides = LayerCache(full.elements, window, "sliding")
    return tuple(slides if sliding else full for sliding in _sliding_layers(row, config, layers))


def _window(row: Architecture, config: ConfigValues) -> int | None:
    if row.window_switch and not config.flag("use_sliding_window"):
        return None
    listed = config.raw("layer_types") is not None
    return (config.maybe("sliding_window", 0) or None) if listed or row.sliding != "none" else None


def _sliding_layers(row: Architecture, config: ConfigValues, layers: int) -> list[bool]:
    kinds = config.raw("layer_types")
    if kinds is None:
        return [SLIDING[row.sliding](layer, config) for layer in range(layers)]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in _KINDS for kind in kinds):
        raise CheckpointError(f"{config.where}: layer_types is {shown(kinds, 80)}; known are {', '.join(_KINDS)}")
    if len(kinds) != layers:
        raise CheckpointError(f"{config.where}: layer_types has {len(kinds)} entries for {layers} layers")
    return [_KINDS[kind] for kind in kinds]
