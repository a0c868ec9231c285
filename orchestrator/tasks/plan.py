"""task=plan: what fits, before anything loads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from orchestrator.backends.table import BACKENDS
from orchestrator.config import Config
from orchestrator.engine.interpreters import how_to_install
from orchestrator.plan.disk import not_writable
from orchestrator.plan.planner import not_made
from orchestrator.plan.types import Candidate, Plan
from orchestrator.report.console import console
from orchestrator.report.plan import bars, candidates_table, changes_table, command, legend
from orchestrator.report.tables import fitting
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Planned, can_be_made, fits, has_room, look, show_plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def plan(config: Config, folder: RunFolder) -> None:
    """Prints the plan, every candidate, and the command that runs the best on stdout; plan.json has all of it.

    Raises:
        DoesNotFitError: nothing that was asked for fits, the conversion takes more memory than there is, or this
            machine's disk has no room for what is written.
        ConfigError: what has to be written cannot be, on this machine; the conversion would be refused; all that was
            asked for would run from a checkpoint only that nothing here makes.
    """
    planned = look(config, planning=True, download=False, bare=True)
    chosen = planned.plan.chosen
    can_be_run = chosen.fits and not chosen.needs and _is_convertible(planned)
    run = command(_typed(), chosen, config) if can_be_run else None
    folder.write("plan.json", planned.to_json() | {"command": run})
    out = console(sys.stdout)
    show_plan(planned, chosen, out)
    out.print("", *bars(chosen, out.width, ascii_only=out.options.ascii_only), "", sep="\n")
    out.print(_fitting(out, planned.plan, candidates_table))
    for text in (*legend(planned.plan), *_missing(planned), ""):
        out.print(text, markup=False, soft_wrap=True)
    if planned.plan.changes:
        out.print(_fitting(out, planned.plan, changes_table))
    here = " (this machine)" if planned.elsewhere else ""
    for text in (*(f"{line}{here}" for line in not_writable(planned.disk)), *_to_run(planned, config)):
        out.print(text, markup=False, soft_wrap=True)
    fits(planned)
    if chosen.needs and config.quant.method != chosen.method:  # who names the method wants to see it beside the others
        raise not_made(chosen)
    can_be_made(planned)
    if not planned.elsewhere:
        has_room(planned)


def _fitting(out: Console, plan: Plan, table: Callable[..., Table]) -> Table | Text:
    return fitting(out.width, table(plan), table(plan, narrow=True))


def _to_run(planned: Planned, config: Config) -> Iterator[str]:
    """The command of the best; where its engine has to be installed first, also that of the best that is here."""
    runs = [c for c in planned.plan.candidates if c.fits and not c.needs]
    if not runs or not _is_convertible(planned):
        return
    first = "" if runs[0].installed else " (once its engine is installed)"
    yield f"To run it{first}: {command(_typed(), runs[0], config)}"
    here = next((c for c in runs if c.installed), None)
    if here is not None and here is not runs[0]:
        yield f"With what is installed ({here.label}): {command(_typed(), here, config)}"


def _is_convertible(planned: Planned) -> bool:
    return planned.conversion is None or not planned.conversion.lacks


def _missing(planned: Planned) -> list[str]:
    """How to get each engine that is not here, of those that would fit (or of all, where none does)."""
    candidates: list[Candidate] = [c for c in planned.plan.candidates if not (c.installed or c.needs)]
    fitting = [c for c in candidates if c.fits] or candidates
    device = planned.hardware.device
    names = dict.fromkeys(c.backend for c in fitting)
    return [f"* {name} is not installed: {how_to_install(BACKENDS[name], device)}" for name in names]


def _typed() -> list[str]:
    """The overrides of the command line; none where the task was not started from one."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
