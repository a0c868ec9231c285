"""The benchmark of ExLlamaV2 in depth: its command line, its 70B by headers, what it compares, what it reports."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: some of its names are also names of tests
sys.path.append(str(Path(__file__).parents[2] / "tools"))

import exl2_depth as depth
import readme_tables
from exl2_depth import BIG, CAP_GIB, KILL, SHAPES, SPLITS, SWEEP, arguments_of
from made_up import Shape
from made_up_fast import exl2_bytes, write_exl2

from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.config import BackendConfig, CacheConfig, Config, HardwareConfig, ModelConfig, ParallelConfig
from orchestrator.config import RunConfig as Run
from orchestrator.hardware import GIB, Gpu, Hardware
from orchestrator.plan.planner import make_plan
from orchestrator.plan.types import Candidate

SMALL = Shape(256, 512, 2, 4, 2, 4100)

# The command line


def test_every_command_takes_its_parts_a_time_and_folders() -> None:
    for name, known in (("sweep", SWEEP), ("big", BIG), ("kill", KILL)):
        found = arguments_of([name, "out", "work", "--only", *known, "--minutes", "8"])
        assert (found.command, found.only, found.minutes) == (name, list(known), 8)
        assert arguments_of([name, "out", "work"]).only == []
    assert arguments_of(["sweep", "out", "work", "--tiny"]).tiny
    assert arguments_of(["speed", "out", "work", "8b"]).turns == 12
    assert arguments_of(["report", "o", "p"]).outs == [Path("o"), Path("p")]


@pytest.mark.parametrize("argv", [["speed", "o", "w"], ["speed", "o", "w", "70b"], ["kill", "o", "w", "--only", "20"]])
def test_what_is_no_part_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments_of(argv)


def test_a_part_is_done_once_and_tried_again_where_it_failed(tmp_path: Path) -> None:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no luck")
        return {"seconds": 1}

    for _ in range(3):
        depth.do(tmp_path, "part", work)
    assert len(calls) == 2
    assert depth.kept(tmp_path, "part") == {"seconds": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_the_time_ends_what_takes_longer_and_is_no_failure_of_it(tmp_path: Path) -> None:
    def slow() -> dict[str, Any]:
        time.sleep(5)
        return {}

    depth.limit(0.05 / 60)
    with pytest.raises(depth.TimeIsOver):
        depth.do(tmp_path, "part", slow)
    assert not list(tmp_path.iterdir())


# The 70B


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exl2(tmp_path_factory.mktemp("big") / "70b", SHAPES["70b"], depth.POSITIONS, 4, hollow=True)


def test_a_hollow_model_has_the_header_of_a_whole_one_and_takes_no_room(tmp_path: Path, llama_70b: Path) -> None:
    whole, hollow = (write_exl2(tmp_path / str(h), SMALL, 1024, 4, hollow=h) for h in (False, True))
    assert open_checkpoint(whole).tensors.keys() == open_checkpoint(hollow).tensors.keys()
    sizes = {f.name: f.stat().st_size for f in whole.iterdir()}
    assert {f.name: f.stat().st_size for f in hollow.iterdir()} == sizes
    assert sizes["output.safetensors"] > exl2_bytes(SMALL, 4) > 0
    file = (llama_70b / "output.safetensors").stat()
    assert file.st_size > 37 * 10**9
    assert file.st_blocks * 512 < 2**20


def test_the_70b_has_its_size_and_its_tensors(llama_70b: Path) -> None:
    assert exl2_bytes(SHAPES["70b"], 4) == 37_455_271_296
    spec = model_spec(open_checkpoint(llama_70b))
    assert (spec.layers, spec.hidden, spec.vocab, spec.max_context) == (80, 8192, 128256, 131_072)
    assert spec.parameters == 70_553_706_496  # Llama-3-70B's
    weights = exl2_bytes(SHAPES["70b"], 4) - 2 * 128256 * 8192  # the embedding stays in host memory
    assert 32 * GIB < weights < 34 * GIB


def planned(model: Path, context: int, cache: int | None, split: list[float] | None = None) -> Candidate:
    """Its plan on two GPUs of an H100, capped as the benchmark does it."""
    config = Config(
        backend=BackendConfig(name="exllamav2"),
        model=ModelConfig(path=str(model), max_context=context),
        cache=CacheConfig(bits=cache),
        parallel=ParallelConfig(gpu_split=split),
        hardware=HardwareConfig(gpus=[0, 1], memory_gib=CAP_GIB),
        run=Run(in_flight=1),
    )
    free = int((CAP_GIB - 0.5) * GIB)
    card = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * GIB, free, (9, 0))
    hardware = Hardware("auto", (card, replace(card, index=1)), 256 * GIB, 240 * GIB, 16)
    return make_plan(config, model_spec(open_checkpoint(model)), hardware).chosen


@pytest.mark.usefixtures("every_engine")
def test_the_70b_fits_two_cards_of_24_gib_by_itself_and_by_hand(llama_70b: Path) -> None:
    usual = planned(llama_70b, depth.BIG_CONTEXT, None)
    assert (usual.fits, len(usual.gpus)) == (True, 2)
    long = planned(llama_70b, usual.largest_context, None)
    assert long.fits
    by_hand = [planned(llama_70b, depth.BIG_CONTEXT, 4, split) for split in SPLITS]
    assert any(c.fits and c.largest_context > 64_000 for c in by_hand)
    assert planned(llama_70b, depth.BIG_CONTEXT, 4).largest_context > 64_000


def test_a_model_goes_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, work = tmp_path / "shm", tmp_path / "work"
    shared.mkdir()
    work.mkdir()
    monkeypatch.setattr(depth, "SHARED_MEMORY", shared)
    monkeypatch.setattr(depth, "host_memory", lambda: (256 * GIB, 200 * GIB))
    assert depth.roomy(1000, work, "m") == shared / "m"
    monkeypatch.setattr(depth, "host_memory", lambda: (64 * GIB, 30 * GIB))
    assert depth.roomy(1000, work, "m") == work / "m"
    with pytest.raises(RuntimeError, match="room for"):
        depth.roomy(2**60, work, "m")
    (work / "m").mkdir()
    assert depth.roomy(2**60, work, "m") == work / "m"


# What is compared


def saved(folder: Path, **tensors: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "output.safetensors")
    return folder


def test_two_models_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    words, half = np.arange(8, dtype=np.int32), np.ones((2, 4), dtype=np.float16)
    other = words.copy()
    other[3] = 10
    one = saved(tmp_path / "one", a=words, b=half, c=words, gone=half)
    assert depth.compare(one, saved(tmp_path / "same", a=words, b=half, c=words, gone=half)) == {
        "tensors": 4,
        "equal": 4,
        "missing": [],
        "different": {},
        "files_equal": True,
    }
    found = depth.compare(one, saved(tmp_path / "two", a=other, b=half.astype(np.float32), c=words, new=half))
    assert found["different"] == {
        "a": {"share": 1 / 8, "largest": 7.0},
        "b": {"kind": ["float16 [2, 4]", "float32 [2, 4]"]},
    }
    assert (found["equal"], found["missing"], found["files_equal"]) == (1, ["gone", "new"], False)


def running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_is_killed_at_its_moment_with_its_whole_group(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "measuring"}')
    pid = run / "pid"
    script = f"sleep 60 & echo $! > {pid}; wait"
    found = depth.killed_after(["sh", "-c", script], 1.0, tmp_path)
    assert found == {"killed_after_s": 1.0, "status": {"state": "measuring"}}
    until = time.monotonic() + 10
    while running(int(pid.read_text())):
        assert time.monotonic() < until
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match="ended already, with code 3"):
        depth.killed_after([sys.executable, "-c", "raise SystemExit(3)"], 30, tmp_path)


@pytest.mark.parametrize(
    ("part", "launcher", "count", "said"),
    [
        ("in-turn", True, 1, ["-m", "quant.bits=4,6,8", "hardware.gpus=[0]"]),
        ("one", True, 1, ["-m", "quant.bits=4,6,8", "hardware.gpus=[0]", "hydra/launcher=joblib"]),
        ("one", False, 3, ["quant.bits=4", "hardware.gpus=[0]"]),
        ("two", False, 3, ["quant.bits=4", "hardware.gpus=[0,1]"]),
    ],
)
def test_all_widths_by_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, launcher: bool, count: int, said: list[str]
) -> None:
    ran: list[list[str]] = []

    def finished(commands: list[list[str]], log: Path) -> float:
        ran.extend(commands)
        for name in ("measurement-1", *(f"exl2-{bits}" for bits in depth.WIDTHS)):
            (log.parent / "artifacts" / name).mkdir(parents=True)
            report = {"loaded": {"load_s": 3.0}} if name.startswith("exl2-") else {}
            manifest = json.dumps({"seconds": 7, "report": report})
            (log.parent / "artifacts" / name / "manifest.json").write_text(manifest)
        return 20.0

    monkeypatch.setattr(depth, "finished", finished)
    monkeypatch.setattr(depth.importlib.util, "find_spec", lambda name: object() if launcher else None)
    found = depth.together(tmp_path / "model", tmp_path / "sweep", part, [0, 1] if part == "two" else [0])
    assert (found["seconds"], len(found["stages"]), len(ran)) == (20.0, 4, count)
    assert found["load_s"] == {f"exl2-{bits}": 3.0 for bits in depth.WIDTHS}
    assert set(said) <= set(ran[0])
    assert ("-m" in said, "hydra/launcher=joblib" in said) == (
        ran[0].count("-m") == 2,
        "hydra/launcher=joblib" in ran[0],
    )


# The report


def spoken(ours: list[float], bare: list[float], ratio: float) -> dict[str, Any]:
    pairs = [a / b for a, b in zip(ours, bare, strict=True)]
    return {
        "ours": ours[1],
        "bare": bare[1],
        "ratio": ratio,
        "quartiles_of_turns": statistics.quantiles(pairs, n=4),
        "turns": {"ours": ours, "bare": bare},
    }


PARTS: dict[str, dict[str, Any]] = {
    "sweep-separate-4": {"seconds": 90},
    "sweep-separate-6": {"seconds": 100},
    "sweep-separate-8": {"seconds": 110},
    "sweep-one": {"seconds": 195},
    "sweep-two": {"seconds": 156},
    "sweep-in-turn": {"seconds": 240},
    "speed-8b": {
        "bound": 0.97,
        "within_bound": True,
        "in_flight": {
            "1": spoken([97, 98, 99], [99, 100, 101], 0.98),
            "16": spoken([380, 394, 400], [399, 400, 402], 0.985),
        },
        "decode_tokens_per_s": 240,
        "weights": 5 * 10**9,
        "copy_bytes_per_s": 3e12,
    },
    "speed-1b": {"error": "lost", "traceback": "long"},
    "big-bandwidth": {"copy_bytes_per_s": {"cuda:0": 3e12, "cuda:1": 2e12}},
    "big-plan": {"hardware": "4x24gb", "candidates": []},
    "big-auto": {
        "context": 4096,
        "cap": 24 * GIB,
        "devices": [
            {"device": "cuda:0", "predicted": 23 * GIB, "measured": 22.8 * GIB},
            {"device": "cuda:1", "predicted": 15 * GIB, "measured": 24.5 * GIB},
        ],
        "weights": {"cuda:0": 18 * 10**9, "cuda:1": 16 * 10**9},
        "load_s": 30,
        "decode_tokens_per_s": 50,
        "prefill_tokens_per_s": 2000,
    },
    "kill-whole": {"seconds": 70},
    "kill-again": {"seconds": 60, "compared": {"files_equal": True}},
    "kill-quality": {
        "whole": {"kl_mean": 0.2},
        "again": {"kl_mean": 0.21},
        "10": {"kl_mean": 0.2},
        "30": {"kl_mean": 0.2051},
    },
    "kill-10": {"compared": {"files_equal": True}},
    "kill-30": {"compared": {"files_equal": False, "different": {"a": {}, "b": {}}, "tensors": 229}},
}


def test_the_numbers_of_the_report() -> None:
    found = depth.summary(PARTS)
    assert found["sweep"] == {
        "in-turn": {"ours_s": 240, "separate_s": 300, "ratio": 0.8, "bound": None, "within": True},
        "one": {"ours_s": 195, "separate_s": 300, "ratio": 0.65, "bound": 0.67, "within": True},
        "two": {"ours_s": 156, "separate_s": 300, "ratio": 0.52, "bound": 0.5, "within": False},
    }
    assert list(found["speed"]) == ["8b"]
    speed = found["speed"]["8b"]
    assert (speed["turns"], speed["ratio"], speed["within"]) == (3, {"1": 0.98, "16": 0.985}, True)
    assert speed["share_of_copy"] == pytest.approx(5e9 * 240 / 3e12)
    big = found["big"]["auto"]
    assert (big["inside_caps"], big["plan_right"]) == (False, False)
    assert big["limit_tokens_per_s"] == pytest.approx(1 / (18e9 / 3e12 + 16e9 / 2e12), rel=1e-3)
    assert big["share_of_limit"] == pytest.approx(0.7)
    assert found["kill"] == {
        "killed": 2,
        "equal": 1,
        "differ": {"30": "2 of 229 tensors"},
        "uninterrupted_equal": True,
        "kl": {"whole": 0.2, "again": 0.21, "10": 0.2, "30": 0.2051},
    }
    rows = readme_tables.depth_rows(found)
    speeds = ["0.980, 0.98 to 0.98", "0.985, 0.95 to 1.00"]
    assert [row[3] for row in rows] == ["0.80", "0.65", "0.52", *speeds, "0.40", "", ""]
    assert rows[-2][1:] == ["1 of 2", "1 of 1 that was only repeated", "", "all, or the engine explains it"]
    assert rows[-1][1:3] == ["0.200, 0.205", "0.200, 0.210 of those that were not"]
    assert {len(row) for row in rows} == {5}
    (loaded,) = readme_tables.big_rows(found)
    assert loaded[0] == "auto"
    assert len(loaded) == len(readme_tables.BIG_HEAD)


def test_a_sweep_is_compared_with_the_runs_of_its_own_lease() -> None:
    later = {f"sweep-separate-{bits}": {"seconds": 50} for bits in (4, 6, 8)} | {"sweep-one": {"seconds": 60}}
    found = depth.summary(PARTS, later)["sweep"]
    assert (found["one"]["ratio"], found["one"]["separate_s"]) == (0.4, 150)
    assert (found["two"]["ratio"], found["two"]["separate_s"]) == (0.52, 300)


def test_what_was_not_measured_is_left_out() -> None:
    assert depth.summary({}) == {"sweep": {}, "speed": {}, "big": {}, "kill": None}
    assert depth.sweep_rows({"separate-4": {"seconds": 1}}) == {}
    auto = depth.big_row(PARTS["big-auto"], {})
    assert (auto["limit_tokens_per_s"], auto["share_of_limit"]) == (None, None)
    assert readme_tables.depth_rows(depth.summary({})) == readme_tables.big_rows(depth.summary({})) == []


def test_the_report_is_kept_with_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}

    def save(name: str, result: dict[str, Any], where: dict[str, Any]) -> Path:
        kept.update(result, name=name, where=where)
        return tmp_path

    monkeypatch.setattr(depth, "save", save)
    for name, value in (PARTS | {"environment": {"gpus": ["H200"]}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    depth.report([tmp_path])
    assert (kept["name"], kept["where"], kept["summary"]["kill"]["equal"]) == ("exl2_depth", {"gpus": ["H200"]}, 1)
    assert kept["outs"][0]["speed-1b"] == {"error": "lost"}


def test_the_section_of_the_readme_is_written_only_where_there_is_a_result() -> None:
    there = (readme_tables.RESULTS / "exl2_depth.json").exists()
    assert ("depth" in readme_tables.SECTIONS) is there
