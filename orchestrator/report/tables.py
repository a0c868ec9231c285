"""The plan and the result as tables."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

from orchestrator.calibration import ASKED
from orchestrator.checkpoint.spec import ModelSpec
from orchestrator.hardware import GIB, MIB, Hardware, Holder
from orchestrator.plan.types import Candidate
from orchestrator.report.console import size

if TYPE_CHECKING:
    from rich.console import OverflowMethod
    from rich.table import Column, Table
    from rich.text import Text

LONG_WORD = 12  # a word that is longer (a path) may be cut where its column may be folded; no number is
INDENT, NO_BREAK = "  ", "\N{NO-BREAK SPACE}"
WORTH_SAYING = 256 * MIB  # held on a GPU by nobody that can be named: less is the driver's bookkeeping


def fitting(width: int, *versions: Table) -> Table | Text:
    """The first of these that is whole in so many columns, else a list of what is in the first: no number is ever cut.

    Args:
        versions: of one table, the wider ones first.
    """
    for made in versions:
        if (spare := width - _least_width(made)) >= 0:
            _share_out(made, spare)
            return made
    return _listed(versions[0], width)


def _least_width(made: Table) -> int:
    """Columns in which each cell of a table is whole, and of one that may be folded each word."""
    gap = 1 + made.padding[1]
    return sum(map(_least, made.columns)) + gap * (len(made.columns) - 1)


def _least(column: Column) -> int:
    words = (word[:LONG_WORD] for cell in _cells(column) for word in cell.split())
    return _whole(column) if column.no_wrap else max(map(len, words), default=0)


def _whole(column: Column) -> int:
    return max(len(line) for cell in _cells(column) for line in cell.split("\n"))


def _cells(column: Column) -> list[str]:
    return [str(cell) for cell in (column.header, *column.cells)]


def _share_out(made: Table, spare: int) -> None:
    """Gives what is left of the line to the columns that may be folded: rich would cut words of one for another's."""
    for column in made.columns:
        if not column.no_wrap:
            column.width = min(_whole(column), _least(column) + spare)
            spare -= column.width - _least(column)


def _listed(made: Table, width: int) -> Text:
    """A table as a list: a row's name, which is in its first column and in those without a header, then the others."""
    from rich.text import Text

    names, *rows = zip(*map(_cells, made.columns), strict=True)
    text = Text.assemble((f"{made.title}\n", "bold"))
    for row, cells in zip(made.rows, rows, strict=True):
        head = [cell for i, (name, cell) in enumerate(zip(names, cells, strict=True)) if cell and not (i and name)]
        said = [f"{name} {cell}" for name, cell in zip(names[1:], cells[1:], strict=True) if name and cell.strip("-")]
        text.append("\n".join((" ".join(head), *_lines(said, width), "")), style=row.style or "")
    text.rstrip()
    return text


def _lines(said: list[str], width: int) -> list[str]:
    """As many to a line as there is room for; only what is longer than a line is broken, between words."""
    room = width - len(INDENT)
    kept = [text.replace(" ", NO_BREAK) if len(text) < room else text for text in said]
    lines = textwrap.wrap(", ".join(kept), max(room, 1), break_long_words=False, break_on_hyphens=False)
    return [f"{INDENT}{line.replace(NO_BREAK, ' ')}" for line in lines]


def table(title: str, *columns: str, left: int = 1, folded: tuple[str, ...] = (), gap: int = 2) -> Table:
    """An empty table.

    Args:
        left: so many columns hold words, aligned at the left; the others hold numbers.
        folded: columns whose cells may take several lines where the terminal is narrow.
        gap: blanks between two columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    made.padding, made.pad_edge, made.show_edge = (0, gap - 1, 0, 0), False, False
    for i, column in enumerate(columns):
        # What is printed without `fitting` to a narrower terminal is seen to be cut off: -122… is not -122.
        fold = column in folded
        overflow: OverflowMethod = "fold" if fold else "ellipsis"
        made.add_column(column, justify="left" if i < left else "right", no_wrap=not fold, overflow=overflow)
    return made


def short(count: float) -> str:
    """Bytes in at most eight characters, for a column: 22.8 GiB, 700 MiB."""
    text, unit = size(count).split()
    number = float(text)
    whole = unit == "B" or round(abs(number), 1) >= 100
    return f"{number:.0f} {unit}" if whole else f"{number:.1f} {unit}"


def model_line(name: str, spec: ModelSpec, merged: int, on_top: int = 0) -> str:
    """The model in one line, with the number of its adapters."""
    adapters = merged or on_top
    more = f", {adapters} adapter{'s' * (adapters != 1)}{' on top' * bool(on_top)}" if adapters else ""
    return (
        f"{name}: {spec.architecture}, {spec.parameters / 1e6:,.1f} M parameters in {spec.dtype}, "
        f"{spec.layers} layers, context {spec.max_context}{more}"
    )


def hardware_line(hardware: Hardware) -> str:
    """The machine in one line."""
    host = f"{size(hardware.host_available)} of {size(hardware.host_total)} host memory free, {hardware.cpus} CPUs"
    if not hardware.gpus:
        return f"no GPU; {host}"
    counted = Counter((gpu.name, gpu.free) for gpu in hardware.gpus)
    return f"{', '.join(_cards(name, free, count) for (name, free), count in counted.items())}; {host}"


def _cards(name: str, free: int, count: int) -> str:
    """ "4 x 24 GiB cards with 23.56 GiB free each"; the name of a real card has no plural."""
    plural = "s" if count > 1 and name.endswith(" card") else ""
    return f"{count} x {name}{plural} with {size(free)} free{' each' if count > 1 else ''}"


def held_lines(hardware: Hardware) -> list[str]:
    """What is not free on each GPU, and by whom: "GPU 0: 3.10 GiB held by python (pid 4242)"."""
    lines = []
    for gpu in hardware.gpus:
        said = [f"{'' if h.held is None else size(h.held)} held by {_holder(h)}".strip() for h in gpu.held_by]
        if gpu.unnamed >= WORTH_SAYING and all(holder.held is not None for holder in gpu.held_by):
            said.append(f"{size(gpu.unnamed)} held by processes that cannot be seen from here")
        if said:
            lines.append(f"GPU {gpu.index}: {', '.join(said)}")
    return lines


def _holder(holder: Holder) -> str:
    ours = ", ours" if holder.ours else ""
    return f"{holder.name} (pid {holder.pid}{ours})" if holder.name else f"pid {holder.pid}{ours}"


def gib(count: int) -> str:
    """GiB without the unit, in at most six characters."""
    number = count / GIB
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.3f}"


def plan_table(candidate: Candidate, *, narrow: bool = False) -> Table:
    """Bytes per device of the chosen candidate against what is there.

    Args:
        narrow: in GiB, for terminals of 60 columns.
    """
    made = table(
        f"{'Plan' if candidate.fits else 'Does not fit'}: {candidate.label}, {candidate.dtype}, "
        f"{candidate.max_in_flight} in flight, context {candidate.max_context}{', in GiB' if narrow else ''}",
        "device",
        "weights",
        "cache" if narrow else "KV cache",
        *("scratch", "runtime", "total", "free", "left"),
        gap=1 if narrow else 2,
    )
    for device in candidate.devices:
        left = device.capacity - device.total
        cells = (
            device.weights,
            device.kv_cache,
            device.scratch,
            device.runtime,
            device.total,
            device.capacity,
        )
        style = "" if left >= 0 else "red"
        made.add_row(device.device, *map(gib if narrow else short, (*cells, left)), style=style)
    return made


def margin_line(candidate: Candidate) -> str:
    """What the plan keeps free: "kept free: 482 MiB a GPU (bitsandbytes was never measured on this card)"."""
    where = " a GPU" if candidate.gpus else ""
    most = "up to " if len({gpu.margin for gpu in candidate.gpus}) > 1 else ""
    asked = candidate.margin_source == ASKED
    why = ASKED if asked else f"{candidate.backend} was {candidate.margin_source}"
    return f"kept free: {most}{size(candidate.margin)}{where} ({why})"


def result_table(plan: Candidate, measured: dict[str, Any]) -> Table:
    """What was predicted and what was measured."""
    made = table("Result", "", "predicted", "measured")
    placement = measured["placement"]
    for device in plan.devices:
        if device.weights:
            made.add_row(f"weights on {device.device}", size(device.weights), size(placement.get(device.device, 0)))
    made.add_row("peak host memory of the engine", size(plan.host.total), size(measured["host_peak_bytes"]))
    for gpu, peak in zip(plan.gpus, measured["gpu_peak_bytes"], strict=False):
        made.add_row(f"peak memory of {gpu.device}", size(gpu.total - gpu.runtime), size(peak))
    rows = (
        ("load", "load_s", "s"),
        ("time to first token (median)", "ttft_s", "s"),
        ("prefill", "prefill_tokens_per_s", "tokens/s"),
        ("decode", "decode_tokens_per_s", "tokens/s"),
        ("answers", "answers_s", "s"),
        ("whole run", "total_s", "s"),
    )
    for label, key, unit in rows:
        value = measured[key]
        made.add_row(
            label,
            "",
            "-" if value is None else f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}",
        )
    return made
