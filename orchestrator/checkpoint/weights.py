"""Which weight files of a folder make up the model, and what they hold together."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.files import Files, LocalFiles
from orchestrator.checkpoint.headers import header_of
from orchestrator.checkpoint.tensors import TensorInfo
from orchestrator.checkpoint.trust import JSON_LIMIT, IncompleteError, parse_object, shown
from orchestrator.errors import CheckpointError

_AGAIN = "Download the model again."


@dataclass(frozen=True)
class Format:
    """How a set of weights is named: one file, or shards with an index, or shards alone."""

    name: str
    single: str
    index: str = ""
    shard: str = ""

    @property
    def suffix(self) -> str:
        return Path(self.single).suffix


MODEL_FORMATS = (
    Format(
        "safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        r"model-([0-9]{5})-of-([0-9]{5})\.safetensors",
    ),
    Format("bin", "pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model-([0-9]{5})-of-([0-9]{5})\.bin"),
    # As exllamav2's converter names them; an index beside them is that of the model that it was given.
    Format("safetensors", "output.safetensors", shard=r"output-([0-9]{5})-of-([0-9]{5})\.safetensors"),
)
"""In order of preference."""

ADAPTER_FORMATS = (Format("safetensors", "adapter_model.safetensors"), Format("bin", "adapter_model.bin"))


@dataclass(frozen=True)
class WeightSet:
    """A complete set: tensors in file order, files, digest of each file's header, digest of the index."""

    format: str
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    digests: dict[str, str]
    index_digest: str | None
    notes: tuple[str, ...]


def read_weights(folder: Path, formats: tuple[Format, ...]) -> WeightSet | None:
    """The weights of a folder of this machine; see `weights_of`."""
    return weights_of(LocalFiles(folder), formats)


def weights_of(files: Files, formats: tuple[Format, ...]) -> WeightSet | None:
    """The first format whose set is complete; None where the folder has none of their files.

    A set that is not whole gives way to the next format (with a note); a malicious or contradictory one
    does not.

    Raises:
        CheckpointError: no set is complete, or one is malicious or contradictory.
    """
    present = [form for form in formats if _present(files, form)]
    notes: list[str] = []
    first: IncompleteError | None = None
    for place, form in enumerate(present):
        try:
            found = _read_set(files, form)
        except IncompleteError as error:
            first = first or error
            notes.append(f"the {form.name} files are not complete and are not used: {error.message}")
            continue
        notes += [
            f"{shown(files.path, 400)} holds {form.name} and {other.name} weights: the {form.name} ones are used"
            for other in present[place + 1 :]
        ]
        return WeightSet(
            form.name, found.tensors, found.files, found.digests, found.index_digest, (*notes, *found.notes)
        )
    if first is not None:
        raise first
    return None


def _present(files: Files, form: Format) -> bool:
    names = (form.single, form.index) if form.index else (form.single,)
    return any(files.has(name) for name in names) or bool(_shards(files, form))


def _shards(files: Files, form: Format) -> list[re.Match[str]]:
    if not form.shard:
        return []
    found = (re.fullmatch(form.shard, name) for name in files.names())
    return sorted((match for match in found if match), key=lambda match: match.group())


def _read_set(files: Files, form: Format) -> WeightSet:
    if files.has(form.single):
        stale = form.index and files.has(form.index)
        notes = (f"{form.index} is not used: {form.single} is the whole model",) if stale else ()
        return _read_files(form, files, [form.single], None, None, notes)
    if form.index and files.has(form.index):
        index = shown(files.path / form.index, 400)
        data = files.read(form.index, JSON_LIMIT)
        where = read_index(parse_object(data, index), form, index)
        names = list(dict.fromkeys(sorted(where.values())))
        return _read_files(form, files, names, where, hashlib.sha256(data).hexdigest(), _strays(files, form, names))
    names = _all_shards(files, form)
    notes = (f"there is no {form.index}: the shards were found by their names",) if form.index else ()
    return _read_files(form, files, names, None, None, notes)


def _strays(files: Files, form: Format, known: list[str]) -> tuple[str, ...]:
    strays = sorted({match.group() for match in _shards(files, form)} - set(known))
    return tuple(f"{name} is not in {form.index} and is not used" for name in strays)


def _all_shards(files: Files, form: Format) -> list[str]:
    matches = _shards(files, form)
    total = int(matches[0][2])
    if total == 0:
        raise CheckpointError(f"{shown(files.path / matches[0].group(), 400)} says that it is one of 0 shards", _AGAIN)
    found = {match.group() for match in matches}
    stem = form.shard.split("-", 1)[0]
    wanted = [f"{stem}-{number:05d}-of-{total:05d}{form.suffix}" for number in range(1, total + 1)]
    for name in wanted:
        if name not in found:
            raise IncompleteError(f"{shown(files.path / name, 400)} is missing: one of {total} shards", _AGAIN)
    if found != set(wanted):
        other = shown(min(found - set(wanted)))
        raise CheckpointError(
            f"{shown(files.path, 400)} has shards of two models: {wanted[0]} and {other}",
            f"Remove those of one{f', or add {form.index}' if form.index else ''}.",
        )
    return wanted


def read_index(index: dict[str, object], form: Format, where: str) -> dict[str, str]:
    """Which file holds which tensor, as an index says; `where` names it in messages.

    Raises:
        CheckpointError: it has no map, or names a file outside its folder or of another format.
    """
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{where} has no weight_map", _AGAIN)
    checked: dict[str, str] = {}
    for tensor, shard in named.items():
        if not isinstance(shard, str) or not _plain_name(shard):
            raise CheckpointError(
                f"{where} names a file outside its folder for {shown(tensor)}: {shown(shard)}: refused"
            )
        if not shard.endswith(form.suffix):
            raise CheckpointError(f"{where} names {shown(shard)}, which is no {form.suffix} file")
        checked[tensor] = shard
    return checked


def _plain_name(name: str) -> bool:
    if not name or len(name.encode("utf-8", "replace")) > 255 or not name.isprintable():
        return False
    return not any(mark in name for mark in "/\\:") and name not in (".", "..")


def _read_files(
    form: Format,
    files: Files,
    names: list[str],
    where: dict[str, str] | None,
    index_digest: str | None,
    notes: tuple[str, ...],
) -> WeightSet:
    tensors: dict[str, TensorInfo] = {}
    digests: dict[str, str] = {}
    paths = [files.path / name for name in names]
    for file, header in zip(paths, files.map(lambda name: header_of(files, name), names), strict=True):
        digests[file.name] = header.digest
        for info in header.tensors:
            if info.name in tensors:
                other = tensors[info.name].file.name
                raise CheckpointError(
                    f"{shown(file, 400)} holds {shown(info.name)}, which {shown(other)} holds too",
                    "Remove the file that does not belong to the model.",
                )
            tensors[info.name] = info
    if where is not None:
        notes += _check_index(tensors, where, form, files.path)
    return WeightSet(form.name, tensors, tuple(paths), digests, index_digest, notes)


def _check_index(tensors: dict[str, TensorInfo], where: dict[str, str], form: Format, folder: Path) -> tuple[str, ...]:
    for name, shard in where.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise IncompleteError(
                f"{shown(folder / form.index, 400)} says that {shown(shard)} holds {shown(name)}: it does not",
                _AGAIN,
            )
    extra = [name for name in tensors if name not in where]
    if not extra:
        return ()
    return (f"{len(extra)} tensors are not in {form.index}, the first is {shown(extra[0])}: they are kept",)
