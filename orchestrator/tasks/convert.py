"""task=convert: the model that an engine would load; output.path puts it where it is wanted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.artifacts import MANIFEST, kept
from orchestrator.backends.table import BACKENDS
from orchestrator.config import Config, folder
from orchestrator.errors import ConfigError, RequestError
from orchestrator.pipeline import Model, Source, disk_needs, is_exl2, merged, prepare
from orchestrator.plan.disk import existing, must_be_writable, must_have_room
from orchestrator.report.console import note
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.proof import load_once
from orchestrator.tasks.session import bring, can_convert, has_room, look

_SUFFIX = ".unfinished"  # of the hidden folder in which an output is made
_ANOTHER = "Name a new folder, or remove what is in it."
log = logging.getLogger(__name__)


def convert(config: Config, run: RunFolder) -> None:
    """Merges and converts; with output.path a folder of the user's gets the files (hard links where possible).

    What an engine's own conversion made is loaded once before that, where a GPU has room for it.

    Raises:
        StageError: a stage failed, or what it made does not load.
        RequestError: output.path is there already and not empty.
        DoesNotFitError: the disk of the store, or of output.path, has no room for the result.
    """
    output = folder(config.output.path).resolve() if config.output.path is not None else None
    if output is not None:
        _check_output(output)

    with kept():  # from a prune, until it is linked or copied
        source, model, not_loaded = (_quantized if _is_planned(config) else _merged)(config, run)
        if output is not None:
            export(model, output)
            note(f"finished model: {output}")
    if not model.artifacts:
        looked = "" if config.convert.verify and is_exl2(source.base) else ", nothing was looked at"
        done = "nothing to do" if output is None else f"its files are copied as they are{looked}"
        note(
            f"{source.base.path} is safetensors already and has no adapter: {done} (convert.shard_size writes it anew)"
        )
    run.write(
        "result.json",
        {
            **source.identity(),
            "output": str(output or model.path),
            "artifacts": [{"name": a.name, "built": a.name in model.built} for a in model.artifacts],
            "stages_run": list(model.built),
            "not_loaded": not_loaded or None,
            "reports": {a.name: a.manifest.get("report") for a in model.artifacts},
        },
    )


def _is_planned(config: Config) -> bool:
    """Whether an engine's own conversion may be asked for; a merge alone is for any engine, and needs no plan."""
    asked = config.backend.name != "auto" and BACKENDS[config.backend.name].stages
    return bool(asked) or config.quant.bits is not None or config.quant.method != "auto"


def _merged(config: Config, run: RunFolder) -> tuple[Source, Model, str]:
    """The merged (or converted) model, of any architecture; no engine is there to load it."""

    def check(source: Source) -> None:
        needs = disk_needs(config, source, None)
        must_be_writable(needs)
        must_have_room(needs)

    config, source = bring(config, check)
    check(source)
    return source, merged(config, source, run), ""


def _quantized(config: Config, run: RunFolder) -> tuple[Source, Model, str]:
    """What the engine that the plan chooses would load. For another machine, maybe: it need not fit here.

    Returns:
        What was asked for, the model, and why what was made of it was not loaded here ("" where it was).
    """
    planned = look(config, planning=True, check=can_convert)
    has_room(planned)
    chosen = planned.plan.chosen
    if not BACKENDS[chosen.backend].stages and chosen.bits < 16:
        note(
            f"{chosen.backend} quantizes when it loads: what is written is the merged model, "
            f"not {chosen.bits:g} bits (backend=exllamav2 writes those)"
        )
    model, not_loaded = load_once(planned, prepare(planned.config, planned.source, chosen, run), run)
    return planned.source, model, not_loaded


def _check_output(output: Path) -> None:
    """Refuses what cannot be written, before anything long."""
    try:
        if not (there := existing(output)).is_dir():
            which = "" if there == output else f": {there}"
            raise ConfigError(f"output.path={output}{which} is a file", "Name a folder.")
        if output.is_dir() and any(output.iterdir()):
            raise RequestError(f"output.path={output} is not empty", _ANOTHER)
        _sweep(output)
        with _beside(output):
            pass
    except OSError as error:
        raise RequestError(f"output.path={output}: {error.strerror}") from None


@contextlib.contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A new, empty folder on the same disk, held while this is open; removed then, unless it was renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    while True:
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=_SUFFIX, dir=output.parent))
        with _held(part):
            if not part.exists():  # another run took it for a leftover before it was held
                continue
            try:
                yield part
            finally:
                shutil.rmtree(part, ignore_errors=True)
            return


def _sweep(output: Path) -> None:
    """Removes what runs that were killed have left of `_beside(output)`."""
    for left in output.parent.glob(f".{glob.escape(output.name)}.*{_SUFFIX}"):
        with _held(left, fcntl.LOCK_NB) as held:
            if held:
                log.info("%s is removed: its run was killed", left)
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path, how: int = 0) -> Iterator[bool]:
    """Whether a folder could be locked, which it is while this is open; the system releases it if we die."""
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | how)
            held = True
        except OSError as error:  # somebody else has it, it is gone, or a file system without such locks
            log.info("%s is not locked: %s", folder, error)
            held = False
        yield held


def export(model: Model, output: Path) -> None:
    """Puts a model's files into `output`, all or none: made beside it, renamed at the end.

    Raises:
        RequestError: it cannot be written there.
    """
    try:
        with _beside(output) as part:
            for source in sorted(p for p in model.path.iterdir() if p.is_file() and p.name != MANIFEST):
                linked = bool(model.artifacts) and source.suffix == ".safetensors"
                _put(source.resolve(), part / source.name, linked)
            part.chmod(0o777 & ~_umask())  # mkdtemp's are private
            part.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # what was free when this run began
            raise RequestError(f"output.path={output} has appeared meanwhile", _ANOTHER) from None
        raise RequestError(f"output.path={output}: {error.strerror}") from None


def _put(source: Path, target: Path, linked: bool) -> None:
    """A copy; of the store's weights a hard link. What a person edits (config.json, ...) is never shared."""
    if linked:
        try:
            os.link(source, target)
            return
        except OSError as error:  # another file system, or one without hard links
            log.info("%s is copied: %s", source, error)
    shutil.copy2(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
