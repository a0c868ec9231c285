"""Merged safetensors to EXL2 by exllamav2's own converter: a measurement, and with it one model per width.

Two artifacts: the measurement depends on the model and on the calibration only, so the next width reuses it; it is
where nearly all of the time goes. The converter's working folder lies in the partial artifact, so that one that was
killed goes on from its own last checkpoint (every three minutes).
"""

from __future__ import annotations

import filecmp
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.artifacts import MANIFEST, RECIPE_NAME, Artifact, Built, Recipe, Store
from orchestrator.backends.exl2_setup import visible_devices
from orchestrator.backends.table import BACKENDS
from orchestrator.checkpoint.carry import written_config
from orchestrator.checkpoint.exl2_layout import TOLERANCE, check_exl2
from orchestrator.checkpoint.fingerprint import differences
from orchestrator.checkpoint.folder import Checkpoint, carried_files, fingerprint, open_checkpoint
from orchestrator.checkpoint.trust import shown
from orchestrator.config import Config, folder
from orchestrator.engine.cuda_build import require_build
from orchestrator.engine.interpreters import require
from orchestrator.errors import ConfigError, EngineUnavailableError, OutputError, StageError
from orchestrator.hardware import child_devices, nvml_gpus
from orchestrator.pipeline import Model, is_exl2
from orchestrator.plan.conversion import Conversion
from orchestrator.plan.disk import Part
from orchestrator.plan.exl2_sizes import head_file_bytes, pad32
from orchestrator.plan.types import Candidate
from orchestrator.report.console import note, size, steps
from orchestrator.runfolder import RunFolder
from orchestrator.stages.converter import Failure, OnStatus, Status, convert
from orchestrator.stages.exl2_begun import left_behind
from orchestrator.stages.exl2_calibration import MEASURED_ROWS, Calibration, file_identity
from orchestrator.stages.exl2_gpu import LENGTH, cap_of, leased_gpu, most_free, needed
from orchestrator.stages.exl2_job import Record
from orchestrator.stages.exl2_log import OverflowWatch, Seen, overflow_error, seen_overflow
from orchestrator.stages.exl2_measurement import (
    FILE,
    base_measurements,
    check_fits,
    judge_measurement,
)
from orchestrator.stages.exl2_memory import host_needed
from orchestrator.stages.exl2_mix import OtherMix, check_mix
from orchestrator.stages.exl2_result import Linears, NotWhole, judge_model, verify_artifact
from orchestrator.stages.exl2_rope import check_rope

VERSION = "1"
"""Of both stages: part of an artifact's key, to be raised when the same inputs give other files."""

MODULE = "exllamav2.conversion.convert_exl2"
EXTENSION = "exllamav2_ext"  # of the engine's and the converter's; where it is not installed, it is built
_ROWS = {"measure": 19, "quantize": 115}  # of the calibration data that ship with it
_HEAD_BITS = 6
_OWN = "this model"  # what a measurement was made on
_STATUS_S = 2.0  # between two updates of status.json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """Everything that a conversion needs to know."""

    config: Config
    source: Checkpoint
    chosen: Candidate
    run: RunFolder
    python: str
    length: int
    calibration: Calibration | None  # None: the engine's own

    @property
    def head_bits(self) -> int:
        return self.config.quant.head_bits or _HEAD_BITS


def quantize(config: Config, model: Model, chosen: Candidate, run: RunFolder) -> Model:
    """The stage: the EXL2 model of a request, and the measurement where it had to be made.

    Raises:
        EngineUnavailableError: exllamav2 or a GPU is not here.
        ConfigError: settings that do not go with this model.
        StageError: the converter made no whole result; its last error is in the message.
        DoesNotFitError: it ran out of GPU memory, or the disk has too little room.
    """
    source = open_checkpoint(model.path)
    _check_config(source, chosen)
    if not _converts(source, chosen):
        if is_exl2(source) and not config.convert.verify:  # which looks at the same, and says so
            check_exl2(source.path)  # all but the weights: seconds at most, before minutes of loading
        return model
    length = _length(config, source)
    store = Store(folder(config.paths.artifacts))
    choice = _choose(store, config, _inputs(model, source), source, length, chosen.bits)
    made: list[tuple[Artifact, bool]] = []
    if store.find(choice.recipe) is None:
        # Only now: a model that is there needs neither the converter nor a GPU.
        python = _converter(config, chosen)
        calibration = Calibration.of(config, length)
        if calibration:
            calibration.check(source.path, python)
        work = _Work(config, source, chosen, run, python, length, calibration)
        for line in left_behind(store, choice.recipe, choice.measurement):
            note(line)
        measured = _measured(store, work, choice, made)
        make = partial(_quantize, work, measurement=measured, whose=choice.whose)
        _, most = _model_bytes(source, chosen.bits, work.head_bits)
        room = most + _states_bytes(config, source, length, "quantize")
        made.append(_build(store, choice.recipe, make, room, work))
    else:
        if choice.measurement and choice.whose != _OWN:  # used: not pruned before the model that is found by it
            made.append(_build(store, choice.measurement, _never, 0, None))
        made.append(_build(store, choice.recipe, _never, 0, None))
    if config.convert.verify:
        _verify(store, made[-1][0], run)
    artifacts = tuple(artifact for artifact, _ in made)
    built = tuple(artifact.name for artifact, now in made if now)
    return Model(artifacts[-1].path, (*model.artifacts, *artifacts), (*model.built, *built))


def check(
    config: Config,
    store: Store,
    source: Checkpoint,
    inputs: dict[str, Any] | None,
    chosen: Candidate,
    tokenizer: Callable[[], Path],
    *,
    here: bool,
) -> None:
    """Refuses by headers alone what the stage would refuse, before anything is written.

    Args:
        source: the model that it will be given, with its config.json as it will be then.
        inputs: the recipe's; None where they are not on this machine yet.
        tokenizer: the folder of that model's tokenizer, for whose inputs are here.
        here: this machine converts, so that the converter has to be on it, and what its extension is built with.

    Raises:
        EngineUnavailableError, ConfigError: see `quantize`.
        CheckpointError: the model's tokenizer cannot be loaded, which calibration texts of the user's need.
    """
    _check_config(source, chosen)
    if not _converts(source, chosen):
        return
    length = _length(config, source)
    if inputs is not None and store.find(_choose(store, config, inputs, source, length, chosen.bits).recipe):
        return
    if config.quant.measurement is not None:
        _users_measurement(config, source)
    python = _converter(config, chosen) if here else None
    if calibration := Calibration.of(config, length):
        _check_calibration(calibration, tokenizer() if inputs is not None else None, python)


def _check_calibration(calibration: Calibration, tokenizer: Path | None, python: str | None) -> None:
    """The texts as far as it can be: to the last token where they will be converted, else as a plan does."""
    if python is not None and tokenizer is not None:
        calibration.check(tokenizer, python)
    else:
        calibration.look(tokenizer)


def conversion(
    config: Config,
    store: Store,
    source: Checkpoint,
    inputs: dict[str, Any] | None,
    chosen: Candidate,
    *,
    planning: bool,
) -> Conversion | None:
    """What the stage will take of one GPU and of the host; None where it has nothing to convert.

    Args:
        source, inputs: as for `check`.
        planning: a profile stands for the machine.
    """
    if not _converts(source, chosen):
        return None
    try:
        length = _length(config, source)
    except ConfigError:  # see `check`
        return None
    measures, begun = config.quant.measurement is None, False
    if inputs is not None:
        choice = _choose(store, config, inputs, source, length, chosen.bits)
        if store.find(choice.recipe):
            return None
        measures = choice.measurement is not None and store.find(choice.measurement) is None
        begun = store.is_begun(choice.recipe)
    calibration = Calibration.of(config, length)
    rows = calibration.rows if calibration else _ROWS["quantize"]
    measured = min(rows, MEASURED_ROWS) if calibration else _ROWS["measure"]
    # One that was begun had room, and may need no more of it: it is not held up.
    gpu_free, host_free = (None, None) if begun else most_free(config.hardware, planning=planning)
    host = host_needed(source, chosen.bits, length, measured if measures else None, rows)
    return Conversion("to EXL2", needed(source, length), gpu_free, host, host_free)


def disk_part(
    config: Config, store: Store, source: Checkpoint, inputs: dict[str, Any] | None, chosen: Candidate
) -> list[Part]:
    """What the stage will write, the measurement's own folder included.

    Args:
        source: the model that it will be given, by headers.
        inputs: the recipe's; None where they are not on this machine yet.
    """
    if not _converts(source, chosen):
        return []
    try:
        length = _length(config, source)
    except ConfigError:  # see `check`
        return []
    head_bits = config.quant.head_bits or _HEAD_BITS
    final, most = _model_bytes(source, chosen.bits, head_bits)
    adds = most + _states_bytes(config, source, length, "quantize")
    measuring = _states_bytes(config, source, length, "measure")
    if inputs is not None:
        choice = _choose(store, config, inputs, source, length, chosen.bits)
        adds = store.to_write(choice.recipe, adds)
        measuring = store.to_write(choice.measurement, measuring) if adds and choice.measurement else 0
    return [Part("of EXL2", final, max(adds, measuring))]


def _converts(source: Checkpoint, chosen: Candidate) -> bool:
    """Whether a model is converted; if not, it is loaded as it is."""
    return not source.quantized and chosen.method == "exl2"


def _converter(config: Config, chosen: Candidate) -> str:
    """The Python that has the converter.

    Raises:
        EngineUnavailableError: there is none, no GPU, or nothing to build the converter's extension with.
    """
    python = require(BACKENDS[chosen.backend], config, "cuda")
    if not nvml_gpus()[0]:
        raise EngineUnavailableError("the conversion to EXL2 needs a CUDA GPU, and there is none here")
    require_build(python, EXTENSION)
    return python


@dataclass(frozen=True)
class _Choice:
    """The model's recipe by the measurement that it is made with.

    Attributes:
        measurement: its recipe; None where the user gave a file.
        whose: what it was measured on, for the manifest.
    """

    recipe: Recipe
    measurement: Recipe | None
    whose: str


def _choose(
    store: Store, config: Config, inputs: dict[str, Any], source: Checkpoint, length: int, bits: float
) -> _Choice:
    """The user's measurement; else the model's own, or its base's where only that is there.

    A model that is there already wins over a measurement that is: those can have come and gone since.
    """
    options: dict[str, Any] = {"bits": bits, "head_bits": config.quant.head_bits or _HEAD_BITS}
    own = _measurement_recipe(config, inputs, length)
    settings = own.settings | {f"quant.{name}": value for name, value in options.items()}
    if config.quant.measurement is not None:
        settings["quant.measurement"] = str(folder(config.quant.measurement))
        # The key of a measurement of ours says the calibration; of a file it has to be said beside it.
        given = own.inputs | {"measurement": file_identity(folder(config.quant.measurement))}
        recipe = Recipe("exl2", VERSION, options | own.options, given, settings=settings)
        return _Choice(recipe, None, "a file of the user's")
    bases = base_measurements(store, own, inputs["model"])
    measurements = [(own, _OWN), *((recipe, "its base") for recipe in bases if _fits(store, recipe, source))]
    choices = [
        _Choice(
            Recipe("exl2", VERSION, options, inputs | {"measurement": recipe.name}, settings=settings), recipe, whose
        )
        for recipe, whose in measurements
    ]
    done = (choice for choice in choices if store.find(choice.recipe))
    measured = (choice for choice in choices if choice.measurement and store.find(choice.measurement))
    return next(done, None) or next(measured, None) or choices[0]


def _fits(store: Store, measurement: Recipe, source: Checkpoint) -> bool:
    """Whether a base's measurement is there and serves this model: its merge may have changed shapes."""
    found = store.find(measurement)
    try:
        if found is not None:
            check_fits(found.path / FILE, source)
    except NotWhole as error:
        log.info("%s does not serve this model: it %s", measurement.name, error)
        return False
    return found is not None


def _verify(store: Store, artifact: Artifact, run: RunFolder) -> None:
    """Reads the result back (convert.verify).

    Raises:
        StageError: it is damaged.
    """
    run.status("verifying")
    if problems := [*store.verify(artifact), *verify_artifact(artifact)]:
        raise StageError(
            f"{artifact.path} is damaged: {'; '.join(problems)}",
            f"Remove it with task=artifacts artifacts.action=prune artifacts.name={artifact.name} and run it again.",
        )
    report = artifact.manifest["report"]
    note(
        f"verified: {len(artifact.files)} files by their digests, every linear's groups, order and scales; layers of "
        f"{report['measured_bits']:.3f} bits per weight, a head of {report['measured_head_bits']:.3f}"
    )


def _check_config(source: Checkpoint, chosen: Candidate) -> None:
    """Refuses a config.json that exllamav2 would read wrong. (What is converted gets both forms of the rope keys.)"""
    if _converts(source, chosen):
        check_rope(written_config(source.config, ""), source.path, chosen.max_context)
        return
    _check_old_form(source)
    check_rope(source.config, source.path, chosen.max_context)


def _check_old_form(source: Checkpoint) -> None:
    """exllamav2 reads the old rope keys only, and takes a theta of 10000 where there are none."""
    if written_config(source.config, "") != source.config and "rope_theta" not in source.config:
        raise ConfigError(
            f"{shown(source.path, 400)}/config.json has rope_parameters, which exllamav2 does not read",
            "Add rope_theta (and rope_scaling) to config.json beside them."
            if source.quantized
            else "Add convert.dtype=float16: the copy that is made has both forms.",
        )


def _length(config: Config, source: Checkpoint) -> int:
    """Tokens of a calibration row: no more than the model's positions, in whole pieces of 128 (its shuffled rows)."""
    positions = source.config.get("max_position_embeddings")
    most = positions if isinstance(positions, int) and positions > 0 else LENGTH
    asked = config.quant.calibration.length
    if asked is not None and asked > most:
        raise ConfigError(f"quant.calibration.length={asked} is more than the model's {most} positions")
    length = asked or min(LENGTH, most) // 128 * 128
    if length < 128:
        raise ConfigError(f"the model has {most} positions, and a calibration row has 128 tokens at least")
    return length


def _inputs(model: Model, source: Checkpoint) -> dict[str, Any]:
    """What the model is: our own artifact by its name, which is its key; a folder of the user's by its files."""
    return {"model": model.artifacts[-1].name if model.artifacts else fingerprint(source)}


def _measurement_recipe(config: Config, inputs: dict[str, Any], length: int) -> Recipe:
    """The recipe of the model's own measurement: the model and the calibration, no bits."""
    options: dict[str, Any] = {"length": length}
    file = None
    if calibration := Calibration.of(config, length):
        options["rows"] = calibration.rows
        inputs = inputs | {"calibration": calibration.identity()}
        file = str(calibration.file)
    settings = {f"quant.calibration.{name}": value for name, value in ({"file": file, "rows": None} | options).items()}
    return Recipe("measurement", VERSION, options, inputs, settings=settings | {"quant.measurement": None})


def _measured(store: Store, work: _Work, choice: _Choice, made: list[tuple[Artifact, bool]]) -> Path:
    """The measurement file: the user's, the store's, or one that is made now."""
    recipe = choice.measurement
    if recipe is None:
        path = _users_measurement(work.config, work.source)
        note("quant.measurement: of blocks with the names and shapes of this model's, whichever was measured")
        return path
    if choice.whose != _OWN:
        note(f"measurement: that of {choice.whose} is used ({recipe.name}); nothing is measured anew")
    room = _states_bytes(work.config, work.source, work.length, "measure")
    made.append(_build(store, recipe, partial(_measure, work), room, work))
    return made[-1][0].path / FILE


def _users_measurement(config: Config, source: Checkpoint) -> Path:
    """quant.measurement, which is set.

    Raises:
        ConfigError: it is none, or not of such a model.
    """
    path = folder(str(config.quant.measurement))
    try:
        check_fits(path, source)
    except NotWhole as error:
        raise ConfigError(
            f"quant.measurement={path} is not of this model: it {error}",
            "Leave quant.measurement out: the model is then measured, once for every width.",
        ) from None
    return path


def _build(
    store: Store, recipe: Recipe, make: Callable[[Path], Built], needed: int, work: _Work | None
) -> tuple[Artifact, bool]:
    started = time.monotonic()
    artifact, built = store.build(
        recipe,
        make=make,
        needed=0 if store.find(recipe) else needed,
        changed=lambda: _changed(work.source) if work else [],
        waiting=lambda: note(f"waiting for another run that builds {recipe.name}"),
    )
    how = f"{size(artifact.size)} in {time.monotonic() - started:.1f} s" if built else "found, nothing to build"
    note(f"{recipe.stage}: {how} -> {artifact.path}")
    return artifact, built


def _changed(source: Checkpoint) -> list[str]:
    return differences({"model": fingerprint(source)}, {"model": fingerprint(open_checkpoint(source.path))})


def _never(out: Path) -> Built:
    raise AssertionError(f"{out}: it was there a moment ago")


def _measure(work: _Work, out: Path) -> Built:
    """Builds the measurement artifact."""
    result = out / FILE
    job = _Job(work, "measure", out / "work", result)
    job.arguments += ["-om", str(result), "-l", str(work.length), "-ml", str(work.length)]
    report = job.done(lambda: judge_measurement(result, work.source))
    return Built(report | {"source": work.source.path.name, "length": work.length}, {})


def _quantize(work: _Work, out: Path, measurement: Path, whose: str) -> Built:
    """Builds the EXL2 artifact: the model's files at the top of the partial folder, where a reader expects them."""
    result = out / "result"
    job = _Job(work, "quantize", out / "work", result)
    job.arguments += ["-cf", str(result), "-m", str(measurement), "-b", str(work.chosen.bits)]
    job.arguments += ["-hb", str(work.head_bits), "-l", str(work.length)]

    def judge() -> dict[str, Any]:
        # Also what an earlier, killed process has moved already.
        _move_up(result, out)
        _refresh(work.source, out)
        check = partial(
            check_mix, work=out / "work", measurement=measurement, source=work.source, bits=work.chosen.bits
        )
        return judge_model(out, work.source, work.chosen.bits, work.head_bits, check)

    report = job.done(judge)
    if not math.isclose(report["measured_bits"], work.chosen.bits, rel_tol=TOLERANCE):
        note(f"its layers have {report['measured_bits']:.2f} bits per weight: no mix of widths comes nearer")
    source = {"source": work.source.path.name, "length": work.length, "measured_on": whose}
    return Built(report | source, {})


def _refresh(source: Checkpoint, out: Path) -> None:
    """The tokenizer and what else travels along, where they were edited since: no reason to convert anew."""
    for file in carried_files(source.path):
        copy = out / file.name
        if copy.is_file() and not filecmp.cmp(file, copy, shallow=False):
            copy.unlink()
            shutil.copyfile(file, copy)


def _move_up(result: Path, out: Path) -> None:
    """The finished model's files; not the source's index, which names other shards, nor its manifest."""
    if not result.is_dir():
        return
    finished = [file for file in sorted(result.iterdir()) if "_temp_" not in file.name]
    for file in finished:
        if file.name.endswith(".index.json") or file.name == MANIFEST:
            file.unlink()
        else:
            file.replace(out / file.name)


class _Job:
    """One run of the converter in a folder, continued where that folder has a usable job of its own."""

    def __init__(self, work: _Work, what: str, where: Path, result: Path) -> None:
        self._work = work
        self._what = what
        self._where = where
        self._result = result
        self._input = where.parent / "input"
        self.arguments = ["-i", str(self._input), "-o", str(where), "-so"]
        self.arguments += work.calibration.arguments(where) if work.calibration else []

    def done(self, judge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs it unless its result is there already; the report of the result.

        Raises:
            StageError, DoesNotFitError: there is no whole result, with why; or the model's numbers left float16's
                range, in this run or before it was interrupted.
        """
        record = Record(self._where, self.arguments, Linears.of(self._work.source).layers)
        state = record.resume()
        if state and (seen := seen_overflow(self._where)):  # it would go on for hours, to be refused in the end
            raise self._overflow(record, (f"{seen[0]}, as an earlier run saw that was interrupted", seen[1]))
        failure = None
        if state != "finished":
            self._clear(everything=not state)
            failure = self._run(state, record)
        if seen := seen_overflow(self._where):  # whole or not: it is of no use
            raise self._overflow(record, seen)
        try:
            report = judge()
        except OtherMix as error:  # whole, so that nothing is removed: a person decides
            raise StageError(
                f"{self._where.parent}: exllamav2 {error}",
                f"To make it anew, type task=artifacts artifacts.action=prune artifacts.name={self._where.parent.name}",
            ) from None
        except NotWhole as error:
            if failure is None:  # it says that it is finished, and it is not
                note(f"{self._where.parent.name}: finished, but it {error}: begun anew")
                self._clear(everything=True)
                return self.done(judge)
            raise failure.error(str(error)) from None
        for path in (self._input, *(p for p in (self._result,) if p.is_dir())):
            shutil.rmtree(path, ignore_errors=True)
        record.leave_only()
        return report

    def _overflow(self, record: Record, seen: Seen) -> StageError:
        """The error for states that are of no use, once nothing goes on with them any more."""
        record.forget()
        self._clear(everything=True)
        return overflow_error(*seen)

    def _clear(self, everything: bool) -> None:
        """Removes what a killed run left: the half result always, its working folder where it is of no use."""
        for path in (self._result, *((self._where,) if everything else ())):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for file in self._where.parent.iterdir():
            if file.is_file() and file.name not in (MANIFEST, RECIPE_NAME):
                file.unlink()
        self._where.mkdir(exist_ok=True)

    def _run(self, state: str, record: Record) -> Failure:
        work = self._work
        record.keep()
        if work.calibration:
            work.calibration.write(self._where, work.source.path, work.python)
        _link_input(work.source, self._input)
        title = {"measure": "measuring", "quantize": f"quantizing to {work.chosen.bits:g} bits"}[self._what]
        if state:
            note(f"{title}: going on where an earlier run stopped ({state})")
        hardware, need = work.config.hardware, needed(work.source, work.length)
        environ = os.environ | child_devices(nvml_gpus()[0])
        log_file = work.run.path / "convert.log"
        watched = OverflowWatch(log_file, self._where)

        def watch() -> None:
            watched.read()
            record.keep()

        with leased_gpu(hardware, need, work.run) as device, _progress(work.run, title) as show:
            return convert(
                work.python,
                MODULE,
                self.arguments,
                log_file,
                show,
                env={
                    "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
                    "CUDA_VISIBLE_DEVICES": visible_devices([device], environ),
                    "HF_HUB_OFFLINE": "1",
                },
                limits=cap_of(hardware, device),
                watch=watch,
            )


def _link_input(source: Checkpoint, where: Path) -> None:
    """The model as exllamav2 has to see it: old rope keys, nothing that is not the model's (it takes all there is)."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    for file in (*source.files, *carried_files(source.path)):
        (where / file.name).symlink_to(file.resolve())
    config = written_config(source.config, "")
    (where / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _progress(run: RunFolder, title: str) -> Iterator[OnStatus]:
    """Where the converter is as a bar, and in status.json: stage, completion (0 to 1), module, eta_s (seconds)."""
    last: dict[str, Any] = {"stage": None, "completion": 0.0, "module": None, "eta_s": None}
    said = 0.0
    run.status(title, **last)
    with steps(title) as show:

        def on_status(status: Status) -> None:
            nonlocal said, last
            show(status.done, status.stage, status.module, status.left_s)
            left = None if status.left_s is None else round(status.left_s, 1)
            now = {"stage": status.stage, "completion": status.done, "module": status.module or None, "eta_s": left}
            # A module of a large model takes minutes: its first one is not left out for coming soon after the stage.
            news = (now["stage"], now["module"] is None) != (last["stage"], last["module"] is None)
            last = now
            if news or time.monotonic() - said > _STATUS_S:
                said = time.monotonic()
                run.status(title, **last)

        try:
            yield on_status
        finally:  # where it ended, and no time left, whatever comes now
            with suppress(OutputError):
                run.status(title, **last | {"eta_s": None})


def _states_bytes(config: Config, source: Checkpoint, length: int, what: str) -> int:
    """The hidden states of the calibration rows on the disk, twice while they are replaced, and the rest."""
    calibration = Calibration.of(config, length)
    rows = calibration.rows if calibration else _ROWS[what]
    hidden = next(iter(Linears.of(source).layers.values()))[1]
    return 2 * rows * length * hidden * 2 + 2**24


def _model_bytes(source: Checkpoint, bits: float, head_bits: int) -> tuple[int, int]:
    """(of the finished model, of that once in pieces and once whole)."""
    linears = Linears.of(source)
    layers = math.ceil(sum(pad32(out) * rows for out, rows in linears.layers.values()) * bits / 8)
    vocab, hidden = linears.head
    head = head_file_bytes(hidden, pad32(vocab), head_bits)
    return layers + head + 2 * vocab * hidden, 2 * (layers + head) + 2 * vocab * hidden
