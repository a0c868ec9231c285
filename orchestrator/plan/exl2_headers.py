"""An EXL2 model of the user's by its headers: whether it can be the model that config.json describes. No data read."""

from __future__ import annotations

from pathlib import Path

from orchestrator.checkpoint.config_values import ConfigValues
from orchestrator.checkpoint.exl2_layout import Packed, check_headers
from orchestrator.checkpoint.folder import Checkpoint
from orchestrator.checkpoint.quantized import read_quantization
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.checkpoint.spec import ModelSpec, SpecTensor
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError
from orchestrator.plan.exl2_sizes import pad32

_OTHER_MODEL = "The files are of different models, or config.json is: download the model again."


def check_planned(source: Checkpoint, spec: ModelSpec) -> None:
    """Checks every quantized linear of an EXL2 model: its parts, their types and shapes, its rows, its bits.

    Also what exllamav2 takes from config.json as it stands: the layers, and the words of embedding and head.

    Args:
        spec: of the same model: the shapes that it should have.

    Raises:
        CheckpointError: the first that is wrong, with its file; or bits that are not those of config.json; or weights
            of another model beside it.
    """
    _check_files(source)
    signed = spec.quantization or {}
    head_bits = signed.get("head_bits")
    known = float(head_bits) if isinstance(head_bits, int | float) else 0
    linears = check_headers(source.path, source.tensors, read_quantization(signed).bits, known)
    _check_layers(source, spec)
    for tensor in spec.tensors:
        linear = linears.get(tensor.name.removesuffix(".weight"))
        if linear is not None and tensor.parts:
            _check_shape(linear, tensor)
    _check_words(source, spec)


def _check_files(source: Checkpoint) -> None:
    """exllamav2 reads every .safetensors file of the folder, so that one of another model stands for this one's.

    Raises:
        CheckpointError: the file that is to be moved away.
    """
    names = {file.name for file in source.files}
    beside = (file for file in sorted(source.path.glob("*.safetensors")) if file.name not in names)
    second = next((file for file in beside if _holds_some_of(file, source)), None)
    if second is None:
        return
    first = source.files[0]
    if not any(name.endswith(".q_weight") for name in source.tensors):  # then the second one is the EXL2 model
        first, second = second, first
    raise CheckpointError(
        f"{shown(source.path, 400)}: {shown(second.name)} holds weights that {shown(first.name)} holds too, and "
        "exllamav2 reads both files",
        f"Move {shown(second.name)} to another folder: the EXL2 model is in {shown(first.name)}.",
    )


def _holds_some_of(file: Path, source: Checkpoint) -> bool:
    """Whether it has a tensor of the model; one that cannot be read counts too, as exllamav2 would read it."""
    try:
        found = read_safetensors_header(file).tensors
    except CheckpointError:
        return True
    return any(info.name in source.tensors for info in found)


def _check_layers(source: Checkpoint, spec: ModelSpec) -> None:
    """exllamav2 builds as many layers as config.json says; what the weights have beyond is left out."""
    config = ConfigValues(source.config, f"{shown(source.path, 400)}/config.json", {})
    said = config.maybe("num_hidden_layers")
    if said != spec.layers:
        raise CheckpointError(
            f"{config.where} says num_hidden_layers {'nowhere' if said is None else said}, and the weights have "
            f"{spec.layers} layers: exllamav2 goes by config.json",
            f"Set num_hidden_layers to {spec.layers} there, or download the model again.",
        )


def _check_words(source: Checkpoint, spec: ModelSpec) -> None:
    """More rows than config.json has words are padding; of fewer, a word has none."""
    embedding = next((tensor for tensor in spec.tensors if tensor.role == "embedding"), None)
    head = next((tensor for tensor in spec.tensors if tensor.role == "head"), None)
    if embedding is None:
        return
    rows = embedding.shape[0]
    if rows < spec.vocab:
        raise _too_few(source, embedding, f"{rows} rows", spec.vocab)
    if head is None:
        return
    words = _words(head)
    if words < spec.vocab:
        raise _too_few(source, head, f"{words} outputs", spec.vocab)
    if words > pad32(rows):
        raise CheckpointError(
            f"{_where(source, head)} has {words} outputs, and {shown(embedding.name)} {rows} rows: the model would "
            "answer with words that it cannot read",
            _OTHER_MODEL,
        )


def _words(head: SpecTensor) -> int:
    """Outputs of the head as it is stored, which of a quantized one are padded."""
    packed = head.part("q_weight")
    return packed.shape[1] if packed is not None else head.shape[0]


def _too_few(source: Checkpoint, tensor: SpecTensor, rows: str, vocab: int) -> CheckpointError:
    return CheckpointError(
        f"{_where(source, tensor)} has {rows}, too few for the vocab_size of {vocab} in config.json",
        "Correct vocab_size in config.json, or download the model again: one of the two is of another model.",
    )


def _where(source: Checkpoint, tensor: SpecTensor) -> str:
    """A tensor's name, or that of its first part, behind its file's."""
    name = tensor.parts[0].name if tensor.parts else tensor.name
    return f"{shown(source.tensors[name].file, 400)}: {shown(tensor.name.removesuffix('.weight'))}"


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
