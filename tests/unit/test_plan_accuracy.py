"""The benchmark of the plan: the arithmetic of its report, its cases, and the made-up models that it loads."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: some of its names are also names of tests

import plan_accuracy as accuracy
from common import RESULTS
from made_up import Shape
from made_up_fast import GROUP, write_exl2, write_gptq, write_plain, write_tokenizer
from plan_accuracy import POSITIONS, SHAPES, Case, cases, configured, is_right, offloaded, read, row, table
from small_models import Llama

from orchestrator import hardware
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.checkpoint.tokenizer import token_count
from orchestrator.config import BackendConfig, CacheConfig, QuantConfig, RunConfig
from orchestrator.hardware import GIB, MIB, Gpu
from orchestrator.plan.exl2_sizes import pieces
from orchestrator.plan.types import Candidate
from orchestrator.stages.exl2_result import judge_model
from orchestrator.tasks.session import look

SMALL = Shape(256, 512, 2, 4, 2, 4100)


def record(
    *devices: tuple[float, float], weights: float, engine: str = "exllamav2", offloads: bool = False
) -> dict[str, Any]:
    """A result of devices that were (planned, measured), in GiB."""
    found = [
        {"device": f"cuda:{i}", "predicted": int(planned * GIB), "measured": int(measured * GIB)}
        for i, (planned, measured) in enumerate(devices)
    ]
    only = {"total": int(weights * GIB), "largest_layer": 1}
    said = {"engine": engine, "method": "none", "offloads": offloads, "kv_tokens": None}
    return said | {"devices": found, "weights_only": only}


def vllm_record(promised: int, real: int) -> dict[str, Any]:
    """A result of a cache of 10 GiB that was promised for so many tokens, and has so many."""
    tokens = {"kv_tokens": {"promised": promised, "real": real}, "parts": {"cuda:0": {"kv_cache": 10 * GIB}}}
    return record((40, 38), weights=8, engine="vllm") | tokens


@pytest.mark.parametrize(
    ("predicted", "measured", "right"),
    [
        *[(300, 0, True), (301, 0, False), (10_000, 10_300, True), (10_000, 10_301, False)],
        *[(50_000, 51_000, True), (50_000, 51_100, False), (51_000, 50_000, True), (51_001, 50_000, False)],
    ],
)
def test_right_is_within_300_mib_or_two_percent_of_what_was_measured(
    predicted: int, measured: int, right: bool
) -> None:
    assert is_right(predicted * MIB, measured * MIB) is right


def test_the_numbers_of_some_cases() -> None:
    found = row(
        [
            record((10, 10.25), weights=8),  # right
            record((10, 10.25), (10, 9), weights=19.25),  # one device is wrong: so is the case; the weights are right
            record((10, 11), weights=8),
            record((10, 10), weights=30, offloads=True),  # the weights say nothing of it
        ]
    )
    assert found == {
        "cases": 4,
        "right": 2,
        "too_little": -GIB,
        "too_much": GIB,
        "weights_only_cases": 3,
        "weights_only_right": 1,
        "weights_only_worst": -3 * GIB,
    }


@pytest.mark.parametrize(
    ("real", "right", "little", "much"),
    [(1000, 1, 0, 0), (950, 0, -0.5, 0), (1050, 0, 0, 0.5), (975, 1, -0.25, 0)],
)
def test_of_vllm_the_promised_cache_counts(real: int, right: int, little: float, much: float) -> None:
    found = row([vllm_record(1000, real)])
    assert (found["right"], found["weights_only_cases"]) == (right, 0)
    assert found["too_little"] == pytest.approx(little * GIB, abs=1)
    assert found["too_much"] == pytest.approx(much * GIB, abs=1)


def test_the_table_has_a_row_for_each_way_and_one_for_all() -> None:
    records = [
        record((10, 10.25), weights=10),
        record((10, 9), weights=8, engine="transformers"),
        record((10, 10), weights=8, engine="transformers"),
    ]
    lines, rows = table(records)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| exllamav2 none", "| transformers none", "| all"]
    assert lines[2] == "| exllamav2 none | 1 | 1 of 1 (100%) | -256 MiB | +0 MiB | 1 of 1 (100%) | -256 MiB |"
    assert lines[3] == "| transformers none | 2 | 1 of 2 (50%) | 0 MiB | +1,024 MiB | 0 of 2 (0%) | -2,048 MiB |"
    assert (rows["all"]["cases"], rows["all"]["right"]) == (3, 2)
    assert table([]) == (lines[:2], {})
    away = table([record((1, 1), weights=3, offloads=True)])[0][-1]
    assert away == "| all | 1 | 1 of 1 (100%) | 0 MiB | +0 MiB | - | - |"


def test_of_a_case_that_was_tried_again_the_last_line_counts(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    (tmp_path / "cases.jsonl").write_text('{"case": "a", "error": "x"}\n{"case": "b"}\n{"case": "a"}\n{"case": "c')
    assert read(tmp_path) == {"a": {"case": "a"}, "b": {"case": "b"}}


def test_every_case_has_a_name_of_its_own_and_can_be_asked_for(tmp_path: Path) -> None:
    every = [*cases(tiny=False), *cases(tiny=True)]
    assert len({case.name for case in every}) == len(every) > 50
    assert {case.engine for case in every} == {"transformers", "bitsandbytes", "exllamav2", "vllm"}
    assert {case.engine for case in every if case.offload} == {"transformers", "bitsandbytes"}
    assert {case.cache_bits for case in every if case.engine == "exllamav2"} == {16, 8, 4}
    case = Case("exllamav2", "exl2", 4, "8b", 8192, 8, cards=2, cap_gib=7)
    config = configured(case, tmp_path, tmp_path)
    assert (config.backend, config.cache) == (BackendConfig(name="exllamav2"), CacheConfig(bits=8))
    assert (config.quant, config.run) == (QuantConfig(method="exl2", bits=4.0), RunConfig(in_flight=2))
    assert (config.hardware.gpus, config.hardware.memory_gib, config.parallel.tensor) == ([0, 1], 7, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up models, with everything but their words."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("1b", "8b"):
        s = SHAPES[name]
        llama = Llama(s.hidden, s.layers, s.heads, s.kv_heads, s.intermediate, s.vocab, POSITIONS)
        write_tokenizer(small_models.write_headers(folder / name, llama), s.vocab, POSITIONS)
        write_gptq(folder / f"{name}-gptq", s, POSITIONS, 4, hollow=True)
    return folder


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two H200s, nothing on them."""
    card = Gpu(0, "NVIDIA H200", 143_771 * MIB, 143_200 * MIB, (9, 0))
    monkeypatch.setattr(hardware, "nvml_gpus", lambda: ((card, replace(card, index=1)), ()))
    monkeypatch.setattr(hardware, "host_memory", lambda: (128 * GIB, 120 * GIB))


def planned(case: Case, models: Path) -> Candidate:
    """The case's plan of today."""
    config = configured(case, models / (f"{case.shape}-gptq" if case.method == "gptq" else case.shape), models)
    return look(offloaded(config) if case.offload else config, planning=False).plan.chosen


@pytest.mark.usefixtures("every_engine", "two_cards")
def test_every_case_is_planned_as_it_says_and_fits_on_two_cards(models: Path) -> None:
    for case in cases(tiny=False):
        chosen = planned(case, models)
        assert chosen.fits, (case, chosen.reasons)
        found = (chosen.backend, chosen.method, chosen.bits, chosen.max_context, chosen.max_in_flight)
        assert found == (case.engine, case.method, case.bits, case.context, case.in_flight)
        assert (len(chosen.gpus), chosen.cache_bits, chosen.offloads) == (case.cards, case.cache_bits, case.offload)


NOT_ALONE = {"vllm-none-16bit-8b-c8192-kv16-2cards-eager"}  # vLLM counted a neighbour's memory as its own


@pytest.mark.usefixtures("every_engine", "two_cards")
def test_the_plans_of_today_are_right_for_what_was_measured(models: Path) -> None:
    """A constant that is changed later has to stand before the same measurements."""
    kept = json.loads((RESULTS / "plan_accuracy.json").read_text(encoding="utf-8"))
    measured = {found["case"]: found for found in kept["cases"] if found.get("fits")}
    wrong, count = set(), 0
    for case in cases(tiny=False):
        if case.name not in measured or case.offload:  # an offload fills the card that its own plan was given
            continue
        found, gpus = measured[case.name], {gpu.device: gpu for gpu in planned(case, models).gpus}
        for device in found["devices"]:
            device["predicted"] = gpus[device["device"]].total
        if found["kv_tokens"]:
            token = found["parts"]["cuda:0"]["kv_cache"] / found["kv_tokens"]["promised"]
            cache = min(gpu.kv_cache for gpu in gpus.values())
            found["parts"] = {"cuda:0": {"kv_cache": cache}}
            found["kv_tokens"]["promised"] = round(cache / token)
        count += 1
        if not all(is_right(*pair) for pair in accuracy.compared(found)):
            wrong.add(case.name)
    assert count > 80
    assert wrong == NOT_ALONE


# The models


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_model_is_read_as_one(bits: int, tmp_path: Path) -> None:
    spec = model_spec(open_checkpoint(write_gptq(tmp_path / "model", SMALL, 4096, bits)))
    plain = model_spec(open_checkpoint(write_plain(tmp_path / "plain", SMALL, 4096)))
    assert spec.parameters == plain.parameters
    assert spec.quantization is not None
    assert (spec.quantization["quant_method"], spec.quantization["bits"]) == ("gptq", bits)
    linears = sum(int(np.prod(t.shape)) for t in plain.tensors if t.role == "linear")
    words = linears * bits // 8 + linears // GROUP * (bits / 8 + 2)
    order = sum(t.shape[1] * 4 for t in plain.tensors if t.role == "linear")
    assert spec.nbytes == plain.nbytes - 2 * linears + words + order


def test_a_plain_model_is_whole(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "model", SMALL, 4096)
    spec = model_spec(open_checkpoint(folder))
    assert (spec.vocab, spec.max_context, spec.layers) == (4100, 4096, 2)
    assert token_count(folder) == 4100
    before = (folder / "model.safetensors").stat().st_mtime_ns
    write_plain(folder, SMALL, 4096)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_its_weights_are_finite_and_no_two_rows_alike(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(write_plain(tmp_path / "model", SMALL, 4096) / "model.safetensors")
    head = tensors["lm_head.weight"].astype(np.float32)
    assert 0.015 < head.std() < 0.025
    assert len(np.unique(head[:, 0])) > 1000
    assert np.all(tensors["model.norm.weight"] == 1)
    assert not np.array_equal(
        tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_made_up_exl2_model_is_what_the_converter_would_leave(tmp_path: Path, bits: int) -> None:
    source = open_checkpoint(write_plain(tmp_path / "model", SMALL, 4096))
    folder = write_exl2(tmp_path / "exl2", SMALL, 4096, bits)
    found = judge_model(folder, source, bits, 6, lambda _: None)
    assert bits < found["measured_bits"] < bits + 0.3  # the shape is small: scales are a large part
    planned = sum(piece.weights for piece in pieces(model_spec(source), bits, 6, True, 4096))
    embedding = 2 * SMALL.vocab * SMALL.hidden
    assert planned == pytest.approx(found["bytes"] - embedding, rel=0.06)


@pytest.mark.parametrize("bits", [4, 8])
def test_its_groups_cover_every_row_once(tmp_path: Path, bits: int) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(write_exl2(tmp_path / "exl2", SMALL, 4096, bits) / "output.safetensors")
    for module in ("lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        packed = tensors[f"{module}.q_weight"].shape[0]
        pairs = tensors[f"{module}.q_groups"].reshape(-1, 2).tolist()
        ends = [start for _, start in pairs[1:]] + [packed]
        rows = [(end - start) * 32 // width for (width, start), end in zip(pairs, ends, strict=True)]
        assert sum(rows) == len(tensors[f"{module}.q_invperm"])
        assert [width for width, _ in pairs] == sorted((width for width, _ in pairs), reverse=True)
        assert sorted(tensors[f"{module}.q_invperm"].tolist()) == list(range(sum(rows)))
        assert np.all(tensors[f"{module}.q_scale_max"] > 0)


def test_the_report_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: dict[str, Any] = {}

    def save(name: str, result: dict[str, Any], where: dict[str, Any]) -> Path:
        saved.update(result, name=name, where=where)
        return tmp_path / "kept.json"

    monkeypatch.setattr(accuracy, "save", save)
    device = {"by": "process", "own": None}
    good = record((10, 10), weights=8)
    good["devices"] = [d | device for d in good["devices"]]
    good |= {"case": "a", "fits": True, "seconds": 3}
    lines = [
        good,
        {"case": "b", "error": "lost", "traceback": "long"},
        {"case": "c", "fits": False, "reasons": ["too small"]},
    ]
    for number, line in enumerate(lines):  # runs went side by side
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cases.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / str(number) / "environment.json").write_text(
            json.dumps({"gpus": ["H200"], "versions": {f"engine {number}": "1"}})
        )
    accuracy.report([tmp_path / str(number) for number in range(3)])
    out = capsys.readouterr().out
    assert "a: cuda:0 planned 10,240 MiB, measured 10,240 by process" in out
    assert "| all | 1 | 1 of 1 (100%)" in out
    assert saved["table"][-1].startswith("| all | 1 | 1 of 1 (100%)")
    assert saved["left_out"] == {"b": "lost", "c": ["too small"]}
    assert saved["rows"]["all"]["right"] == 1
    assert saved["where"] == {"gpus": ["H200"], "versions": {f"engine {number}": "1" for number in range(3)}}
    assert "traceback" not in json.dumps(saved["cases"])


def test_what_vllm_counts_beside_its_cache(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        "INFO Actual usage is 14.97 GiB for weight, 0.24 GiB for peak activation, 0.22 GiB for non-torch memory, and "
        "0.08 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with `--kv-cache-memory=23903691666`\n"
    )
    counts = {"weight": 14.97, "peak activation": 0.24, "non-torch memory": 0.22, "CUDAGraph memory": 0.08}
    assert accuracy.vllm_counts(log) == counts
    log.write_text("nothing of it\n")
    assert accuracy.vllm_counts(log) == {}
