"""What a person sees on a terminal of 80 columns: whole cells, one line a row, a bar that stays on its line."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_models
from rich.console import Console, RenderableType

from orchestrator.checkpoint.folder import open_checkpoint
from orchestrator.checkpoint.spec import model_spec
from orchestrator.config import Config
from orchestrator.hardware import detect
from orchestrator.plan.planner import make_plan
from orchestrator.plan.types import Change, Plan
from orchestrator.report import console as console_module
from orchestrator.report import merge as merge_report
from orchestrator.report.console import console, size, span, steps
from orchestrator.report.plan import BAR as BAR_CELLS
from orchestrator.report.plan import bars, candidates_table, changes_table, legend
from orchestrator.report.tables import fitting, hardware_line, plan_table, short, table

ROOT = Path(__file__).parents[2]
BAR = """
import time
from orchestrator.report.console import progress, steps

with progress("converting") as show:
    for i in range(4):
        show(i * 40_000_000_000, 140_000_000_000, f"model.layers.{i}.self_attn.q_proj.weight[{i}]")
        time.sleep(0.15)
with steps("measuring") as show:
    for i in range(4):
        show(i / 4, f"the sensitivity of layer {i} of a model with a name that is long and has blanks", "", None)
        time.sleep(0.15)
with steps("quantizing to 4.65 bits") as show:
    for i in range(4):
        show(i / 4, "Quantizing", f"model.layers.{i}.a_name_that_is_longer_than_those (Attention)", (4 - i) * 2000.0)
        time.sleep(0.15)
"""


def lines(table: RenderableType, width: int = 80) -> list[str]:
    out = StringIO()
    Console(file=out, width=width).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    model = small_models.write_headers(tmp_path_factory.mktemp("plan") / "70b", small_models.LLAMA_70B)
    config = Config()
    config.hardware.profile = "4x24gb"
    config.hardware.cards, config.hardware.memory_gib = 4, 24
    spec = model_spec(open_checkpoint(model))
    return make_plan(config, spec, detect(config.hardware, planning=True))


def test_a_plan_has_a_line_a_device(plan: Plan) -> None:
    chosen = plan.chosen
    title, head, _, *rows = lines(plan_table(chosen))
    assert "Plan: " in title
    assert re.split(r"\s{2,}", head) == [
        "device",
        *["weights", "KV cache", "scratch", "runtime", "total", "free", "left"],
    ]
    assert len(rows) == len(chosen.devices)
    for row, device in zip(rows, chosen.devices, strict=True):
        name, *cells = re.split(r"\s{2,}", row)
        assert name == device.device
        assert len(cells) == 7
        assert all(re.fullmatch(r"-?\d+(\.\d)? [KMGT]?i?B", cell) for cell in cells)


def test_candidates_have_a_line_each(plan: Plan) -> None:
    _, head, _, *rows = lines(candidates_table(plan))
    assert head.split() == ["engine", "fits", "over", "weights", "cache", "scratch", "left", "context"]
    assert len(rows) == len(plan.candidates) > 3
    assert [text[0] for text in legend(plan)] == ["G", "+"]
    for row, candidate in zip(rows, plan.candidates, strict=True):
        assert row.startswith(candidate.backend + "+" * bool(candidate.needs))
        assert re.search(r" (yes|no|host|disk) +(TP \d|\d GPUs|cuda:\d|cpu) ", row)
        assert row.split()[-1] == (str(candidate.largest_context) if candidate.fits else "-")
        assert float(row.split()[-2]) == pytest.approx(candidate.fullest.left / 2**30, abs=0.06)


@pytest.mark.parametrize("width", [16, 24, 40, 52])
def test_on_a_narrow_terminal_a_table_is_a_list_with_every_number_whole(plan: Plan, width: int) -> None:
    for made in (candidates_table(plan), plan_table(plan.chosen)):
        _, _, _, *rows = lines(made, 200)
        shown = lines(fitting(width, made), width)
        words = [word.rstrip(",") for line in shown for word in line.split()]
        assert all(len(line) <= width and "\u2026" not in line for line in shown)
        numbers = [word for row in rows for word in row.split() if re.fullmatch(r"-?[\d.]+", word)]
        assert [word for word in words if word in numbers] == numbers


def test_a_row_of_a_list_is_its_name_and_below_it_what_it_has() -> None:
    made = table("A title", "engine", "", "fits", "weights", "context", left=3)
    made.add_row("exllamav2*", "EXL2 4", "yes", "32.1", "4096")
    made.add_row("one\ntwo", "", "no", "12.5", "-")
    assert lines(fitting(27, made), 27) == [
        "A title",
        "exllamav2* EXL2 4",
        "  fits yes, weights 32.1,",
        "  context 4096",
        "one",
        "two",
        "  fits no, weights 12.5",
    ]
    assert lines(fitting(80, made), 80)[3].split() == ["exllamav2*", "EXL2", "4", "yes", "32.1", "4096"]


@pytest.mark.parametrize("width", range(34, 60))
def test_a_folded_column_is_folded_between_words(width: int) -> None:
    made = table("", "change", "gives up", "then", "GiB", left=3, folded=("gives up", "then"))
    made.add_row("a=1", "113.52 GiB on disk: at most 0.012 tokens/s", "transformers 16 bit", "22.91")
    text = " ".join(lines(fitting(width, made), width))
    assert {"113.52", "0.012", "tokens/s", "transformers", "22.91"} <= set(re.split(r"[\s,]+", text))


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("0", 110), ("wide", 110), ("", 110)])
def test_columns_is_the_width_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert console(StringIO()).width == width


def test_a_terminal_of_no_columns_is_one_of_80(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs that run others in a terminal of their own say so."""
    monkeypatch.setenv("COLUMNS", "0")
    out = StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    assert console(out).width == 80


def test_a_bar_for_each_gpu_is_as_long_as_what_it_holds(plan: Plan) -> None:
    *rows, shades = [line.plain for line in bars(plan.chosen)]
    assert shades.split()[1::2][0] == "weights"
    assert len(rows) == len(plan.chosen.gpus)
    for row, device in zip(rows, plan.chosen.gpus, strict=True):
        assert row.startswith(device.device)
        assert len(row) <= 80
        assert row.count("\u2588") == pytest.approx(BAR_CELLS * device.weights / device.capacity, abs=1)
        assert row.count("\u00b7") == pytest.approx(BAR_CELLS * device.left / device.capacity, abs=1)
        assert row.endswith(f"{size(device.total)} of {size(device.capacity)}")


def test_bars_where_there_is_ascii_only(plan: Plan) -> None:
    shaded, plain = ([line.plain for line in bars(plan.chosen, ascii_only=only)] for only in (False, True))
    assert all(line.isascii() for line in plain)
    assert [line.count("#") for line in plain] == [line.count("\u2588") for line in shaded]


def test_what_to_change_has_a_line_each(plan: Plan) -> None:
    less = replace(plan.chosen, backend="exllamav2", method="exl2", bits=4.65)
    changes = (
        Change(("cache.bits=4",), "", "a little precision of the cache", less),
        Change((), "2 more such cards (4 in all)", "another card", plan.chosen),
    )
    text = "\n".join(lines(changes_table(replace(plan, changes=changes)), 120))
    assert re.search(r"cache\.bits=4 +a little.* exllamav2 EXL2 4\.65 +\d", text)
    assert "2 more such cards" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_whole_plan_is_whole_on_any_terminal(plan: Plan, width: int) -> None:
    offload = ("backend=transformers", "quant.bits=16", "offload.folder=/path")
    costs = "113.52 GiB on disk: at most 0.012 tokens/s"
    changes = (
        Change(offload, "", costs, plan.chosen),
        Change((), "2 more such cards (4 in all)", "money", plan.chosen),
    )
    unfit = replace(plan, chosen=replace(plan.chosen, fits=False), changes=changes)
    made = [
        (plan_table(unfit.chosen), plan_table(unfit.chosen, narrow=True)),
        (candidates_table(unfit), candidates_table(unfit, narrow=True)),
        (changes_table(unfit), changes_table(unfit, narrow=True)),
    ]
    shown = [lines(fitting(width, *versions), width) for versions in made]
    assert all(len(line) <= width and "\u2026" not in line for table in shown for line in table)
    assert shown[0][0].startswith("Does not fit: bitsandbytes int8")
    assert shown[1][0] == "What could run it with more memory, nearest first"
    for setting in (*offload, "2 more such cards"):
        assert any(setting in line for line in shown[2])
    assert all(len(line.plain) <= width for line in bars(plan.chosen, width))


def test_a_machine_is_said_in_plain_words(plan: Plan) -> None:
    hardware = plan.hardware
    assert hardware is not None
    assert hardware_line(hardware).startswith("4 x 24 GiB cards with 23.56 GiB free each; ")
    gpu = hardware.gpus[0]
    assert hardware_line(replace(hardware, gpus=(gpu,))).startswith("1 x 24 GiB card with 23.56 GiB free; ")
    real = tuple(replace(gpu, name="NVIDIA L4", free=free << 30) for free in (20, 20, 9))
    said = "2 x NVIDIA L4 with 20.00 GiB free each, 1 x NVIDIA L4 with 9.00 GiB free; "
    assert hardware_line(replace(hardware, gpus=real)).startswith(said)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (4.12 * 2**20, "4.1 MiB"), (99.96 * 2**30, "100 GiB"), (-700 * 2**20, "-700 MiB")],
)
def test_bytes_in_a_column_are_short(count: float, text: str) -> None:
    assert short(count) == text


@pytest.mark.parametrize("power", range(50))
def test_bytes_in_a_column_have_eight_characters_at_most(power: int) -> None:
    assert all(len(short(factor * 2**power)) <= 8 for factor in (1, 1.3, 1.999))
    assert short(1.3 * 2**power).split()[1] == size(1.3 * 2**power).split()[1]


def module(tensor: str, change: float | None, rounding: float | None) -> dict[str, object]:
    more = {} if rounding is None else {"nf4_rounding": rounding}
    return {"tensor": tensor, "relative_change": change, "changed": 0.9996, **more}


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("nf4", [True, False])
def test_a_merge_is_told_in_whole_numbers_on_any_terminal(
    width: int, nf4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {
        "notes": [],
        "adapters": [{"tensors": 6}],
        "onto": {"base": "nf4", "double": True} if nf4 else {"base": "original"},
        "tensors": 12,
        "modules": [
            module("model.layers.0.self_attn.q_proj.weight", 0.0123, 0.0977 if nf4 else None),
            module("model.layers.1.self_attn.q_proj.weight", 281.84, 0.0977 if nf4 else None),
            module("model.layers.0.mlp.a_module.with_a_name_that_is.longer_than_most.weight", 12345678.0, None),
            module("lm_head.weight", None, None),
        ],
    }
    out = StringIO()
    monkeypatch.setattr(merge_report, "console", lambda: Console(file=out, width=width))
    merge_report.show_merge(report)
    title, head, _, *rows = out.getvalue().splitlines()
    assert title.strip() == f"Merged onto {'NF4 (double)' if nf4 else 'the original'}: |change| / |weights|"
    assert head.split() == ["module", "tensors", "median", "most", "changed", *["NF4"] * nf4]
    cells = [row.split() for row in rows]
    assert ["self_attn.q_proj", "2", "x140.9", "x281.8", "100.0%", *["9.77%"] * nf4] in cells
    assert any(row[1:] == ["1", "x1e+07", "x1e+07", "100.0%", *["-"] * nf4] for row in cells)
    assert ["lm_head", "1", "new", "new", "100.0%", *["-"] * nf4] in cells
    assert any("take that if the adapter was not trained on 4 bit" in row for row in rows) == nf4
    assert all(len(row) <= width for row in rows if not row.startswith(("NF4", "6 adapter")))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0977, "9.77%"), (9.99, "999.00%"), (9.9999, "x10.0"), (281.84, "x281.8"), (99999.6, "x1e+05"), (0, "0.00%")],
)
def test_a_ratio_is_short(value: float, text: str) -> None:
    assert merge_report._ratio(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m"), (840, "14m"), (3580, "1h 00m"), (7500, "2h 05m"), (1e6, "277h 47m")],
)
def test_a_time_is_short(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_steps_without_a_terminal_are_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: clock))
    with steps("measuring") as show:
        show(0.0, "Embeddings", "", None)
        show(0.0, "Measuring", "", None)
        for module in range(200):  # each of a second
            show(module / 200, "Measuring", f"model.layers.{module}", None if module < 2 else 200.0 - module)
            clock += 1
        show(1.0, "Measuring", "", None)
    assert capsys.readouterr().err.splitlines() == [
        "measuring: Embeddings, 0%",
        "measuring: Measuring, 0%",
        "measuring: Measuring, 0%, model.layers.0",
        "measuring: Measuring, 30%, model.layers.61, 2m left",
        "measuring: Measuring, 61%, model.layers.122, 1m left",
        "measuring: Measuring, 92%, model.layers.183, 17s left",
    ]


def test_a_bar_stays_on_its_line() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", BAR], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    try:
        while data := os.read(ours, 1 << 16):
            said += data
    except OSError:  # how a terminal says that its last user has gone
        pass
    os.close(ours)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    shown = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert all(line.startswith(("converting", "measuring", "quantizing")) and len(line) <= 80 for line in shown), shown
    assert any(re.search(r"to 4\.65 bits \S+ +50% 1h 07m left model\.layers\.2\.a_name\S*…", line) for line in shown)
    assert any(re.search(r"model\.layers\.\S*…", line) for line in shown)
    assert any("120.0/140.0 GB" in line for line in shown)
    assert any("the sensitivity of" in line for line in shown)
