"""What a run took is kept beside the artifacts, and the margins of later plans follow from it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import Done, Orchestrator, read_lines

from orchestrator.calibration import NAME


def kept(done: Done) -> str:
    """The line that says what the plan keeps free: on stdout of a plan, on stderr of a run."""
    assert done.code == 0, done.err
    (line,) = (line for line in (done.out + done.err).splitlines() if line.startswith("kept free: "))
    return line


def test_a_run_says_what_it_keeps_free_and_keeps_what_it_took(shared: Orchestrator, default_run: Done) -> None:
    assert re.fullmatch(r"kept free: \S+ MiB \(\w+ was never measured on this CPU\)", kept(default_run))
    plan, measured = default_run.json("plan.json"), default_run.json("result.json")["measured"]
    line = read_lines(shared.store / NAME)[0]
    (device,) = line["devices"]
    assert [{key: value for key, value in device.items() if key != "comparable"}] == measured["memory"]
    # Eight short answers: a part of the context that was planned.
    assert plan["host"]["weights"] + plan["host"]["runtime"] < device["comparable"] < device["predicted"]
    assert line["ended"] == "well"
    assert (device["device"], device["kind"], device["by"]) == ("cpu", "cpu", "process")
    assert device["predicted"] == plan["host"]["total"]
    assert 100 << 20 < device["measured"] < measured["host_peak_bytes"] == device["own"]
    assert (line["engine"], line["method"], line["bits"]) == (plan["backend"], plan["method"], plan["bits"])
    assert (line["context"], line["in_flight"]) == (plan["max_context"], plan["max_in_flight"])
    assert line["version"]
    assert line["model"]["architecture"] == "LlamaForCausalLM"
    assert str(shared.folder) not in (shared.store / NAME).read_text()


@pytest.mark.slow
def test_the_third_run_changes_the_plan(orchestrator: Orchestrator, shared: Orchestrator, default_run: Done) -> None:
    assert default_run.code == 0
    own = Orchestrator(orchestrator.folder, Path(shutil.copytree(shared.store, orchestrator.folder / "store")))
    record = own.store / NAME
    first = record.read_text().splitlines()[0]
    record.write_text(f"{first}\n{first}\n")
    assert kept(own("task=plan")).endswith(" was measured in 2 runs on this CPU, 3 are needed)")
    assert own("generation.max_tokens=2").code == 0
    assert len(read_lines(record)) == 3
    learned = own("task=plan")
    assert kept(learned).endswith(" was measured in 3 runs on this CPU)")
    plan = learned.json("plan.json")
    assert plan["margin"] == plan["host"]["margin"] >= 64 << 20
    assert plan["margin_source"] == "measured in 3 runs on this CPU"


@pytest.mark.slow
def test_a_record_that_cannot_be_written_costs_a_line_only(orchestrator: Orchestrator, merged: Path) -> None:
    store = orchestrator.folder / "store"
    (store / NAME).mkdir(parents=True)
    own = Orchestrator(orchestrator.folder, store)
    done = own(f"model.path={merged}", "prompts.text=hi", "generation.max_tokens=1", "quant.bits=32")
    assert done.code == 0, done.err
    assert "note: what this run took is not kept for later plans: " in done.err
    assert len(done.answers) == 1
    assert done.json("result.json")["measured"]["memory"]


@pytest.mark.slow
def test_a_chat_is_kept_too(orchestrator: Orchestrator, merged: Path) -> None:
    own = Orchestrator(orchestrator.folder, orchestrator.folder / "store")
    done = own("task=chat", f"model.path={merged}", "quant.bits=32", "generation.max_tokens=1", stdin="hi\n")
    assert done.code == 0, done.err
    assert [line["engine"] for line in read_lines(own.store / NAME)] == ["transformers"]
