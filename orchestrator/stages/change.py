"""The arithmetic of a merge: what adapters add to the rows of one weight, in float32."""

import torch

from orchestrator.checkpoint.reader import read_tensor
from orchestrator.stages.merge_plan import Output


class Change:
    """The adapters' tensors for one output, read once; `apply` may be called for rows in any order, from any thread.

    Attributes:
        whole: the rows depend on each other: `apply` is to be given all of them at once.
    """

    def __init__(self, output: Output) -> None:
        self.whole = False
        self._lora = [
            (target, target.scale * weight, read_tensor(target.a).float(), read_tensor(target.b).float())
            for weight, target in output.changes
        ]

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The new values of `rows` (float32, may be changed in place), of which `start` is the first one's number."""
        for target, scale, a, b in self._lora:
            part = slice(start, start + len(rows))
            delta = (b @ a[:, part]).T if target.transposed else b[part] @ a
            rows += delta.mul_(scale)
        return rows
