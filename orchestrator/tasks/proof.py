"""What an engine's own conversion has made is judged by the result: it is loaded once before it is given to anybody."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from orchestrator.artifacts import Artifact
from orchestrator.backends.table import BACKENDS
from orchestrator.config import HardwareConfig, changed, folder
from orchestrator.engine.handle import EngineProcess
from orchestrator.engine.interpreters import require
from orchestrator.engine.wire import Ready
from orchestrator.errors import DoesNotFitError, EngineUnavailableError, OrchestratorError, StageError
from orchestrator.hardware import detect
from orchestrator.hardware.types import FOR_THE_CPU
from orchestrator.pipeline import Model
from orchestrator.plan.asks import asks_of
from orchestrator.plan.estimate import estimate
from orchestrator.report.console import note
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.gpus import leased, same
from orchestrator.tasks.record import record_load, unproved
from orchestrator.tasks.session import Planned, start_engine

CONTEXT = 256  # tokens: the smoke pass and the warm-up take eight each


def load_once(planned: Planned, model: Model, run: RunFolder) -> tuple[Model, str]:
    """Loads a quantized artifact in its engine's own process, with the smoke pass, unless one was loaded well before.

    Returns:
        The model, whose artifact now says that it was loaded; and why it was not: "" where it was, or needs not be.

    Raises:
        StageError: it does not load, or gives what is not finite.
    """
    artifact = unproved(planned.plan.chosen, model)
    if artifact is None:
        return model, ""
    try:
        short, python = _short(planned)
        with ExitStack() as holding:
            short, chosen = holding.enter_context(leased(short, short.plan.chosen, run))
            run.status("loading")
            note(f"loading it once in a process of its own ({chosen.label}) ...")
            log = run.path / "engine.log"
            with start_engine(short, chosen, python, model.path, log, model.adapters) as (engine, _):
                ready = _ready(engine, artifact)
    except (DoesNotFitError, EngineUnavailableError) as error:  # they say nothing of the artifact
        note(f"{artifact.name} is not loaded here: {error.message}")
        return model, error.message
    where = ", ".join(device for device in ready.placement if device != "cpu")
    note(f"{artifact.name}: loaded in {ready.load_s:.1f} s on {where}, smoke pass finite, released")
    return record_load(planned.config, planned.plan.chosen, model, ready), ""


def _ready(engine: EngineProcess, artifact: Artifact) -> Ready:
    """What the engine says once it has loaded.

    Raises:
        StageError: it did not load; the artifact may be at fault.
        DoesNotFitError, EngineUnavailableError: this machine is.
    """
    try:
        return engine.wait_ready()
    except (DoesNotFitError, EngineUnavailableError):
        raise
    except OrchestratorError as error:  # of the artifact, or of the engine: only a person can tell
        raise StageError(
            f"{artifact.path} was made, and did not load: {error.message}",
            f"{error.hint.rstrip('. ')}{'. ' * bool(error.hint)}It is kept: the same command loads it again. "
            f"task=artifacts artifacts.action=prune artifacts.name={artifact.name} removes it.",
        ) from error


def _short(planned: Planned) -> tuple[Planned, str]:
    """The plan of a short context on this machine, wherever the engine itself places whole layers; its interpreter.

    Raises:
        DoesNotFitError: the GPUs have no room for it, other runs or not.
        EngineUnavailableError: there is no GPU here, or no engine.
    """
    chosen = planned.plan.chosen
    short = {
        "model.max_context": min(CONTEXT, planned.spec.max_context),
        "run.in_flight": 1,
        "parallel.tensor": None,
        "parallel.gpu_split": None,
    }
    # As for the conversion: a profile's caps, and its GPUs, are of the machine that the model is for.
    asked = planned.config.hardware
    here = HardwareConfig(gpus=asked.gpus, reserve_gib=asked.reserve_gib)
    config = changed(planned.config, short | ({"hardware": here} if planned.elsewhere else {}))
    machine = detect(config.hardware, planning=False, artifacts=folder(config.paths.artifacts), idle=True)
    if not machine.gpus:
        why = (text.removesuffix(FOR_THE_CPU) for text in machine.notes)
        raise EngineUnavailableError("; ".join(why) or "there is no GPU")
    python = require(BACKENDS[chosen.backend], config, machine.device)
    ask = next((ask for ask in asks_of(config, planned.spec, machine) if same(ask, chosen)), None)
    if ask is None:
        raise EngineUnavailableError(f"{chosen.label} is not planned for this machine's GPUs")
    found = estimate(config, planned.spec, machine, ask)
    if not found.fits:
        raise DoesNotFitError("; ".join(found.reasons))
    plan = replace(planned.plan, chosen=found, hardware=machine)
    return replace(planned, config=config, hardware=machine, plan=plan, elsewhere=False), python
