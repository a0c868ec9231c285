"""task=convert: where the finished model is put."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exl2_bench import GPU, TESTS, Bench, make_bench

from orchestrator import artifacts, hardware
from orchestrator.artifacts import Store
from orchestrator.backends.table import BACKENDS
from orchestrator.errors import ConfigError, RequestError, StageError
from orchestrator.hardware import GIB
from orchestrator.hardware import lease as lease_module
from orchestrator.hardware.lease import Wanted, lease, leases
from orchestrator.pipeline import Model
from orchestrator.tasks import convert, session

EXPORTING = """
import sys, time
from pathlib import Path
from orchestrator.tasks import convert, session

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


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hydra: None, every_engine: None, no_margins: None) -> Bench:
    """A machine with one GPU, our converter in the place of exllamav2's, and our engine in the place of its own."""
    made = make_bench(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], str(TESTS / "engines")]))
    monkeypatch.setenv(lease_module.PLACE, str(tmp_path / "leases"))
    monkeypatch.setitem(BACKENDS, "exllamav2", replace(BACKENDS["exllamav2"], adapter="fakes:Placed"))
    return made


def converted(bench: Bench, *argv: str) -> dict[str, Any]:
    """result.json of a conversion to output.path=OUT."""
    options = (f"model.path={bench.source}", "quant.bits=4", f"output.path={bench.folder / 'out'}", "task=convert")
    convert.convert(bench.config(*options, *argv), bench.run)
    result: dict[str, Any] = json.loads((bench.run.path / "result.json").read_text())
    return result


def loads(bench: Bench) -> list[dict[str, Any]]:
    """What each engine that was started has said of its plan."""
    log = bench.run.path / "engine.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line.removeprefix("loads ")) for line in lines if line.startswith("loads ")]


def report_of(bench: Bench) -> dict[str, Any]:
    """That of the EXL2 artifact, from its manifest."""
    [found] = [a for a in Store(bench.folder / "store").finished() if a.manifest["stage"] == "exl2"]
    report: dict[str, Any] = found.manifest["report"]
    return report


def test_a_new_artifact_is_loaded_once_before_it_is_given_away(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    result = converted(bench)
    assert (bench.folder / "out" / "config.json").is_file()
    assert loads(bench) == [{"context": 256, "in_flight": 1}]
    loaded = report_of(bench)["loaded"]
    assert loaded["versions"] == {"fake": "1"}
    assert loaded["placement"]["cuda:0"] > 0
    assert report_of(bench)["bits"] == 4.0
    assert result["not_loaded"] is None
    assert result["reports"][result["artifacts"][-1]["name"]]["loaded"] == loaded
    said = capsys.readouterr().err
    assert said.count(" on cuda:0, smoke pass finite, released") == 1
    assert leases() == ([], ())

    (bench.folder / "out").rename(bench.folder / "out1")
    assert converted(bench)["stages_run"] == []
    assert len(loads(bench)) == 1  # it was loaded well before


def test_an_artifact_whose_smoke_pass_fails_is_not_given_away(bench: Bench) -> None:
    fault = "backend.engine_args.fault=infinite"
    with pytest.raises(StageError, match="probability that is not finite on its first tokens") as caught:
        converted(bench, fault)
    assert caught.value.exit_code == 1
    assert "task=artifacts artifacts.action=prune artifacts.name=exl2-" in caught.value.hint
    assert not (bench.folder / "out").exists()
    assert "loaded" not in report_of(bench)
    with pytest.raises(StageError, match="exited with code 3 while loading"):
        converted(bench, "backend.engine_args.fault=exit")  # it is there, and was never seen to load
    assert converted(bench)["stages_run"] == []
    assert "loaded" in report_of(bench)


def test_where_no_gpu_has_room_it_is_said_that_nothing_was_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.quantize()  # while there was room
    small = replace(GPU, free=GIB // 2)
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: ((small,), ()))
    result = converted(bench)
    assert (bench.folder / "out" / "config.json").is_file()
    assert not loads(bench)
    assert "loaded" not in report_of(bench)
    assert "cuda:0 needs " in result["not_loaded"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "is not loaded here" in line]
    assert "cuda:0 needs " in line
    assert "0.50 GiB free" in line


def test_one_that_ran_out_of_memory_says_nothing_of_the_artifact(bench: Bench) -> None:
    assert "CUDA out of memory" in converted(bench, "backend.engine_args.fault=full")["not_loaded"]
    assert (bench.folder / "out" / "config.json").is_file()
    assert "loaded" not in report_of(bench)


def test_for_another_machine_it_is_loaded_on_this_one(bench: Bench) -> None:
    converted(bench, "hardware=4x24gb", "parallel.gpu_split=[1,1,1,1]")
    assert len(loads(bench)) == 1
    assert list(report_of(bench)["loaded"]["placement"]) == ["cpu", "cuda:0"]


def test_a_machine_without_a_gpu_gives_away_what_is_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.quantize()
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: ((), ("no GPU: no driver: planned for the CPU",)))
    assert converted(bench, "hardware=1x24gb")["not_loaded"] == "no GPU: no driver"
    assert (bench.folder / "out" / "config.json").is_file()


def test_it_waits_for_the_runs_that_hold_the_gpu(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.quantize()
    other = ExitStack()
    other.enter_context(lease("another", lambda: Wanted({GPU: 23 * GIB}, True), pytest.fail))
    monkeypatch.setattr(lease_module, "_until_other", lambda held: other.close())
    converted(bench)
    assert len(loads(bench)) == 1
    assert " GiB on GPU 0, held by another (pid " in capsys.readouterr().err


def test_a_run_loads_it_anyway_and_that_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_tokenizer", "_tokenizer"):
        monkeypatch.setattr(session, name, lambda *_: None)
    config = bench.config(f"model.path={bench.source}", "quant.bits=4", "model.max_context=512")
    with session.open_session(session.look(config, planning=False), bench.run) as live:
        assert live.model.artifacts[-1].manifest["report"]["loaded"]["versions"] == {"fake": "1"}
    assert [load["context"] for load in loads(bench)] == [512]  # once, as it was asked for
    first = report_of(bench)["loaded"]
    with session.open_session(session.look(config, planning=False), bench.run):
        assert report_of(bench)["loaded"] == first
    converted(bench)
    assert len(loads(bench)) == 2


def test_a_store_of_somebody_elses_keeps_its_reports(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    [*_, artifact] = bench.quantize().artifacts

    def read_only(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(artifacts, "write_json", read_only)
    found = Store(bench.folder / "store").with_report(artifact, {"loaded": {}})
    assert found.manifest["report"] == {"loaded": {}}
    assert "loaded" not in report_of(bench)
