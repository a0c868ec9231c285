"""What PEFT's names of an adapter's tensors say: which module each belongs to, and as which part."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.checkpoint.tensors import PLAIN_FLOATS, TensorInfo
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError

PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""

_SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B.bias",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".token_adapter.trainable_tokens_delta": "trainable_tokens_delta",
    ".token_adapter.base_layer.weight": "base_layer.weight",
    ".base_layer.weight": "base_layer.weight",
    ".base_layer.bias": "base_layer.bias",
}
"""End of a name -> part of the module before it. What none of these ends is a module's own tensor, saved whole."""

_IN_MEMORY = re.compile(
    r"\.(lora_[AB]\.[^.]+\.(weight|bias)|lora_(embedding_[AB]|magnitude_vector)\.(?!weight$)[^.]+(\.weight)?)$"
)
"""A name as a PEFT model has it in memory, with the adapter's own name in it: `lora_A.default.weight`."""

_MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")

_TRAINED_COPY, _UNTRAINED_COPY = ".modules_to_save.", ".original_module."
"""A resized model's adapter holds a saved module three times: by its own name, again, and as it was before."""

Parts = dict[str, TensorInfo]


@dataclass(frozen=True)
class Modules:
    """An adapter's tensors, sorted.

    Attributes:
        lora: module -> its parts (the values of the table of suffixes).
        saved: name of a model's tensor -> what was saved of it.
        spare: tensors that a merge has no use for.
        copies: (one, other) that have to hold the same: both are the saved tensor of one module.
    """

    lora: dict[str, Parts]
    saved: dict[str, TensorInfo]
    spare: frozenset[str]
    copies: tuple[tuple[TensorInfo, TensorInfo], ...]


def sort_tensors(tensors: Mapping[str, TensorInfo], where: str) -> Modules:
    """Sorts an adapter's tensors by module; `where` names the adapter in messages.

    Raises:
        CheckpointError: a name that is not PEFT's, a part that is there twice, a tensor that is not of a floating
            type, or one whose shape says that it was saved in pieces.
    """
    _refuse_state_dict(tensors, where)
    lora: dict[str, Parts] = {}
    saved: dict[str, TensorInfo] = {}
    copies: dict[str, TensorInfo] = {}
    untrained: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(
                f"{where}: {shown(name)} does not start with {PREFIX}: not one of PEFT's", "Save it again with PEFT."
            )
        path = name.removeprefix(PREFIX)
        module, part = _split(path)
        _check_stored(info, part, where)
        if part:
            _put(lora.setdefault(module, {}), part, info, where)
        elif _UNTRAINED_COPY in path:
            untrained[path] = info
        elif _TRAINED_COPY in path:
            _put(copies, path.replace(_TRAINED_COPY, "."), info, where)
        else:
            saved[path] = info
    twins = tuple((saved[path], info) for path, info in copies.items() if path in saved)
    saved = copies | saved
    spare = {copy.name for _, copy in twins}
    for path, info in untrained.items():
        if path.replace(_UNTRAINED_COPY, ".") in saved:
            spare.add(info.name)
        else:
            saved[path] = info
    return Modules(lora, saved, frozenset(spare), twins)


def _refuse_state_dict(names: Iterable[str], where: str) -> None:
    if raw := next(filter(_IN_MEMORY.search, names), None):
        raise CheckpointError(
            f"{where}: {shown(raw)} is a name out of a model's state_dict, not one that PEFT saves",
            "Save it with PEFT: model.save_pretrained(FOLDER).",
        )


def _split(path: str) -> tuple[str, str]:
    # The longest suffix first: .token_adapter.base_layer.weight also ends with .base_layer.weight.
    found = max((suffix for suffix in _SUFFIXES if path.endswith(suffix)), key=len, default="")
    return (path.removesuffix(found), _SUFFIXES[found]) if found else (path, "")


def _put(parts: Parts, part: str, info: TensorInfo, where: str) -> None:
    if part in parts:
        raise CheckpointError(
            f"{where}: {shown(parts[part].name)} and {shown(info.name)} are the same part of one module",
            "Save it again with PEFT.",
        )
    parts[part] = info


def _check_stored(info: TensorInfo, part: str, where: str) -> None:
    if info.dtype not in PLAIN_FLOATS:
        raise CheckpointError(
            f"{where}: {shown(info.name)} is {info.dtype}, not a floating-point tensor", "Save it again with PEFT."
        )
    shape = shown(list(info.shape), 60)
    if part in _MATRICES and len(info.shape) > 2:
        raise CheckpointError(
            f"{where}: {shown(info.name)} has shape {shape}: LoRA on a convolution is not merged here",
            "Merge it with PEFT (merge_and_unload) and give the merged model.",
        )
    if info.parameters == 0 or (part in _MATRICES and len(info.shape) != 2):
        raise CheckpointError(
            f"{where}: {shown(info.name)} has shape {shape}: it was saved without gathering its parts (ZeRO-3)",
            "Save it again with stage3_gather_16bit_weights_on_model_save, or from zero_to_fp32.",
        )
