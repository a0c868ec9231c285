"""The name that a checkpoint on the disk has for a tensor of the model that an adapter was trained on.

transformers renames tensors when it loads a checkpoint (its conversion_mapping.py), so that PEFT's module paths are
not always the names on the disk. The renamings that matter for language models are data here.
"""

from collections.abc import Iterator

from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tied import vocabulary_of
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_PREFIXES = (
    ("model.", "model.language_model.", "language_model.model.", "model.text_model."),
    ("lm_head.", "language_model.lm_head.", "model.lm_head."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""Beginnings of names that stand for the same part of a model."""

_INFIXES = ((".mlp.", ".block_sparse_moe."),)
"""The same in the middle of a name (Mixtral's)."""


class BaseNames:
    """A base model's tensors, found by the names that PEFT knows them by."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self.vocabulary = vocabulary_of(base)

    def find(self, name: str) -> str | None:
        """The stored tensor that `name` means; a tied head counts as stored. None where there is none.

        Raises:
            CheckpointError: two stored tensors may be meant, and neither has this very name.
        """
        if self._has(name):
            return name
        found = sorted({other for other in _equivalents(name) if self._has(other)})
        if len(found) > 1:
            raise CheckpointError(
                f"{shown(self._base.path, 400)}: {shown(name)} may be {shown(found[0])} or {shown(found[1])}",
                "Merge the adapter with PEFT (merge_and_unload) and give the merged model.",
            )
        return found[0] if found else None

    def _has(self, name: str) -> bool:
        return name in self._base.tensors or (self.vocabulary.tied and name == self.vocabulary.head)


def _equivalents(name: str) -> Iterator[str]:
    for renamed in (name, *_swapped(name)):
        yield renamed
        for group in _PREFIXES:
            for prefix in group:
                if renamed.startswith(prefix):
                    yield from (other + renamed.removeprefix(prefix) for other in group)


def _swapped(name: str) -> Iterator[str]:
    for one, other in _INFIXES:
        yield name.replace(one, other, 1)
        yield name.replace(other, one, 1)
