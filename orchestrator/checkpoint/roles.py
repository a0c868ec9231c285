"""Which tensor of a checkpoint is what: its role and its layer, by its name in the architecture's row."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.checkpoint.architectures import VISION, Architecture
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.tensors import DTYPES, TensorInfo


@dataclass(frozen=True)
class SpecTensor:
    """One tensor as planning sees it.

    `role` is "embedding", "linear", "expert" (of one or of all experts of a layer), "head", "vision" (of an image
    encoder or its projection) or "other". A quantized linear is one tensor of its real shape, and `parts` is what it
    is stored as; of others it is empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    role: str
    layer: int | None
    parts: tuple["SpecTensor", ...] = ()

    def part(self, *kinds: str) -> "SpecTensor | None":
        """The first of these parts that there is: "qweight", "weight.absmax", ..."""
        module = self.name.removesuffix("weight")
        return next((part for kind in kinds for part in self.parts if part.name == module + kind), None)


@dataclass(frozen=True)
class SpecLora:
    """The two factors that an adapter adds to one linear where it is not merged: (rank, inputs) and (outputs, rank).

    `module` is the linear's, as the base names it.
    """

    module: str
    layer: int
    rank: int
    inputs: int
    outputs: int

    @property
    def elements(self) -> int:
        """Of both factors."""
        return self.rank * (self.inputs + self.outputs)


def layer_pattern(row: Architecture) -> re.Pattern[str]:
    """Of a layer's tensors: the layer's number, the name within it."""
    before, after = row.layer.split("{}")
    return re.compile(rf"{re.escape(before)}(\d{{1,9}}){re.escape(after)}(.+)")


def spec_tensors(
    checkpoint: Checkpoint,
    row: Architecture,
    layers: int,
    tied: bool,
    packed: bool,
    notes: list[str],
) -> Iterator[SpecTensor]:
    """The tensors that are counted, in file order; what is left out, and why, is added to the notes."""
    pattern = layer_pattern(row)
    head, embedding = checkpoint.tensors.get(row.head), checkpoint.tensors.get(row.embedding)
    skipped = tied and head is not None and embedding is not None
    if skipped and head is not None and embedding is not None and not head.shares_all(embedding):
        notes.append(f"config.json ties {row.head} to {row.embedding}: the stored {row.head} is not counted")
    roles = _Roles(row, packed)
    for info in checkpoint.tensors.values():
        if skipped and info.name == row.head:
            continue
        match = pattern.fullmatch(info.name)
        layer = int(match[1]) if match else None
        if layer is not None and layer >= layers:
            continue
        role = roles.of(info, match[2] if match else None)
        yield SpecTensor(info.name, info.shape, info.dtype, info.nbytes, role, layer)


_BODY = re.compile(r"^(model|transformer)\.")
_NUMBER = re.compile(r"\.\d+\.")  # of an expert


class _Roles:
    """The role of each tensor, by its name in the architecture's row."""

    def __init__(self, row: Architecture, packed: bool) -> None:
        self._ends = {row.embedding: "embedding", row.head: "head"}
        self._packed = packed
        self._parts = {part.name: part.role for part in (*row.every, *row.dense, *row.sparse, *row.stacked)}

    def of(self, info: TensorInfo, within: str | None) -> str:
        """Args: within: its name within its layer, if it is of one."""
        if within is None:
            body = _BODY.sub("", info.name)
            return "vision" if body.startswith(VISION) else self._ends.get(info.name, "other")
        if self._packed and not DTYPES[info.dtype].floating:
            return "other"
        known = self._parts.get(_NUMBER.sub(".{}.", within))
        if known is not None:
            return known
        matrix = len(info.shape) == 2 and within.endswith(".weight") and "norm" not in within
        return "linear" if matrix else "other"
