"""task=artifacts: list, verify and prune the store."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from orchestrator.artifacts import Artifact, Store, last_used
from orchestrator.config import Config, did_you_mean, folder
from orchestrator.errors import RequestError, StageError
from orchestrator.report.console import console, size
from orchestrator.runfolder import RunFolder

DAY = 86400.0


def artifacts(config: Config, run: RunFolder) -> None:
    """Does artifacts.action to all artifacts, or to the one that artifacts.name names.

    Raises:
        RequestError: there is none of that name.
        StageError: verify found a damaged one.
    """
    store = Store(folder(config.paths.artifacts))
    found = _named(store.finished(), config.artifacts.name)
    {"list": _list, "verify": _verify, "prune": _prune}[config.artifacts.action](config, store, found, run)


def _named(found: list[Artifact], name: str | None) -> list[Artifact]:
    if name is None:
        return found
    names = [artifact.name for artifact in found]
    if name not in names:
        raise RequestError(f"artifacts.name={name}: there is no such artifact", did_you_mean(name, names))
    return [artifact for artifact in found if artifact.name == name]


def _list(config: Config, store: Store, found: list[Artifact], run: RunFolder) -> None:
    from rich.table import Table

    table = Table(title=f"Artifacts in {store.root}", title_justify="left", header_style="bold")
    for column in ("name", "size", "files", "last used", "from"):
        table.add_column(column, overflow="fold")
    for artifact in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(last_used(artifact)))
        source = artifact.manifest["report"].get("source", "")
        table.add_row(artifact.name, size(artifact.size), str(len(artifact.files)), used, str(source))
    for path in store.partials():
        table.add_row(path.name, size(_bytes(path)), "", "", "unfinished")
    console(sys.stdout).print(table)
    rows = [{"name": a.name, "bytes": a.size, "last_used": last_used(a)} for a in found]
    run.write("result.json", {"artifacts": rows, "partials": [p.name for p in store.partials()]})


def _verify(config: Config, store: Store, found: list[Artifact], run: RunFolder) -> None:
    problems = {artifact.name: store.verify(artifact) for artifact in found}
    for name, wrong in problems.items():
        print(f"{name}: {'; '.join(wrong) if wrong else 'ok'}")
    run.write("result.json", {"verified": problems})
    damaged = [name for name, wrong in problems.items() if wrong]
    if damaged:
        raise StageError(
            f"{len(damaged)} of {len(found)} artifacts are damaged: {', '.join(damaged)}",
            f"Remove one with artifacts.action=prune artifacts.name={damaged[0]}; the next run builds it again.",
        )


def _prune(config: Config, store: Store, found: list[Artifact], run: RunFolder) -> None:
    settings = config.artifacts
    oldest = time.time() - settings.unused_days * DAY
    doomed = [a.path for a in found if settings.name is not None or last_used(a) <= oldest]
    doomed += store.partials() if settings.name is None else []
    freed = sum(_bytes(path) for path in doomed)
    for path in doomed:
        print(f"{'would remove' if settings.dry_run else 'removed'} {path.name} ({size(_bytes(path))})")
        if not settings.dry_run:
            store.remove(path)
    print(f"{size(freed)} {'would be' if settings.dry_run else ''} freed".replace("  ", " "))
    run.write("result.json", {"removed": [p.name for p in doomed], "bytes": freed, "dry_run": settings.dry_run})


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*") if file.is_file())
