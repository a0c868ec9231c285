"""The base as a 4-bit training saw it: quantized to NF4 and back, by bitsandbytes itself (merge.base=nf4).

A QLoRA adapter was trained on top of weights that had gone through NF4 (arXiv:2305.14314): what it learned makes up
for their errors too. Merging it into those weights keeps the model that was trained, at the price of their rounding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.checkpoint.tensors import PLAIN_FLOATS, TensorInfo
from orchestrator.errors import EngineUnavailableError

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Elements that share a scale, in row-major order: bitsandbytes' default, and that of QLoRA."""

_IN_A_LAYER = re.compile(r"\.\d+\..*\.weight")


@dataclass(frozen=True)
class Nf4:
    """How the training quantized its base; `double`: the scales as well (bnb_4bit_use_double_quant)."""

    double: bool = False

    def takes(self, info: TensorInfo) -> bool:
        """Whether transformers quantizes a tensor: a linear of a layer. Embedding and head stay as they are, and
        so do experts: transformers 5 stacks them, and bitsandbytes replaces nn.Linear only."""
        linear = len(info.shape) == 2 and info.dtype in PLAIN_FLOATS and _IN_A_LAYER.search(info.name) is not None
        return linear and ".experts." not in info.name

    def needs_whole(self, info: TensorInfo) -> bool:
        """Whether some rows alone do not give what the whole tensor gives: a block of theirs reaches into another
        row, or a mean over all scales is subtracted (which double quantization does)."""
        return self.double or info.shape[1] % BLOCK != 0


def check_available() -> None:
    """Raises EngineUnavailableError where bitsandbytes is not installed."""
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError as error:
        raise EngineUnavailableError(
            f"merge.base=nf4 needs bitsandbytes, which cannot be imported ({error})",
            'Type: pip install "orchestrator[bitsandbytes]"',
        ) from None


def as_trained(rows: torch.Tensor, nf4: Nf4) -> torch.Tensor:
    """`rows` (out, in) in the type that they are stored in, quantized to NF4 and back, as float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from torch.nn.functional import pad

    # Block by block: for rows that are no whole number of blocks, bitsandbytes 0.50 on a CPU gives other values back
    # than on a GPU, where the training was. Zeros that fill the last block change no scale.
    blocks = pad(rows.reshape(-1), (0, -rows.numel() % BLOCK)).view(-1, BLOCK)
    packed, state = quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4", compress_statistics=nf4.double)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored.reshape(-1)[: rows.numel()].view(rows.shape).float()
