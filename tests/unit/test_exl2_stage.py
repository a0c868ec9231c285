"""The conversion to EXL2 against a converter of ours, for faults that the real one does not have on demand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from composing import composed, hydra_ready
from exl2_models import measurement, write_exl2, write_fake
from small_models import Llama, write_headers

from orchestrator import hardware
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.config import Config
from orchestrator.errors import ConfigError, DoesNotFitError, EngineUnavailableError, StageError
from orchestrator.hardware import GIB, Gpu, Hardware
from orchestrator.pipeline import Model, Source, disk_needs
from orchestrator.plan.exllamav2 import estimate
from orchestrator.plan.types import Ask, Candidate
from orchestrator.runfolder import RunFolder
from orchestrator.stages import converter, exl2
from orchestrator.stages.exl2_result import NotWhole, judge_measurement, judge_model

SHAPE = Llama(layers=2)
GPU = Gpu(0, "a card", 24 * GIB, 23 * GIB, (8, 6))
TESTS = Path(__file__).parents[1]


class Bench:
    """A model, a store, a run folder, and the fake converter in the place of the real one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = write_headers(folder / "model", SHAPE)
        (self.source / "tokenizer.json").write_text("{}")
        (self.source / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(SHAPE.tensors(), "model.safetensors")})
        )
        (folder / "run").mkdir()
        self.run = RunFolder(folder / "run")

    def quantize(self, bits: float = 4.0, *options: str) -> Model:
        return exl2.quantize(self.config(*options), Model(self.source), self.chosen(bits), self.run)

    def config(self, *options: str) -> Config:
        with hydra_ready():
            return composed("backend=exllamav2", f"paths.artifacts={self.folder / 'store'}", *options)

    def chosen(self, bits: float) -> Candidate:
        spec = model_spec(open_checkpoint(self.source))
        ask = Ask("exllamav2", "exl2", bits, "float16", False, None, 512, 1)
        return estimate(spec, Hardware("auto", (GPU,), 64 * GIB, 64 * GIB, 8), ask)

    @property
    def log(self) -> str:
        return (self.run.path / "convert.log").read_text()

    def runs(self) -> list[dict[str, Any]]:
        """The arguments of each run of the converter."""
        lines = self.log.splitlines()
        return [json.loads(line.removeprefix("arguments ")) for line in lines if line.startswith("arguments ")]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("PYTHONPATH", str(write_fake(tmp_path / "fake")))
    monkeypatch.setenv("FAKE_TESTS", str(TESTS))
    monkeypatch.setenv("EXLLAMA_NO_FLASH_ATTN", "1")  # no import of torch in the child
    monkeypatch.setattr(exl2, "require", lambda *_: sys.executable)
    for module in (exl2, hardware):
        monkeypatch.setattr(module, "nvml_gpus", lambda: ((GPU,), ()))
    return Bench(tmp_path)


def test_a_model_and_its_measurement(bench: Bench) -> None:
    model = bench.quantize()
    assert [a.manifest["stage"] for a in model.artifacts] == ["measurement", "exl2"]
    assert model.built == tuple(a.name for a in model.artifacts)
    assert sorted(p.name for p in model.path.iterdir()) == [
        *("config.json", "manifest.json", "output.safetensors", "tokenizer.json"),
    ]
    report = model.artifacts[1].manifest["report"]
    assert report["bits"] == 4.0
    assert report["measured_bits"] == pytest.approx(4.2, abs=0.3)  # of so small matrices, scales are a large part
    measuring, quantizing = bench.runs()
    assert measuring["om"].endswith("/measurement.json")
    assert measuring["cf"] is None
    assert quantizing["m"] == str(model.artifacts[0].path / "measurement.json")
    assert (quantizing["b"], quantizing["hb"], quantizing["l"]) == ("4.0", "6", "2048")
    status = json.loads((bench.run.path / "status.json").read_text())
    assert status["stage"] == "Quantizing"


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
    file.write_text(json.dumps(measurement(Llama(layers=1))))
    with pytest.raises(ConfigError, match=r"measured nothing of 2 of 4 blocks, the first is model\.layers\.1\.mlp"):
        bench.quantize(6.0, f"quant.measurement={file}")


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


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("nothing", StageError, "ended with code 0 and wrote no measurement; its last error: Error: 7 is not a sup"),
        ("raise", StageError, "ended with code 1 and wrote no measurement; its last error: ValueError: Hessian is not"),
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


def test_a_model_that_is_not_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "norm")
    with pytest.raises(StageError, match=r"and wrote no model\.norm\.weight"):
        bench.quantize()
    # Its job says that it is finished: it is begun anew, and not believed for ever.
    monkeypatch.delenv("FAKE_FAULT")
    assert bench.quantize().path.name.startswith("exl2-")


@pytest.mark.parametrize(
    ("damage", "resumed"),
    [(None, True), ('{"in_dir": ', False), ({"invalid": True}, False), ({"in_dir": "/elsewhere"}, False)],
)
def test_one_that_is_interrupted_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, damage: str | dict[str, Any] | None, resumed: bool
) -> None:
    monkeypatch.setenv("FAKE_FAULT", "sleep")
    monkeypatch.setattr(exl2, "_progress", interrupted_at(0.5))
    with pytest.raises(KeyboardInterrupt):
        bench.quantize()
    assert nothing_runs("convert_exl2", str(bench.folder))
    (job,) = (bench.folder / "store").glob("measurement-*.partial/work/job_new.json")
    if isinstance(damage, str):  # killed while it was written
        job.write_text(damage)
    elif damage is not None:
        job.write_text(json.dumps(json.loads(job.read_text()) | damage))
    monkeypatch.setattr(exl2, "_progress", interrupted_at(2))
    monkeypatch.delenv("FAKE_FAULT")
    assert len(bench.quantize().built) == 2
    assert (" -- Resuming job quant" in bench.log) is resumed


def interrupted_at(done: float) -> Any:
    """A progress that stands for a Ctrl-C when so much is done."""
    from contextlib import contextmanager

    @contextmanager
    def progress(run: RunFolder, title: str) -> Iterator[Any]:
        def on_status(stage: str, now: float) -> None:
            if now >= done:
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
    assert bench.runs()[0]["ml"] == "640"
    with pytest.raises(ConfigError, match="more than the model's 700 positions"):
        bench.quantize(4.0, "quant.calibration.length=1024")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leave_out": "model.layers.1.mlp.up_proj.q_scale"}, r"wrote no model\.layers\.1\.mlp\.up_proj\.q_scale"),
        ({"leave_out": "lm_head.q_weight"}, r"wrote no lm_head\.q_weight"),
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
    with pytest.raises(NotWhole, match="cannot be read"):
        judge_measurement(tmp_path / "half.json", source)


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
