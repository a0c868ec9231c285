"""An engine that runs out of memory: how the run ends, what is kept of it, and what the next plan does."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from asking import FAKE

from orchestrator.backends.table import BACKENDS
from orchestrator.calibration import NAME
from orchestrator.config import BackendConfig, Config, HardwareConfig, ModelConfig, PathsConfig, QuantConfig
from orchestrator.errors import OutOfMemoryError
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import look, open_session


def test_a_run_that_ran_out_of_memory_makes_the_next_plan_keep_more(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "transformers", replace(BACKENDS["transformers"], adapter=FAKE))
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    config = Config(
        backend=BackendConfig(name="transformers", engine_args={"fault": "full"}),
        model=ModelConfig(path=str(checkpoint)),
        quant=QuantConfig(bits=32.0),
        hardware=HardwareConfig(profile="cpu"),
        paths=PathsConfig(artifacts=str(tmp_path / "store")),
    )
    (tmp_path / "run").mkdir()
    before = look(config, planning=False)
    with (
        pytest.raises(OutOfMemoryError, match=r"transformers engine stopped while loading: .*out of memory") as caught,
        open_session(before, RunFolder(tmp_path / "run")),
    ):
        pytest.fail("it has loaded")
    assert caught.value.hint.startswith("Ask for less")
    assert "note: the next plan of transformers keeps more free, and may fit: run it again" in capsys.readouterr().err
    line = json.loads((tmp_path / "store" / NAME).read_text())
    (device,) = line["devices"]
    kept = before.plan.chosen.margin
    assert (line["engine"], line["ended"], line["bits"]) == ("transformers", "out of memory", 32)
    assert (device["device"], device["margin"]) == ("cpu", kept)
    assert device["predicted"] == before.plan.chosen.host.total
    after = look(config, planning=False).plan.chosen
    assert after.margin >= 2 * kept
    assert after.margin_source == "never measured on this CPU; out of memory there in 1 run"
