"""The tensors of a PyTorch `.bin`: where each lies in the file, whichever way `torch.save` laid it out."""

import math
from pathlib import Path

from orchestrator.checkpoint.bin_legacy import is_legacy, read_legacy
from orchestrator.checkpoint.bin_pickle import PickledTensor
from orchestrator.checkpoint.bin_storages import Contents, resave
from orchestrator.checkpoint.bin_zip import ZIP_MAGIC, read_zip
from orchestrator.checkpoint.files import Opened
from orchestrator.checkpoint.tensors import DTYPES, MAX_BYTES, Header, TensorInfo, row_major
from orchestrator.checkpoint.trust import IncompleteError, shown
from orchestrator.errors import CheckpointError

WRAPPERS = ("state_dict", "model", "module")
"""Under which key training programs put the weights, beside epochs, options and the optimizer's state."""

_TAR_MAGIC = b"ustar"
_TAR_AT = 257
_AGAIN = "Download it again."


def bin_header(opened: Opened) -> Header:
    """The tensors of a `.bin`, in the order of its state dict. Nothing in the file is executed.

    Raises:
        IncompleteError: the file is truncated.
        CheckpointError: another format, a pickle with more than tensors in it, or contradictions.
    """
    where = opened.where
    contents = _contents(opened, where)
    state = _state_dict(contents.value, where)
    tensors = tuple(_place(contents, opened.file, where, name, value) for name, value in state.items())
    return Header(tensors, contents.digest)


def _contents(opened: Opened, where: str) -> Contents:
    start = opened.stream.read(512)
    opened.stream.seek(0)
    if start.startswith(ZIP_MAGIC):
        return read_zip(opened)
    if is_legacy(start):
        return read_legacy(opened)
    if not start:
        raise IncompleteError(f"{where} is empty", _AGAIN)
    if start[_TAR_AT:].startswith(_TAR_MAGIC):
        raise CheckpointError(
            f"{where} is a .tar of PyTorch before 0.2, which is not read here",
            "If you trust it (this runs what is in it), save it again: "
            + resave(where, "torch.load(f, weights_only=False)"),
        )
    raise CheckpointError(f"{where} is not a PyTorch checkpoint", _AGAIN)


def _state_dict(value: object, where: str) -> dict[str, PickledTensor]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds no state dict", "Save the model's state_dict().")
    wrapped = [key for key in WRAPPERS if _is_state_dict(value.get(key))]
    if len(wrapped) > 1:
        raise CheckpointError(
            f"{where} holds several state dicts: {' and '.join(wrapped)}", "Save the one that is meant alone."
        )
    # Where none is whole, the message names what is wrong inside of the likeliest.
    inner = wrapped or [key for key in WRAPPERS if isinstance(value.get(key), dict)]
    state = value[inner[0]] if inner else value
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, PickledTensor):
            raise CheckpointError(
                f"{where}: {shown(name)} is no tensor ({shown(type(tensor).__name__)})",
                "Save the model's state_dict().",
            )
    return state


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, PickledTensor) for item in value.values())


def _place(contents: Contents, file: Path, where: str, name: str, tensor: PickledTensor) -> TensorInfo:
    what = f"tensor {shown(name)} in {where}"
    item = DTYPES[tensor.dtype].size
    start, available = contents.regions[tensor.storage.key]
    # Counted as if nothing were empty: torch refuses such a shape also where a 0 is in it.
    if math.prod(max(size, 1) for size in tensor.shape) * item > MAX_BYTES:
        raise CheckpointError(f"{what} claims a shape that no file can hold")
    nbytes = math.prod(tensor.shape) * item
    if nbytes > available:
        raise CheckpointError(f"{what} claims more elements than its storage of {available:,} bytes has")
    # An empty tensor may be anywhere in its storage, or behind it: it gets a place that the file has.
    offset = start + (tensor.offset * item if nbytes else 0)
    info = TensorInfo(name, tensor.dtype, tensor.shape, file, offset, nbytes, _strides(tensor))
    if nbytes and tensor.offset * item + info.span > available:
        raise CheckpointError(f"{what} reaches beyond its storage of {available:,} bytes")
    return info


def _strides(tensor: PickledTensor) -> tuple[int, ...]:
    # Where a dimension has one element its stride means nothing, and may be larger than any address.
    plain = row_major(tensor.shape)
    if 0 in tensor.shape:
        return plain
    return tuple(
        want if size == 1 else have for size, have, want in zip(tensor.shape, tensor.strides, plain, strict=True)
    )
