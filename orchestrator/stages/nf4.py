"""The base as a 4-bit training saw it: quantized to NF4 and back, by bitsandbytes itself (merge.base=nf4).

A QLoRA adapter was trained on top of weights that had gone through NF4 (arXiv:2305.14314): what it learned makes up
for their errors too. Merging it into those weights keeps the model that was trained, at the price of their rounding.
"""

import torch

from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.errors import EngineUnavailableError

BLOCK = 64
"""Elements that share a scale, in row-major order: bitsandbytes' default, and that of QLoRA."""


def check_available() -> None:
    """Raises EngineUnavailableError where bitsandbytes is not installed."""
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError as error:
        raise EngineUnavailableError(
            f"merge.base=nf4 needs bitsandbytes, which cannot be imported ({error})",
            'Type: pip install "orchestrator[bitsandbytes]"',
        ) from None


def rows_are_apart(info: TensorInfo, double: bool) -> bool:
    """Whether some rows alone give what the whole tensor gives: no block of theirs reaches into another row, and
    there is no mean over all scales (which double quantization subtracts)."""
    return not double and len(info.shape) == 2 and info.shape[1] % BLOCK == 0


def as_trained(rows: torch.Tensor, double: bool) -> torch.Tensor:
    """`rows` (out, in) in the type that they are stored in, quantized to NF4 and back, as float32.

    Args:
        double: the scales are quantized as well (bnb_4bit_use_double_quant).
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(rows.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=double)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored.float()
