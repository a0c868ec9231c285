"""The arithmetic of a merge: what adapters do to the rows of one tensor, in float32.

Every step repeats PEFT's operations (merge_and_unload) in their order and in its layouts, so that the result is
PEFT's bit for bit.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from orchestrator.checkpoint.adapter_targets import BiasTarget, ExpertsTarget, LoraTarget, RowsTarget, Target
from orchestrator.checkpoint.reader import read_tensor
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.stages.merge_plan import Output

Step = Callable[[torch.Tensor, int], torch.Tensor]
"""(rows, number of the first one) -> their new values; the rows may be changed in place."""


class Change:
    """The adapters' tensors for one output, read once; `apply` may be called for rows in any order, from any thread.

    Attributes:
        whole: the rows depend on each other: `apply` is to be given all of them at once.
    """

    def __init__(self, output: Output) -> None:
        self.whole = any(
            isinstance(target, LoraTarget) and target.magnitude is not None and target.transposed
            for _, target in output.changes
        )
        self._rows = math.prod(output.source.shape[:1])
        self._plain = _norm(*output.changes[0]) if len(output.changes) == 1 else None
        self._steps = [_STEPS[type(target)](target, weight) for weight, target in output.changes]

    def square(self, start: int, stop: int) -> float | None:
        """Sum of squares of what `apply` adds to some rows, where it can be had from A and B alone; else None.

        |s * B@A|^2 = s^2 * trace(B^T B A A^T): r x r products instead of one more pass over the rows.
        """
        return self._plain(start, stop) if self._plain is not None else None

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The new values of `rows` (float32, may be changed in place), of which `start` is the first one's number."""
        if self.whole and len(rows) != self._rows:
            raise ValueError(f"{len(rows)} of {self._rows} rows given, where all are needed at once")
        for step in self._steps:
            rows = step(rows, start)
        return rows


def _read(info: TensorInfo) -> torch.Tensor:
    return read_tensor(info).float()


def _norm(weight: float, target: Target) -> Callable[[int, int], float] | None:
    if not isinstance(target, LoraTarget) or target.magnitude is not None or target.transposed:
        return None
    scale, b, a = target.scale * weight, _read(target.b), _read(target.a).double()
    gram = (a @ a.T).float()
    return lambda start, stop: scale**2 * float(torch.sum((b[start:stop] @ gram) * b[start:stop]))


def _lora(target: LoraTarget, weight: float) -> Step:
    scale, a, b = target.scale * weight, _read(target.a), _read(target.b)

    def delta(count: int, start: int) -> torch.Tensor:
        part = slice(start, start + count)
        product = (b @ a[:, part]).T if target.transposed else b[part] @ a
        return product.mul_(scale)

    if target.magnitude is not None:
        return _dora(_read(target.magnitude), target.transposed, delta)

    def add(rows: torch.Tensor, start: int) -> torch.Tensor:
        rows += delta(len(rows), start)
        return rows

    return add


def _dora(magnitude: torch.Tensor, transposed: bool, delta: Callable[[int, int], torch.Tensor]) -> Step:
    """W = m / |V| * V, V = W + delta, the norm along the inputs (arXiv:2402.09353, equation 5)."""

    def scale(rows: torch.Tensor, start: int) -> torch.Tensor:
        added = delta(len(rows), start)
        if transposed:
            norm: torch.Tensor = torch.linalg.norm(rows.T + added.T, dim=1)
            return (magnitude / norm).view(1, -1) * (rows + added)
        norm = torch.linalg.norm(rows + added, dim=1)
        return (magnitude[start : start + len(rows)] / norm).view(-1, 1) * (rows + added)

    return scale


def _experts(target: ExpertsTarget, weight: float) -> Step:
    a, b = _read(target.a), _read(target.b)
    a, b = a.reshape(target.experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, target.experts)
    product = "ore,eri->eio" if target.transposed else "ore,eri->eoi"

    def add(rows: torch.Tensor, start: int) -> torch.Tensor:
        part = slice(start, start + len(rows))
        rows += torch.einsum(product, b[:, :, part], a[part]) * (target.scale * weight)
        return rows

    return add


def _bias(target: BiasTarget, weight: float) -> Step:
    added = _read(target.value) * (target.scale * weight)

    def add(rows: torch.Tensor, start: int) -> torch.Tensor:
        rows += added[start : start + len(rows)]
        return rows

    return add


def _overwrite(target: RowsTarget, weight: float) -> Step:
    values, places = _read(target.value), torch.tensor(target.rows)

    def overwrite(rows: torch.Tensor, start: int) -> torch.Tensor:
        here = (places >= start) & (places < start + len(rows))
        rows[places[here] - start] = values[here].to(rows.dtype)
        return rows

    return overwrite


_STEPS: dict[type, Callable[[Any, float], Step]] = {
    LoraTarget: _lora,
    ExpertsTarget: _experts,
    BiasTarget: _bias,
    RowsTarget: _overwrite,
}
