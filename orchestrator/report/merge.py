"""What a merge did, as a table."""

from __future__ import annotations

import statistics
from typing import Any

from orchestrator.report.console import console
from orchestrator.report.tables import table


def show_merge(report: dict[str, Any]) -> None:
    """The change by kind of module (layers together), and what was checked. Nothing for a plain conversion."""
    out = console()
    for text in report["notes"]:
        out.print(f"note: {text}", markup=False, soft_wrap=True)
    if not report["adapters"]:
        return
    kinds: dict[str, list[dict[str, Any]]] = {}
    for module in report["modules"]:
        kinds.setdefault(_kind(module["tensor"]), []).append(module)
    rounded = report["onto"] != "original"
    more = ("NF4 rounding",) if rounded else ()
    title = f"Merged onto {report['onto']}: |change| / |weights|"
    made = table(title, "module", "tensors", "least", "median", "most", "elements changed", *more)
    for kind, modules in kinds.items():
        changes = [m["relative_change"] for m in modules if m["relative_change"] is not None]
        spread = (min(changes), statistics.median(changes), max(changes)) if changes else ()
        shares = statistics.fmean(m["changed"] for m in modules)
        cells = [f"{change:.2%}" for change in spread] or ["new"] * 3
        lost = [m["nf4_rounding"] for m in modules if "nf4_rounding" in m]
        last = [f"{statistics.median(lost):.2%}" if lost else "-"] if rounded else []
        made.add_row(kind, str(len(modules)), *cells, f"{shares:.1%}", *last)
    out.print(made)
    count = sum(adapter["tensors"] for adapter in report["adapters"])
    text = f"{count} adapter tensors, each used once; {report['tensors']} tensors written, all finite"
    out.print(text, markup=False, soft_wrap=True)


def _kind(tensor: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    parts = tensor.removesuffix(".weight").split(".")
    last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last_number + 1 :])
