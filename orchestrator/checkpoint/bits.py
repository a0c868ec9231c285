"""Questions about floating-point data that its bits answer, without torch and without a copy.

numpy is imported where data are looked at: a plan that reads headers only does without.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 2**22
"""Elements looked at at a time: it bounds the temporary memory."""

_NOT_FINITE: dict[str, tuple[str, int, int]] = {
    "F64": ("uint64", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": ("uint32", 0x7F80_0000, 0x7F80_0000),
    "F16": ("uint16", 0x7C00, 0x7C00),
    "BF16": ("uint16", 0x7F80, 0x7F80),
    "F8_E5M2": ("uint8", 0x7C, 0x7C),
    "F8_E4M3": ("uint8", 0x7F, 0x7F),
    "F8_E4M3FNUZ": ("uint8", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("uint8", 0xFF, 0x80),
    "F8_E8M0": ("uint8", 0xFF, 0xFF),
}
"""dtype -> (word, mask, value): an element is NaN or infinite where word & mask == value.

IEEE 754 for F16 to F64; OCP 8-bit floating point 1.0 and the FNUZ variants for the 8-bit ones.
"""

_SIGN = {"F64": 63, "F32": 31, "F16": 15, "BF16": 15}


def all_finite(data: Any, dtype: str) -> bool:
    """Whether no element of `data` (a buffer of bytes) is NaN or infinite; True for non-floating types."""
    if dtype not in _NOT_FINITE:
        return True
    word, mask, value = _NOT_FINITE[dtype]
    parts = ((part, part.dtype.type) for part in _parts(data, word))
    return not any(bool(((part & of(mask)) == of(value)).any()) for part, of in parts)


def all_zero(data: Any, dtype: str) -> bool:
    """Whether every element of `data` (a buffer of bytes) is 0 or -0."""
    if dtype not in _SIGN:
        return not any(bool(part.any()) for part in _parts(data, "uint8"))
    magnitude = (1 << _SIGN[dtype]) - 1
    return not any(bool((part & part.dtype.type(magnitude)).any()) for part in _parts(data, _NOT_FINITE[dtype][0]))


def _parts(data: Any, word: str) -> Iterator["np.ndarray[Any, Any]"]:
    import numpy as np

    words = np.frombuffer(data, dtype=word)
    for start in range(0, len(words), _CHUNK):
        yield words[start : start + _CHUNK]
