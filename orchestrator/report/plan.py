"""The whole plan for a person: every candidate, a bar for each GPU, what to change, what to type."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.backends.table import METHODS
from orchestrator.config import Config
from orchestrator.hardware import GIB
from orchestrator.overrides import unquoted
from orchestrator.plan.types import Candidate, DeviceBytes, Plan
from orchestrator.report.console import size
from orchestrator.report.tables import table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

BAR = 48  # cells
PARTS = (  # of a bar: shade, colour, name
    ("\u2588", "blue", "weights"),
    ("\u2593", "green", "KV cache"),
    ("\u2592", "yellow", "scratch"),
    ("\u2591", "magenta", "runtime"),
    ("\u00b7", "dim", "free"),
)
CHOOSES = {  # an engine, or a width, is chosen already where one of these was typed
    "backend": ("backend", "backend.name"),
    "quant.bits": ("quant", "quant.bits", "quant.method", "model.dtype"),
}
EXAMPLE = "prompts.text=Hello"


def gib(count: int) -> str:
    """GiB without the unit, in at most six characters."""
    number = count / GIB
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.3f}"


def candidates_table(plan: Plan) -> Table:
    """Every engine and width that was asked about, best first. It is readable at 80 columns."""
    made = table(
        "What could run it, best first",
        *("engine", "", "fits", "over", "weights", "cache", "scratch", "left", "context"),
        left=4,
    )
    for c in plan.candidates:
        parts = (c.fullest.weights, c.fullest.kv_cache, c.fullest.scratch, c.fullest.left)
        engine = c.backend + ("+" if c.needs else "" if c.installed else "*")
        context = str(c.largest_context) if c.largest_context else "-"
        cells = (engine, method_label(c), _fits(c), spread_label(c), *map(gib, parts), context)
        made.add_row(*cells, style="" if c.fits else "dim")
    return made


def legend(plan: Plan) -> Iterator[str]:
    """What is to be known to read the table of the candidates."""
    yield "GiB on the fullest device; the largest context, of one answer at a time"
    if needs := ", ".join(dict.fromkeys(method_label(c) for c in plan.candidates if c.needs)):
        yield f"+ from a checkpoint in {needs}, which this version does not make"


def method_label(candidate: Candidate) -> str:
    """The method and its bits, as short as they are clear: "EXL2 4.65", "NF4", "16 bit"."""
    method = METHODS[candidate.method]
    if candidate.method == "none":
        return f"{candidate.bits:g} bit"
    bits = f" {candidate.bits:g}" if method.low is not None or method.per_bit else ""
    return f"{method.label}{bits}{' double' if candidate.double_quant else ''}"


def spread_label(candidate: Candidate) -> str:
    """What it is spread over: "TP 4", "4 GPUs", "cuda:0", "cpu"."""
    ranks = (("TP", candidate.tensor_parallel), ("PP", candidate.pipeline_parallel))
    if any(count > 1 for _, count in ranks):
        return " ".join(f"{name} {count}" for name, count in ranks if count > 1)
    return candidate.fullest.device if len(candidate.computing) == 1 else f"{len(candidate.computing)} GPUs"


def _fits(candidate: Candidate) -> str:
    if not candidate.fits:
        return "no"
    if not candidate.offloads:
        return "yes"
    return "disk" if candidate.disk else "host"


def bars(candidate: Candidate) -> Iterator[Text]:
    """A bar for each GPU (or for the host where there is none), and what its shades mean."""
    from rich.text import Text

    devices = candidate.computing
    whole = max(max(device.capacity, device.total) for device in devices)
    for device in devices:
        line = Text(f"{device.device:<8}")
        for (shade, colour, _), cells in zip(PARTS, _cells(device, whole), strict=True):
            line.append(shade * cells, style=colour)
        over = device.total > device.capacity
        line.append(f"  {size(device.total)} of {size(device.capacity)}", style="red" if over else "")
        yield line
    shades = Text(" " * 8)
    for shade, colour, name in PARTS:
        shades.append(shade, style=colour)
        shades.append(f" {name}  ")
    yield shades


def _cells(device: DeviceBytes, whole: int) -> list[int]:
    """How many cells each part gets, so that their ends are where they belong."""
    parts = (device.weights, device.kv_cache, device.scratch, device.runtime, max(0, device.left))
    ends = [round(sum(parts[: i + 1]) / whole * BAR) for i in range(len(parts))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def changes_table(plan: Plan) -> Table:
    """What to change, cheapest first, and what it comes to."""
    made = table(
        "What to change, cheapest first",
        *("change", "gives up", "then", "GiB", "left", "context"),
        left=3,
        folded=("change", "gives up"),
    )
    for change in plan.changes:
        found = change.candidate
        then = f"{found.backend} {method_label(found)}"
        cells = (gib(found.fullest.total), gib(found.fullest.left), str(found.max_context))
        made.add_row(change.label, change.costs, then, *cells)
    # To be copied: no setting is cut in two, however narrow the terminal is.
    made.columns[0].min_width = max((len(word) for c in plan.changes for word in c.label.split()), default=0)
    return made


def command(typed: list[str], candidate: Candidate, config: Config) -> str:
    """The command that runs a candidate: what was typed, with the engine and the width where they were left open.

    Args:
        typed: the overrides of the command line.
    """
    kept = [unquoted(text) for text in typed if _key(text) not in ("task", "task.name")]
    keys = {_key(text) for text in kept}
    choice = {"backend": candidate.backend, "quant.bits": f"{candidate.bits:g}"}
    added = [f"{key}={value}" for key, value in choice.items() if not keys & set(CHOOSES[key])]
    prompts = config.model.path is None or any(key.startswith("prompts.") for key in keys)
    return shlex.join(["python", "-m", "orchestrator", *kept, *added, *([] if prompts else [EXAMPLE])])


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")
