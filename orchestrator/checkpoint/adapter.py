"""A LoRA adapter's folder: its config, its tensors by their headers, its tokenizer. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.adapter_names import Modules, sort_tensors
from orchestrator.checkpoint.bits import all_finite, all_zero
from orchestrator.checkpoint.fingerprint import fingerprint_files
from orchestrator.checkpoint.folder import check_folder
from orchestrator.checkpoint.lora_config import LoraConfig, parse_lora_config
from orchestrator.checkpoint.reader import read_words
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.tied import same_data
from orchestrator.checkpoint.tokenizer import tokenizer_files
from orchestrator.checkpoint.trust import read_object, shown
from orchestrator.checkpoint.weights import ADAPTER_FORMATS, read_weights
from orchestrator.errors import CheckpointError

_RANDOM_STARTS = (".lora_A.weight", ".lora_embedding_B")
"""Factors that training starts from at random; the others start at zero, so that at first nothing changes."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's files: config as it is, the facts a merge uses, tensors in file order."""

    path: Path
    config: dict[str, Any]
    lora: LoraConfig
    tensors: dict[str, TensorInfo]
    format: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    digests: dict[str, str]


def open_adapter(path: Path) -> Adapter:
    """An adapter's folder, checked: adapter_config.json and adapter_model.safetensors or .bin.

    Raises:
        CheckpointError: no such folder, no adapter in it, damaged or malicious files, or a feature that is
            not merged here (named).
    """
    check_folder(path, "an adapter")
    where = shown(path, 400)
    file = path / "adapter_config.json"
    if not file.exists():
        model = (path / "config.json").exists()
        hint = f"It is a model: give it as model.path={where}" if model else "Give a folder that PEFT has saved."
        raise CheckpointError(f"{where} has no adapter_config.json", hint)
    config = read_object(file)
    lora = parse_lora_config(config, shown(file, 400))
    weights = read_weights(path, ADAPTER_FORMATS)
    if weights is None:
        raise CheckpointError(f"{where} has neither adapter_model.safetensors nor adapter_model.bin")
    if not weights.tensors:
        raise CheckpointError(f"{where}: the adapter would change nothing: it holds no tensors")
    return Adapter(path, config, lora, weights.tensors, weights.format, weights.files, weights.notes, weights.digests)


def modules_of(adapter: Adapter) -> Modules:
    """The adapter's tensors by module (see `sort_tensors`)."""
    return sort_tensors(adapter.tensors, shown(adapter.path, 400))


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """What identifies an adapter, JSON-able: names, sizes, times, header digests. No data are read."""
    plain = (adapter.path / "adapter_config.json", *tokenizer_files(adapter.path))
    found = fingerprint_files(plain, adapter.files, adapter.digests)
    return {"format": adapter.format, **found}


def check_values(adapter: Adapter) -> None:
    """Reads the adapter's data (small) once.

    Raises:
        CheckpointError: a value that is NaN or infinite (it names the tensor), two copies of one module that
            differ, or every lora_B is zero and nothing is replaced: the adapter would change nothing.
    """
    where = shown(adapter.path, 400)
    idle = True
    for info in adapter.tensors.values():
        data = read_words(info, 0, info.shape[0] if info.shape else 1)
        if not all_finite(data, info.dtype):
            raise CheckpointError(
                f"{where}: {shown(info.name)} holds NaN or infinite values",
                "The training diverged: use an earlier checkpoint of it.",
            )
        idle = idle and (info.name.endswith(_RANDOM_STARTS) or all_zero(data, info.dtype))
    if idle:
        raise CheckpointError(
            f"{where}: the adapter would change nothing: every lora_B is zero", "Was it saved before training?"
        )
    for one, other in modules_of(adapter).copies:
        if not same_data(one, other):
            raise CheckpointError(
                f"{where}: {shown(one.name)} and {shown(other.name)} are one module's, but their values differ",
                "Save it again with PEFT.",
            )
