"""One commit of a repo on a hub: its files by the hub's listing, and which of them a run needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from orchestrator import __version__
from orchestrator.checkpoint.folder import is_carried, no_config, no_weights
from orchestrator.checkpoint.trust import parse_object
from orchestrator.checkpoint.weights import Format, read_index
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.hub.locate import ADAPTER, COMMIT, Kind, storage

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit. `sha256` is known of large files only (those that the hub keeps outside git)."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Commit:
    """One commit of a repo, and the files in its topmost folder by name."""

    hub: str
    revision: str
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def snapshot(self) -> Path:
        return storage(self.hub) / "snapshots" / self.commit

    def blob(self, file: RemoteFile) -> Path:
        return storage(self.hub) / "blobs" / str(file.sha256)


def list_commit(hub: str, revision: str) -> Commit:
    """One request: which commit a revision is now, and its files. From then on everything is of this commit."""
    api = HfApi(library_name="orchestrator", library_version=__version__)
    info = api.model_info(hub, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit):
        raise OrchestratorError(f"{constants.ENDPOINT} names no commit of {hub}", "Does HF_ENDPOINT name a hub?")
    files = {}
    for item in info.siblings or []:
        if "/" in item.rfilename:
            continue
        known = item.lfs is not None and SHA256.fullmatch(item.lfs.sha256)  # it becomes a file's name
        length = item.lfs.size if item.lfs else item.size
        length = length if type(length) is int and length > 0 else 0
        files[item.rfilename] = RemoteFile(item.rfilename, length, item.lfs.sha256 if known else None)
    return Commit(hub, revision, commit, files)


def needed(commit: Commit, kind: Kind, read: Callable[[str], bytes]) -> list[RemoteFile]:
    """The config, the small files that travel with a model, and the weights in one format.

    Args:
        read: gives an index.

    Raises:
        CheckpointError: it is no such repo, or its weights are not all there.
    """
    names = commit.files
    if kind.config not in names:
        if kind is ADAPTER:
            hint = f"It is a model: give it as model.path={commit.hub}" if "config.json" in names else ""
            raise CheckpointError(f"{commit.hub} has no {kind.config}", hint)
        raise no_config(commit.hub, names)
    sets = (weight_files(names, form, read) for form in kind.formats)
    weights = next((found for found in sets if found), None)
    if weights is None and kind is ADAPTER:
        raise CheckpointError(f"{commit.hub} has neither {' nor '.join(form.single for form in kind.formats)}")
    if weights is None:
        error = no_weights(commit.hub, names)
        raise CheckpointError(error.message, "Give the repo of the original model, with all of its weights.")
    small = [name for name in names if name == kind.config or is_carried(name)]
    return [names[name] for name in dict.fromkeys([*sorted(small), *weights])]


def weight_files(names: Mapping[str, Any], form: Format, read: Callable[[str], bytes]) -> list[str] | None:
    """The files of one format (with its index) out of a repo's names; None where they are not all there."""
    if form.single in names:
        return [form.single]
    if form.index and form.index in names:
        where = read_index(parse_object(read(form.index), form.index), form, form.index)
        shards = sorted(set(where.values()))
        return [form.index, *shards] if all(shard in names for shard in shards) else None
    numbered = [match for name in sorted(names) if form.shard and (match := re.fullmatch(form.shard, name))]
    return [match.group() for match in numbered] if numbered and len(numbered) == int(numbered[0][2]) else None
