"""task=convert: where the finished model is put."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, RequestError
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
