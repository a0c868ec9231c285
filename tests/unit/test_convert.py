"""task=convert: room on the disk of output.path, where that is another one than the store's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import DoesNotFitError
from orchestrator.tasks import convert

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another disk than tmp_path's."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def test_a_result_that_has_no_room_on_another_disk_is_refused(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**30, 2**30))
    convert._check_room(elsewhere / "new" / "model", tmp_path / "store", 2**30)
    with pytest.raises(DoesNotFitError, match=r"has 1.00 GiB free and the result takes 2.00 GiB"):
        convert._check_room(elsewhere / "new" / "model", tmp_path / "store", 2**31)
    convert._check_room(tmp_path / "model", tmp_path / "store", 2**31)  # hard links: the store has looked already
