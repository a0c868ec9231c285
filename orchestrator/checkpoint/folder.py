"""A model's folder: its config, its weight files by their headers, and the files that travel with it."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.files import Files, LocalFiles
from orchestrator.checkpoint.fingerprint import fingerprint_files
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import JSON_LIMIT, parse_object, shown
from orchestrator.checkpoint.weights import MODEL_FORMATS, weights_of
from orchestrator.errors import CheckpointError

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the files that a result carries over byte for byte; never weights or indexes."""

_AGAIN = "Download the model again."
_NEVER_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".part")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, read no further than their headers.

    Attributes:
        path: the folder.
        config: config.json as it is.
        tensors: by name, in file order.
        format: "safetensors" or "bin".
        files: the weight files.
        notes: what was noticed and decided, for the user.
        digests: SHA-256 of each weight file's header, by file name.
        index_digest: SHA-256 of the index; None where there is none.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    format: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    digests: dict[str, str]
    index_digest: str | None

    @property
    def nbytes(self) -> int:
        """Of all tensors, headers aside."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def quantized(self) -> bool:
        """Whether config.json says that the weights are quantized already."""
        return self.config.get("quantization_config") is not None


def open_checkpoint(path: Path) -> Checkpoint:
    """A model's folder, checked: every tensor named is there, in full, once. Links are followed.

    Raises:
        CheckpointError: no such folder, an adapter instead of a model, a config.json or an index that is
            missing, damaged or contradictory, weights that are missing, truncated or malicious.
    """
    check_folder(path)
    return checkpoint_of(LocalFiles(path))


def checkpoint_of(files: Files) -> Checkpoint:
    """The model that is in these files, wherever they lie; see `open_checkpoint`."""
    where = shown(files.path, 400)
    if not files.has("config.json"):  # a link to nowhere is named by its reader
        raise no_config(where, set(files.names()))
    config = parse_object(files.read("config.json", JSON_LIMIT), shown(files.path / "config.json", 400))
    weights = weights_of(files, MODEL_FORMATS)
    if weights is None:
        raise no_weights(where, set(files.names()))
    if not weights.tensors:
        names = ", ".join(shown(file.name) for file in weights.files[:3])
        raise CheckpointError(f"{where}: there are no tensors in {names}", _AGAIN)
    return Checkpoint(
        files.path,
        config,
        weights.tensors,
        weights.format,
        weights.files,
        weights.notes,
        weights.digests,
        weights.index_digest,
    )


def check_folder(path: Path, what: str = "a model") -> None:
    """Raises CheckpointError unless `path`, which is to be `what`, is a folder that may be listed."""
    where = shown(path, 400)
    try:
        if path.is_dir():
            next(path.iterdir(), None)
            return
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read: {shown(error)}") from error
    if exists:
        raise CheckpointError(f"{where} is a file; {what} is a folder", f"Give the folder: {shown(path.parent, 400)}")
    raise CheckpointError(f"there is no folder {where}", f"Give the path of {what}'s folder.")


def carried_files(path: Path) -> tuple[Path, ...]:
    """The files of a folder that a result carries over (see `CARRIED`), sorted by name."""
    return tuple(sorted(file for file in path.iterdir() if is_carried(file.name) and file.is_file()))


def is_carried(name: str) -> bool:
    """Whether a file of this name is one that a result carries over."""
    return any(fnmatchcase(name, pattern) for pattern in CARRIED) and not name.endswith(_NEVER_CARRIED)


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies a checkpoint, JSON-able: names, sizes, times, header digests. No data are read."""
    plain = (checkpoint.path / "config.json", *carried_files(checkpoint.path))
    found = fingerprint_files(plain, checkpoint.files, checkpoint.digests)
    return {"format": checkpoint.format, "index_sha256": checkpoint.index_digest, **found}


def no_config(where: str, names: Collection[str]) -> CheckpointError:
    """Says what a folder or a repo is that has no config.json, going by the names of its files."""
    if "adapter_config.json" in names:
        return CheckpointError(
            f"{where} is an adapter, not a model: it has an adapter_config.json and no config.json",
            f"Give it as model.adapter={where} and its base as model.path=...",
        )
    return CheckpointError(f"{where} has no config.json", "Give a folder as save_pretrained writes it.")


def no_weights(where: str, names: Collection[str]) -> CheckpointError:
    """Says what a folder or a repo holds instead of a model's weights, going by the names of its files."""
    if "adapter_config.json" in names:
        return CheckpointError(
            f"{where} has an adapter's weights and no model's",
            f"Give it as model.adapter={where} and its base as model.path=...",
        )
    wanted = ", ".join(form.single for form in MODEL_FORMATS)
    others = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".gguf", ".pth")))
    there = f" (there is {shown(others[0])})" if others else ""
    return CheckpointError(f"{where} holds no weights{there}: {wanted} or numbered shards", _AGAIN)
