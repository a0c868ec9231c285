"""ExLlamaV2: the adapter of the backend `exllamav2`. Everything of that package is imported here, inside methods."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.backends.exl2_adapters import sort_factors
from orchestrator.backends.exl2_setup import (
    MAX_INPUT,
    RESERVE_FIRST,
    RESERVE_OTHERS,
    SCORE_CHUNK,
    SCORE_ROWS,
    limit_memory,
    prepare_attention,
    round_up,
    visible_devices,
)
from orchestrator.backends.exl2_tensors import bytes_per_tensor
from orchestrator.backends.protocol import Event, Failed, LoadPlan, Request, Score, Stats
from orchestrator.backends.row import Row, problem
from orchestrator.backends.usage import gpu_peaks, host_peak, installed, one_segment
from orchestrator.engine.placement import members
from orchestrator.errors import CheckpointError, EngineError, OutOfMemoryError

_PACKAGES = ("torch", "exllamav2", "flash-attn", "xformers", "tokenizers", "safetensors", "numpy")
_CACHES = {16: "ExLlamaV2Cache", 8: "ExLlamaV2Cache_Q8", 6: "ExLlamaV2Cache_Q6", 4: "ExLlamaV2Cache_Q4"}
_QUERY = 8  # tokens per sequence and step that the generator keeps room for (its own default)
_UNPAGED_CHUNK = 512  # tokens of one prefill step without flash-attn: its attention weights are held in full
_ALIKE = 1e6  # GiB a GPU: so much that what it takes off for cache and attention leaves every GPU the same share
_FULL = ("Insufficient VRAM", "Insufficient space in device allocation")  # exllamav2's own messages


@dataclass
class _Counts:
    """Those of Stats, added to in place: once a step, between two steps of a GPU."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


class ExLlamaV2Engine:
    """Continuous batching through ExLlamaV2's dynamic generator; without flash-attn one request at a time, in order."""

    gather_s = 0.0

    def __init__(self) -> None:
        self._plan: LoadPlan
        self._torch: Any = None
        self._model: Any = None
        self._cache: Any = None
        self._generator: Any = None
        self._adapters: list[Any] = []
        self._decode: Callable[[list[int]], str]
        self._devices: list[str] = []
        self._unpaged = ""  # why the cache is not paged; "" where it is
        self._ends: frozenset[int] = frozenset()
        self._vocabulary = 0
        self._jobs: dict[str, tuple[Row, Any]] = {}  # request id -> its row and the generator's job
        self._at_once: list[Event] = []  # events that need no step
        self._counts = _Counts()

    def load(self, plan: LoadPlan) -> None:
        """Loads plan.model over the GPUs of the plan: a part of every layer on each where plan.tensor_parallel is set,
        whole layers by hand where plan.gpu_split is, else whole layers by the engine's own split.

        Raises:
            EngineError: the method is not ours, CUDA does not show the GPUs of the plan, or flash-attn is missing
                where layers are cut.
            CheckpointError: an architecture that exllamav2 would take for a Llama, or files that it cannot read; an
                adapter that it cannot run.
            OutOfMemoryError: the GPUs are full before the model is loaded.
        """
        if plan.method not in ("exl2", "gptq", "none") or plan.cache_bits not in _CACHES:
            raise EngineError(f"the exllamav2 engine has no method {plan.method} with a {plan.cache_bits}-bit cache")
        self._plan = plan
        self._devices = _planned_gpus(plan)
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(self._devices, os.environ)
        one_segment()
        import torch

        self._torch = torch
        if torch.cuda.device_count() != len(self._devices):
            raise EngineError(
                f"the plan is for {len(self._devices)} GPUs ({', '.join(self._devices)}), and CUDA shows "
                f"{torch.cuda.device_count()} of CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}",
                "Check nvidia-smi and the driver",
            )
        self._unpaged = prepare_attention()
        if self._unpaged and plan.tensor_parallel > 1:
            raise EngineError(
                f"parallel.tensor={plan.tensor_parallel} needs a paged cache, and there is none: {self._unpaged}",
                "Leave out parallel.tensor: layers then stay whole, each on one GPU",
            )
        limit_memory([plan.memory[device] for device in self._devices])
        config = self._config()
        try:
            self._load_weights(config)
            self._load_adapters()
        except Exception as error:
            if not _is_full(error):
                raise
            raise OutOfMemoryError(
                f"the GPUs are full before the model and its cache are loaded ({_first_line(error)})",
                "Set model.max_context or run.in_flight lower, cache.bits=8, fewer quant.bits, or another "
                "parallel.gpu_split",
            ) from error
        self._start_generator(config)

    def _config(self) -> Any:
        from exllamav2 import ExLlamaV2Config

        plan = self._plan
        try:
            config = ExLlamaV2Config(plan.model)
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"exllamav2 cannot read {plan.model}: {_first_line(error)}") from error
        if config.arch.arch_string != config.architecture:
            raise CheckpointError(
                f"exllamav2 does not know the architecture {config.architecture} of {plan.model}, and would load it "
                f"as {config.arch.arch_string}",
                "Use another backend",
            )
        config.max_seq_len = round_up(plan.max_context)
        config.max_input_len = min(MAX_INPUT, config.max_seq_len)
        config.max_batch_size = 1
        for name, value in plan.engine_args.items():
            if not hasattr(config, name):
                raise EngineError(
                    f"backend.engine_args.{name} is not an attribute of ExLlamaV2Config",
                    "See exllamav2's config.py for what there is",
                )
            setattr(config, name, value)
        config.arch_compat_overrides()
        if config.no_flash_attn and not self._unpaged:
            self._unpaged = "this architecture cannot use the installed flash-attn"
        return config

    def _load_weights(self, config: Any) -> None:
        import exllamav2

        plan = self._plan
        make_cache = getattr(exllamav2, _CACHES[plan.cache_bits])
        # Without pages there is one sequence at a time, so that room for one is enough.
        tokens = config.max_seq_len * (1 if self._unpaged else plan.max_in_flight)
        self._model = exllamav2.ExLlamaV2(config)
        if plan.tensor_parallel > 1:
            self._model.load_tp([_ALIKE] * plan.tensor_parallel)
            self._cache = exllamav2.ExLlamaV2Cache_TP(self._model, base=make_cache, max_seq_len=tokens)
        elif plan.gpu_split:
            self._model.load(list(plan.gpu_split))
            self._cache = make_cache(self._model, max_seq_len=tokens)
        else:
            reserve = [RESERVE_FIRST] + [RESERVE_OTHERS] * (len(self._devices) - 1)
            # What comes after it, beside the layers that it is for; the split itself does not know of adapters.
            reserve = [kept + plan.adapter_bytes.get(d, 0) for kept, d in zip(reserve, self._devices, strict=True)]
            # The margin is for what was not planned, not for more layers. The last GPU has to take the rest.
            limit_memory([plan.memory[d] - plan.margin.get(d, 0) for d in self._devices[:-1]])
            self._cache = make_cache(self._model, max_seq_len=tokens, lazy=True)
            # last_id_only: no logits of 2048 positions while it loads; score asks for few at a time.
            self._model.load_autosplit(self._cache, reserve_vram=reserve, last_id_only=True)
            limit_memory([plan.memory[d] for d in self._devices])

    def _load_adapters(self) -> None:
        """Those of the plan, each linear's factors to where the linear is."""
        if not self._plan.adapters:
            return
        from exllamav2 import ExLlamaV2Lora

        for folder in self._plan.adapters:
            try:
                self._adapters.append(ExLlamaV2Lora.from_directory(self._model, folder))
            except (AssertionError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"exllamav2 cannot run the adapter {folder} on {self._plan.model}: {_first_line(error)}",
                    "Set model.merge=true with the unquantized model as model.path",
                ) from error
        sort_factors(self._model)

    def _start_generator(self, config: Any) -> None:
        from exllamav2 import ExLlamaV2Tokenizer
        from exllamav2.generator import ExLlamaV2DynamicGenerator

        folder = self._plan.tokenizer or self._plan.model
        if self._plan.tokenizer:  # it is read from the folder of a config
            config = copy.copy(config)
            config.model_dir = folder
        tokenizer = ExLlamaV2Tokenizer(config)
        inner = tokenizer.tokenizer_model.hf_tokenizer
        self._decode = _remembering(lambda tokens: str(inner.decode(tokens, skip_special_tokens=True)))
        self._ends = end_tokens(Path(self._plan.model), inner.token_to_id, Path(folder))
        self._vocabulary = config.vocab_size
        at_once = 1 if self._unpaged else min(self._plan.max_in_flight, config.max_input_len // _QUERY)
        self._generator = ExLlamaV2DynamicGenerator(
            model=self._model,
            cache=self._cache,
            tokenizer=tokenizer,
            max_batch_size=at_once,
            max_chunk_size=min(_UNPAGED_CHUNK, config.max_input_len) if self._unpaged else config.max_input_len,
            max_q_size=_QUERY,
            paged=not self._unpaged,
        )
        if self._adapters:  # an empty list would be taken for adapters
            self._generator.set_loras(self._adapters)

    def placement(self) -> dict[str, dict[str, int]]:
        """device -> {tensor name: bytes}, adapters included; the embedding is on "cpu", as exllamav2 keeps it."""
        return bytes_per_tensor(self._model, self._devices)

    def versions(self) -> dict[str, str]:
        """Of Python, CUDA, the packages, and which generator answers."""
        if self._unpaged:
            return installed(_PACKAGES) | {"generator": f"unpaged, one at a time ({self._unpaged})"}
        import flash_attn

        return installed(_PACKAGES) | {"generator": f"paged (flash-attn {flash_attn.__version__})"}

    def submit(self, request: Request) -> None:
        """Queues a request; one that cannot be answered gets its Failed from the next `events`."""
        found = problem(request, self._plan.max_context, self._vocabulary)
        if found:
            self._at_once.append(Failed(request.id, found))
            return
        from exllamav2.generator import ExLlamaV2DynamicJob

        row = Row(request, self._decode)
        job = ExLlamaV2DynamicJob(
            input_ids=self._torch.tensor([request.tokens], dtype=self._torch.long),
            max_new_tokens=request.max_tokens,
            gen_settings=_settings(request),
            seed=request.seed,
            stop_conditions=sorted(self._ends.union(request.stop_tokens)),
            identifier=request.id,
        )
        self._generator.enqueue(job)
        self._jobs[request.id] = (row, job)

    def cancel(self, request_id: str) -> None:
        """Ends a request at once, waiting or running."""
        found = self._jobs.pop(request_id, None)
        if found is not None:
            row, job = found
            self._generator.cancel(job)
            self._at_once += row.finish("cancelled")

    def events(self) -> list[Event]:
        """One iteration of the generator: prefill of new requests, and a token for every running one."""
        events, self._at_once = self._at_once, []
        return [*events, *self._step()] if self._jobs else events

    def _step(self) -> list[Event]:
        began = time.monotonic()
        results = self._generator.iterate()
        events: list[Event] = []
        prefilled = streamed = 0
        prefilling = False
        for result in results:
            stage = result["stage"]
            if stage == "streaming":
                streamed += 1
                continue
            prefilling = True
            found = self._jobs.get(result["identifier"])
            if stage == "started" and found is not None:
                found[0].started = began
                prefilled += len(found[0].request.tokens)
        firsts = self._first_logits(streamed)
        for result, first in zip((r for r in results if r["stage"] == "streaming"), firsts, strict=True):
            events += self._take(result, math.isfinite(first))
        self._count(prefilled, streamed, prefilling, time.monotonic() - began)
        return events

    def _first_logits(self, rows: int) -> list[float]:
        """The first logit of each sequence of the last step, in the order of the results.

        A NaN anywhere in a hidden state is in all of its logits; the padding and the masked ones are at the end.
        """
        return [float(x) for x in self._generator.logits_pinned[:rows, 0, 0].tolist()]

    def _take(self, result: dict[str, Any], finite: bool) -> list[Event]:
        """The events of one request's part of a step. Tokens of a half character come with those that complete it."""
        found = self._jobs.get(result["identifier"])
        if found is None:
            return []
        row, job = found
        tokens = _tokens(result)
        if "held" in result:
            tokens += _tokens(result["held"])
        events: list[Event] = []
        if not finite:
            events += row.take(0, False, self._ends)
        for token in tokens:
            events += row.take(token, True, self._ends)
        if result["eos"] and not row.done:
            events += row.finish("length" if result.get("eos_reason") == "max_new_tokens" else "stop")
        if row.done:
            del self._jobs[row.request.id]
            if not result["eos"]:  # a stop string of ours, which the generator does not know
                self._generator.cancel(job)
        return events

    def _count(self, prefilled: int, streamed: int, prefilling: bool, took: float) -> None:
        counts = self._counts
        if prefilling:
            counts.prefill_tokens += prefilled
            counts.prefill_s += took
        else:
            counts.decode_tokens += streamed
            counts.decode_s += took

    def score(self, tokens: list[int], top_k: int) -> Score:
        """Forward passes through the cache (as quantized as it is), softmax in float32.

        The generator owns the cache: what is in flight is finished first, its events are kept for `events`.

        Raises:
            ValueError: fewer than two tokens, or one outside of the vocabulary.
        """
        if len(tokens) < 2 or min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise ValueError("a score needs at least two tokens of the vocabulary")
        while self._jobs:
            self._at_once += self._step()
        score = Score([], [], [], [])
        given = self._torch.tensor([tokens], dtype=self._torch.long)
        with self._torch.inference_mode():
            self._cache.current_seq_len = 0
            for start in range(0, len(tokens) - 1, SCORE_CHUNK):
                end = min(start + SCORE_CHUNK, len(tokens) - 1)
                part, adapters = given[:, start:end], self._adapters or None
                logits = self._model.forward(part, cache=self._cache, loras=adapters)[0, :, : self._vocabulary]
                targets = given[0, start + 1 : end + 1]
                # Tensor parallel gathers them in host memory, where one thread would take longer than the model did.
                device = "cuda:0" if self._plan.tensor_parallel > 1 else logits.device
                for at in range(0, end - start, SCORE_ROWS):
                    rows = slice(at, at + SCORE_ROWS)
                    self._score_rows(logits[rows].to(device), targets[rows].to(device), top_k, score)
        self._cache.current_seq_len = 0
        self._generator.reset_page_table()  # its pages have been written over
        return score

    def _score_rows(self, logits: Any, targets: Any, top_k: int, score: Score) -> None:
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1)
        # Summed over the others, not 1 minus the top: a tail of 1e-9 would be lost to rounding.
        rest = logprobs.scatter(-1, top.indices, float("-inf")).exp().sum(-1)
        score.logprobs.extend(logprobs.gather(-1, targets[:, None])[:, 0].tolist())
        score.top_tokens.extend(top.indices.tolist())
        score.top_logprobs.extend(top.values.tolist())
        score.tail.extend(rest.tolist())

    def stats(self) -> Stats:
        """Counters and peaks since load."""
        return Stats(host_peak(), gpu_peaks(), **vars(self._counts))

    def close(self) -> None:
        """Frees the GPUs; what is in flight is left as it is."""
        self._jobs.clear()
        self._generator = None
        self._cache = None
        self._adapters = []
        if self._model is not None:
            self._model.unload()
            self._model = None
        gc.collect()
        if self._torch is not None:
            self._torch.cuda.empty_cache()


def _planned_gpus(plan: LoadPlan) -> list[str]:
    """The GPUs of the plan, in its order."""
    named = [device for group in (*plan.memory, *plan.weights) for device in members(group)]
    return list(dict.fromkeys(device for device in named if device.startswith("cuda:")))


def _settings(request: Request) -> Any:
    """The sampler's settings. Everything is named: its own defaults penalize repetition and cut the tail."""
    from exllamav2.generator import ExLlamaV2Sampler

    if request.temperature == 0:
        return ExLlamaV2Sampler.Settings.greedy()
    return ExLlamaV2Sampler.Settings(
        temperature=request.temperature,
        top_p=request.top_p if request.top_p < 1.0 else 0.0,  # 0 is off
        top_k=0,
        token_repetition_penalty=1.0,
    )


def _remembering(decode: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
    """`decode` that does a single token once: half of what a stream of tokens asks for, between two steps of a GPU."""
    single: dict[int, str] = {}

    def remembered(tokens: list[int]) -> str:
        if len(tokens) != 1:
            return decode(tokens)
        text = single.get(tokens[0])
        if text is None:
            text = single[tokens[0]] = decode(tokens)
        return text

    return remembered


def _tokens(part: dict[str, Any]) -> list[int]:
    """Of a tensor of shape (1, tokens), or of none."""
    tokens = part.get("token_ids")
    if tokens is None:
        return []
    (row,) = tokens.tolist()
    return list(row)


def end_tokens(folder: Path, token_id: Callable[[str], int | None], tokenizer: Path | None = None) -> frozenset[int]:
    """The tokens that end an answer: generation_config.json's (else config.json's), and the tokenizer's own.

    Not exllamav2's eos_token_id: it keeps the first of several, and takes 2 where there is none.

    Args:
        tokenizer: the folder of another tokenizer than the model's.
    """
    configs = [_read(folder / name) for name in ("generation_config.json", "config.json")]
    said = next((c["eos_token_id"] for c in configs if c.get("eos_token_id") is not None), None)
    ends = {end for end in (said if isinstance(said, list) else [said]) if isinstance(end, int)}
    text = _read((tokenizer or folder) / "tokenizer_config.json").get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    own = token_id(text) if isinstance(text, str) else None
    return frozenset(ends if own is None else ends | {own})


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_full(error: Exception) -> bool:
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in text or any(m in text for m in _FULL)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
