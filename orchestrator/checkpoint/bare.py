"""A model of which only config.json is there: the tensors that it would have, to plan with."""

import functools
import math
from pathlib import Path

from orchestrator.checkpoint.architectures import architecture_of, is_tied
from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.dimensions import MAX_LAYERS, Shape, configured, model_parts, shape_of
from orchestrator.checkpoint.folder import Checkpoint, check_folder, open_checkpoint
from orchestrator.checkpoint.parts import Part
from orchestrator.checkpoint.tensors import DTYPES, MAX_BYTES, PLAIN_FLOATS, TensorInfo, row_major
from orchestrator.checkpoint.trust import read_object, shown
from orchestrator.checkpoint.weights import MODEL_FORMATS, read_weights
from orchestrator.errors import CheckpointError

_NAMES = {DTYPES[name].torch: name for name in PLAIN_FLOATS}


def open_to_plan(path: Path) -> Checkpoint:
    """A model's folder as `open_checkpoint` has it; without any weights, what config.json says they would be.

    Raises:
        CheckpointError: as `open_checkpoint`; without weights also an unsupported architecture, a size that is
            missing, or a config of quantized weights.
    """
    check_folder(path)
    file = path / "config.json"
    if not file.is_file() or read_weights(path, MODEL_FORMATS) is not None:
        return open_checkpoint(path)
    return from_config(path)


def from_config(path: Path) -> Checkpoint:
    """The checkpoint that a folder's config.json describes; no weight is read."""
    file = path / "config.json"
    where = shown(file, 400)
    values = read_object(file)
    row = architecture_of(values, shown(path, 400))
    config = ConfigValues(values, where, row.defaults)
    if values.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where} is of quantized weights, and there are none: how large they are, it does not say",
            "Give the folder with the weights, or remove quantization_config to plan for the unquantized model.",
        )
    sizes, layers = configured(row, config), config.need("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise CheckpointError(f"{where} claims {layers:,} layers: refused")
    dtype = _dtype(config)
    tensors = {}

    @functools.cache  # a part is there once in each layer, and for each of its experts
    def measured(part: Part) -> tuple[Shape, int, Shape]:
        shape = shape_of(part, sizes)
        return shape, math.prod(shape) * DTYPES[dtype].size, row_major(shape)

    for name, part in model_parts(row, config, layers, sizes.experts, is_tied(values)):
        shape, nbytes, strides = measured(part)
        if nbytes > MAX_BYTES:
            raise CheckpointError(f"{where}: {name} would take {nbytes:,} bytes: refused")
        tensors[name] = TensorInfo(name, dtype, shape, file, 0, nbytes, strides)
    notes = ["there are no weights: their sizes are derived from config.json"]
    if isinstance(values.get("vision_config") or values.get("visual"), dict):
        notes.append("of the image encoder nothing is counted: config.json does not say its tensors")
    return Checkpoint(path, values, tensors, "none", (), tuple(notes), {}, None)


def _dtype(config: ConfigValues) -> str:
    """The type that the weights would have: transformers 5 writes it as dtype, older ones as torch_dtype."""
    for key in ("dtype", "torch_dtype"):
        value = config.raw(key)
        if value in (None, "auto"):
            continue
        name = _NAMES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
        if name is None:
            raise CheckpointError(f"{config.where}: {key} is {shown(value, 40)}; known are {', '.join(_NAMES)}")
        return name
    return "BF16"
