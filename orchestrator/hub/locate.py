"""Where a model or an adapter lies: a folder, or a hub id and what the hub library's cache has of it.

Nothing here costs time for folders: the hub's library is imported once a text is known to be no folder of this machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoint.trust import IncompleteError, shown
from orchestrator.checkpoint.weights import ADAPTER_FORMATS, MODEL_FORMATS, Format, read_weights
from orchestrator.config import folder
from orchestrator.errors import CheckpointError, OrchestratorError, RequestError

if TYPE_CHECKING:
    from orchestrator.hub.headers import RemoteRepo

EXPLICIT = "hf://"
DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")


class NoPartsError(OrchestratorError):
    """The hub sends whole files only: nothing can be known of the weights before they are here."""


@dataclass(frozen=True)
class Kind:
    """What is looked for: the file that makes a repo one of these, and how its weights may be named."""

    what: str
    config: str
    formats: tuple[Format, ...]


MODEL = Kind("model", "config.json", MODEL_FORMATS)
ADAPTER = Kind("adapter", "adapter_config.json", ADAPTER_FORMATS)


@dataclass(frozen=True)
class Located:
    """A folder with a model's or an adapter's files; for one of the hub, what it is called there and its commit.

    Attributes:
        remote: what reads its headers and downloads it, where it is not here; then `path` is only a name.
    """

    path: Path
    hub: str | None = None
    commit: str | None = None
    remote: RemoteRepo | None = None

    def here(self) -> Located:
        """With all of its files on this machine: downloaded, if they are not.

        Raises:
            RequestError, DoesNotFitError, OrchestratorError: no access any more; the cache's disk is too small; the
                hub cannot be reached.
        """
        return self.remote.fetch() if self.remote else self

    @property
    def name(self) -> str:
        return self.hub or str(self.path)

    @property
    def label(self) -> str:
        """The name with the commit, which together say exactly what it is."""
        return f"{self.hub}@{self.commit}" if self.hub else str(self.path)


def hub_id(text: str) -> str | None:
    """The hub id that a path of the configuration stands for; None where it is a path.

    What is there always wins; hf://org/name says that a hub id is meant.

    Raises:
        RequestError: hf:// and no hub id after it.
    """
    name = text.removeprefix(EXPLICIT)
    explicit = name != text
    if not explicit and (not _is_relative(text) or os.path.exists(folder(text))):
        return None
    if name.count("/") == 1 and _is_valid(name):
        return name
    if explicit:
        raise RequestError(f"{shown(text)} is not a hub id", "One looks like this: hf://org/name")
    return None


def _is_relative(text: str) -> bool:
    """Whether a text may be a hub id at all: /data/x, ./x, ../x and ~/x are meant as paths."""
    return not text.startswith(("/", ".", "~"))


def _is_valid(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return all(name.split("/"))


def locate(text: str, revision: str | None, kind: Kind, *, latest: bool) -> Located:
    """Where a model or an adapter lies; of a hub id the library's snapshot of one commit, or the hub's repo.

    Args:
        latest: ask the hub which commit a branch is now; False: what the cache has in full will do, without a request.

    Raises:
        RequestError, CheckpointError: no such folder, repo or revision; not a model (an adapter); no access.
        OrchestratorError: the hub cannot be reached, and the cache does not have it.
    """
    hub = hub_id(text)
    if hub is None:
        return Located(_local(text, revision, kind))
    revision = revision or DEFAULT_REVISION
    found = None if latest else cached(hub, revision, kind)
    if found is not None:
        return found
    from orchestrator.hub.headers import look_up

    return look_up(hub, revision, kind)


def _local(text: str, revision: str | None, kind: Kind) -> Path:
    path = folder(text)
    if not os.path.exists(path) and _is_relative(text):
        raise CheckpointError(
            f"there is no folder {shown(path, 400)}",
            f"Give the path of {'an' if kind is ADAPTER else 'a'} {kind.what}'s folder, or a hub id as org/name.",
        )
    if revision is not None and os.path.exists(path):
        raise RequestError(
            f"the revision {shown(revision)} is set, and {shown(path, 400)} is a folder, which has no revisions",
            f"Leave it out, or give a hub id: {EXPLICIT}org/name",
        )
    return path


def storage(hub: str) -> Path:
    """The folder that the library's cache has for a repo."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, "--".join(("models", *hub.split("/"))))


def cached(hub: str, revision: str, kind: Kind) -> Located | None:
    """What the cache has of a revision; None unless its config and a complete set of weights are there."""
    place = storage(hub)
    try:
        commit = (place / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = revision
    path = place / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not (path / kind.config).is_file():
        return None
    try:
        whole = read_weights(path, kind.formats) is not None
    except IncompleteError:
        whole = False
    return Located(path, hub, commit) if whole else None
