"""ExLlamaV2 in depth, on one or two GPUs: sweeps, speed against the bare generator, a 70B, conversions that are killed.

    exl2_depth.py sweep  OUT WORK [--only PART ...]   4, 6 and 8 bits: our one measurement, and a converter run for each
    exl2_depth.py speed  OUT WORK NAME                tokens/s of ours and of the bare generator, in turns
    exl2_depth.py big    OUT WORK [--only PART ...]   a 70B on two GPUs of 24 GiB each
    exl2_depth.py kill   OUT WORK [--only PART ...]   a conversion that is killed at five moments, and resumed
    exl2_depth.py report OUT ...                      everything that is there into results/exl2_depth.json

Parts of `sweep`: separate-4, separate-6, separate-8, in-turn (one process, one width after the other, on one GPU), one,
two (all widths at once on so many GPUs, by Hydra's joblib launcher, or in processes of their own without it). NAMEs of
`speed`: 1b, 8b, tiny. Parts of `big`: bandwidth, plan, auto, split, tensor (each layer cut over both), largest,
largest-split. Parts of `kill`: whole, again, 10, 30, 50, 70, 90 (percent of an uninterrupted run's time), quality (the
KL to float32 of every result that is there).

Each part is one OUT/PART.json, written as soon as it is over; what is there is not done again, what failed is. Of a
part that several OUTs have the last one's counts; a sweep is compared with the separate runs of its own OUT.
`--minutes N` ends a command after so many minutes, with what it has. `--tiny` takes a model that is loaded in a
moment: it proves the way, and its numbers mean nothing. CUDA_VISIBLE_DEVICES chooses the GPUs; `two` and
`big` need two of them, the others take the first.

The 1B, the 8B and the 70B are made up: true shapes and files, random words, so that they show memory, placement and
speed, and answer noise. Copy bandwidth is that of torch's copy of 4 GiB on one GPU, bytes read and bytes written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from common import environment, save
from made_up import ONE_B, Shape
from made_up_fast import exl2_bytes, write_config, write_exl2, write_plain
from plan_accuracy import SHAPES as PLANNED
from plan_accuracy import is_right
from thin_gpu import compare as compared_scores
from thin_gpu import held_out, live, reference, side_by_side

from orchestrator.backends.protocol import Failed, Finished, Request
from orchestrator.config import (
    BackendConfig,
    CacheConfig,
    Config,
    HardwareConfig,
    ModelConfig,
    ParallelConfig,
    PathsConfig,
    RunConfig,
)
from orchestrator.hardware import GIB, host_memory, nvml_gpus
from orchestrator.tasks.record import memory
from orchestrator.tasks.session import Session, look

ROOT = Path(__file__).resolve().parents[1]
SHARED_MEMORY = Path("/dev/shm")
LEAVE_HOST = 40 * GIB  # for processes, beside a model that lies in shared memory

SHAPES = {**PLANNED, "70b": Shape(8192, 28672, 80, 64, 8, 128256)}  # Llama-3-70B
SLICE = replace(ONE_B, layers=4)
WIDTHS = (4, 6, 8)
OURS = ("in-turn", "one", "two")
SWEEP = (*(f"separate-{bits}" for bits in WIDTHS), *OURS)
SWEEP_BOUNDS = {"one": 0.67, "two": 0.5}  # our time over that of the separate runs

SPEED_CONTEXT, SPEED_IN_FLIGHT, DECODED = 1024, 16, 256  # tokens, requests, tokens of an answer at batch 1
RATES = ("ours", "bare", "ratio", "quartiles_of_turns")
CAP_GIB = 24.0
BITS = 4

BIG = ("bandwidth", "plan", "auto", "split", "tensor", "largest", "largest-split")
POSITIONS = 131_072  # that the 70B has, as Llama-3.1's
BIG_CONTEXT, BIG_ANSWER = 4096, 128  # tokens
SPLITS = [[quarter / 4, 22.0] for quarter in range(64, 89)]  # GiB, of which the plan tells the best

MOMENTS = (10, 30, 50, 70, 90)  # percent of an uninterrupted run's time
KILL = ("whole", "again", *map(str, MOMENTS), "quality")

Result = dict[str, Any]


class TimeIsOver(BaseException):
    """The minutes are over, or somebody ended us. No Exception: nothing on the way may take it for one of its own."""


def keep(out: Path, name: str, value: Result) -> Result:
    """Writes a part's result at once."""
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".{name}.{os.getpid()}"
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(out / f"{name}.json")
    print(f"{name}: {json.dumps(value)[:1500]}", flush=True)
    return value


def kept(out: Path, name: str) -> Result | None:
    """A part's result; None where there is none, or it failed."""
    file = out / f"{name}.json"
    found: Result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"error": "not run"}
    return None if "error" in found else found


def do(out: Path, name: str, work: Callable[[], Result]) -> None:
    """One part, unless it is there already. What goes wrong is its result, but for the end of the time."""
    if kept(out, name) is not None:
        print(f"{name}: done already", flush=True)
        return
    try:
        keep(out, name, work())
    except Exception as error:  # the next part may go well; this one is tried again
        keep(out, name, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


def limit(minutes: float) -> None:
    """Raises TimeIsOver in this thread after so many minutes, whatever it waits for; also where we are terminated."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeIsOver(f"ended by {signal.Signals(number).name}")

    signal.signal(signal.SIGALRM, over)
    signal.signal(signal.SIGTERM, over)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def fresh(folder: Path) -> Path:
    """An empty folder: what an earlier try left there would be found, not made."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def visible() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(gpu.index) for gpu in nvml_gpus()[0]] if named is None else named.split(",")


def ours(folder: Path, *arguments: str) -> list[str]:
    """The command line of a user, with its artifacts and runs under a folder."""
    paths = [f"paths.artifacts={folder / 'artifacts'}", f"paths.runs={folder / 'runs'}"]
    return [sys.executable, "-m", "orchestrator", *arguments, *paths]


def finished(commands: Sequence[Sequence[str]], log: Path, env: dict[str, str] | None = None) -> float:
    """Runs commands at the same time; seconds until all have ended.

    Raises:
        RuntimeError: one failed.
    """
    began = time.monotonic()
    with log.open("ab") as output:
        running = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            for command in commands
        ]
        try:
            codes = [process.wait() for process in running]
        finally:  # also when the time is over: the converters that they started notice it
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - began
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {log.read_text(errors='replace')[-2000:]}")
    return round(seconds, 2)


# --- a sweep of three widths


def sweep(out: Path, work: Path, only: Sequence[str], tiny: bool) -> None:
    """Each part in folders of its own: nothing of one is found by another."""
    shape, name = (SHAPES["tiny"], "tiny") if tiny else (SLICE, "1b-4-layers")
    for part in only or SWEEP:
        model = work / "models" / f"{part}-{name}"  # of its own: parts may run at the same time
        write_plain(model, shape, 2048)
        folder = work / "sweep" / part
        if part.startswith("separate"):
            do(out, f"sweep-{part}", partial(separate, model, folder, part.rpartition("-")[2]))
        elif part == "two" and len(visible()) < 2:
            keep(out, f"sweep-{part}", {"note": "there are no two GPUs"})
        else:
            do(out, f"sweep-{part}", partial(together, model, folder, part, [0, 1] if part == "two" else [0]))


def separate(model: Path, folder: Path, bits: str) -> Result:
    """One width by exllamav2's converter as its README says, on the first GPU; it measures anew."""
    command = [sys.executable, "-m", "exllamav2.conversion.convert_exl2", "-i", str(model), "-b", bits]
    command += ["-o", str(folder / "work"), "-cf", str(folder / "result")]
    (fresh(folder) / "work").mkdir()
    env = {"CUDA_VISIBLE_DEVICES": visible()[0], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    seconds = finished([command], folder / "log", env)
    made = folder / "result" / "output.safetensors"
    if not made.exists():  # its exit code says nothing
        raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
    return {"seconds": seconds, "bytes": made.stat().st_size}


def together(model: Path, folder: Path, part: str, gpus: Sequence[int]) -> Result:
    """All widths by ours, with one measurement: the first that needs it makes it, and the others wait for it."""
    fresh(folder)
    on = f"hardware.gpus=[{','.join(map(str, gpus))}]"
    asked = ["task=convert", "backend=exllamav2", f"model.path={model}", on]
    every = ours(folder, "-m", *asked, width(*WIDTHS))
    if part == "in-turn":
        how, commands = "one process", [every]
    elif importlib.util.find_spec("hydra_plugins"):
        how, commands = "hydra/launcher=joblib", [[*every, "hydra/launcher=joblib"]]
    else:
        how, commands = "a process each", [ours(folder, *asked, width(bits)) for bits in WIDTHS]
    seconds = finished(commands, folder / "log")
    made = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("artifacts/*/manifest.json")}
    if sum(name.startswith("exl2-") for name in made) != len(WIDTHS):
        raise RuntimeError(f"it made {sorted(made)}: {(folder / 'log').read_text(errors='replace')[-2000:]}")
    loaded = {name: said["report"].get("loaded", {}).get("load_s") for name, said in made.items()}
    return {
        "seconds": seconds,
        "how": how,
        "stages": {name: said["seconds"] for name, said in made.items()},
        "load_s": {name: took for name, took in loaded.items() if took is not None},
    }


def width(*bits: int) -> str:
    return f"quant.bits={','.join(map(str, bits))}"


# --- a live engine


def configured(work: Path, model: Path, context: int, **more: Any) -> Config:
    """An EXL2 model that is there already, as a person would ask for it."""
    return replace(
        Config(
            backend=BackendConfig(name="exllamav2"),
            model=ModelConfig(path=str(model), max_context=context),
            hardware=HardwareConfig(gpus=[0], memory_gib=CAP_GIB),
            paths=PathsConfig(artifacts=str(work / "artifacts")),
        ),
        **more,
    )


def one_answer(session: Session, prompt: int, answer: int, seed: int) -> Result:
    """A prompt of so many random tokens, alone; rates by the engine's own clock, tokens/s.

    Raises:
        RuntimeError: it was not answered.
    """
    tokens = np.random.default_rng([prompt, seed]).integers(10, 4000, prompt).tolist()
    session.engine.submit(Request("one", tokens, answer))
    while True:
        for event in session.engine.events(timeout=None):
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Finished):
                return {
                    "prompt": event.prompt_tokens,
                    "answer": event.completion_tokens,
                    "ttft_s": event.ttft_s,
                    "prefill_tokens_per_s": event.prompt_tokens / event.prefill_s,
                    "decode_tokens_per_s": (event.completion_tokens - 1) / event.decode_s if event.decode_s else None,
                }


def median_rate(session: Session, prompt: int, answer: int, key: str, rounds: int = 3) -> float:
    """The median of some answers, after one that is not counted."""
    found: list[float] = [one_answer(session, prompt, answer, seed)[key] for seed in range(rounds + 1)]
    return round(statistics.median(found[1:]), 2)


def gpu_weights(session: Session) -> dict[str, int]:
    """Bytes of weights on each GPU; all of them are read for each token of one sequence."""
    return {device: size for device, size in session.ready.placement.items() if device.startswith("cuda")}


def copy_bandwidth() -> dict[str, float]:
    """Bytes per second of a copy on each GPU, in a process of its own, which then holds nothing."""
    done = subprocess.run([sys.executable, __file__, "copy"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def copy() -> None:
    """Prints it: 20 copies of 4 GiB, after three that are not counted; read and written bytes both count."""
    import torch

    size, times, found = 4 * GIB, 20, {}
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            source = torch.ones(size // 4, dtype=torch.float32, device="cuda")
            target = torch.empty_like(source)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            for number in range(times + 3):
                if number == 3:
                    begin.record()
                target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            found[f"cuda:{index}"] = 2 * size * times / (begin.elapsed_time(end) / 1000)
            del source, target
            torch.cuda.empty_cache()
    print(json.dumps(found))


# --- speed against the bare generator


def speed(work: Path, name: str, turns: int) -> Result:
    """Ours and bare, both loaded on the first GPU, in turns; beside them a copy, and how fast the weights are read."""
    model = write_exl2(work / "models" / f"speed-{name}", SHAPES[name], SPEED_CONTEXT, BITS)
    config = configured(work, model, SPEED_CONTEXT, run=RunConfig(in_flight=SPEED_IN_FLIGHT))
    copied = copy_bandwidth()["cuda:0"]
    env = {"CUDA_VISIBLE_DEVICES": visible()[0], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with live(work, f"speed-{name}", config) as session:
        decode = median_rate(session, 64, DECODED, "decode_tokens_per_s")
        *_, found = side_by_side("exl2", session, turns, env)
        return {
            "decode_tokens_per_s": decode,
            "weights": sum(gpu_weights(session).values()),
            "copy_bytes_per_s": copied,
            "generator": session.ready.versions.get("generator", ""),
            **found,
        }


# --- a 70B on two GPUs of 24 GiB each


def big(out: Path, work: Path, only: Sequence[str], tiny: bool) -> None:
    shape, name = (SHAPES["tiny"], "tiny") if tiny else (SHAPES["70b"], "70b")
    if "plan" in (only or BIG):
        do(out, "big-plan", lambda: planned_elsewhere(work, shape, name))
    if len(visible()) < 2:
        keep(out, "big-note", {"note": "there are no two GPUs: nothing of it was loaded"})
        return
    if "bandwidth" in (only or BIG):
        do(out, "big-bandwidth", lambda: {"copy_bytes_per_s": copy_bandwidth()})
    loaded = [part for part in (only or BIG) if part not in ("bandwidth", "plan")]
    if all(kept(out, f"big-{part}") for part in loaded):
        return
    model = written(out, work, shape, name)
    for part in loaded:
        do(out, f"big-{part}", partial(on_two, work, model, part))


def written(out: Path, work: Path, shape: Shape, name: str) -> Path:
    """The model's folder, in shared memory where there is room, else in WORK.

    Raises:
        RuntimeError: there is room nowhere.
    """
    needed = exl2_bytes(shape, BITS)
    folder = roomy(needed, work, f"exl2-depth-{name}")
    began = time.monotonic()
    write_exl2(folder, shape, POSITIONS, BITS)
    if kept(out, "big-model") is None:
        took = round(time.monotonic() - began, 1)
        made_up = "true tensors with random words: it shows memory, placement and speed, and answers noise"
        where = "shared memory" if folder.is_relative_to(SHARED_MEMORY) else "disk"
        keep(out, "big-model", {"bytes": needed, "write_s": took, "on": where, "made_up": made_up})
    return folder


def roomy(needed: int, work: Path, name: str) -> Path:
    """A folder of this name where there is room for so many bytes, or that is there already."""
    in_memory = SHARED_MEMORY.is_dir() and host_memory()[1] > needed + LEAVE_HOST
    for place in (SHARED_MEMORY, work):
        if (folder := place / name).is_dir():
            return folder
    for place in (*((SHARED_MEMORY,) if in_memory else ()), work):
        if shutil.disk_usage(place).free > 1.02 * needed:
            return Path(place / name)
    raise RuntimeError(f"neither {SHARED_MEMORY} nor {work} has room for {needed / GIB:.1f} GiB")


def planned_elsewhere(work: Path, shape: Shape, name: str) -> Result:
    """What task=plan says of the unquantized model on four cards of 24 GiB: EXL2 at every width."""
    folder = fresh(work / "big-plan")
    model = write_config(work / "models" / f"{name}-config", shape, POSITIONS)
    asked = ["task=plan", "backend=exllamav2", "hardware=4x24gb", f"model.path={model}"]
    finished([ours(folder, *asked)], folder / "log")
    plan = json.loads(next(folder.glob("runs/*/plan.json")).read_text(encoding="utf-8"))
    keys = ("bits", "fits", "max_context", "largest_context", "reasons")
    return {
        "hardware": "4x24gb",
        "candidates": [
            {key: c[key] for key in keys} | {"gpus": [gpu["total"] for gpu in c["gpus"]]}
            for c in plan["candidates"]
            if c["method"] == "exl2"
        ],
    }


def asked_for(work: Path, model: Path, part: str) -> Config:
    """The configuration of one part: split automatically, by hand or within layers, a usual context or the largest."""
    config = configured(
        work,
        model,
        BIG_CONTEXT,
        hardware=HardwareConfig(gpus=[0, 1], memory_gib=CAP_GIB),
        cache=CacheConfig(bits=4 if "largest" in part else None),
        run=RunConfig(in_flight=1),
    )
    if "split" in part:
        ways = [replace(config, parallel=ParallelConfig(gpu_split=split)) for split in SPLITS]
        config = max(ways, key=largest)
    if part == "tensor":
        config = replace(config, parallel=ParallelConfig(tensor=2))
    if "largest" in part:
        config = replace(config, model=replace(config.model, max_context=largest(config)))
    return config


def largest(config: Config) -> int:
    """The longest context of one sequence, by the plan; 0 where the model does not fit."""
    chosen = look(config, planning=False).plan.chosen
    return chosen.largest_context or 0 if chosen.fits else 0


def on_two(work: Path, model: Path, part: str) -> Result:
    """Loads it, answers, and says what it took of each GPU."""
    config = asked_for(work, model, part)
    context = config.model.max_context
    assert context is not None
    began = time.monotonic()
    with live(work, f"big-{part}", config) as session:
        ready = time.monotonic() - began
        near = one_answer(session, context - BIG_ANSWER, BIG_ANSWER, seed=100)
        rate = {
            "decode_tokens_per_s": median_rate(session, 64, BIG_ANSWER, "decode_tokens_per_s"),
            "prefill_tokens_per_s": median_rate(session, BIG_CONTEXT - 8, 2, "prefill_tokens_per_s"),
        }
        stats = session.engine.stats()
        devices = memory(session.planned, session.chosen, session.watch, stats)
        return {
            "context": context,
            "cache_bits": session.chosen.cache_bits,
            "gpu_split": list(session.chosen.gpu_split),
            "tensor_parallel": session.chosen.tensor_parallel,
            "ready_s": round(ready, 1),
            "load_s": round(session.ready.load_s, 1),
            "near_full": near,
            **rate,
            "weights": gpu_weights(session),
            "planned_weights": {gpu.device: gpu.weights for gpu in session.chosen.gpus},
            "devices": devices,
            "cap": int(CAP_GIB * GIB),
            "host_peak": stats.host_peak_bytes,
            "versions": session.ready.versions,
        }


# --- conversions that are killed


def kill(out: Path, work: Path, only: Sequence[str]) -> None:
    """The embedded model at 4 bits. Every part has a store of its own; `whole` is what the others are compared with."""
    for part in only or KILL:
        if part == "quality":
            keep(out, "kill-quality", quality(work, kept(out, "kill-quality") or {}))
        else:
            do(out, f"kill-{part}", partial(converted, out, work, part))


def converted(out: Path, work: Path, part: str) -> Result:
    """A conversion without an interruption, or with one and the same command again.

    Raises:
        RuntimeError: a command failed, or `whole` is not there to be compared with.
    """
    whole, result = work / "kill" / "whole" / "result", work / "kill" / part / "result"
    uninterrupted = [known["seconds"] for name in ("whole", "again") if (known := kept(out, f"kill-{name}"))]
    if part != "whole" and not (uninterrupted and whole.is_dir()):
        raise RuntimeError("the uninterrupted conversion, whole, has to be made first")
    folder = fresh(work / "kill" / part)
    command = ours(folder, "task=convert", "backend=exllamav2", "quant.bits=4", f"output.path={result}")
    command.append("hardware.gpus=[0]")
    found: Result = {}
    if part not in ("whole", "again"):
        found = killed_after(command, min(uninterrupted) * int(part) / 100, folder)
    found["seconds"] = finished([command], folder / "log")
    return found if part == "whole" else found | {"compared": compare(whole, result)}


def quality(work: Path, known: Result) -> Result:
    """Each result's KL to float32 and its top-1 agreement, on held-out text: files that differ may be as good.

    Args:
        known: those that were scored before.
    """
    windows = held_out()
    wanted = reference(work, windows)
    found = dict(known)
    for part in KILL:
        if part not in known and (folder := work / "kill" / part / "result").is_dir():
            with live(work, f"kill-{part}", configured(work, folder, max(map(len, windows)))) as session:
                scores = [session.engine.score(tokens, session.planned.spec.vocab) for tokens in windows]
                found[part] = compared_scores(scores, wanted)
    return found


def killed_after(command: Sequence[str], seconds: float, folder: Path) -> Result:
    """Starts a command, and kills its whole process group; what it was doing then.

    Raises:
        RuntimeError: it had ended before.
    """
    log = folder / "killed.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
                raise RuntimeError(f"it had ended already, with code {code}: {log.read_text(errors='replace')[-2000:]}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    statuses = [json.loads(file.read_text()) for file in sorted(folder.glob("runs/*/status.json"))]
    return {"killed_after_s": round(seconds, 2), "status": statuses[-1] if statuses else None}


def compare(one: Path, other: Path) -> Result:
    """Every tensor of two folders of safetensors: how many are the same, and how those that are not differ.

    Returns:
        JSON-able; of a tensor that differs, the share of its elements that do and the largest difference.
    """
    first, second = dict(tensors(one)), dict(tensors(other))
    different: dict[str, Result] = {}
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            different[name] = {"kind": [f"{t.dtype} {list(t.shape)}" for t in (a, b)]}
        elif a.tobytes() != b.tobytes():
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
            different[name] = {"share": float((a != b).mean()), "largest": float(gap.max())}
    return {
        "tensors": len(first),
        "equal": len(first.keys() & second.keys()) - len(different),
        "missing": sorted(first.keys() ^ second.keys()),
        "different": different,
        "files_equal": not different and first.keys() == second.keys(),
    }


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Every tensor of a folder's safetensors."""
    from safetensors.numpy import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


# --- the report


def parts_of(out: Path) -> dict[str, Result]:
    """Every part that is there, without tracebacks."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))}
    return {name: {k: v for k, v in part.items() if k != "traceback"} for name, part in found.items()}


def section(parts: dict[str, Result], prefix: str) -> dict[str, Result]:
    """The parts of one command that went well, by their short names."""
    return {
        name.removeprefix(prefix): part
        for name, part in parts.items()
        if name.startswith(prefix) and "error" not in part and "note" not in part
    }


def sweep_rows(parts: dict[str, Result]) -> dict[str, Result]:
    """Our seconds over those of the separate runs together, by the way of ours; none where one of those is missing."""
    names = [f"separate-{bits}" for bits in WIDTHS]
    if not set(names) <= set(parts):
        return {}
    whole = sum(parts[name]["seconds"] for name in names)
    rows = {}
    for name in (name for name in OURS if name in parts):
        ratio, bound = round(parts[name]["seconds"] / whole, 3), SWEEP_BOUNDS.get(name)
        rows[name] = {
            "ours_s": parts[name]["seconds"],
            "separate_s": round(whole, 1),
            "ratio": ratio,
            "bound": bound,
            "within": bound is None or ratio <= bound,
        }
    return rows


def speed_row(part: Result) -> Result:
    """Ours over bare, and what of the copy's bandwidth the weights alone take."""
    read = part["weights"] * part["decode_tokens_per_s"]
    counts = part["in_flight"]
    return {
        "turns": min(len(found["turns"]["ours"]) for found in counts.values()),
        **{key: {count: found[key] for count, found in counts.items()} for key in RATES},
        "bound": part["bound"],
        "within": part["within_bound"],
        "weights": part["weights"],
        "read_bytes_per_s": read,
        "copy_bytes_per_s": part["copy_bytes_per_s"],
        "share_of_copy": round(read / part["copy_bytes_per_s"], 4),
    }


def big_row(part: Result, copied: dict[str, float]) -> Result:
    """One load of the 70B: inside the caps, the plan right, what of the bandwidth's limit it decodes at.

    The GPUs work in turn, each on its own weights, and a token takes the sum of their times; where each layer is cut,
    they work at the same time, and it takes the longest.
    """
    times = [size / copied[device] for device, size in part["weights"].items()] if copied else [0.0]
    at_least = max(times) if part.get("tensor_parallel", 1) > 1 else sum(times)
    return {
        "context": part["context"],
        "inside_caps": all(device["measured"] <= part["cap"] for device in part["devices"]),
        "plan_right": all(is_right(d["predicted"], d["measured"]) for d in part["devices"]),
        "gpus": {d["device"]: {"planned": d["predicted"], "measured": d["measured"]} for d in part["devices"]},
        "load_s": part["load_s"],
        "decode_tokens_per_s": part["decode_tokens_per_s"],
        "limit_tokens_per_s": round(1 / at_least, 2) if at_least else None,
        "share_of_limit": round(part["decode_tokens_per_s"] * at_least, 4) if at_least else None,
        "prefill_tokens_per_s": part["prefill_tokens_per_s"],
    }


def kill_row(parts: dict[str, Result]) -> Result:
    """How many of the killed conversions ended with the uninterrupted one's tensors; `again`: with no kill at all."""
    killed = {name: part for name, part in parts.items() if name not in ("whole", "again", "quality")}
    again = parts.get("again")
    return {
        "killed": len(killed),
        "equal": sum(part["compared"]["files_equal"] for part in killed.values()),
        "differ": {
            name: f"{len(part['compared']['different'])} of {part['compared']['tensors']} tensors"
            for name, part in killed.items()
            if not part["compared"]["files_equal"]
        },
        "uninterrupted_equal": again["compared"]["files_equal"] if again else None,
        "kl": {name: part["kl_mean"] for name, part in parts.get("quality", {}).items()},
    }


def summary(*outs: dict[str, Result]) -> Result:
    """The numbers that the parts give."""
    parts = {name: part for found in outs for name, part in found.items()}
    loads, killed = section(parts, "big-"), section(parts, "kill-")
    copied = loads.get("bandwidth", {}).get("copy_bytes_per_s", {})
    return {
        "sweep": {name: row for found in outs for name, row in sweep_rows(section(found, "sweep-")).items()},
        "speed": {name: speed_row(part) for name, part in section(parts, "speed-").items()},
        "big": {name: big_row(part, copied) for name, part in loads.items() if "devices" in part},
        "kill": kill_row(killed) if killed else None,
    }


def report(folders: Sequence[Path]) -> None:
    """Prints the numbers, and keeps them with everything that was measured."""
    outs = [parts_of(folder) for folder in folders]
    places = [found["environment"] for found in outs if "environment" in found]
    where = max(places, key=lambda place: len(place["gpus"]), default=None)
    found = summary(*outs)
    print(json.dumps(found, indent=1))
    print(save("exl2_depth", {"summary": found, "outs": outs}, where))


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, known in (("sweep", SWEEP), ("speed", None), ("big", BIG), ("kill", KILL)):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("work", type=Path)
        command.add_argument("--minutes", type=float, default=1e6)
        if known is None:
            command.add_argument("name", choices=[shape for shape in SHAPES if shape != "70b"])
            command.add_argument("--turns", type=int, default=12)
        else:
            command.add_argument("--only", nargs="+", choices=known, default=[])
        if name in ("sweep", "big"):
            command.add_argument("--tiny", action="store_true")
    commands.add_parser("report").add_argument("outs", nargs="+", type=Path)
    commands.add_parser("copy")
    return parser.parse_args(argv)


def main() -> None:
    arguments = arguments_of(sys.argv[1:])
    if arguments.command == "copy":
        copy()
        return
    if arguments.command == "report":
        report(arguments.outs)
        return
    out, work = arguments.out.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    here = environment()
    if len((kept(out, "environment") or {"gpus": []})["gpus"]) <= len(here["gpus"]):  # of the parts, that with the most
        keep(out, "environment", here)
    limit(arguments.minutes)
    try:
        match arguments.command:
            case "sweep":
                sweep(out, work, arguments.only, arguments.tiny)
            case "speed":
                do(out, f"speed-{arguments.name}", lambda: speed(work, arguments.name, arguments.turns))
            case "big":
                big(out, work, arguments.only, arguments.tiny)
            case "kill":
                kill(out, work, arguments.only)
    except TimeIsOver as error:
        sys.exit(f"{error}: what is done is kept")


if __name__ == "__main__":
    main()
