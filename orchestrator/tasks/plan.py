"""task=plan: what fits, before anything loads."""

from __future__ import annotations

import sys

from orchestrator.config import Config
from orchestrator.report.console import console
from orchestrator.report.tables import candidates_table
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import fits, look, show_plan


def plan(config: Config, folder: RunFolder) -> None:
    """Prints the plan and every candidate; plan.json has both.

    Raises:
        DoesNotFitError: nothing that was asked for fits.
    """
    planned = look(config, planning=True, download=False, bare=True)
    folder.write("plan.json", planned.to_json())
    show_plan(planned, planned.plan.chosen)
    console(sys.stdout).print(candidates_table(planned.plan))
    fits(planned)
