"""The plan against real memory: each engine, width, context and cache with its context full, NVML beside the plan.

    plan_accuracy.py run OUT WORK [--only TEXT ...] [--tiny] [--resume] [--minutes N] [--case-minutes N]
    plan_accuracy.py list [--tiny]
    plan_accuracy.py report OUT ... [--into NAME]

`run` appends one line of JSON a case to OUT/cases.jsonl as soon as it is over, models stay in WORK. `--only` takes the
cases whose name matches one of these patterns, `*` being anything; `--minutes` starts no case after so many; `--resume`
skips those that are done. Runs may go side by side, each with an OUT of its own: memory is counted for each process.
`--tiny` is a small model on this machine's CPU: it proves the way, and its numbers mean nothing. `report` prints the
table and writes results/NAME.json, which is plan_accuracy.json unless NAME says otherwise.

A case: the engine loads a made-up model as it was planned, then answers as many prompts at once as the plan has in
flight, each a few tokens short of the context. Measured is the most that its processes held on each GPU at any time,
loading included. A case is right where the plan is within 300 MiB of that, or within 2% of it. vLLM takes what it is
given: of it the cache that was promised is compared with the one that it has, in the bytes of their tokens. Beside it,
what the method of `accelerate estimate-memory` says: parameters times bytes of a weight, compared with all GPUs
together.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, save
from made_up import ONE_B, Shape
from made_up_fast import write_exl2, write_gptq, write_plain

from orchestrator.backends.protocol import Failed, Finished, Request
from orchestrator.config import (
    BackendConfig,
    CacheConfig,
    Config,
    HardwareConfig,
    ModelConfig,
    OffloadConfig,
    ParallelConfig,
    PathsConfig,
    QuantConfig,
    RunConfig,
)
from orchestrator.engine.handle import EngineProcess
from orchestrator.hardware import DRIVER_KEEPS, GIB, MIB, nvml_gpus
from orchestrator.plan.planner import runnable
from orchestrator.plan.types import Candidate
from orchestrator.tasks.record import memory
from orchestrator.tasks.session import Planned, look, start_engine

SHAPES = {
    "tiny": Shape(256, 512, 2, 4, 4, 4096),
    "1b": ONE_B,
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama-3.1-8B
}
POSITIONS = 32_768  # that the made-up models have
ANSWER = 4  # tokens: the rest of the context is prompt
IN_FLIGHT = {128: 2, 2048: 4, 8192: 2, 32_768: 1}  # by context
WRITES = {"exl2": write_exl2, "gptq": write_gptq}  # a quantized model, by method
# Of the weights on the GPU, where the others are offloaded, which bitsandbytes does not quantize.
STAYS = {"transformers": 0.5, "bitsandbytes": 0.75}
RIGHT_BYTES, RIGHT_SHARE = 300 * MIB, 0.02
# What it counts beside its cache, in GiB, as it logs it.
ACCOUNT_LOG = re.compile(r"([\d.]+) GiB for (weight|peak activation|non-torch memory|CUDAGraph memory)")
CACHE_LOG = re.compile(r"GPU KV cache size: ([\d,]+) tokens")  # as vLLM logs it


@dataclass(frozen=True)
class Case:
    """One line of the result.

    Attributes:
        cards: GPUs; 0: the CPU.
        cap_gib: of each card's memory; None: all that is free.
        eager: vLLM without compilation and graphs, which start a minute sooner.
    """

    engine: str
    method: str
    bits: int
    shape: str
    context: int
    cache_bits: int = 16
    cards: int = 1
    cap_gib: float | None = None
    offload: bool = False
    eager: bool = False

    @property
    def name(self) -> str:
        parts = [self.engine, self.method, f"{self.bits}bit", self.shape, f"c{self.context}", f"kv{self.cache_bits}"]
        parts += [f"{self.cards}cards"] * (self.cards > 1) + ["offload"] * self.offload + ["eager"] * self.eager
        return "-".join(parts)

    @property
    def in_flight(self) -> int:
        return IN_FLIGHT[self.context]


def cases(tiny: bool) -> Iterator[Case]:
    """All of them, small models and quick starts first."""
    plain = (("transformers", "none", 16), ("bitsandbytes", "nf4", 4), ("bitsandbytes", "int8", 8))
    if tiny:
        yield from (Case(*way, "tiny", 128, cards=0) for way in plain)
        return
    for shape in ("1b", "8b"):
        for context in (8192, 2048, 32_768):
            yield from (Case(*way, shape, context) for way in plain)
            for bits in (4, 6, 8):
                yield from (Case("exllamav2", "exl2", bits, shape, context, cache) for cache in (16, 8, 4))
        yield Case("exllamav2", "gptq", 4, shape, 8192)
        yield Case("exllamav2", "none", 16, shape, 8192)
        yield from (Case(*way, shape, 2048, offload=True) for way in plain[:2])
        yield Case("vllm", "none", 16, shape, 8192, cap_gib=40)
        yield Case("vllm", "gptq", 4, shape, 8192, cap_gib=40, eager=True)
        yield from (Case("vllm", "none", 16, shape, context, cap_gib=40, eager=True) for context in (32_768, 2048))
        yield Case("vllm", "none", 16, shape, 8192, 8, cap_gib=40, eager=True)
    yield Case("transformers", "none", 16, "8b", 2048, cards=2, cap_gib=16)
    yield Case("bitsandbytes", "nf4", 4, "8b", 2048, cards=2, cap_gib=8)
    yield Case("exllamav2", "exl2", 4, "8b", 8192, cards=2, cap_gib=7)
    yield Case("vllm", "none", 16, "8b", 8192, cards=2, cap_gib=24, eager=True)


# --- one case


def configured(case: Case, model: Path, work: Path) -> Config:
    """The configuration that a person would type for it."""
    hardware = HardwareConfig(gpus=list(range(case.cards)), memory_gib=case.cap_gib)
    return Config(
        backend=BackendConfig(name=case.engine, engine_args={"enforce_eager": True} if case.eager else {}),
        model=ModelConfig(path=str(model), max_context=case.context),
        quant=QuantConfig(method=case.method, bits=float(case.bits)),
        cache=CacheConfig(bits=None if case.cache_bits == 16 else case.cache_bits),
        parallel=ParallelConfig(tensor=case.cards if case.engine == "vllm" else None),
        hardware=hardware if case.cards else HardwareConfig(profile="cpu"),
        run=RunConfig(in_flight=case.in_flight),
        paths=PathsConfig(artifacts=str(work / "artifacts")),
    )


def offloaded(config: Config) -> Config:
    """The same on a card that has room for a part of the weights only, the others in host memory."""
    whole = look(config, planning=False).plan.chosen.gpus[0]
    room = whole.total - (1 - STAYS[config.backend.name]) * whole.weights
    card = max(room + RIGHT_BYTES, room / (1 - RIGHT_SHARE)) + DRIVER_KEEPS  # with the margin
    hardware = replace(config.hardware, memory_gib=round(card / GIB, 3))
    return replace(config, hardware=hardware, offload=OffloadConfig(cpu_gib=256.0))


def measure(case: Case, work: Path, seconds: float) -> dict[str, Any]:
    """The case's result; `seconds`: after which it is given up.

    Raises:
        OrchestratorError: the engine is not here, or failed.
        RuntimeError: a request failed, or nobody tells what was held.
        TimeoutError: it took too long.
    """
    began = time.monotonic()
    shape = SHAPES[case.shape]
    model = plain = write_plain(work / "models" / case.shape, shape, POSITIONS)
    if case.method in WRITES:
        quantized = work / "models" / f"{case.shape}-{case.method}-{case.bits}"
        model = WRITES[case.method](quantized, shape, POSITIONS, case.bits)
    # EXL2 is planned before it is made; who has GPTQ plans from what is there.
    config = configured(case, plain if case.method == "exl2" else model, work)
    planned = look(offloaded(config) if case.offload else config, planning=False)
    if not planned.plan.chosen.fits:
        return {"fits": False, "reasons": list(planned.plan.chosen.reasons)}
    chosen, python = runnable(planned.plan, planned.config, planned.hardware)
    log = work / "logs" / f"{case.name}-{time.time():.0f}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with start_engine(planned, chosen, python, model, log) as (engine, watch):
        ready = engine.wait_ready(seconds)
        fill(engine, case, shape.vocab, deadline)
        stats = engine.stats()
        devices = memory(planned, chosen, watch, stats)
    if len(devices) < len(chosen.gpus or (chosen.host,)):
        raise RuntimeError("what the engine held could not be measured on every device")
    return {
        "fits": True,
        "devices": devices,
        "parts": {device.device: device.to_json() for device in chosen.gpus or (chosen.host,)},
        "offloads": chosen.offloads,
        "weights_only": weights_only(planned, case.bits),
        "kv_tokens": kv_tokens(case, chosen, log),
        "vllm_counts_gib": vllm_counts(log) if case.engine == "vllm" else None,
        "generator": ready.versions.get("generator"),
        "versions": ready.versions,
        "load_s": round(ready.load_s, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def fill(engine: EngineProcess, case: Case, vocab: int, deadline: float) -> None:
    """Fills the whole context of every sequence in flight.

    Raises:
        RuntimeError: a request failed.
        TimeoutError: the deadline has passed.
    """
    random = np.random.default_rng(1)
    for number in range(case.in_flight):
        # Unequally long, as prompts are: what pads them to a batch has more to keep.
        tokens = random.integers(10, min(vocab, 4000), case.context - ANSWER - number).tolist()
        engine.submit(Request(str(number), tokens, ANSWER))
    open_requests = case.in_flight
    while open_requests:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError("the answers took too long")
        for event in engine.events(timeout=left):
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            open_requests -= isinstance(event, Finished)


def weights_only(planned: Planned, bits: int) -> dict[str, int]:
    """As `accelerate estimate-memory` counts: every parameter at the width that was asked for. Bytes."""
    layers: dict[str, int] = {}
    for tensor in planned.spec.tensors:
        part = str(tensor.layer) if tensor.layer is not None else tensor.name
        layers[part] = layers.get(part, 0) + int(np.prod(tensor.shape)) * bits // 8
    return {"total": planned.spec.parameters * bits // 8, "largest_layer": max(layers.values())}


def kv_tokens(case: Case, chosen: Candidate, log: Path) -> dict[str, int] | None:
    """Tokens that vLLM's cache has: by the plan, and as it says itself.

    Raises:
        RuntimeError: it says nothing.
    """
    if case.engine != "vllm" or not chosen.gpus:
        return None
    shape = SHAPES[case.shape]
    heads = max(1, shape.kv_heads // chosen.tensor_parallel)
    token = 2 * shape.layers * heads * shape.hidden // shape.heads * case.cache_bits // 8
    found = CACHE_LOG.findall(log.read_text(errors="replace"))
    if not found:
        raise RuntimeError(f"{log} does not say how many tokens the cache has")
    promised = min(gpu.kv_cache for gpu in chosen.gpus) // token
    return {"promised": promised, "real": int(found[-1].replace(",", ""))}


def vllm_counts(log: Path) -> dict[str, float]:
    """What the last rank of vLLM that said so counts beside its cache: GiB by its own names."""
    return {what: float(gib) for gib, what in ACCOUNT_LOG.findall(log.read_text(errors="replace"))}


# --- all cases


def run(arguments: argparse.Namespace) -> None:
    out, work = Path(arguments.out), Path(arguments.work)
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n", encoding="utf-8")
    done = {name for name, record in read(out).items() if "error" not in record} if arguments.resume else set()
    gpus = len(nvml_gpus()[0])
    began = time.monotonic()
    for case in cases(arguments.tiny):
        if arguments.only and not any(fnmatch(case.name, f"*{text}*") for text in arguments.only):
            continue
        if case.name in done or case.cards > gpus:
            print(f"{case.name}: {'done already' if case.name in done else 'too few GPUs'}", flush=True)
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"{case.name}: no time is left for it", flush=True)
            continue
        try:
            result = measure(case, work, 60 * arguments.case_minutes)
        except Exception as error:  # the next case may go well; this one is tried again with --resume
            result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        record = {"case": case.name, **asdict(case), "in_flight": case.in_flight, **result}
        with (out / "cases.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(said(record), flush=True)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Case -> its last record; a half line is none."""
    found: dict[str, dict[str, Any]] = {}
    file = out / "cases.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["case"]] = record
    return found


def said(record: dict[str, Any]) -> str:
    """One record in one line."""
    if "error" in record or not record["fits"]:
        return f"{record['case']}: {record.get('error') or record['reasons']}"
    devices = [
        f"{d['device']} planned {d['predicted'] / MIB:,.0f} MiB, measured {d['measured'] / MIB:,.0f} by {d['by']}"
        f" (its own count {(d['own'] or 0) / MIB:,.0f})"
        for d in record["devices"]
    ]
    tokens = f"; KV tokens {record['kv_tokens']}" if record["kv_tokens"] else ""
    return f"{record['case']}: {'; '.join(devices)}{tokens} ({record['seconds']} s)"


# --- the report


def is_right(predicted: float, measured: float) -> bool:
    """Within 300 MiB of what was measured, or within 2% of it."""
    return abs(predicted - measured) <= max(RIGHT_BYTES, RIGHT_SHARE * measured)


def compared(record: dict[str, Any]) -> list[tuple[int, int]]:
    """(planned, measured) of each device, bytes; of vLLM (the cache that it has, the one that was promised).

    So that "too little" is a plan that promised too much, as it is everywhere else.
    """
    tokens = record["kv_tokens"]
    if tokens is None:
        return [(d["predicted"], d["measured"]) for d in record["devices"]]
    cache = min(part["kv_cache"] for part in record["parts"].values())
    return [(round(cache / tokens["promised"] * tokens["real"]), cache)]


def weights_miss(record: dict[str, Any]) -> int | None:
    """Bytes that the weights alone are above what all devices held; None where that method says nothing of them.

    It knows of no offload, and vLLM fills what it is given.
    """
    if record["offloads"] or record["kv_tokens"]:
        return None
    return int(record["weights_only"]["total"] - sum(d["measured"] for d in record["devices"]))


def row(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of some cases: how many are right on every device, and the worst misses. Bytes."""
    right = [all(is_right(*pair) for pair in compared(r)) for r in records]
    every = [planned - measured for r in records for planned, measured in compared(r)]
    plain = [(r, miss) for r in records if (miss := weights_miss(r)) is not None]
    plain_right = [is_right(r["weights_only"]["total"], r["weights_only"]["total"] - miss) for r, miss in plain]
    return {
        "cases": len(records),
        "right": sum(right),
        "too_little": min([0, *every]),
        "too_much": max([0, *every]),
        "weights_only_cases": len(plain),
        "weights_only_right": sum(plain_right),
        "weights_only_worst": max((miss for _, miss in plain), key=abs, default=0),
    }


def table(records: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The matrix as lines of Markdown, and its numbers: a row for each engine and method, one for all."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        ways.setdefault(f"{record['engine']} {record['method']}", []).append(record)
    rows = {way: row(found) for way, found in ways.items()} | ({"all": row(records)} if records else {})
    lines = [
        "| engine | cases | right | worst: too little | too much | weights only: right | worst |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, r in rows.items():
        weights = (
            f"{_share(r['weights_only_right'], r['weights_only_cases'])} | {r['weights_only_worst'] / MIB:+,.0f} MiB"
            if r["weights_only_cases"]
            else "- | -"
        )
        lines.append(
            f"| {way} | {r['cases']} | {_share(r['right'], r['cases'])} | {r['too_little'] / MIB:,.0f} MiB "
            f"| {r['too_much'] / MIB:+,.0f} MiB | {weights} |"
        )
    return lines, rows


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f}%)"


def report(outs: Sequence[Path], into: str = "plan_accuracy") -> None:
    """Prints everything that was measured, and keeps it. Of a case that several runs have, the last one's counts."""
    found = {case: record for out in outs for case, record in read(out).items()}
    measured = [record for record in found.values() if "error" not in record and record["fits"]]
    lines, rows = table(measured)
    left_out = {name: r.get("error") or r["reasons"] for name, r in found.items() if r not in measured}
    print("\n".join((*map(said, found.values()), "", *lines)))
    kept = [{key: value for key, value in r.items() if key != "traceback"} for r in found.values()]
    places = [json.loads((out / "environment.json").read_text(encoding="utf-8")) for out in outs]
    where = places[-1] | {"versions": {k: v for place in places for k, v in place["versions"].items()}}
    print(save(into, {"table": lines, "rows": rows, "left_out": left_out, "cases": kept}, where))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("out")
    running.add_argument("work")
    running.add_argument("--only", nargs="+", default=[])
    running.add_argument("--resume", action="store_true")
    running.add_argument("--minutes", type=float, default=1e6)
    running.add_argument("--case-minutes", type=float, default=10)
    listing = commands.add_parser("list")
    for command in (running, listing):
        command.add_argument("--tiny", action="store_true")
    reporting = commands.add_parser("report")
    reporting.add_argument("outs", nargs="+", type=Path)
    reporting.add_argument("--into", default="plan_accuracy")
    arguments = parser.parse_args()
    match arguments.command:
        case "run":
            run(arguments)
        case "list":
            print("\n".join(case.name for case in cases(arguments.tiny)))
        case "report":
            report(arguments.outs, arguments.into)


if __name__ == "__main__":
    main()
