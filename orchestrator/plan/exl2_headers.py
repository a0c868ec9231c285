"""An EXL2 model of the user's by its headers: whether it can be the model that config.json describes. No data read."""

from __future__ import annotations

from orchestrator.checkpoint.exl2_layout import Packed, check_headers
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.quantized import read_quantization
from orchestrator.checkpoint.spec import ModelSpec, SpecTensor
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.plan.exl2_sizes import pad32

_OTHER_MODEL = "The files are of different models, or config.json is: download the model again."


def check_planned(source: Checkpoint, spec: ModelSpec) -> None:
    """Checks every quantized linear of an EXL2 model: its parts, their types and shapes, its rows, its bits.

    Args:
        spec: of the same model: the shapes that it should have.

    Raises:
        CheckpointError: the first that is wrong, with its file; or bits that are not those of config.json.
    """
    signed = spec.quantization or {}
    head_bits = signed.get("head_bits")
    known = float(head_bits) if isinstance(head_bits, int | float) else 0
    linears = check_headers(source.path, source.tensors, read_quantization(signed).bits, known)
    for tensor in spec.tensors:
        linear = linears.get(tensor.name.removesuffix(".weight"))
        if linear is not None and tensor.parts:
            _check_shape(linear, tensor)


def _check_shape(linear: Packed, tensor: SpecTensor) -> None:
    """Of the head only the rows: it may have more words than config.json says."""
    columns, rows = tensor.shape[-2:]
    right = linear.rows in (rows, pad32(rows)) and (linear.columns == pad32(columns) or tensor.role == "head")
    if not right:
        info = linear.parts["q_weight"]
        raise CheckpointError(
            f"{shown(info.file, 400)}: {shown(info.name)} is of {linear.rows} inputs and {linear.columns} outputs, and "
            f"config.json and the other weights say {rows} and {columns}",
            _OTHER_MODEL,
        )
