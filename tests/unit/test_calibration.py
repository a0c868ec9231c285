"""The record of what runs took, the margins that follow from it, and what they change in a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small_models
from composing import composed
from small_models import LLAMA_7B, LLAMA_70B

from orchestrator.backends.vllm_rules import cuda_runtime, utilization
from orchestrator.calibration import LINES, NAME, OUT_OF_MEMORY, TAIL_BYTES, WELL, append, margins, read
from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import ModelSpec, model_spec
from orchestrator.engine.in_flight import Held
from orchestrator.hardware import GIB, MIB, Gpu, Hardware
from orchestrator.plan.huggingface import at_use
from orchestrator.plan.planner import make_plan
from orchestrator.plan.types import Candidate
from orchestrator.report.tables import margin_line

pytestmark = pytest.mark.usefixtures("hydra", "every_engine")
CARD = "NVIDIA H100 80GB HBM3"


def machine(*gib: float, host: float = 64) -> Hardware:
    gpus = tuple(Gpu(i, CARD, int(g * GIB), int(g * GIB), (9, 0)) for i, g in enumerate(gib))
    return Hardware("auto", gpus, int(host * GIB), int(host * GIB), 8)


def line(*missed: int, engine: str = "bitsandbytes", kind: str = CARD, together: bool = False) -> dict[str, Any]:
    """A run on so many devices, each of which took so many MiB more than was planned."""
    devices = [
        {"kind": kind, "predicted": 30 * GIB, "comparable": 20 * GIB, "measured": 20 * GIB + m * MIB} for m in missed
    ]
    return {"engine": engine, "ended": WELL, "together": together, "devices": devices}


def old_line(missed: int, engine: str = "bitsandbytes") -> dict[str, Any]:
    """The same as it was before it was known what had been held."""
    devices = [{"kind": CARD, "predicted": 20 * GIB, "measured": 20 * GIB + missed * MIB}]
    return {"engine": engine, "together": False, "devices": devices}


def full_line(margin: int, beyond: int | None = None, engine: str = "bitsandbytes") -> dict[str, Any]:
    """A run that ran out of memory with so many MiB kept free, and so many held beyond its plan."""
    measured = None if beyond is None else 20 * GIB + beyond * MIB
    device = {"kind": CARD, "predicted": 20 * GIB, "margin": margin * MIB, "measured": measured}
    return {"engine": engine, "ended": OUT_OF_MEMORY, "together": False, "devices": [device]}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return model_spec(open_checkpoint(small_models.write_headers(tmp_path_factory.mktemp("7b"), LLAMA_7B)))


def planned(root: Path, spec: ModelSpec, hardware: Hardware, *argv: str) -> Candidate:
    return make_plan(composed(f"paths.artifacts={root}", *argv), spec, hardware).chosen


# The margin


@pytest.mark.parametrize(("gib", "kept"), [(80, 0.02 * 80 * GIB), (24, 0.02 * 24 * GIB), (12, 300 * MIB), (1, GIB / 4)])
def test_where_nothing_was_measured_the_margin_is_careful(tmp_path: Path, gib: float, kept: float) -> None:
    found = margins(tmp_path, machine(gib), "vllm")["cuda:0"]
    assert (found.bytes, found.source) == (int(kept), "never measured on this card")


def test_a_host_keeps_a_part_of_what_it_has(tmp_path: Path) -> None:
    assert margins(tmp_path, machine(host=2), "vllm")["cpu"].bytes == int(0.02 * 2 * GIB)
    assert margins(tmp_path, machine(host=2), "vllm")["cpu"].source == "never measured on this CPU"


def test_from_the_third_run_on_the_margin_is_the_worst_miss(tmp_path: Path) -> None:
    found = []
    for missed in (-200, 100, 90, 400, 30):
        append(tmp_path, line(missed))
        found.append(margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"])
    unmeasured = int(0.02 * 80 * GIB)
    assert [m.bytes for m in found] == [unmeasured] * 2 + [int(110 * MIB), int(440 * MIB), int(440 * MIB)]
    assert found[0].source == "measured in 1 run on this card, 3 are needed"
    assert found[4].source == "measured in 5 runs on this card"


def test_it_is_never_nothing_and_never_the_most_of_a_card(tmp_path: Path) -> None:
    for missed in (-500, -20, 10):
        append(tmp_path, line(missed, engine="vllm"))
        append(tmp_path, line(60_000, engine="exllamav2"))
    assert margins(tmp_path, machine(80), "vllm")["cuda:0"].bytes == int(64 * MIB * 1.1)
    assert margins(tmp_path, machine(80), "exllamav2")["cuda:0"].bytes == 20 * GIB


def test_a_margin_can_be_asked_for(tmp_path: Path, spec: ModelSpec) -> None:
    none, much = (planned(tmp_path, spec, machine(24), f"hardware.margin_gib={gib}") for gib in (0, 8))
    assert (none.margin, much.margin) == (0, 8 * GIB)
    assert margin_line(none) == "kept free: 0 B a GPU (hardware.margin_gib)"
    assert much.gpus[0].capacity == 16 * GIB


def test_no_margin_is_more_than_is_free(tmp_path: Path, spec: ModelSpec) -> None:
    """Others may hold most of a card whose own size leaves room for it."""
    busy = planned(tmp_path, spec, machine(8), "hardware.margin_gib=9")
    assert (busy.gpus[0].capacity, busy.margin, busy.fits) == (0, 8 * GIB, False)
    assert busy.reasons[-1] == "it would without the 8.00 GiB kept free (hardware.margin_gib)"


def test_another_engine_or_another_card_is_not_learned_from(tmp_path: Path) -> None:
    for _ in range(3):
        append(tmp_path, line(100))
        append(tmp_path, line(100, engine="vllm", kind="cpu"))
    careful = int(0.02 * 80 * GIB)
    assert margins(tmp_path, machine(80), "vllm")["cuda:0"].bytes == careful
    other = replace(machine(80), gpus=(replace(machine(80).gpus[0], name="NVIDIA L4"),))
    assert margins(tmp_path, other, "bitsandbytes")["cuda:0"].bytes == careful
    assert margins(tmp_path, machine(host=8), "vllm")["cpu"].bytes == int(110 * MIB)
    # Beside a GPU a host holds something else than without one.
    assert margins(tmp_path, machine(80, host=8), "vllm")["cpu"].source == "never measured on this CPU"


def test_of_several_cards_the_worst_counts_and_of_a_group_the_mean(tmp_path: Path) -> None:
    for _ in range(3):
        append(tmp_path, line(300, 100))
        append(tmp_path, line(900, -500, engine="exllamav2", together=True))  # the first took what the second lacks
    assert margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"].bytes == int(330 * MIB)
    assert margins(tmp_path, machine(80), "exllamav2")["cuda:0"].bytes == int(220 * MIB)


def test_an_old_line_lowers_nothing_where_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    for _ in range(3):
        append(tmp_path, old_line(-5000))
        append(tmp_path, old_line(-5000, engine="exllamav2"))
    found = margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"]
    assert (found.bytes, found.source) == (int(0.02 * 80 * GIB), "never measured on this card")
    assert margins(tmp_path, machine(80), "exllamav2")["cuda:0"].bytes == int(64 * MIB * 1.1)
    for _ in range(3):
        append(tmp_path, old_line(3000))
    assert margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"].bytes == int(3300 * MIB)


def test_a_run_that_ran_out_of_memory_counts_at_once(tmp_path: Path) -> None:
    append(tmp_path, full_line(1638))
    found = margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"]
    assert found.bytes == 2 * 1638 * MIB
    assert found.source == "never measured on this card; out of memory there in 1 run"
    for _ in range(3):
        append(tmp_path, line(100))
    append(tmp_path, full_line(10))
    found = margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"]
    assert found.bytes == 2 * 1638 * MIB
    assert found.source == "measured in 3 runs on this card; out of memory there in 2 runs"
    assert margins(tmp_path, machine(80), "transformers")["cuda:0"].source == "never measured on this card"


def test_each_time_out_of_memory_keeps_more_and_never_the_most_of_a_card(tmp_path: Path) -> None:
    seen = [margins(tmp_path, machine(24), "vllm")["cuda:0"].bytes]
    for _ in range(6):
        append(tmp_path, full_line(seen[-1] // MIB, engine="vllm"))
        seen.append(margins(tmp_path, machine(24), "vllm")["cuda:0"].bytes)
    assert all(later > before or later == 6 * GIB for before, later in pairwise(seen))
    assert seen[-1] == 6 * GIB


def test_what_was_held_beyond_the_plan_is_kept_after_an_end_without_memory(tmp_path: Path) -> None:
    append(tmp_path, full_line(0, 5000))
    assert margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"].bytes == 5000 * MIB
    append(tmp_path, full_line(0, -5000, engine="vllm"))  # and nothing was kept: what nobody has measured is
    assert margins(tmp_path, machine(80), "vllm")["cuda:0"].bytes == int(0.02 * 80 * GIB)


# The record


BROKEN = [
    "{",
    "[1, 2]",
    '"text"',
    "null",
    '{"engine": "vllm"}',
    '{"engine": 5, "together": false, "devices": [{"kind": "x", "predicted": 1, "measured": 2}]}',
    *(
        json.dumps({"engine": "vllm", "together": False, "devices": [{"kind": CARD} | sizes]})
        for sizes in (
            {"predicted": 1, "measured": -5},
            {"predicted": 1, "measured": 2**60},
            {"predicted": True, "measured": 5},
            {"predicted": 1.5, "measured": 5},
            {"predicted": "1", "measured": 5},
            {"predicted": 1, "measured": None},
        )
    ),
    '{"engine": "vllm", "together": false, "devices": [{"kind": "x", "predicted": NaN, "measured": 1e999}]}',
    json.dumps(line(100) | {"devices": [{"kind": CARD, "predicted": 5, "measured": 5, "comparable": None}]}),
    json.dumps(full_line(5) | {"devices": [{"kind": CARD, "predicted": 5, "measured": None, "margin": "5"}]}),
    json.dumps(full_line(5) | {"devices": [{"kind": CARD, "predicted": 5, "measured": None}]}),
    "[" * 100_000,
    "\x00\xff not UTF-8",
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_line_that_is_no_run_is_skipped_and_said(tmp_path: Path, text: str) -> None:
    for _ in range(3):
        append(tmp_path, line(100))
    with (tmp_path / NAME).open("ab") as file:
        file.write(text.encode("latin-1") + b"\n")
    found = margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"]
    assert found.bytes == int(110 * MIB)
    assert found.source == f"measured in 3 runs on this card; 1 line of {NAME} cannot be read"


def test_a_half_line_at_the_end_costs_no_other(tmp_path: Path) -> None:
    append(tmp_path, line(1))
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes() + b'{"engine": "vl')
    append(tmp_path, line(2))
    history = read(tmp_path)
    assert history.missed == {("bitsandbytes", CARD): (MIB, 2 * MIB)}
    assert history.skipped == 1


def test_of_a_long_record_the_end_is_read(tmp_path: Path) -> None:
    lines = [json.dumps(line(1000 if i < 2000 else 100)) for i in range(2000 + LINES)]
    (tmp_path / NAME).write_text("\n".join(lines) + "\n")
    assert read(tmp_path).missed == {("bitsandbytes", CARD): (100 * MIB,) * LINES}
    padded = json.dumps(line(7) | {"padding": "x" * (TAIL_BYTES // 3)})
    (tmp_path / NAME).write_text(f"{padded}\n" * 9)
    assert read(tmp_path).missed == {("bitsandbytes", CARD): (7 * MIB,) * 2}
    assert read(tmp_path).skipped == 0


def test_without_a_record_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    for root in (tmp_path, tmp_path / "nowhere", Path("/dev/null")):
        assert read(root).missed == {}


APPENDS = """
import sys
from pathlib import Path
from orchestrator.calibration import append
for i in range(100):
    append(Path(sys.argv[1]), {"engine": "vllm", "together": False, "who": sys.argv[2] * 5000,
        "devices": [{"kind": "x", "predicted": 1, "measured": 1 + i}]})
"""


def test_runs_that_end_together_lose_no_line(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", APPENDS, str(tmp_path / "new" / "store"), who]) for who in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    text = (tmp_path / "new" / "store" / NAME).read_text()
    assert sorted(json.loads(row)["who"][0] for row in text.splitlines()) == ["a"] * 100 + ["b"] * 100 + ["c"] * 100


def test_what_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        append(tmp_path, line(1))


# The plan


@pytest.mark.parametrize("argv", [["backend=bitsandbytes", "quant.bits=4"], ["backend=transformers"]])
def test_a_run_is_compared_with_the_plan_of_what_it_held(tmp_path: Path, spec: ModelSpec, argv: list[str]) -> None:
    chosen = planned(tmp_path, spec, machine(80), *argv, "model.max_context=4096", "run.in_flight=4")
    (gpu,) = chosen.gpus
    held = Held(4, 4 * 1000, 4 * 1024)
    quarter = planned(tmp_path, spec, machine(80), *argv, "model.max_context=1000", "run.in_flight=4").gpus[0]
    assert at_use(spec, chosen, held) == {"cuda:0": quarter.total + (gpu.kv_cache // 4 - quarter.kv_cache)}
    assert at_use(spec, chosen, Held(4, 4 * 4096, 4 * 4096)) == {"cuda:0": gpu.total}
    assert at_use(spec, chosen, Held(9, 9 * 4096, 9 * 4096)) == {"cuda:0": gpu.total}  # never more than the plan
    nothing = at_use(spec, chosen, Held())["cuda:0"]
    assert gpu.weights + gpu.runtime <= nothing < gpu.total - gpu.kv_cache


def test_short_runs_do_not_make_room(tmp_path: Path, spec: ModelSpec) -> None:
    argv = ("backend=bitsandbytes", "quant.bits=4")
    chosen = planned(tmp_path, spec, machine(24), *argv)
    (gpu,) = chosen.gpus
    used = at_use(spec, chosen, Held(1, 100, 200))["cuda:0"]
    for _ in range(3):  # each took 500 MiB more than its share of the plan, and far less than the plan
        device = {"kind": CARD, "predicted": gpu.total, "measured": used + 500 * MIB, "comparable": used}
        append(tmp_path, {"engine": "bitsandbytes", "together": False, "devices": [device]})
    assert used + 500 * MIB < gpu.total
    assert planned(tmp_path, spec, machine(24), *argv).margin == int(550 * MIB)


@pytest.mark.parametrize("argv", [["backend=bitsandbytes", "quant.bits=4"], ["backend=exllamav2", "quant.bits=4"]])
def test_a_plan_leaves_the_margin_and_lets_the_engine_use_it(tmp_path: Path, spec: ModelSpec, argv: list[str]) -> None:
    chosen = planned(tmp_path, spec, machine(24), *argv)
    kept = int(0.02 * 24 * GIB)
    assert chosen.fits
    assert (chosen.margin, chosen.gpus[0].margin, chosen.gpus[0].capacity) == (kept, kept, 24 * GIB - kept)
    assert chosen.limits == {"cuda:0": 24 * GIB}
    assert chosen.host.capacity == 64 * GIB - int(0.02 * 64 * GIB)
    assert chosen.to_json()["margin"] == chosen.to_json()["gpus"][0]["margin"] == kept
    assert chosen.to_json()["margin_source"] == "never measured on this card"


@pytest.mark.parametrize("gib", [17, 24, 80])
def test_vllm_leaves_the_margin_to_what_it_does_not_count(tmp_path: Path, spec: ModelSpec, gib: float) -> None:
    chosen = planned(tmp_path, spec, machine(gib), "backend=vllm", "quant.bits=16")
    assert chosen.fits
    gpu = chosen.gpus[0]
    assert gpu.total == gpu.capacity == chosen.limits["cuda:0"] == int(gib * GIB) - gpu.margin
    runtime = cuda_runtime(1, 1, chosen.max_in_flight, {})
    asked = utilization(chosen.limits["cuda:0"], int(gib * GIB), runtime) * gib * GIB
    assert asked <= gib * GIB - gpu.margin - runtime  # what it wants free when it starts


def test_the_third_run_makes_room(tmp_path: Path, spec: ModelSpec) -> None:
    seen = []
    for _ in range(4):
        seen.append(planned(tmp_path, spec, machine(80), "backend=bitsandbytes", "quant.bits=4"))
        append(tmp_path, line(-100, 20))
    assert [margin_line(c) for c in seen[::3]] == [
        "kept free: 1.60 GiB a GPU (bitsandbytes was never measured on this card)",
        "kept free: 70.40 MiB a GPU (bitsandbytes was measured in 3 runs on this card)",
    ]
    assert seen[3].gpus[0].capacity > seen[2].gpus[0].capacity


def test_unequal_cards_keep_a_part_each(tmp_path: Path) -> None:
    spec = model_spec(open_checkpoint(small_models.write_headers(tmp_path / "70b", LLAMA_70B)))
    chosen = planned(tmp_path, spec, machine(24, 80), "backend=bitsandbytes", "quant.bits=4", "model.max_context=1024")
    assert [gpu.margin for gpu in chosen.gpus] == [int(0.02 * 24 * GIB), int(0.02 * 80 * GIB)]
    assert margin_line(chosen).startswith("kept free: up to 1.60 GiB a GPU (")


def test_where_only_the_margin_is_missing_that_is_said(tmp_path: Path, spec: ModelSpec) -> None:
    argv = ("backend=transformers", "quant.bits=16", "model.max_context=512", "run.in_flight=1")
    need = planned(tmp_path, spec, machine(24), *argv).gpus[0].total
    short = planned(tmp_path, spec, machine((need + 10 * MIB) / GIB), *argv)
    assert not short.fits
    assert short.reasons[-1] == "it would without the 0.29 GiB kept free (transformers was never measured on this card)"
    shorter = planned(tmp_path, spec, machine((need - 10 * MIB) / GIB), *argv)
    assert not shorter.fits
    assert not any("kept free" in reason for reason in shorter.reasons)


def test_on_a_cpu_it_is_of_the_host(tmp_path: Path, spec: ModelSpec) -> None:
    chosen = planned(tmp_path, spec, machine(host=32), "backend=bitsandbytes", "quant.bits=4")
    assert margin_line(chosen) == "kept free: 655.36 MiB (bitsandbytes was never measured on this CPU)"
    assert chosen.host.capacity == 32 * GIB - chosen.margin


@pytest.mark.parametrize(
    "damage", [{"ended": "???"}, {"ended": None}, {"together": "x"}, {"devices": []}, {"devices": {}}]
)
def test_what_is_no_record_of_a_run_is_skipped_and_counted(tmp_path: Path, damage: dict[str, Any]) -> None:
    for _ in range(3):
        append(tmp_path, line(100) | damage)
    found = read(tmp_path)
    assert (found.skipped, dict(found.missed), dict(found.full)) == (3, {}, {})


def test_empty_lines_are_none(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("\n" + "\n\n".join(json.dumps(line(100)) for _ in range(3)) + "\n  \n")
    found = read(tmp_path)
    assert (found.skipped, len(found.missed["bitsandbytes", CARD])) == (0, 3)


def test_more_than_the_device_is_nothing_that_was_measured(tmp_path: Path) -> None:
    for missed in (100, 200, 150, 2**29):
        append(tmp_path, line(missed))
    append(tmp_path, full_line(2**28))
    kept = margins(tmp_path, machine(80), "bitsandbytes")["cuda:0"]
    assert (kept.bytes, kept.source) == (int(200 * MIB * 1.1), "measured in 3 runs on this card")


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    assert dict(read(tmp_path).missed) == {}
