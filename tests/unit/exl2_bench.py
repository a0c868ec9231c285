"""The stage that makes EXL2 models, with a converter of ours in the place of the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from composing import composed, hydra_ready
from exl2_models import write_fake
from small_models import Llama, write_headers

from orchestrator import hardware
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.config import Config
from orchestrator.hardware import GIB, Gpu, Hardware
from orchestrator.pipeline import Model
from orchestrator.plan.exllamav2 import estimate
from orchestrator.plan.types import Ask, Candidate
from orchestrator.runfolder import RunFolder
from orchestrator.stages import exl2, exl2_gpu

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

    def modules(self) -> list[int]:
        """The modules that the converter has worked on, in all runs."""
        return [int(line.removeprefix("module ")) for line in self.log.splitlines() if line.startswith("module ")]

    def runs(self) -> list[dict[str, Any]]:
        """The arguments of each run of the converter."""
        lines = self.log.splitlines()
        return [json.loads(line.removeprefix("arguments ")) for line in lines if line.startswith("arguments ")]


def make_bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """For one test."""
    monkeypatch.setenv("PYTHONPATH", str(write_fake(folder / "fake")))
    monkeypatch.setenv("FAKE_TESTS", str(TESTS))
    monkeypatch.setenv("EXLLAMA_NO_FLASH_ATTN", "1")  # no import of torch in the child
    monkeypatch.setattr(exl2, "require", lambda *_: sys.executable)
    monkeypatch.setattr(exl2, "require_build", lambda *_: None)
    monkeypatch.setattr(exl2_gpu, "host_memory", lambda: (64 * GIB, 60 * GIB))
    see_gpus(monkeypatch, GPU)
    return Bench(folder)


def see_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    """The machine has these GPUs."""
    for module in (exl2, hardware):
        monkeypatch.setattr(module, "nvml_gpus", lambda: (gpus, ()))
