"""task=convert: room on the disk of output.path, where that is another one than the store's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, DoesNotFitError, RequestError
from orchestrator.pipeline import Model
from orchestrator.tasks import convert

EXPORTING = """
import sys, time
from pathlib import Path
from orchestrator.tasks import convert

with convert._beside(Path(sys.argv[1])) as part:
    (part / "model.safetensors").write_bytes(b"half")
    print("copying", flush=True)
    time.sleep(60)
"""

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


def test_what_a_killed_export_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    output = tmp_path / "out[1]"
    (tmp_path / ".out[1].backup").mkdir()
    child = subprocess.Popen([sys.executable, "-c", EXPORTING, output], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "copying\n"
    [part] = tmp_path.glob(".out*.unfinished")
    convert._check_output(output)
    assert (part / "model.safetensors").read_bytes() == b"half"  # its run is alive
    child.kill()
    child.communicate()
    convert._check_output(output)
    assert [path.name for path in tmp_path.iterdir()] == [".out[1].backup"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("ours")
    convert._check_output(output)
    convert.export(Model(tmp_path / "model"), output)
    assert (output / "config.json").read_text() == "ours"
    (output / "config.json").write_text("theirs")
    with pytest.raises(RequestError, match=f"output.path={output} has appeared meanwhile") as caught:
        convert.export(Model(tmp_path / "model"), output)
    assert caught.value.hint == "Name a new folder, or remove what is in it."
    assert (output / "config.json").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("name", ["file", "file/x", "file/x/y"])
def test_an_output_below_a_file_is_refused_with_the_files_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError) as caught:
        convert._check_output(tmp_path / name)
    which = "" if name == "file" else f": {file}"
    assert str(caught.value).startswith(f"output.path={tmp_path / name}{which} is a file")
