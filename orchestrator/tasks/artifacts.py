"""task=artifacts: list, verify and prune the store."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.artifacts import MANIFEST, Artifact, Store, bytes_below, last_used
from orchestrator.config import Config, did_you_mean, folder
from orchestrator.errors import RequestError, StageError
from orchestrator.report.console import console, size
from orchestrator.report.tables import fitting, short, table
from orchestrator.runfolder import RunFolder

DAY = 86400.0


@dataclass(frozen=True)
class _Found:
    """What is in the store, or the one thing in it that artifacts.name names."""

    finished: list[Artifact]
    damaged: list[Path]
    partials: list[Path]


def artifacts(config: Config, run: RunFolder) -> None:
    """Does artifacts.action to all artifacts, or to the one that artifacts.name names.

    Raises:
        RequestError: there is none of that name, or the store is none.
        StageError: verify found a damaged one.
    """
    root = folder(config.paths.artifacts)
    if root.exists() and not root.is_dir():
        raise RequestError(f"paths.artifacts={root} is a file", "Set paths.artifacts=FOLDER.")
    store = Store(root)
    action = {"list": _list, "verify": _verify, "prune": _prune}[config.artifacts.action]
    try:
        action(config, store, _named(store, config.artifacts.name), run)
    except OSError as error:
        if error.filename is None:  # not the store: our output, say
            raise
        raise RequestError(f"{error.filename}: {error.strerror}", "Check paths.artifacts.") from None


def _named(store: Store, name: str | None) -> _Found:
    found = _Found(store.finished(), store.damaged(), store.partials())
    if name is None:
        return found
    one = _Found(
        [artifact for artifact in found.finished if artifact.name == name],
        [path for path in found.damaged if path.name == name],
        [path for path in found.partials if path.name == name],
    )
    if not (one.finished or one.damaged or one.partials):
        if (store.root / name).is_dir() and store.held(name):
            raise RequestError(f"artifacts.name={name} is being built by a running process")
        names = [path.name for path in (*(a.path for a in found.finished), *found.damaged, *found.partials)]
        raise RequestError(f"artifacts.name={name}: there is no such artifact", did_you_mean(name, names))
    return one


def _list(config: Config, store: Store, found: _Found, run: RunFolder) -> None:
    listed = table(f"Artifacts in {store.root}", "name", "size", "last used", "from", folded=("from",))
    listed.columns[-1].justify = "left"
    for artifact in found.finished:
        used = time.strftime("%Y-%m-%d", time.localtime(last_used(artifact)))
        report = artifact.manifest.get("report")
        source = report.get("source", "") if isinstance(report, dict) else ""
        listed.add_row(artifact.name, short(artifact.size), used, str(source))
    for path in found.damaged:
        listed.add_row(path.name, short(bytes_below(path)), "damaged", "", style="red")
    for path in found.partials:
        listed.add_row(path.name, short(bytes_below(path)), "unfinished", "")
    out = console(sys.stdout)
    out.print(fitting(out.width, listed))
    rows = [{"name": a.name, "bytes": a.size, "last_used": last_used(a)} for a in found.finished]
    names = {"damaged": [p.name for p in found.damaged], "partials": [p.name for p in found.partials]}
    run.write("result.json", {"artifacts": rows, **names})


def _verify(config: Config, store: Store, found: _Found, run: RunFolder) -> None:
    problems = {artifact.name: store.verify(artifact) or _contents(artifact) for artifact in found.finished}
    problems |= {path.name: [f"{MANIFEST} is missing or cannot be read"] for path in found.damaged}
    if config.artifacts.name is not None:
        problems |= {path.name: ["it is unfinished"] for path in found.partials}
    if not problems:
        print(f"nothing to verify in {store.root}")
    for name, wrong in problems.items():
        print(f"{name}: {'; '.join(wrong) if wrong else 'ok'}")
    run.write("result.json", {"verified": problems})
    damaged = [name for name, wrong in problems.items() if wrong]
    if damaged:
        raise StageError(
            f"{len(damaged)} of {len(problems)} artifacts are damaged: {', '.join(damaged)}",
            f"Remove one with artifacts.action=prune artifacts.name={damaged[0]}; the next run builds it again.",
        )


def _contents(artifact: Artifact) -> list[str]:
    """What is wrong with an artifact that is as it was built, of the kinds whose files can be looked into."""
    from orchestrator.stages.exl2_result import verify_artifact

    check = {"exl2": verify_artifact}.get(str(artifact.manifest.get("stage")))
    return check(artifact) if check else []


def _prune(config: Config, store: Store, found: _Found, run: RunFolder) -> None:
    settings = config.artifacts
    oldest = time.time() - settings.unused_days * DAY
    ages = {artifact.path: last_used(artifact) for artifact in found.finished}
    ages |= {path: _last_written(path) for path in found.partials}
    doomed = [path for path, age in ages.items() if settings.name is not None or age <= oldest]
    removed, used, freed = [], [], 0
    for path in (*doomed, *found.damaged):
        count = bytes_below(path)
        if not store.remove(path, only_ask=settings.dry_run):
            print(f"kept {path.name}: a run is building or loading it")
            used.append(path.name)
            continue
        print(f"{'would remove' if settings.dry_run else 'removed'} {path.name} ({size(count)})")
        removed.append(path.name)
        freed += count
    print(f"{size(freed)} {'would be' if settings.dry_run else ''} freed".replace("  ", " "))
    run.write("result.json", {"removed": removed, "in_use": used, "bytes": freed, "dry_run": settings.dry_run})


def _last_written(partial: Path) -> float:
    """When its build, which the next run may go on with, last wrote anything: seconds since the epoch."""
    # Of a link itself: the model that a conversion has linked may have gone.
    return max(path.lstat().st_mtime for path in (partial, *partial.rglob("*")))
