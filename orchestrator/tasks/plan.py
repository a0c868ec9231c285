"""task=plan: what fits, before anything loads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.backends.table import BACKENDS
from orchestrator.config import Config
from orchestrator.engine.interpreters import how_to_install
from orchestrator.errors import OrchestratorError
from orchestrator.pipeline import conversion
from orchestrator.plan.disk import not_writable
from orchestrator.plan.planner import not_made
from orchestrator.plan.types import Candidate, Plan
from orchestrator.report.console import console
from orchestrator.report.plan import bars, candidates_table, changes_table, command, legend
from orchestrator.report.tables import fitting
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Planned, can_be_made, fits, has_room, look, show_notes, show_plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def plan(config: Config, folder: RunFolder) -> None:
    """Prints the plan, every candidate, and the command that runs the best on stdout; plan.json has all of it.

    Of a plan whose command would be refused only the candidates are printed, and plan.json has it as one that does not
    fit: what is kept of it (task=plan > plan.txt) is no plan.

    Raises:
        DoesNotFitError: nothing that was asked for fits, the conversion takes more memory than there is, or this
            machine's disk has no room for what is written.
        ConfigError: what has to be written cannot be, on this machine; the conversion would be refused; all that was
            asked for would run from a checkpoint only that nothing here makes.
    """
    planned = look(config, planning=True, download=False, bare=True)
    chosen = planned.plan.chosen
    if chosen.fits and (refusal := _refusal(planned, chosen)) is not None:
        _show_refused(planned, folder)
        raise refusal
    run = command(_typed(), chosen, config) if chosen.fits and not chosen.needs else None
    folder.write("plan.json", planned.to_json() | {"command": run})
    out = console(sys.stdout)
    show_plan(planned, chosen, out)
    out.print("", *bars(chosen, out.width, ascii_only=out.options.ascii_only), "", sep="\n")
    out.print(_fitting(out, planned.plan, candidates_table))
    for text in (*legend(planned.plan), *_missing(planned.plan, planned.hardware.device), ""):
        out.print(text, markup=False, soft_wrap=True)
    if planned.plan.changes:
        out.print(_fitting(out, planned.plan, changes_table))
    here = " (this machine)" if planned.elsewhere else ""
    for text in (*(f"{line}{here}" for line in not_writable(planned.disk)), *_to_run(planned, config)):
        out.print(text, markup=False, soft_wrap=True)
    fits(planned)
    if not planned.elsewhere:
        has_room(planned)


def _refusal(planned: Planned, candidate: Candidate) -> OrchestratorError | None:
    """Why the command of a candidate that fits would be refused; None where it would not."""
    if candidate.needs:  # who names the method wants to see it beside the others
        return not_made(candidate) if planned.config.quant.method != candidate.method else None
    if candidate is not planned.plan.chosen:
        converting = conversion(planned.config, planned.source, candidate, planning=True)
        planned = replace(planned, plan=replace(planned.plan, chosen=candidate), conversion=converting)
    try:
        can_be_made(planned)
    except OrchestratorError as error:
        return error
    return None


def _show_refused(planned: Planned, folder: RunFolder) -> None:
    """Writes a plan that is refused as one that does not fit; prints the candidates, where another would not be."""

    def judged(candidate: Candidate) -> Candidate:
        error = _refusal(planned, candidate) if candidate.fits else None
        return replace(candidate, fits=False, reasons=(*candidate.reasons, error.message)) if error else candidate

    made = [judged(candidate) for candidate in planned.plan.candidates]
    made.sort(key=lambda candidate: not candidate.fits)
    plan = replace(planned.plan, chosen=judged(planned.plan.chosen), candidates=tuple(made))
    folder.write("plan.json", replace(planned, plan=plan).to_json() | {"command": None})
    show_notes(plan)
    if made[0].fits:
        out = console(sys.stdout)
        out.print(_fitting(out, plan, partial(candidates_table, refused=True)))
        for text in (*legend(plan), *_missing(plan, planned.hardware.device)):
            out.print(text, markup=False, soft_wrap=True)


def _fitting(out: Console, plan: Plan, table: Callable[..., Table]) -> Table | Text:
    return fitting(out.width, table(plan), table(plan, narrow=True))


def _to_run(planned: Planned, config: Config) -> Iterator[str]:
    """The command of the best; where its engine has to be installed first, also that of the best that is here."""
    runs = [c for c in planned.plan.candidates if c.fits and not c.needs]
    if not runs:
        return
    typed = command(_typed(), runs[0], config)
    if runs[0].installed:
        yield f"To run it: {typed}"
        return
    yield f"To run it (once its engine is installed): {typed}"
    here = next((c for c in runs if c.installed and _refusal(planned, c) is None), None)
    if here is not None:
        yield f"With what is installed ({here.label}): {command(_typed(), here, config)}"


def _missing(plan: Plan, device: str) -> list[str]:
    """How to get each engine that is not here, of those that would fit (or of all, where none does)."""
    candidates: list[Candidate] = [c for c in plan.candidates if not (c.installed or c.needs)]
    fitting = [c for c in candidates if c.fits] or candidates
    names = dict.fromkeys(c.backend for c in fitting)
    return [f"* {name} is not installed: {how_to_install(BACKENDS[name], device)}" for name in names]


def _typed() -> list[str]:
    """The overrides of the command line; none where the task was not started from one."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
