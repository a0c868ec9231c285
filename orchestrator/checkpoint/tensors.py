"""What a header says about one tensor, and the table of data types. Nothing here needs torch."""

import math
from dataclasses import dataclass
from pathlib import Path

MAX_DIMS = 32
MAX_BYTES = 2**62
"""Sizes above this are nonsense; checked before anything is multiplied further or printed."""


@dataclass(frozen=True)
class DType:
    """One data type: bytes per element, torch's name for it, and whether it is a floating one."""

    size: int
    torch: str
    floating: bool = False


DTYPES = {
    "F64": DType(8, "float64", True),
    "F32": DType(4, "float32", True),
    "F16": DType(2, "float16", True),
    "BF16": DType(2, "bfloat16", True),
    "F8_E4M3": DType(1, "float8_e4m3fn", True),
    "F8_E5M2": DType(1, "float8_e5m2", True),
    "F8_E8M0": DType(1, "float8_e8m0fnu", True),
    "F8_E4M3FNUZ": DType(1, "float8_e4m3fnuz", True),
    "F8_E5M2FNUZ": DType(1, "float8_e5m2fnuz", True),
    "C64": DType(8, "complex64"),
    "I64": DType(8, "int64"),
    "I32": DType(4, "int32"),
    "I16": DType(2, "int16"),
    "I8": DType(1, "int8"),
    "U64": DType(8, "uint64"),
    "U32": DType(4, "uint32"),
    "U16": DType(2, "uint16"),
    "U8": DType(1, "uint8"),
    "BOOL": DType(1, "bool"),
}
"""By safetensors' name. Types narrower than a byte (F4, F6) are not among them: nothing here reads them."""

PLAIN_FLOATS = ("F32", "BF16", "F16", "F64")
"""The floating types that weights are computed in; the 8-bit ones mean a quantized checkpoint."""


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor without gaps whose last dimension varies fastest."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: as the checkpoint names it.
        dtype: a key of `DTYPES`.
        shape: sizes in elements.
        file: the file that holds its data.
        offset: of its first element, in bytes from the start of the file.
        nbytes: elements times bytes per element (for a strided tensor: of the tensor, not of its span).
        strides: in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether its data are one run of bytes in row-major order."""
        if self.parameters == 0:
            return True
        wanted = row_major(self.shape)
        return all(size == 1 or have == want for size, have, want in zip(self.shape, self.strides, wanted, strict=True))

    @property
    def span(self) -> int:
        """Bytes of the file from its first element to the end of its last one."""
        if self.parameters == 0:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * DTYPES[self.dtype].size

    def shares_all(self, other: "TensorInfo") -> bool:
        """Whether `other` is the same elements of the same file in the same order (a true tie)."""
        mine = (self.file, self.offset, self.dtype, self.shape, self.strides)
        return mine == (other.file, other.offset, other.dtype, other.shape, other.strides)


@dataclass(frozen=True)
class Header:
    """What one weight file holds: its tensors in file order, and the SHA-256 of its header bytes."""

    tensors: tuple[TensorInfo, ...]
    digest: str
