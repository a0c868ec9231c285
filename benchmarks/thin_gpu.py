"""The thin way on GPUs: EXL2 and vLLM, from .bin + adapter to answers, against float32 and against bare scripts.

Runs in pieces; each writes OUT/<name>.json as soon as it has something, models and artifacts stay in WORK.

    thin_gpu.py embedded OUT WORK [WAY ...]      answers, KL and top-1 agreement against float32 on the CPU
    thin_gpu.py model OUT WORK                   writes a random Llama of about 1 B parameters to WORK
    thin_gpu.py speed OUT WORK WAY ...           load, tokens/s at 1 and 16 in flight, plan against measured per GPU
    thin_gpu.py ratio OUT WORK WAY [TURNS]       the same generator in a bare script, both loaded, turn by turn
    thin_gpu.py collect OUT                      all of them into results/thin_gpu.json, with the bounds

Ways of `embedded`: exl2-4, exl2-6, exl2-8, vllm-tp1, vllm-tp2. Of `speed`: exl2-split, exl2-auto, vllm-tp1, vllm-tp2.
Of `ratio`: exl2-one (one GPU), vllm-tp1. The 1 B model's weights are random: it shows memory, placement and speed only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, save

from orchestrator import embedded
from orchestrator.backends.protocol import Delta, Failed, Finished, Request, Score
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
from orchestrator.errors import OrchestratorError
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.record import memory
from orchestrator.tasks.session import Session, look, open_session
from orchestrator.tokenizer import Tokenizer

WINDOW, WINDOWS = 256, 12  # held-out tokens
PROMPT, ANSWER, IN_FLIGHT = 64, 256, (1, 16)  # of the speed: tokens, tokens, requests
CONTEXT = 1024
CAP_GIB = 24.0
BOUNDS = {"exl2": 0.97, "vllm": 0.95}  # tokens/s of ours over those of the bare script
SHAPE = {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocab": 4096}


def exl2(bits: float, split: list[float] | None = None, gpus: list[int] | None = None) -> dict[str, Any]:
    return {
        "backend": BackendConfig(name="exllamav2"),
        "quant": QuantConfig(bits=bits),
        "parallel": ParallelConfig(gpu_split=split),
        "hardware": HardwareConfig(gpus=gpus),
    }


def vllm(tensor: int) -> dict[str, Any]:
    return {
        "backend": BackendConfig(name="vllm"),
        "quant": QuantConfig(bits=16.0, method="none"),
        "parallel": ParallelConfig(tensor=tensor),
        "hardware": HardwareConfig(gpus=list(range(tensor))),
    }


EMBEDDED_WAYS = {
    **{f"exl2-{bits}": exl2(float(bits), gpus=[0]) for bits in (4, 6, 8)},
    "vllm-tp1": vllm(1),
    "vllm-tp2": vllm(2),
}
SPEED_WAYS = {
    "exl2-split": exl2(4.0, [0.4, 24.0], [0, 1]),
    "exl2-auto": exl2(4.0, gpus=[0, 1]),
    "exl2-one": exl2(4.0, gpus=[0]),
    "vllm-tp1": vllm(1),
    "vllm-tp2": vllm(2),
}


def write(out: Path, name: str, value: dict[str, Any]) -> None:
    """A partial result, at once."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {json.dumps(value)[:1500]}", flush=True)


@contextmanager
def live(work: Path, name: str, config: Config) -> Iterator[Session]:
    """A live engine; its run folder stays in WORK/runs/NAME."""
    folder = work / "runs" / f"{name}-{time.time():.0f}"
    folder.mkdir(parents=True)
    with open_session(look(config, planning=False), RunFolder(folder)) as session:
        yield session


def configured(work: Path, way: dict[str, Any], **more: Any) -> Config:
    return replace(Config(paths=PathsConfig(artifacts=str(work / "artifacts"))), **way, **more)


# --- the embedded model: quality


def held_out() -> list[list[int]]:
    """Windows of held-out text, as tokens."""
    tokenizer = Tokenizer(embedded.BASE, None, False)
    tokens = tokenizer.encode_text((embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8"))
    return [tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(min(WINDOWS, len(tokens) // WINDOW))]


def dense(score: Score) -> np.ndarray:
    """The distributions of one sequence as log-probabilities, [T - 1, vocabulary]."""
    tokens, values = np.asarray(score.top_tokens), np.asarray(score.top_logprobs)
    out = np.empty_like(values)
    np.put_along_axis(out, tokens, values, axis=1)
    return out


def reference(work: Path, windows: list[list[int]]) -> list[np.ndarray]:
    """float32 on the CPU through our own engine, base + adapter; kept in WORK."""
    file = work / "reference.npz"
    if not file.exists():
        way = {
            "backend": BackendConfig(name="transformers"),
            "quant": QuantConfig(method="none", bits=32.0),
            "hardware": HardwareConfig(profile="cpu"),
        }
        config = configured(work, way, run=RunConfig(in_flight=1))
        with live(work, "reference", config) as session:
            vocab = session.planned.spec.vocab
            np.savez(file, *[dense(session.engine.score(w, vocab)) for w in windows])
    with np.load(file) as stored:
        return [stored[f"arr_{i}"] for i in range(len(windows))]


def compare(found: list[Score], wanted: list[np.ndarray]) -> dict[str, Any]:
    """Perplexity; KL(float32 || way) and top-1 agreement over all positions.

    Tokens that a way does not list count as one, with its tail's mass: exact where it lists all, else a lower bound.
    """
    kl: list[np.ndarray] = []
    agree: list[np.ndarray] = []
    for score, want in zip(found, wanted, strict=True):
        tokens = np.asarray(score.top_tokens)
        have = np.asarray(score.top_logprobs, dtype=np.float64)
        want_top = np.take_along_axis(want, tokens, axis=1).astype(np.float64)
        part = (np.exp(want_top) * (want_top - have)).sum(axis=1)
        rest = np.clip(1.0 - np.exp(want_top).sum(axis=1), 0.0, 1.0)
        tail = np.asarray(score.tail, dtype=np.float64)
        listed_all = tokens.shape[1] == want.shape[1]
        if not listed_all:
            part = part + np.where(rest > 1e-9, rest * (np.log(rest + 1e-30) - np.log(tail + 1e-30)), 0.0)
        kl.append(part)
        agree.append(want.argmax(axis=1) == tokens[:, 0])
    logprobs = np.concatenate([np.asarray(score.logprobs) for score in found])
    every = np.concatenate(kl)
    return {
        "tokens": len(logprobs),
        "listed": int(np.asarray(found[0].top_tokens).shape[1]),
        "perplexity": round(float(np.exp(-logprobs.mean())), 4),
        "kl_mean": float(f"{max(0.0, every.mean()):.4g}"),
        "kl_p99": float(f"{np.quantile(every, 0.99):.4g}"),
        "top1_agreement": round(float(np.concatenate(agree).mean()), 4),
    }


def embedded_ways(out: Path, work: Path, names: list[str]) -> None:
    """Answers and quality of each way on the embedded model with its adapter."""
    windows = held_out()
    wanted = reference(work, windows)
    for name in names or list(EMBEDDED_WAYS):
        started = time.monotonic()
        try:
            with live(work, name, configured(work, EMBEDDED_WAYS[name])) as session:
                ready = time.monotonic() - started
                found = [session.engine.score(w, session.planned.spec.vocab) for w in windows]
                result = {
                    "ready_s": round(ready, 2),
                    **compare(found, wanted),
                    "answers": answers(session),
                    **measured(session),
                    "reports": {a.name: a.manifest["report"] for a in session.model.artifacts if "merge" not in a.name},
                    "seconds": {a.name: a.manifest["seconds"] for a in session.model.artifacts},
                }
        except OrchestratorError as error:
            result = {"error": str(error), "traceback": traceback.format_exc()}
        write(out, f"embedded-{name}", result)


def answers(session: Session) -> list[dict[str, str]]:
    """The embedded prompts' answers, greedy."""
    prompts = [json.loads(line)["prompt"] for line in embedded.PROMPTS.read_text(encoding="utf-8").splitlines()]
    requests = [
        Request(str(i), session.tokenizer.encode([{"role": "user", "content": p}]), 64) for i, p in enumerate(prompts)
    ]
    _, texts = answer(session, requests)
    return [{"prompt": prompt, "answer": texts[str(i)]} for i, prompt in enumerate(prompts)]


def measured(session: Session) -> dict[str, Any]:
    """The plan against what was measured, per GPU."""
    stats = session.engine.stats()
    chosen, placement = session.chosen, session.ready.placement
    peaks = [*stats.gpu_peak_bytes, *[None] * len(chosen.gpus)]
    return {
        "load_s": round(session.ready.load_s, 3),
        "warmup_s": round(session.ready.warmup_s, 3),
        "gpus": [
            {
                "device": gpu.device,
                "weights_planned": gpu.weights,
                "weights": placement.get(gpu.device, 0),
                "peak_planned": gpu.total - gpu.runtime,
                "peak": peak,
                "capacity": gpu.capacity,
            }
            for gpu, peak in zip(chosen.gpus, peaks, strict=False)
        ],
        "memory": memory(session.planned, session.chosen, session.watch, stats),  # NVML's
        "host": {"planned": chosen.host.total, "peak": stats.host_peak_bytes, "weights": placement.get("cpu", 0)},
        "plan": {"max_context": chosen.max_context, "bits": chosen.bits, "gpu_split": list(chosen.gpu_split)},
        "versions": session.ready.versions,
    }


# --- a random 1 B model: speed and memory


def write_model(work: Path) -> Path:
    """A random Llama in float16, written straight from the GPU (the CPU where there is none); kept in WORK."""
    folder = work / "random-1b"
    if (folder / "done").exists():
        return folder
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden, inner, vocab = SHAPE["hidden"], SHAPE["intermediate"], SHAPE["vocab"]
    keys = hidden // SHAPE["heads"] * SHAPE["kv_heads"]

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * 0.02).half().cpu()

    state = {"model.embed_tokens.weight": random(vocab, hidden), "lm_head.weight": random(vocab, hidden)}
    state["model.norm.weight"] = torch.ones(hidden).half()
    attention = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    attention["o_proj"] = (hidden, hidden)
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for layer in range(SHAPE["layers"]):
        prefix = f"model.layers.{layer}."
        state |= {f"{prefix}self_attn.{name}.weight": random(*size) for name, size in attention.items()}
        state |= {f"{prefix}mlp.{name}.weight": random(*size) for name, size in mlp.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{norm}.weight"] = torch.ones(hidden).half()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": SHAPE["layers"],
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["kv_heads"],
        "head_dim": hidden // SHAPE["heads"],
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": None,  # answers have to run to their length
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_bytes((embedded.BASE / "tokenizer.json").read_bytes())
    tokens = json.loads((embedded.BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "done").touch()
    return folder


def random_config(work: Path, name: str, in_flight: int = max(IN_FLIGHT)) -> Config:
    """A way on the random model, on cards capped to CAP_GIB."""
    config = configured(work, SPEED_WAYS[name], run=RunConfig(in_flight=in_flight))
    hardware = replace(config.hardware, memory_gib=CAP_GIB)
    return replace(config, hardware=hardware, model=ModelConfig(path=str(write_model(work)), max_context=CONTEXT))


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens, all different."""
    random = np.random.default_rng(seed)
    return [random.integers(10, 4000, PROMPT).tolist() for _ in range(count)]


def answer(session: Session, requests: list[Request]) -> tuple[int, dict[str, str]]:
    """(tokens, texts) of all requests, at the same time."""
    texts = {request.id: "" for request in requests}
    tokens = ended = 0
    for request in requests:
        session.engine.submit(request)
    while ended < len(requests):
        for event in session.engine.events(timeout=None):
            match event:
                case Delta(id=name, text=text):
                    texts[name] += text
                    tokens += len(event.tokens)
                case Finished():
                    ended += 1
                case Failed(message=message):
                    raise RuntimeError(message)
    return tokens, texts


def rate(session: Session, count: int, turn: int) -> float:
    """tokens/s of so many requests at the same time, seen by the parent from the first submission to the last end."""
    requests = [Request(str(i), tokens, ANSWER) for i, tokens in enumerate(prompts(count, 100 * turn + count))]
    began = time.monotonic()
    tokens, _ = answer(session, requests)
    return tokens / (time.monotonic() - began)


def rates(session: Session, rounds: int = 3) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count in IN_FLIGHT:
        values = [rate(session, count, turn) for turn in range(rounds + 1)][1:]  # the first is not counted
        found[str(count)] = {"median": round(statistics.median(values), 1), "all": [round(v, 1) for v in values]}
    return found


def speed(out: Path, work: Path, names: list[str]) -> None:
    for name in names or [way for way in SPEED_WAYS if way != "exl2-one"]:
        try:
            with live(work, name, random_config(work, name)) as session:
                write(out, f"speed-{name}", {"tokens_per_s": rates(session), **measured(session)})
        except OrchestratorError as error:
            write(out, f"speed-{name}", {"error": str(error), "traceback": traceback.format_exc()})


# --- the same generator in a bare script


@contextmanager
def bare_script(kind: str, session: Session, env: Mapping[str, str]) -> Iterator[Callable[[int, int], float]]:
    """The bare script as a process with the session's model loaded: (requests, turn) -> tokens/s."""
    plan = session.engine.plan
    given = {
        "model": plan.model,
        "context": plan.max_context,
        "in_flight": plan.max_in_flight,
        "cache_bits": plan.cache_bits,
        "dtype": plan.dtype,
        "tensor": plan.tensor_parallel,
        "memory": max(plan.memory.values(), default=0),
        "engine_args": plan.engine_args,
        "unpaged": session.ready.versions.get("generator", "").startswith("unpaged"),
    }
    command = [sys.executable, __file__, "--bare", kind, json.dumps(given)]
    with subprocess.Popen(
        command, env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, said = process.stdin, process.stdout

        def ask(count: int, turn: int) -> float:
            asked.write(f"{count} {turn}\n")
            asked.flush()
            for line in said:
                if line.startswith("BARE "):
                    return float(line.removeprefix("BARE "))
            raise RuntimeError(f"the bare script ended with {process.wait()}")

        try:
            yield ask
        finally:
            asked.close()


def side_by_side(
    kind: str, session: Session, turns: int, env: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Ours, bare, bare, ours, ...: both loaded on the same GPU, one of them at work at a time.

    Args:
        kind: exl2 or vllm.
        env: variables of the bare script's, on top of this process's.

    Yields:
        What is known after each number of requests in flight.
    """
    found: dict[str, dict[str, Any]] = {}
    with bare_script(kind, session, env or {}) as bare:
        both: dict[str, Callable[[int, int], float]] = {"ours": partial(rate, session), "bare": bare}
        for count in IN_FLIGHT:
            values: dict[str, list[float]] = {who: [] for who in both}
            for turn in range(-2, turns):  # the first two are not counted
                for who in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                    values[who].append(round(both[who](count, turn % 100), 1))
            ours, theirs = (found_by[2:] for found_by in values.values())
            pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
            found[str(count)] = {
                "ratio": round(statistics.median(ours) / statistics.median(theirs), 4),
                "quartiles_of_turns": [round(q, 4) for q in statistics.quantiles(pairs, n=4)],
                "ours": round(statistics.median(ours), 1),
                "bare": round(statistics.median(theirs), 1),
                "turns": {"ours": ours, "bare": theirs},
            }
            bound = BOUNDS[kind]
            within = all(part["ratio"] >= bound for part in found.values())
            yield {"bound": bound, "within_bound": within, "in_flight": found}


def ratio(out: Path, work: Path, name: str, turns: int) -> None:
    with live(work, name, random_config(work, name)) as session:
        for found in side_by_side(name.partition("-")[0], session, turns):
            write(out, f"ratio-{name}", found)


def bare_exl2(given: dict[str, Any]) -> Callable[[int, int], float]:
    """exllamav2's dynamic generator as its own examples call it, with the sizes of our plan."""
    import torch
    from exllamav2 import (
        ExLlamaV2,
        ExLlamaV2Cache,
        ExLlamaV2Cache_Q4,
        ExLlamaV2Cache_Q6,
        ExLlamaV2Cache_Q8,
        ExLlamaV2Config,
        ExLlamaV2Tokenizer,
    )
    from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler

    config = ExLlamaV2Config(given["model"])
    config.max_seq_len = -(-given["context"] // 256) * 256
    config.max_input_len = min(2048, config.max_seq_len)
    model = ExLlamaV2(config)
    kind = {16: ExLlamaV2Cache, 8: ExLlamaV2Cache_Q8, 6: ExLlamaV2Cache_Q6, 4: ExLlamaV2Cache_Q4}[given["cache_bits"]]
    at_once = 1 if given["unpaged"] else given["in_flight"]
    cache = kind(model, max_seq_len=config.max_seq_len * at_once, lazy=True)
    model.load_autosplit(cache)
    generator = ExLlamaV2DynamicGenerator(
        model=model,
        cache=cache,
        tokenizer=ExLlamaV2Tokenizer(config),
        max_batch_size=at_once,
        paged=not given["unpaged"],
    )

    def run(count: int, turn: int) -> float:
        began = time.monotonic()
        for tokens in prompts(count, 100 * turn + count):
            generator.enqueue(
                ExLlamaV2DynamicJob(
                    input_ids=torch.tensor([tokens], dtype=torch.long),
                    max_new_tokens=ANSWER,
                    gen_settings=ExLlamaV2Sampler.Settings.greedy(),
                )
            )
        made = 0
        while generator.num_remaining_jobs():
            for result in generator.iterate():
                if result["eos"]:
                    made += result["new_tokens"]
        return made / (time.monotonic() - began)

    return run


def bare_vllm(given: dict[str, Any]) -> Callable[[int, int], float]:
    """vLLM's AsyncLLM, with the sizes of our plan."""
    import asyncio

    import torch
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from orchestrator.backends.vllm_rules import batched_tokens, cuda_runtime, utilization

    # The same memory and the same tokens per step as ours, or the two would not do the same work.
    total = torch.cuda.get_device_properties(0).total_memory
    capacity = given["memory"] or total
    runtime = cuda_runtime(given["tensor"], 1, given["in_flight"], given["engine_args"])
    extra = {
        "gpu_memory_utilization": utilization(capacity, total, runtime),
        "max_num_batched_tokens": max(batched_tokens(capacity), given["in_flight"]),
        **given["engine_args"],
    }
    args = AsyncEngineArgs(
        model=given["model"],
        dtype=given["dtype"],
        tensor_parallel_size=given["tensor"],
        max_model_len=given["context"],
        max_num_seqs=given["in_flight"],
        **extra,
    )

    async def start() -> Any:
        return AsyncLLM.from_engine_args(args)

    loop = asyncio.new_event_loop()
    engine = loop.run_until_complete(start())
    sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def one(name: str, tokens: list[int]) -> int:
        made = 0
        async for output in engine.generate({"prompt_token_ids": tokens}, sampling, name):
            made += len(output.outputs[0].token_ids)
        return made

    async def all_of(count: int, turn: int) -> float:
        began = time.monotonic()
        given_now = prompts(count, 100 * turn + count)
        made = await asyncio.gather(*[one(f"{count}-{turn}-{i}", t) for i, t in enumerate(given_now)])
        return sum(made) / (time.monotonic() - began)

    return lambda count, turn: loop.run_until_complete(all_of(count, turn))


def collect(out: Path) -> None:
    """Everything that was written, and whether the bounds hold."""
    parts = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))}
    measured_on = parts.pop("environment", None)
    order = [parts.get(f"embedded-exl2-{bits}", {}).get("kl_mean") for bits in (8, 6, 4)]
    known = [value for value in order if value is not None]
    checks = {
        "8 nearer than 6, 6 nearer than 4": known == sorted(known) if len(known) == 3 else None,
        **{name: part.get("within_bound") for name, part in parts.items() if name.startswith("ratio-")},
    }
    print(save("thin_gpu", {"checks": checks, "parts": parts}, measured_on), json.dumps(checks))


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if command == "--bare":
        bare = {"exl2": bare_exl2, "vllm": bare_vllm}[rest[0]](json.loads(rest[1]))
        for line in sys.stdin:
            count, turn = map(int, line.split())
            print(f"BARE {bare(count, turn)}", flush=True)
        return
    if command == "collect" and rest:
        collect(Path(rest[0]))
        return
    if len(rest) < 2 or command not in ("embedded", "model", "speed", "ratio"):
        sys.exit(__doc__)
    out, work, names = Path(rest[0]), Path(rest[1]), rest[2:]
    work.mkdir(parents=True, exist_ok=True)
    write(out, "environment", environment())
    match command:
        case "embedded":
            embedded_ways(out, work, names)
        case "model":
            print(write_model(work))
        case "speed":
            speed(out, work, names)
        case "ratio":
            ratio(out, work, names[0] if names else "exl2-one", int(names[1]) if len(names) > 1 else 12)


if __name__ == "__main__":
    main()
