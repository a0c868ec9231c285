"""How many bytes a GPTQ linear takes, in the file and on a GPU. No torch."""

from __future__ import annotations

import math

_WORD = 4  # bytes: weights and zeros are packed into int32, g_idx is int32
_SCALE = 2  # bytes: float16
DEFAULT_GROUP = 128


def linear_bytes(shape: tuple[int, ...], bits: int, group: int) -> int:
    """Bytes of one quantized weight of shape (out, in): qweight, qzeros, scales and g_idx, as GPTQModel writes them.

    qweight is int32 (in * bits / 32, out), qzeros int32 (groups, out * bits / 32), scales float16 (groups, out),
    g_idx int32 (in).

    Args:
        group: input rows that share a scale; -1: all of them.
    """
    out, rows = shape
    groups = 1 if group < 0 else math.ceil(rows / group)
    weights = math.ceil(rows * bits / 32) * out * _WORD
    zeros = groups * math.ceil(out * bits / 32) * _WORD
    return weights + zeros + groups * out * _SCALE + rows * _WORD
