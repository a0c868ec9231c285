"""The conversion to EXL2 against a converter of ours, for faults that the real one does not have on demand."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from exl2_bench import GPU, SHAPE, TESTS, Bench, make_bench, see_gpus
from exl2_models import exl2_arrays, measurement, optimized, strategy_groups, write_exl2
from small_models import Llama, write_adapter, write_headers

from orchestrator import artifacts as artifact_store
from orchestrator import pipeline
from orchestrator.artifacts import Built, Recipe, Store
from orchestrator.checkpoint.adapter import open_adapter
from orchestrator.checkpoint.digest import digest
from orchestrator.checkpoint.exl2_layout import packed_linears
from orchestrator.checkpoint.folder import fingerprint, open_checkpoint
from orchestrator.checkpoint.safetensors_header import read_safetensors_header
from orchestrator.errors import CheckpointError, ConfigError, DoesNotFitError, EngineUnavailableError, StageError
from orchestrator.hardware import DRIVER_KEEPS, GIB
from orchestrator.pipeline import Model, Source, check_stages, conversion, disk_needs, merged, prepare
from orchestrator.runfolder import RunFolder
from orchestrator.stages import converter, exl2, exl2_gpu
from orchestrator.stages.exl2_job import Record
from orchestrator.stages.exl2_log import OverflowWatch, _Scan, seen_overflow
from orchestrator.stages.exl2_measurement import check_fits, judge_measurement
from orchestrator.stages.exl2_mix import check_mix
from orchestrator.stages.exl2_result import NotWhole, judge_model
from orchestrator.tasks.artifacts import artifacts

BETWEEN = "job_new.json is of a crash between two checkpoints"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return make_bench(tmp_path, monkeypatch)


def test_a_model_and_its_measurement(bench: Bench) -> None:
    model = bench.quantize()
    assert [a.manifest["stage"] for a in model.artifacts] == ["measurement", "exl2"]
    assert model.built == tuple(a.name for a in model.artifacts)
    assert sorted(p.name for p in model.path.iterdir()) == [
        *("config.json", "manifest.json", "output.safetensors", "tokenizer.json"),
    ]
    report = model.artifacts[1].manifest["report"]
    assert report["bits"] == 4.0
    assert report["measured_bits"] == pytest.approx(4.0, rel=0.01)
    assert report["measured_on"] == "this model"
    measuring, quantizing = bench.runs()
    assert measuring["om"].endswith("/measurement.json")
    assert measuring["cf"] is None
    assert quantizing["m"] == str(model.artifacts[0].path / "measurement.json")
    assert (quantizing["b"], quantizing["hb"], quantizing["l"]) == (4.0, 6, 2048)
    status = json.loads((bench.run.path / "status.json").read_text())
    ended = {"state": "quantizing to 4 bits", "stage": "Quantizing", "completion": 1.0, "module": None, "eta_s": None}
    assert {key: status[key] for key in ended} == ended


def test_it_is_said_which_module_it_works_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    tell = bench.run.status
    monkeypatch.setattr(bench.run, "status", lambda state, **more: (told.append(more), tell(state, **more)))
    monkeypatch.setenv("FAKE_FAULT", "kill working 3")
    with pytest.raises(StageError, match="was killed by signal 9"):
        bench.quantize()
    at = {(said["stage"], said["completion"], said["module"]) for said in told}
    assert ("Measuring", 0.0, "model.layers.0 (Attention)") in at
    # It failed at one, which stays there to be read, and its time does not.
    status = json.loads((bench.run.path / "status.json").read_text())
    assert (status["stage"], status["completion"], status["module"]) == ("Measuring", 0.5, "model.layers.1 (Attention)")
    assert status["eta_s"] is None
    assert "\nmeasuring: Measuring, 0%, model.layers.0 (Attention)\n" in capsys.readouterr().err


STEP = """\
-------------------------------------------
| Measured: model.layers.{index} (MLP)    |
| Estimated remaining time: 0min 2sec     |
-------------------------------------------
[STATUS]{{"stage": "Measuring", "completion": {done}}}[/STATUS]
"""


def measuring(first: int, seconds: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is reported of a measurement of 10 modules that is at `first` when it starts, by the time of each."""
    clock, log, seen = 100.0, tmp_path / "log", []
    monkeypatch.setattr(converter, "time", SimpleNamespace(monotonic=lambda: clock))
    log.write_text(STEP.format(index=first - 1, done=first / 10))
    statuses = converter._Statuses(log, 0, seen.append)
    statuses.read()
    for index, took in enumerate(seconds, first):
        for text in (f" -- Layer: model.layers.{index} (MLP)\n -- half a li", "ne\n"):
            with log.open("a") as file:
                file.write(text)
            statuses.read()
        clock += took
        with log.open("a") as file:
            file.write(STEP.format(index=index, done=(index + 1) / 10))
        statuses.read()
    return seen


@pytest.mark.parametrize("first", [0, 5])
def test_the_time_that_is_left_goes_by_this_runs_modules(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measuring(first, [10.0, 30.0, 20.0, 20.0], tmp_path, monkeypatch)
    modules = [f"model.layers.{index} (MLP)" for index in range(first, first + 4)]
    assert [status.module for status in seen] == ["", *modules]
    assert [status.done for status in seen] == [pytest.approx(n / 10) for n in (first, *range(first, first + 4))]
    left = 10 - first
    wanted = [None, None, None, 20.0 * (left - 2), 20.0 * (left - 3)]
    assert [status.left_s for status in seen] == [pytest.approx(seconds) for seconds in wanted]


def test_no_time_is_left_of_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measuring(7, [0.0, 0.0, 9.0], tmp_path, monkeypatch)  # all of them at once; then its end
    assert [status.left_s for status in seen] == [None] * 5
    assert seen[-1] == converter.Status("Measuring", 1.0)
    log, found = tmp_path / "other", []
    log.write_text(
        '[STATUS]{"stage": "Measuring", "completion": 0.5}[/STATUS]\n -- Layer: lm_head (Linear)\n'
        '[STATUS]{"stage": "Optimizing", "completion": 0.1}[/STATUS]\n[STATUS]{"stage": 1}[/STATUS]\n[STATUS]{}'
    )
    converter._Statuses(log, 0, found.append).read()
    assert found == [converter.Status("Optimizing", 0.1)]


def test_the_next_width_reuses_the_measurement(bench: Bench) -> None:
    first = bench.quantize()
    second = bench.quantize(6.0)
    assert second.artifacts[0].name == first.artifacts[0].name
    assert second.built == (second.artifacts[1].name,)
    assert [run["om"] is not None for run in bench.runs()] == [True, False, False]
    third = bench.quantize(6.0)
    assert third.built == ()
    assert third.path == second.path
    other = bench.quantize(6.0, "quant.head_bits=8", "quant.calibration.length=1024")
    assert len(other.built) == 2  # another calibration, another measurement


def test_many_adapters_share_one_quantized_base(bench: Bench) -> None:
    for number, rank in enumerate((4, 8)):
        lora = write_adapter(bench.folder / f"lora{rank}", SHAPE, rank)
        config = bench.config("model.merge=false", f"model.path={bench.source}", f"model.adapter={lora}")
        source = Source(open_checkpoint(bench.source), unmerged=((open_adapter(lora), 1.0),))
        model = prepare(config, source, bench.chosen(4.0), bench.run)
        stages = [name.partition("-")[0] for name in model.built]
        assert stages == [["measurement", "exl2", "adapter"], ["adapter"]][number]
        assert model.path.name.startswith("exl2-")
        assert [path.name for path in model.adapters] == [model.artifacts[-1].name]


def test_a_bad_adapter_is_refused_before_the_base_is_quantized(bench: Bench) -> None:
    lora = write_adapter(bench.folder / "lora", SHAPE)
    source = Source(open_checkpoint(bench.source), unmerged=((open_adapter(lora), 1e9),))
    with pytest.raises(CheckpointError, match="does not fit into float16"):
        prepare(bench.config("model.merge=false"), source, bench.chosen(4.0), bench.run)
    assert not list((bench.folder / "store").glob("*-*"))


def test_what_it_writes_is_known_before_and_nothing_once_it_is_there(bench: Bench) -> None:
    config, source = bench.config(), Source(open_checkpoint(bench.source))
    [before] = disk_needs(config, source, bench.chosen(4.0))
    model = bench.quantize()
    [after], [other] = (disk_needs(config, source, bench.chosen(bits)) for bits in (4.0, 6.0))
    assert after.bytes == 0
    assert other.bytes > 0
    size = (model.path / "output.safetensors").stat().st_size
    assert size * 0.9 < before.parts[-1].size < size * 1.1  # so small matrices: scales are a large part


def test_a_measurement_of_the_users(bench: Bench) -> None:
    file = bench.folder / "mine.json"
    file.write_text(json.dumps(measurement(SHAPE)))
    assert len(bench.quantize(4.0, f"quant.measurement={file}").artifacts) == 1
    other = bench.quantize(4.0, f"quant.measurement={file}", "quant.calibration.length=1024")
    assert len(other.built) == 1  # another calibration, another model
    assert other.artifacts[-1].manifest["report"]["measured_on"] == "a file of the user's"
    file.write_text(json.dumps(measurement(Llama(layers=1))))
    with pytest.raises(ConfigError, match=r"measured nothing of 2 of 4 blocks, the first is model\.layers\.1\.mlp"):
        bench.quantize(6.0, f"quant.measurement={file}")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Llama(intermediate=512), r"was made of a model\.layers\.0\.mlp with other shapes"),
        (Llama(hidden=256), r"was made of a model\.layers\.0\.self_attn with other shapes"),
        (Llama(kv_heads=1), r"was made of a model\.layers\.0\.self_attn with other shapes"),
    ],
)
def test_a_measurement_of_other_shapes(bench: Bench, shape: Llama, message: str) -> None:
    file = bench.folder / "mine.json"
    file.write_text(json.dumps(measurement(shape)))
    with pytest.raises(ConfigError, match=message):
        bench.quantize(4.0, f"quant.measurement={file}")


def test_a_merged_model_takes_its_bases_measurement(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(bench.folder / "store")
    base = fingerprint(open_checkpoint(bench.source))

    def merge(number: int, shape: Llama = SHAPE) -> Model:
        recipe = Recipe("merge", "1", {}, {"base": base, "adapter0": number})

        def make(out: Path) -> Built:
            write_headers(out, shape)
            (out / "tokenizer.json").write_text("{}")
            return Built({}, {})

        artifact, _ = store.build(recipe, make, 0, list, lambda: None)
        return Model(artifact.path, (artifact,))

    def quantize(model: Model, *options: str) -> Model:
        return exl2.quantize(bench.config(*options), model, bench.chosen(4.0), bench.run)

    own = quantize(merge(1))  # before the base was measured
    assert [name.partition("-")[0] for name in own.built] == ["measurement", "exl2"]
    measured = bench.quantize().artifacts[0]
    assert quantize(merge(1)).path == own.path  # what is there stays
    capsys.readouterr()

    found = quantize(merge(2))
    assert [name.partition("-")[0] for name in found.built] == ["exl2"]
    assert found.artifacts[1].name == measured.name
    manifest = found.artifacts[-1].manifest
    assert manifest["inputs"]["measurement"] == measured.name
    assert manifest["report"]["measured_on"] == "its base"
    assert f"that of its base is used ({measured.name}); nothing is measured anew" in capsys.readouterr().err
    again = quantize(merge(2))
    assert again.built == ()
    assert again.artifacts[1].name == measured.name  # marked as used

    assert len(quantize(merge(2), "quant.calibration.length=1024").built) == 2  # another calibration
    with pytest.raises(StageError, match="wrote model"):  # (the fake makes one shape only)
        quantize(merge(3, Llama(layers=2, intermediate=512)))
    assert bench.runs()[-2]["om"] is not None  # a merge that changed shapes is measured


def test_a_measurement_of_a_base_that_was_converted_first(bench: Bench) -> None:
    store = Store(bench.folder / "store")
    made = {}
    for stage, inputs in (("convert", {"base": "b"}), ("merge", {"base": "b", "adapter0": "a"})):

        def make(out: Path) -> Built:
            write_headers(out, SHAPE)
            return Built({}, {})

        artifact, _ = store.build(Recipe(stage, "1", {}, inputs), make, 0, list, lambda: None)
        made[stage] = Model(artifact.path, (artifact,))
    built = [exl2.quantize(bench.config(), made[s], bench.chosen(4.0), bench.run).built for s in ("convert", "merge")]
    assert [len(names) for names in built] == [2, 1]


@pytest.mark.parametrize("method", ["none", "exl2"])
def test_a_context_that_exllamav2_does_not_scale_to(bench: Bench, method: str) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    (bench.source / "config.json").write_text(json.dumps(SHAPE.config() | {"rope_scaling": scaling}))
    chosen = replace(bench.chosen(4.0), method=method, max_context=SHAPE.context + 1)
    with pytest.raises(ConfigError, match=f"does not scale beyond {SHAPE.context} tokens") as error:
        exl2.quantize(bench.config(), Model(bench.source), chosen, bench.run)
    assert f"model.max_context={SHAPE.context}" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("key", "kind", "works"),
    [
        ("rope_scaling", "dynamic", False),
        ("rope_scaling", "linear", True),
        ("rope_scaling", "yarn", True),
        ("rope_parameters", "linear", False),  # it looks for rope_scaling only
        ("rope_parameters", "yarn", False),
    ],
)
def test_scaling_that_exllamav2_knows(bench: Bench, key: str, kind: str, works: bool) -> None:
    original = {"original_max_position_embeddings": SHAPE.context}
    config = SHAPE.config() | {key: {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **original}}
    (bench.source / "config.json").write_text(json.dumps(config))
    chosen = replace(bench.chosen(4.0), method="none", bits=16.0, max_context=2 * SHAPE.context)
    with nullcontext() if works else pytest.raises(ConfigError, match="does not scale beyond"):
        exl2.quantize(bench.config(), Model(bench.source), chosen, bench.run)
    chosen = replace(chosen, max_context=SHAPE.context)
    assert exl2.quantize(bench.config(), Model(bench.source), chosen, bench.run).path == bench.source


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("less", r"wrote model\.layers\.\d\.\S+ with \d\.\d+ bits per weight, and chose \d\.\d+ for it"),
        ("narrow", r"chose widths of [\d,]+ bits where [\d,]+ were asked for, and a wider option fits"),
    ],
)
def test_a_model_that_is_not_what_was_chosen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    """It is refused and kept, with what removes it: hours of work are a person's to throw away."""
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(StageError, match=message) as error:
        bench.quantize(5.0006)
    monkeypatch.delenv("FAKE_FAULT")
    ran = len(bench.runs())
    with pytest.raises(StageError, match=message):
        bench.quantize(5.0006)
    assert len(bench.runs()) == ran
    [partial] = bench.folder.glob("store/exl2-*.partial")
    assert f"artifacts.action=prune artifacts.name={partial.name}" in error.value.hint
    shutil.rmtree(partial)
    report = bench.quantize(5.0006).artifacts[-1].manifest["report"]
    assert report["measured_bits"] == pytest.approx(5.0, rel=0.005)


def test_a_tokenizer_that_the_converter_changed_is_the_models(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "tokenizer")
    made = bench.quantize(5.0006).path
    assert (made / "tokenizer.json").read_bytes() == (bench.source / "tokenizer.json").read_bytes()


def test_killed_while_its_digests_are_taken_it_is_not_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> str:
        raise KeyboardInterrupt

    bench.quantize(6.0)  # the measurement
    ran = len(bench.runs())
    with monkeypatch.context() as patched:
        patched.setattr(artifact_store, "digest", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.quantize(5.0006)
    made = bench.quantize(5.0006).path
    assert len(bench.runs()) == ran + 1
    assert not [path for path in made.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("bits", "near"),
    [(2.0, 2.29), (8.5, 8.29), (5.0, 4.93)],  # nothing is less; nothing is wider; so few options
)
def test_a_target_that_no_mix_comes_near_to(
    bench: Bench, bits: float, near: float, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bench.folder / "mine.json"
    file.write_text(json.dumps(measurement(SHAPE, steps=4)))
    report = bench.quantize(bits, f"quant.measurement={file}").artifacts[-1].manifest["report"]
    assert report["measured_bits"] == pytest.approx(near, abs=0.05)
    assert "no mix of widths comes nearer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": None}, r"left no choice of widths in job_new\.json"),
        ({"mlp": None}, r"left no choice of widths in job_new\.json"),
        ({"mlp": {"total_bits": 1}}, r"chose widths for model\.layers\.1\.mlp that were not measured"),
        ({"mlp": 0}, "and a wider option fits"),
        ({"mlp": -1}, r"chose widths of [\d,]+ bits, and [\d,]+ were asked for"),
    ],
)
def test_the_judge_of_widths(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = open_checkpoint(write_headers(tmp_path / "source", SHAPE))
    file = tmp_path / "measurement.json"
    measured = measurement(SHAPE)
    file.write_text(json.dumps(measured))
    strategy = optimized(measured["measurement"], SHAPE, 4.0)
    result = write_exl2(tmp_path / "result", SHAPE, layers=strategy_groups(strategy, SHAPE))
    packed = packed_linears(
        {info.name: info for info in read_safetensors_header(result / "output.safetensors").tensors}
    )
    record = tmp_path / "job_new.json"
    record.write_text(json.dumps({"strategy": strategy}))
    check_mix(packed, tmp_path, file, source, 4.0)
    if "mlp" in change:
        option = change["mlp"]
        block = measured["measurement"]["model.layers.1.mlp"]
        change = {"strategy": strategy | {"model.layers.1.mlp": block[option] if isinstance(option, int) else option}}
    record.write_text(json.dumps(change))
    with pytest.raises(NotWhole, match=message):
        check_mix(packed, tmp_path, file, source, 4.0)


def test_what_the_converter_is_given(bench: Bench) -> None:
    config = SHAPE.config() | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    del config["rope_theta"]
    (bench.source / "config.json").write_text(json.dumps(config))
    seen: dict[str, Any] = {}

    def convert(*args: Any, **kwargs: Any) -> Any:
        source = Path(args[2][args[2].index("-i") + 1])
        seen["files"] = sorted(p.name for p in source.iterdir())
        seen["config"] = json.loads((source / "config.json").read_text())
        seen["limits"], seen["env"] = kwargs["limits"], kwargs["env"]
        raise StageError("seen")

    patch = pytest.MonkeyPatch()
    patch.setattr(exl2, "convert", convert)
    try:
        with pytest.raises(StageError, match="seen"):
            bench.quantize(4.0, "hardware.memory_gib=24")
    finally:
        patch.undo()
    assert seen["files"] == ["config.json", "model.safetensors", "tokenizer.json"]  # no index, which it would copy
    assert seen["config"]["rope_theta"] == 5e5  # the only form that it reads
    assert seen["limits"] == [GPU.free]
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_conversion_takes_the_largest_gpu_that_is_allowed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, GPU, replace(GPU, index=1))
    seen: dict[str, Any] = {}

    def convert(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        raise StageError("seen")

    monkeypatch.setattr(exl2, "convert", convert)
    with pytest.raises(StageError, match="seen"):  # the model alone would run on the first
        bench.quantize(4.0, "hardware.memory_gib=[1,20]")
    assert seen["limits"] == [20 * GIB - DRIVER_KEEPS]
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "1"


class Late(Exception):
    """A merge has begun."""


@pytest.fixture
def to_merge(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A model with an adapter; that it is merged is the failure."""

    def merge(*_: Any) -> Any:
        raise Late

    monkeypatch.setattr(pipeline, "_merge", merge)
    lora = write_adapter(bench.folder / "lora", SHAPE)
    return Source(open_checkpoint(bench.source), adapters=((open_adapter(lora), 1.0),))


def scaled(bench: Bench, kind: str) -> None:
    config = SHAPE.config() | {"rope_scaling": {"type": kind, "factor": 2.0}}
    (bench.source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "can be read"),
        ("{}", "can be read"),
        (json.dumps(measurement(Llama(layers=1))), "measured nothing of 2 of 4 blocks"),
        (json.dumps(measurement(Llama(intermediate=512))), "with other shapes"),
    ],
)
def test_a_bad_measurement_is_found_before_the_merge(bench: Bench, to_merge: Source, text: str, message: str) -> None:
    file = bench.folder / "mine.json"
    file.write_text(text)
    config = bench.config(f"quant.measurement={file}")
    with pytest.raises(ConfigError, match=f"quant.measurement={file} is not of this model: it .*{message}"):
        prepare(config, to_merge, bench.chosen(4.0), bench.run)
    with pytest.raises(ConfigError, match=message):
        check_stages(config, to_merge, bench.chosen(4.0), here=False)
    file.write_text(json.dumps(measurement(SHAPE)))
    with pytest.raises(Late):
        prepare(config, to_merge, bench.chosen(4.0), bench.run)


def test_rows_that_are_too_long_are_refused_before_the_merge(bench: Bench, to_merge: Source) -> None:
    with pytest.raises(ConfigError, match=r"calibration\.length=4096 is more than the model's 2048 positions"):
        prepare(bench.config("quant.calibration.length=4096"), to_merge, bench.chosen(4.0), bench.run)


@pytest.mark.parametrize("method", ["none", "exl2"])
def test_scaling_is_refused_before_the_merge(bench: Bench, to_merge: Source, method: str) -> None:
    scaled(bench, "dynamic")
    source = replace(to_merge, base=open_checkpoint(bench.source))
    chosen = replace(bench.chosen(4.0), method=method, max_context=SHAPE.context + 1)
    for here in (True, False):
        with pytest.raises(ConfigError, match=f"does not scale beyond {SHAPE.context} tokens"):
            check_stages(bench.config(), source, chosen, here=here)
    with pytest.raises(ConfigError, match="does not scale beyond"):
        prepare(bench.config(), source, chosen, bench.run)


def test_a_merge_writes_both_forms_of_the_rope_keys(bench: Bench, to_merge: Source) -> None:
    config = SHAPE.config() | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    del config["rope_theta"]
    (bench.source / "config.json").write_text(json.dumps(config))
    chosen = replace(bench.chosen(4.0), method="none", bits=16.0)
    base = open_checkpoint(bench.source)
    check_stages(bench.config(), replace(to_merge, base=base), chosen, here=True)
    with pytest.raises(ConfigError, match="has rope_parameters, which exllamav2 does not read"):
        check_stages(bench.config(), Source(base), chosen, here=True)


@pytest.mark.parametrize("missing", ["require", "require_build", "gpu"])
def test_what_is_not_installed_is_said_before_the_merge(
    bench: Bench, to_merge: Source, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def absent(*_: Any) -> Any:
        raise EngineUnavailableError("it is not here")

    if missing == "gpu":
        see_gpus(monkeypatch)
    else:
        monkeypatch.setattr(exl2, missing, absent)
    config, chosen = bench.config(), bench.chosen(4.0)
    with pytest.raises(EngineUnavailableError, match=r"not here|there is none here"):
        prepare(config, to_merge, chosen, bench.run)
    check_stages(config, to_merge, chosen, here=False)  # for another machine


@pytest.mark.parametrize(
    ("gib", "host", "message"),
    [
        (1, 60, r"takes 1\.5\d GiB of one GPU, and none has more than 1\.00 GiB free"),
        (23, 1, r"takes 3\.1\d GiB of host memory, of which 1\.00 GiB are free"),
        (1, 1, r"takes 1\.5\d GiB of one GPU, .*; and 3\.1\d GiB of host memory"),
    ],
)
def test_too_little_memory_is_said_before_the_merge(
    bench: Bench, to_merge: Source, monkeypatch: pytest.MonkeyPatch, gib: int, host: int, message: str
) -> None:
    chosen = bench.chosen(4.0)
    see_gpus(monkeypatch, replace(GPU, free=gib * GIB))
    monkeypatch.setattr(exl2_gpu, "host_memory", lambda: (64 * GIB, host * GIB))
    with pytest.raises(DoesNotFitError, match=f"the conversion to EXL2 {message}") as caught:
        prepare(bench.config(), to_merge, chosen, bench.run)
    assert caught.value.exit_code == 3
    assert "task=convert output.path=FOLDER" in (caught.value.hint or "")


def test_nothing_is_asked_of_a_machine_that_only_loads_what_is_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, source, chosen = bench.config(), Source(open_checkpoint(bench.source)), bench.chosen(4.0)
    before = conversion(config, source, chosen, planning=False)
    assert before is not None
    assert (before.gpu_free, before.host_free, before.lacks) == (23 * GIB, 60 * GIB, "")
    assert before.to_json()["gpu"] == {"bytes": before.gpu, "free": 23 * GIB}
    bench.quantize()
    again = conversion(config, source, bench.chosen(6.0), planning=False)
    assert again is not None  # with the measurement that there is

    see_gpus(monkeypatch, replace(GPU, free=GIB))
    monkeypatch.setattr(exl2, "require", lambda *_: pytest.fail("it is converted already"))
    assert conversion(config, source, chosen, planning=False) is None
    assert prepare(config, source, chosen, bench.run).built == ()


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("nothing", StageError, "ended with code 0 and wrote no measurement; its last error: Error: 7 is not a sup"),
        ("fault", StageError, "ended with code 1 and wrote no measurement; its last error: KeyError: 'hidden_size'"),
        ("raise", StageError, "cannot convert this model: a Hessian that cannot be inverted"),
        ("overflow", StageError, r"hidden states beyond float16's range in model\.layers\.1 \(MLP\)"),
        ("oom", DoesNotFitError, r"ran out of GPU memory \(.*CUDA out of memory"),
    ],
)
def test_a_converter_that_gives_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[Exception], message: str
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(kind, match=message) as caught:
        bench.quantize()
    assert "convert.log" in str(caught.value)
    monkeypatch.delenv("FAKE_FAULT")
    assert len(bench.quantize().built) == 2


def test_a_whole_model_of_nonsense(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "nan")
    with pytest.raises(StageError, match=r"results that are no numbers \(NaN\) in model\.layers\.1 \(MLP\)") as caught:
        bench.quantize()
    assert "Type backend=bitsandbytes quant.bits=4" in caught.value.hint
    with pytest.raises(StageError, match="no numbers"):  # nothing of it is taken for finished
        bench.quantize()
    monkeypatch.delenv("FAKE_FAULT")
    assert len(bench.quantize().built) == 1


def test_an_overflow_before_an_interruption_is_remembered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exl2, "_progress", interrupted_at(2))
    bench.quantize()
    monkeypatch.setenv("FAKE_FAULT", "nan sleep")
    monkeypatch.setattr(exl2, "_progress", interrupted_at(0.7))
    with pytest.raises(KeyboardInterrupt):
        bench.quantize(6.0)
    monkeypatch.delenv("FAKE_FAULT")  # what goes on from its states would say nothing
    monkeypatch.setattr(exl2, "_progress", interrupted_at(2))
    runs = len(bench.runs())
    with pytest.raises(
        StageError, match=r"\(NaN\) in model\.layers\.1 \(MLP\), as an earlier run saw that was"
    ) as caught:
        bench.quantize(6.0)
    assert f"The same command begins anew. Its log: {bench.run.path / 'convert.log'}" in caught.value.hint
    assert len(bench.runs()) == runs  # at once, not after hours
    (work,) = (bench.folder / "store").glob("exl2-*.partial/work")
    assert not list(work.iterdir())
    capsys.readouterr()
    assert len(bench.quantize(6.0).built) == 1
    assert "going on where" not in capsys.readouterr().err


def test_states_of_a_reported_overflow_are_not_gone_on_with(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.quantize()
    monkeypatch.setenv("FAKE_FAULT", "nan swapped 3")
    before = len(bench.modules())
    with pytest.raises(StageError, match=r"results that are no numbers \(NaN\) in model\.layers\.1 \(MLP\)\. It"):
        bench.quantize(6.0)
    monkeypatch.delenv("FAKE_FAULT")
    assert len(bench.quantize(6.0).built) == 1
    assert bench.modules()[before:] == [1, 2, 3, 1, 2, 3]


def test_a_record_that_is_forgotten_is_not_gone_on_with(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is removed: that may be cut short."""
    monkeypatch.setenv("FAKE_FAULT", "kill working 2")
    with pytest.raises(StageError, match="was killed by signal 9"):
        bench.quantize()
    (work,) = (bench.folder / "store").glob("measurement-*.partial/work")
    record = Record(work, (), ())
    assert record.resume() == "measure_quant"
    record.forget()
    assert (work / "last_good" / "hidden_states.safetensors").exists()
    assert record.resume() == ""


def test_verify_looks_into_the_files(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    model = bench.quantize(4.0, "convert.verify=true")
    assert "verified: 3 files by their digests, every linear's groups, order and scales; layers of 3.9" in (
        capsys.readouterr().err
    )
    artifacts(bench.config("artifacts.action=verify"), bench.run)
    store, artifact = Store(bench.folder / "store"), model.artifacts[-1]
    other = write_exl2(bench.folder / "other", SHAPE, 5)  # as if it had been made wrong: its digests are right
    (model.path / "output.safetensors").write_bytes((other / "output.safetensors").read_bytes())
    manifest = json.loads((model.path / "manifest.json").read_text())
    file = model.path / "output.safetensors"
    manifest["files"][file.name] |= {"size": file.stat().st_size, "xxh3_128": digest(file)}
    (model.path / "manifest.json").write_text(json.dumps(manifest))
    assert store.verify(store.finished()[0]) == []
    with pytest.raises(StageError, match=rf"1 of 2 artifacts are damaged: {artifact.name}"):
        artifacts(bench.config("artifacts.action=verify"), bench.run)
    assert f"{artifact.name}: {model.path}: its layers have 4.9" in capsys.readouterr().out
    with pytest.raises(StageError, match=r"is damaged: .*its layers have 4\.9\d+ bits per weight, not 3\.9"):
        bench.quantize(4.0, "convert.verify=true")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("q_invperm", np.zeros(128, np.int32), "q_invperm is no order of 128 rows"),
        ("q_groups", np.array([4, 0, 7, 4, 4, 8, 4, 12], np.int16), "q_groups: group 1 is 7 bits from row 4"),
        ("q_scale_max", np.full(4, np.inf, np.float16), "q_scale_max: 4 of 4 are not finite"),
        ("q_scale", ("I32", (1, 8)), r"q_scale has shape \[1, 8\], not \[4, 32\]"),
    ],
)
def test_a_folder_of_the_users_is_looked_at_before_it_is_loaded(
    bench: Bench, part: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    up = "model.layers.1.mlp.up_proj"
    linear = {f"{up}.{name}": array for name, array in exl2_arrays((256, 128), [(32, 4)] * 4).items()}
    good = write_exl2(bench.folder / "good", SHAPE, changed=linear)
    bad = write_exl2(bench.folder / "bad", SHAPE, changed=linear | {f"{up}.{part}": value})
    chosen = bench.chosen(4.0)
    for options in ((), ("convert.verify=true",)):
        model = prepare(bench.config(*options), Source(open_checkpoint(good)), chosen, bench.run)
        assert (model.path, model.artifacts) == (good, ())
        with pytest.raises(CheckpointError, match=rf"bad/output\.safetensors: {up}\.{message}"):
            prepare(bench.config(*options), Source(open_checkpoint(bad)), chosen, bench.run)
    said = capsys.readouterr().err
    assert said.count("verified: 15 linears' parts, groups, order and scales; layers of 4.") == 1
    assert "nothing to verify" not in said


def test_verify_compares_a_folder_with_its_config(bench: Bench) -> None:
    """Without a plan, too: every linear is whole, and one has other rows than the others say."""
    other = exl2_arrays((256, 256), [(32, 4)] * 8)
    folder = write_exl2(
        bench.folder / "m", SHAPE, changed={f"model.layers.1.mlp.up_proj.{n}": a for n, a in other.items()}
    )
    with pytest.raises(
        CheckpointError, match=r"up_proj\.q_weight is of 256 inputs and 256 outputs, and .* 128 and 256"
    ):
        merged(bench.config("convert.verify=true"), Source(open_checkpoint(folder)), bench.run)


def test_a_model_that_is_not_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "norm")
    with pytest.raises(StageError, match=r"and wrote no model\.norm\.weight"):
        bench.quantize()
    # Its job says that it is finished: it is begun anew, and not believed for ever.
    monkeypatch.delenv("FAKE_FAULT")
    assert bench.quantize().path.name.startswith("exl2-")


def test_one_that_is_interrupted_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "sleep")
    monkeypatch.setattr(exl2, "_progress", interrupted_at(0.5))
    with pytest.raises(KeyboardInterrupt):
        bench.quantize()
    assert nothing_runs("convert_exl2", str(bench.folder))
    monkeypatch.setattr(exl2, "_progress", interrupted_at(2))
    monkeypatch.delenv("FAKE_FAULT")
    assert len(bench.quantize().built) == 2
    assert " -- Resuming job measure_quant" in bench.log


@pytest.mark.parametrize(
    ("moment", "said", "again"),
    [
        ("working 2", "measuring: going on where an earlier run stopped (measure_quant)", [2, 3]),
        ("temp 2", "measuring: going on where an earlier run stopped (measure_quant)", [2, 3]),
        (
            "invalid 2",
            "is of a crash between two checkpoints: taken back to the last good one (measure_quant, mod",
            [2, 3],
        ),
        (
            "swapped 3",
            "is of a crash between two checkpoints: taken back to the last good one (measure_quant, mod",
            [3],
        ),
        ("half 3", "is damaged: taken back to the last good one (measure_quant, module 2)", [3]),
        (
            "swapped 1",
            "is of a crash between two checkpoints: taken back to the last good one (measure_quant)",
            [1, 2, 3],
        ),
    ],
)
def test_a_crash_costs_no_more_than_what_was_done_since_the_last_checkpoint(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    said: str,
    again: list[int],
) -> None:
    monkeypatch.setenv("FAKE_FAULT", f"kill {moment}")
    with pytest.raises(StageError, match="was killed by signal 9 and wrote no measurement"):
        bench.quantize()
    monkeypatch.delenv("FAKE_FAULT")
    before = len(bench.modules())
    assert len(bench.quantize().built) == 2
    assert bench.modules()[before:] == [*again, 1, 2, 3]  # and those of the quantization
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"record": "{"}, "job_new.json is damaged): begun anew"),
        ({"invalid": True}, f"{BETWEEN}): begun anew"),
        ({"in_dir": "/elsewhere"}, "was begun with another in_dir /elsewhere instead of "),
        ({"measurement_length": 1024}, "was begun with another measurement_length 1024 instead of 2048): begun anew"),
        ({"file": "hidden_states.safetensors"}, "has no hidden_states.safetensors to go with it): begun anew"),
        ({"file": "cal_data.safetensors"}, "has no cal_data.safetensors to go with it): begun anew"),
    ],
)
def test_one_that_nothing_good_is_left_of_is_begun_anew(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setenv("FAKE_FAULT", "kill working 2")
    with pytest.raises(StageError, match="was killed by signal 9"):
        bench.quantize()
    monkeypatch.delenv("FAKE_FAULT")
    (work,) = (bench.folder / "store").glob("measurement-*.partial/work")
    for place in (work, work / "last_good"):
        record = place / "job_new.json"
        if "file" in damage:
            (place / damage["file"]).unlink(missing_ok=True)
        elif "record" in damage:
            record.write_text(damage["record"])
        else:
            record.write_text(json.dumps(json.loads(record.read_text()) | damage))
    before = len(bench.modules())
    assert len(bench.quantize().built) == 2
    assert bench.modules()[before:] == [1, 2, 3, 1, 2, 3]
    assert said in capsys.readouterr().err


def test_a_job_of_other_bits_is_not_gone_on_with(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.quantize()
    monkeypatch.setenv("FAKE_FAULT", "kill working 2")
    with pytest.raises(StageError, match="was killed by signal 9"):
        bench.quantize(6.0)
    monkeypatch.delenv("FAKE_FAULT")
    (record,) = (bench.folder / "store").glob("exl2-*.partial/work/job_new.json")
    job = json.loads(record.read_text())
    for change, said in (
        ({"bits": 5.0}, "was begun with another bits 5.0 instead of 6.0): begun anew"),
        ({"head_bits": 8}, "was begun with another head_bits 8 instead of 6): begun anew"),
        ({"measurement": {}}, "was begun with another measurement): begun anew"),
    ):
        monkeypatch.setenv("FAKE_FAULT", "kill working 2")
        record.write_text(json.dumps(job | change))
        (record.parent / "last_good" / "job_new.json").write_text(record.read_text())
        with pytest.raises(StageError, match="was killed by signal 9"):
            bench.quantize(6.0)
        assert said in capsys.readouterr().err
    monkeypatch.delenv("FAKE_FAULT")
    assert bench.quantize(6.0).artifacts[-1].manifest["report"]["bits"] == 6.0


def killed(bench: Bench, monkeypatch: pytest.MonkeyPatch, bits: float, *options: str) -> str:
    """Kills a conversion in its second module; the name of what it leaves."""
    before = set((bench.folder / "store").glob("*.partial"))
    monkeypatch.setenv("FAKE_FAULT", "kill working 2")
    with pytest.raises(StageError, match="was killed by signal 9"):
        bench.quantize(bits, *options)
    monkeypatch.delenv("FAKE_FAULT")
    [left] = set((bench.folder / "store").glob("*.partial")) - before
    return left.name


def left_behind(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Which interrupted ones are said not to be continued -> why, and what to type."""
    lines = [line for line in capsys.readouterr().err.splitlines() if " is not continued: " in line]
    return {line.partition(": ")[2].partition(" (")[0]: line.partition(") ")[2] for line in lines}


def removes(name: str) -> str:
    return f"task=artifacts artifacts.action=prune artifacts.name={name} removes it"


def test_interrupted_ones_with_other_settings_are_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring = killed(bench, monkeypatch, 4.0, "quant.calibration.length=1024")
    assert left_behind(capsys) == {}
    bench.quantize()
    assert left_behind(capsys) == {
        measuring: "was begun with quant.calibration.length=1024 (now 2048); the same command with "
        f"quant.calibration.length=1024 goes on with it, {removes(measuring)}"
    }
    six = killed(bench, monkeypatch, 6.0)
    head = killed(bench, monkeypatch, 5.5, "quant.head_bits=8")
    assert set(left_behind(capsys)) == {measuring, six}
    bench.source = write_headers(bench.folder / "other", Llama(layers=2, vocab=512))  # another model
    (bench.source / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("FAKE_FAULT", "kill working 2")
    with pytest.raises(StageError, match="was killed by signal 9"):
        bench.quantize()
    assert left_behind(capsys) == {}
    monkeypatch.delenv("FAKE_FAULT")
    bench.source = bench.folder / "model"
    with Store(bench.folder / "store")._lock(measuring, lambda: None):  # another run has gone on with it
        bench.quantize(5.5)
    assert left_behind(capsys) == {
        six: "was begun with quant.bits=6 (now 5.5); the same command with quant.bits=6 goes on with it, "
        f"{removes(six)}",
        head: "was begun with quant.head_bits=8 (now 6); the same command with quant.head_bits=8 goes on with it, "
        f"{removes(head)}",
    }
    bench.quantize(5.5)  # that is there: nothing is begun
    assert left_behind(capsys) == {}
    bench.quantize(6.0)
    assert "quantizing to 6 bits: going on where an earlier run stopped (quant)" in capsys.readouterr().err
    artifacts(bench.config("artifacts.action=prune", f"artifacts.name={head}"), bench.run)
    assert not (bench.folder / "store" / head).exists()


def test_an_interrupted_one_with_other_files_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bench.folder / "my measurement.json"
    file.write_text(json.dumps(measurement(SHAPE)))
    given = f"quant.measurement={file}"
    name = killed(bench, monkeypatch, 4.0, given)
    bench.quantize(5.0)
    assert left_behind(capsys) == {
        name: f"was begun with quant.measurement={file} (now null), quant.bits=4 (now 5); the same command with "
        f"'quant.measurement={file}' quant.bits=4 goes on with it, {removes(name)}"
    }
    file.write_text(json.dumps(measurement(SHAPE), indent=1))
    bench.quantize(4.0, given)
    assert left_behind(capsys) == {name: f"was begun with files, or by a version, that are others now; {removes(name)}"}


def interrupted_at(done: float) -> Any:
    """A progress that stands for a Ctrl-C when so much is done."""
    from contextlib import contextmanager

    @contextmanager
    def progress(run: RunFolder, title: str) -> Iterator[Any]:
        def on_status(status: converter.Status) -> None:
            if status.done >= done:
                raise KeyboardInterrupt

        yield on_status

    return progress


def nothing_runs(*words: str) -> bool:
    """Whether no process has all of these words in its command line, within five seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        if not any(all(word in line for word in words) for line in lines):
            return True
        time.sleep(0.1)
    return False


def test_it_ends_with_its_parent(bench: Bench, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestrator.stages.converter import convert\n"
        f"convert(sys.executable, {exl2.MODULE!r}, ['-i', 'x', '-o', {str(tmp_path)!r}, '-om', 'm'],"
        f" Path({str(tmp_path / 'log')!r}), lambda *_: None)"
    )
    env = os.environ | {"FAKE_FAULT": "sleep", "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{TESTS.parent}"}
    parent = subprocess.Popen([sys.executable, "-c", script], env=env)
    log = tmp_path / "log"
    deadline = time.monotonic() + 20
    while not (log.exists() and "STATUS" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "STATUS" in log.read_text()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert nothing_runs("convert_exl2", str(tmp_path))


def test_without_a_gpu_nothing_is_converted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exl2, "nvml_gpus", lambda: ((), ()))
    with pytest.raises(EngineUnavailableError, match="needs a CUDA GPU"):
        bench.quantize()


def test_unquantized_with_rope_keys_that_it_does_not_read(bench: Bench) -> None:
    chosen = replace(bench.chosen(4.0), method="none", bits=16.0)
    assert exl2.quantize(bench.config(), Model(bench.source), chosen, bench.run).path == bench.source
    config = SHAPE.config() | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    del config["rope_theta"]
    (bench.source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="rope_parameters, which exllamav2 does not read"):
        exl2.quantize(bench.config(), Model(bench.source), chosen, bench.run)


def test_rows_no_longer_than_the_model(bench: Bench) -> None:
    (bench.source / "config.json").write_text(json.dumps(SHAPE.config() | {"max_position_embeddings": 700}))
    bench.quantize()
    assert bench.runs()[0]["ml"] == 640
    with pytest.raises(ConfigError, match="more than the model's 700 positions"):
        bench.quantize(4.0, "quant.calibration.length=1024")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leave_out": "model.layers.1.mlp.up_proj.q_scale"}, r"there is no model\.layers\.1\.mlp\.up_proj\.q_scale"),
        ({"leave_out": "lm_head.q_weight"}, r"there is no lm_head\.q_weight"),
        ({"leave_out": "model.embed_tokens.weight"}, r"wrote no model\.embed_tokens\.weight"),
        ({"signed": {"bits": 5.0}}, "signed exl2 with 5 bits and 6 for the head"),
        ({"signed": {"quant_method": "gptq"}}, "signed gptq"),
        ({"head_bits": 8}, "signed exl2 with 4 bits and 8 for the head"),
    ],
)
def test_the_judge(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = write_headers(tmp_path / "source", SHAPE)
    (source / "tokenizer.json").write_text("{}")
    good = judge_model(write_exl2(tmp_path / "good", SHAPE), open_checkpoint(source), 4.0, 6)
    assert good["tensors"] == 2 * 7 * 5 + 5 + 6
    assert good["measured_head_bits"] > 6
    with pytest.raises(NotWhole, match=message):
        judge_model(write_exl2(tmp_path / "bad", SHAPE, **change), open_checkpoint(source), 4.0, 6)


def test_the_judge_of_files(tmp_path: Path) -> None:
    source = open_checkpoint(write_headers(tmp_path / "source", SHAPE))
    folder = write_exl2(tmp_path / "result", SHAPE)
    file = folder / "output.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(NotWhole, match=r"damaged file: .* is truncated"):
        judge_model(folder, source, 4.0, 6)
    file.rename(folder / "output_temp_1.safetensors")
    with pytest.raises(NotWhole, match="did not finish writing"):
        judge_model(folder, source, 4.0, 6)
    with pytest.raises(NotWhole, match="with shape"):
        judge_model(write_exl2(tmp_path / "other", Llama(layers=2, intermediate=512)), source, 4.0, 6)
    with pytest.raises(NotWhole, match="wrote no measurement"):
        judge_measurement(tmp_path / "nothing.json", source)
    (tmp_path / "half.json").write_text('{"measurement": {')
    with pytest.raises(NotWhole, match="can be read: it is not JSON"):
        judge_measurement(tmp_path / "half.json", source)


def _changed(**of_an_option: Any) -> str:
    """A measurement whose second option of the first MLP, or that option's first linear, says something else."""
    value = measurement(SHAPE)
    options = value["measurement"]["model.layers.0.mlp"]
    total = of_an_option.pop("total_bits", options[1]["total_bits"])
    options[1]["total_bits"] = total
    options[0]["up_proj"] |= of_an_option
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON"),
        ("[" * 200_000, "it is not JSON"),
        ("[]", "no object with measurement and last_module_idx"),
        ('{"measurement": 5, "last_module_idx": 3}', "no object with measurement"),
        (_changed(total_bits=None), r"says of an option of model\.layers\.0\.mlp not how many bits it takes"),
        (_changed(total_bits=math.inf), "not how many bits"),
        (_changed(total_bits="9"), "not how many bits"),
        (_changed(group_size={"2": 0}), r"says something else of model\.layers\.0\.mlp than a measurement"),
        (_changed(bits_prop=[math.inf]), "says something else"),
        (_changed(bits_prop=[math.nan]), "says something else"),
        (_changed(bits_prop=[1, 1]), "says something else"),
        (_changed(scale_bits=math.inf), "says something else"),
        (_changed(bits=["2"]), "says something else"),
    ],
)
def test_measurements_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    source = open_checkpoint(write_headers(tmp_path / "source", SHAPE))
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(NotWhole, match=message):
        check_fits(file, source)


def test_errors_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("earlier\n")
    start = log.stat().st_size
    log.write_text(
        "earlier\n -- Layer\nTraceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory.\n"
        '[STATUS]{"stage": "Measuring", "completion": 0.5}[/STATUS]\n'
    )
    failure = converter.Failure("m", 1, log, start)
    assert failure.last_error() == "torch.OutOfMemoryError: CUDA out of memory."
    assert isinstance(failure.error("wrote nothing"), DoesNotFitError)
    log.write_text("earlier\n ** Error: Corrupted job\n")
    assert converter.Failure("m", 0, log, start).last_error() == "Corrupted job"
    killed = converter.Failure("m", -9, log, start).error("wrote nothing")
    assert "was killed by signal 9 and wrote nothing" in killed.message
    assert "it continues" in killed.hint


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (
            " -- Layer: model.layers.3 (Attention)\n ## Measurement/inference error (2): hidden_states",
            "(NaN) in model.layers.3",
        ),
        (" -- Layer: model.layers.3 (MLP)\n ## Measurement/inference error (1)", "no width that gives back"),
        (" -- Sublayer: model.layers.0.mlp\n ## Measurement/inference error (1)", "in model.layers.0.mlp"),
        (
            " -- Layer: lm_head\n -- Module quantized, calibration perplexity (quant): nan",
            "no numbers (NaN) in lm_head",
        ),
        (" -- Module quantized, rfn_error: inf", "results that are no numbers"),
        ("OverflowError: math range error", "a perplexity beyond any number"),
    ],
)
def test_signs_of_an_overflow(lines: str, found: str) -> None:
    assert found in _Scan().first([" -- Beginning new job", *lines.splitlines()])


def test_a_sign_is_remembered_while_the_log_grows(tmp_path: Path) -> None:
    log, where = tmp_path / "convert.log", tmp_path / "work"
    where.mkdir()
    log.write_text(" -- Module quantized, rfn_error: nan\n")  # of an earlier run
    watch = OverflowWatch(log, where)
    layer = f" -- Layer: model.layers.3 (MLP)\n{'.' * 2**19}\n"  # a sign far from the end, too
    for text, found in (
        (layer, None),
        (" -- Module quantized, rfn_er", None),
        ("ror: nan\n", "results that are no numbers (NaN) in model.layers.3 (MLP)"),
        (
            f"{layer}ValueError: Hessian is not invertible\n",
            "results that are no numbers (NaN) in model.layers.3 (MLP)",
        ),
    ):
        with log.open("a") as file:
            file.write(text)
        watch.read()
        assert seen_overflow(where) == (found and (found, str(log)))
    log.unlink()
    watch.read()


def test_no_sign_of_an_overflow() -> None:
    lines = (
        " -- Layer: model.layers.3 (MLP)\n !! Measurement/inference warning (3): hidden_states\n !! clamping state\n"
        " -- Module quantized, rfn_error: 0.001234\n -- Module quantized, calibration perplexity (quant): 8.1234\n"
        " !! Warning: Applied additional damping\n"
    )
    assert _Scan().first(lines.splitlines()) == ""
