"""A 70B on all GPUs of a machine, each capped to 24 GiB. Made for four of them, runs on two or more.

    four_gpus.py run OUT WORK [--only PART ...] [--minutes N] [--tiny]
    four_gpus.py report OUT

Parts, in the order of what matters most: bandwidth; exl2-4, exl2-6, exl2-8 (automatic split, the largest context that
the plan has); vllm-16 (the plan's refusal of the 16-bit 70B), vllm-forced (the same, started in spite of it, with
dummy weights), vllm-gptq (4 bits, tensor parallel over all GPUs), vllm-same (the embedded model on one GPU and on all);
nf4 (an 8B over all GPUs, planned layer by layer); sweep-one, sweep-all (4, 6 and 8 bits of a slice of a 1B).

Each part is one OUT/PART.json, written as soon as it is over; what is there is not done again, what failed is. One
70B at a time is on the disk, or in shared memory. vLLM's parts need an interpreter that has it, EXL2's one that has
exllamav2; both may run into one OUT, one after the other. `--tiny` takes models that are loaded in a moment: it proves
the way, and its numbers mean nothing.

The models are made up: true shapes and files, random words, so that they show memory, placement and speed, and answer
noise. A cap of 24 GiB on a larger card is the plan's and the engine's own limit (hardware.memory_gib): emulated.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, save
from exl2_depth import (
    BIG_ANSWER,
    BIG_CONTEXT,
    POSITIONS,
    ROOT,
    SHAPES,
    SLICE,
    TimeIsOver,
    big_row,
    copy_bandwidth,
    do,
    fresh,
    gpu_weights,
    keep,
    kept,
    largest,
    limit,
    median_rate,
    one_answer,
    ours,
    parts_of,
    roomy,
    section,
    together,
    visible,
)
from made_up import Shape
from made_up_fast import exl2_bytes, gptq_bytes, write_config, write_exl2, write_gptq, write_plain
from plan_accuracy import CACHE_LOG
from thin_gpu import answer, compare, dense, held_out, live

from orchestrator import embedded
from orchestrator.backends.protocol import Request
from orchestrator.config import (
    BackendConfig,
    Config,
    HardwareConfig,
    ModelConfig,
    ParallelConfig,
    PathsConfig,
    QuantConfig,
    RunConfig,
)
from orchestrator.hardware import GIB, nvml_gpus
from orchestrator.tasks.record import memory
from orchestrator.tasks.session import Session, look

CAP_GIB = 24.0
WIDTHS = (4, 6, 8)
LAYERED_CONTEXT, LAYERED_STEP_GIB = 2048, 0.25  # tokens; of the caps that are tried for `nf4`
GPTQ_CONTEXT, GPTQ_IN_FLIGHT, GPTQ_ANSWER = 4096, 64, 128  # tokens, requests, tokens
LOADED = re.compile(r"Model loading took ([\d.]+) GiB")  # as vLLM logs it, of each rank

Result = dict[str, Any]


def asked(work: Path, engine: str, model: Path, context: int | None, **more: Any) -> Config:
    """A configuration as a person would type it: all GPUs, each capped."""
    every = list(range(len(visible())))
    return replace(
        Config(
            backend=BackendConfig(name=engine),
            model=ModelConfig(path=str(model), max_context=context),
            hardware=HardwareConfig(gpus=every, memory_gib=CAP_GIB),
            paths=PathsConfig(artifacts=str(work / "artifacts")),
            run=RunConfig(in_flight=1),
        ),
        **more,
    )


def held(session: Session) -> Result:
    """What was planned and what was held, of each GPU."""
    return {
        "load_s": round(session.ready.load_s, 1),
        "weights": gpu_weights(session),
        "planned_weights": {gpu.device: gpu.weights for gpu in session.chosen.gpus},
        "devices": memory(session.planned, session.chosen, session.watch, session.engine.stats()),
        "cap": int(CAP_GIB * GIB),
        "versions": session.ready.versions,
    }


# --- EXL2, split automatically


def exl2(work: Path, shape: Shape, bits: int) -> Result:
    """The 70B in one width, with the largest context that the plan has for it, which one answer then fills."""
    folder = roomy(exl2_bytes(shape, bits), work, f"four-gpus-{work.name}-exl2-{bits}")
    write_exl2(folder, shape, POSITIONS, bits)
    try:
        config = asked(work, "exllamav2", folder, None)
        context = largest(replace(config, model=replace(config.model, max_context=BIG_CONTEXT)))
        if not context:
            return {"fits": False, "reasons": list(look(config, planning=False).plan.chosen.reasons)}
        config = replace(config, model=replace(config.model, max_context=context))
        with live(work, f"four-exl2-{bits}", config) as session:
            near = one_answer(session, context - BIG_ANSWER, BIG_ANSWER, seed=100)
            rates = {
                "decode_tokens_per_s": median_rate(session, 64, BIG_ANSWER, "decode_tokens_per_s"),
                "prefill_tokens_per_s": median_rate(session, BIG_CONTEXT - 8, 2, "prefill_tokens_per_s"),
            }
            return {"fits": True, "context": context, "near_full": near, **rates, **held(session)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- vLLM, tensor parallel over all


def plain_config(work: Path, shape: Shape) -> Path:
    return write_config(work / "models" / f"plain-{shape.layers}-layers", shape, POSITIONS)


def tensor(work: Path, model: Path, context: int | None, **more: Any) -> Config:
    return asked(work, "vllm", model, context, parallel=ParallelConfig(tensor=len(visible())), **more)


def vllm_16(work: Path, shape: Shape, on: Sequence[str] = ()) -> Result:
    """What task=plan says of 16 bits, from config.json alone: exit code 3, and why. `on`: instead of this machine."""
    folder = fresh(work / "vllm-16")
    every = ",".join(map(str, range(len(visible()))))
    here = [f"hardware.gpus=[{every}]", f"hardware.memory_gib={CAP_GIB}", f"parallel.tensor={len(visible())}"]
    said = ["task=plan", f"model.path={plain_config(work, shape)}", "backend=vllm", "quant.bits=16", *(on or here)]
    done = subprocess.run(ours(folder, *said), capture_output=True, text=True, check=False, cwd=ROOT)
    plan = json.loads(next(folder.glob("runs/*/plan.json")).read_text(encoding="utf-8"))
    (chosen,) = (c for c in plan["candidates"] if (c["backend"], c["method"]) == ("vllm", "none"))
    keys = ("device", "total", "capacity", "weights")
    return {
        "exit_code": done.returncode,
        "fits": chosen["fits"],
        "reasons": chosen["reasons"],
        "gpus": [{key: gpu[key] for key in keys} for gpu in chosen["gpus"]],
    }


FORCED = """
import json, sys
from vllm import LLM
if __name__ == "__main__":
    LLM(**json.loads(sys.argv[1]))
"""


def vllm_forced(work: Path, shape: Shape) -> Result:
    """The same without a plan: vLLM started by hand on as much of each card, its weights dummies."""
    script = work / "forced.py"
    script.write_text(FORCED)
    given = {
        "model": str(plain_config(work, shape)),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "tensor_parallel_size": len(visible()),
        "max_model_len": GPTQ_CONTEXT,
        "gpu_memory_utilization": share_of_the_card(),
    }
    command = ["timeout", "--kill-after=15", "300", sys.executable, str(script), json.dumps(given)]  # with its workers
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    errors = [line for line in said.splitlines() if "Error" in line]
    return {
        "exit_code": done.returncode,
        "gpu_memory_utilization": given["gpu_memory_utilization"],
        "weights_gib": sorted(set(map(float, LOADED.findall(said)))),
        "said": errors[-1][-500:] if errors else "",
    }


def share_of_the_card() -> float:
    """The cap as a share of the smallest card."""
    return round(min(1.0, CAP_GIB * GIB / min(gpu.total for gpu in nvml_gpus()[0])), 4)


def vllm_gptq(work: Path, shape: Shape) -> Result:
    """The 70B in GPTQ at 4 bits: the start, the cache that was promised, tokens/s alone and many at a time."""
    folder = roomy(gptq_bytes(shape, 4), work, f"four-gpus-{work.name}-gptq")
    write_gptq(folder, shape, POSITIONS, 4)
    try:
        config = tensor(work, folder, GPTQ_CONTEXT, run=RunConfig(in_flight=GPTQ_IN_FLIGHT))
        with live(work, "four-gptq", config) as session:
            log = max((work / "runs").glob("four-gptq-*/engine.log"), key=lambda file: file.stat().st_mtime)
            said = CACHE_LOG.findall(log.read_text(errors="replace"))
            token = 2 * shape.layers * max(1, shape.kv_heads // len(visible())) * shape.hidden // shape.heads * 2
            promised = min(gpu.kv_cache for gpu in session.chosen.gpus) // token
            return {
                "context": session.chosen.max_context,
                "kv_tokens": {"promised": promised, "real": int(said[-1].replace(",", "")) if said else None},
                "tokens_per_s": {str(count): at_once(session, count) for count in (1, GPTQ_IN_FLIGHT)},
                **held(session),
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def at_once(session: Session, count: int, rounds: int = 3) -> float:
    """tokens/s of so many answers at the same time, the median of some rounds after one that is not counted."""
    random, found = np.random.default_rng(count), []
    for turn in range(rounds + 1):
        asked_now = [Request(f"{turn}-{i}", random.integers(10, 4000, 64).tolist(), GPTQ_ANSWER) for i in range(count)]
        began = time.monotonic()
        made, _ = answer(session, asked_now)
        found.append(made / (time.monotonic() - began))
    return round(float(np.median(found[1:])), 1)


def vllm_same(work: Path, shape: Shape) -> Result:
    """The embedded model on all GPUs against one: KL and top-1 agreement over every token of the vocabulary."""
    windows, scores = held_out(), []
    for ranks in (1, len(visible())):
        config = asked(work, "vllm", embedded.BASE, 512, parallel=ParallelConfig(tensor=ranks))
        config = replace(config, hardware=replace(config.hardware, gpus=list(range(ranks))))
        with live(work, f"four-same-{ranks}", config) as session:
            scores.append([session.engine.score(window, session.planned.spec.vocab) for window in windows])
    one, every = scores
    return {"ranks": len(visible()), **compare(every, [dense(score) for score in one])}


# --- bitsandbytes, layer by layer


def nf4(work: Path, shape: Shape) -> Result:
    """NF4 on cards so small that all of them are needed: where each module goes is the plan's, and checked."""
    model = write_plain(work / "models" / f"nf4-{shape.layers}-layers", shape, LAYERED_CONTEXT)
    config = asked(work, "bitsandbytes", model, LAYERED_CONTEXT, quant=QuantConfig(method="nf4", bits=4.0))
    for step in range(4, int(CAP_GIB / LAYERED_STEP_GIB)):
        cap = step * LAYERED_STEP_GIB
        config = replace(config, hardware=replace(config.hardware, memory_gib=cap))
        chosen = look(config, planning=False).plan.chosen
        if chosen.fits:
            break
    with live(work, "four-nf4", config) as session:
        rate = median_rate(session, 64, 64, "decode_tokens_per_s")
        near = one_answer(session, LAYERED_CONTEXT - 8, 4, seed=100)
        result = held(session)
        places = {device: list(session.chosen.device_map.values()).count(device) for device in result["weights"]}
        return result | {"cap": int(cap * GIB), "modules": places, "near_full": near, "decode_tokens_per_s": rate}


# --- a sweep


def sweep(work: Path, shape: Shape, gpus: Sequence[int], part: str) -> Result:
    """Three widths, one measurement, on these GPUs."""
    model = write_plain(work / "models" / f"sweep-{part}-{shape.layers}", shape, 2048)
    return together(model, work / "sweep" / part, part, gpus)


# --- all parts


def parts(work: Path, tiny: bool) -> dict[str, Callable[[], Result]]:
    """Every part by its name, in the order in which they are run."""
    big = SHAPES["tiny"] if tiny else SHAPES["70b"]
    small = SHAPES["tiny"] if tiny else SHAPES["8b"]
    sliced = SHAPES["tiny"] if tiny else SLICE
    every = range(len(visible()))
    return {
        "bandwidth": lambda: {"copy_bytes_per_s": copy_bandwidth()},
        **{f"exl2-{bits}": partial(exl2, work, big, bits) for bits in WIDTHS},
        "vllm-16": partial(vllm_16, work, big),
        "vllm-forced": partial(vllm_forced, work, big),
        "vllm-gptq": partial(vllm_gptq, work, big),
        "vllm-same": partial(vllm_same, work, big),
        "nf4": partial(nf4, work, small),
        "sweep-one": partial(sweep, work, sliced, [0], "one"),
        "sweep-all": partial(sweep, work, sliced, every, "all"),
    }


def run(out: Path, work: Path, only: Sequence[str], tiny: bool) -> None:
    """The parts that were asked for. A later call for other parts may be one of another interpreter."""
    here, before = environment(), kept(out, "environment") or {"versions": {}}
    keep(out, "environment", here | {"versions": before["versions"] | here["versions"]})
    for name, work_of in parts(work, tiny).items():
        if not only or name in only:
            do(out, name, work_of)


# --- the report


def ratio(found: dict[str, Result]) -> float | None:
    """The sweep on all GPUs over the one on one."""
    if not {"sweep-one", "sweep-all"} <= found.keys():
        return None
    every, one = (float(found[name]["seconds"]) for name in ("sweep-all", "sweep-one"))
    return round(every / one, 3)


def summary(every: dict[str, Result]) -> Result:
    """The numbers that the parts give; a part that failed has its error."""
    found = section(every, "")
    copied = found.get("bandwidth", {}).get("copy_bytes_per_s", {})
    loads = {name: part for name, part in found.items() if name.startswith("exl2-")}
    refused = {name: part["reasons"] for name, part in loads.items() if not part["fits"]}
    return {
        "exl2": {name: big_row(part, copied) for name, part in loads.items() if part["fits"]},
        "refused": refused | {name: found[name]["reasons"] for name in ("vllm-16",) if name in found},
        "forced": found.get("vllm-forced"),
        "gptq": found.get("vllm-gptq"),
        "same": found.get("vllm-same"),
        "nf4": found.get("nf4"),
        "sweep_all_over_one": ratio(found),
        "failed": {name: part["error"] for name, part in every.items() if "error" in part},
    }


def report(out: Path) -> None:
    """Prints the numbers, and keeps them with everything that was measured."""
    every = parts_of(out)
    where = every.pop("environment", None)
    said = summary(every)
    print(json.dumps(said, indent=1))
    print(save("four_gpus", {"summary": said, "parts": every}, where))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("out", type=Path)
    running.add_argument("work", type=Path)
    running.add_argument("--only", nargs="+", choices=list(parts(Path(), tiny=True)), default=[])
    running.add_argument("--minutes", type=float, default=1e6)
    running.add_argument("--tiny", action="store_true")
    commands.add_parser("report").add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(arguments.out)
        return
    out, work = arguments.out.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    limit(arguments.minutes)
    try:
        run(out, work, arguments.only, arguments.tiny)
    except TimeIsOver as error:
        sys.exit(f"{error}: what is done is kept")


if __name__ == "__main__":
    main()
