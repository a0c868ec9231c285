"""A base that is quantized already, before an adapter of its unquantized original. Only headers are looked at.

Into such weights nothing is merged. On top of EXL2 the engine runs an adapter, which knows the linears by the shapes
that they had before they were packed.
"""

import math
from dataclasses import replace

from orchestrator.checkpoint.architectures import text_config
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.checkpoint.tensors import DTYPES, row_major
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

_ON_TOP = "exl2"  # the quant_method on top of which an engine here runs adapters
_KEY = "quantization_config"
_HALF = "F16"  # what an EXL2 linear stands for when it is computed with


def check_plain(base: Checkpoint) -> None:
    """Raises CheckpointError where a base is quantized, so that nothing can be merged into it."""
    if not _is_quantized(base):
        return
    original = "give the original 16-bit model as model.path=..."
    raise CheckpointError(
        f"{shown(base.path, 400)} is quantized: an adapter cannot be merged into it",
        f"Set model.merge=false, which runs it on top, or {original}" if _is_exl2(base) else original.capitalize(),
    )


def unpacked(base: Checkpoint) -> Checkpoint:
    """The base as an adapter that runs on top of it knows it: an EXL2 model's packed linears as plain ones.

    Their shapes are true, and nothing else of them is: their data are not to be read.

    Raises:
        CheckpointError: quantized otherwise; an EXL2 model that cannot be planned either.
    """
    if not _is_quantized(base):
        return base
    if not _is_exl2(base):
        raise CheckpointError(
            f"{shown(base.path, 400)} is quantized, and not to EXL2: no engine here runs an adapter on top of it "
            "(model.merge=false)",
            "Give the original 16-bit model as model.path=...",
        )
    tensors = dict(base.tensors)
    for linear in model_spec(base).tensors:
        for part in linear.parts:
            info = tensors.pop(part.name)
            nbytes = math.prod(linear.shape) * DTYPES[_HALF].size
            tensors[linear.name] = replace(
                info, name=linear.name, dtype=_HALF, shape=linear.shape, nbytes=nbytes, strides=row_major(linear.shape)
            )
    return replace(base, config={key: base.config[key] for key in base.config if key != _KEY}, tensors=tensors)


def _is_quantized(base: Checkpoint) -> bool:
    return any(config.get(_KEY) is not None for config in (base.config, text_config(base.config)))


def _is_exl2(base: Checkpoint) -> bool:
    said = base.config.get(_KEY)
    return isinstance(said, dict) and said.get("quant_method") == _ON_TOP
