"""What the parent and an engine's process say to each other, and what every engine's adapter implements.

Plain frozen dataclasses of JSON values and nothing else is imported: the same file runs in the parent and in
the interpreter of any engine (Python 3.11 to 3.13).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class LoadPlan:
    """How to load one model: the part of the plan that an engine needs. Nothing in it is left to the engine."""

    model: str  # folder with safetensors, config.json and tokenizer files
    backend: str
    method: str  # none, nf4, fp4, int8, ...
    bits: float  # bits per weight
    dtype: str  # of what is not quantized, and of the arithmetic: float32, float16, bfloat16
    max_context: int  # tokens of one sequence, prompt and answer
    max_in_flight: int  # sequences decoded at a time
    # A device is "cpu", "cuda:0", ...; "cuda:0+cuda:1" is anywhere on these: the engine itself spreads over them.
    device_map: dict[str, str]  # module path ("" is the whole model) -> device
    weights: dict[str, int]  # device -> bytes of weights that the plan puts there
    memory: dict[str, int] = field(default_factory=dict)  # device -> bytes that this process may take there
    margin: dict[str, int] = field(default_factory=dict)  # device -> of these, for what the plan does not foresee
    kv_cache: dict[str, int] = field(default_factory=dict)  # device -> bytes of KV cache that the plan puts there
    double_quant: bool = False
    cache_bits: int = 16
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpu_split: tuple[float, ...] = ()  # GiB per GPU
    offload_folder: str = ""  # what device_map has on "disk" may be written under it
    trust_remote_code: bool = False
    engine_args: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()  # folders of adapters in the engine's own form, all of them on top of the model
    adapter_bytes: dict[str, int] = field(default_factory=dict)  # GPU -> bytes of them there; part of `weights`
    tokenizer: str = ""  # a folder whose tokenizer takes the place of the model's (an adapter's own)


@dataclass(frozen=True)
class Request:
    """One prompt. temperature 0 is greedy; a seed makes its samples repeatable whatever else is in flight."""

    id: str
    tokens: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)  # strings: the answer ends before the first of them
    stop_tokens: list[int] = field(default_factory=list)  # ids that end the answer, beside the model's own end tokens


@dataclass(frozen=True)
class Delta:
    """New tokens of one answer. `text` may lag behind `tokens` (a character can take several tokens)."""

    id: str
    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Finished:
    """One answer's end. Times are seconds of the engine's own clock."""

    id: str
    reason: str  # "stop" (end token, stop token or stop string), "length", "cancelled"
    prompt_tokens: int
    completion_tokens: int
    queue_s: float  # from submit to the start of its prefill
    prefill_s: float  # from there to its first token
    decode_s: float  # from the first token to the last
    ttft_s: float  # from submit to the first token


@dataclass(frozen=True)
class Failed:
    """One request's error; the others go on."""

    id: str
    message: str


Event = Delta | Finished | Failed


@dataclass(frozen=True)
class Score:
    """Log-probabilities (natural log) of one given sequence of T tokens.

    For position t in 1..T-1, given tokens[:t]: `logprobs[t-1]` is that of tokens[t]; `top_tokens[t-1]` and
    `top_logprobs[t-1]` are the k likeliest, likeliest first; `tail[t-1]` is the probability of all the others.
    """

    logprobs: list[float]
    top_tokens: list[list[int]]
    top_logprobs: list[list[float]]
    tail: list[float]


@dataclass(frozen=True)
class Stats:
    """What the engine's process has used so far."""

    host_peak_bytes: int  # peak resident memory of the engine's process(es)
    gpu_peak_bytes: list[int]  # per visible GPU, the allocator's peak
    prefill_tokens: int
    prefill_s: float  # time in which at least one prefill ran
    decode_tokens: int
    decode_s: float  # time in which only decoding ran


class Engine(Protocol):
    """An adapter to one of the field's engines. It lives in the child process and is used from one thread.

    Attributes:
        gather_s: so long, in seconds, an idle engine waits for more requests behind the first. An engine that takes
            requests in at any step need not wait; one whose batches are fixed would run the first alone.
    """

    gather_s: float

    def load(self, plan: LoadPlan) -> None:
        """Loads plan.model exactly as the plan says."""

    def placement(self) -> dict[str, dict[str, int]]:
        """device -> {tensor name: bytes} for every parameter and buffer, "meta" and "disk" included."""

    def versions(self) -> dict[str, str]:
        """Package -> version of everything that matters to the result."""

    def submit(self, request: Request) -> None:
        """Queues a request."""

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; it still gets its Finished("cancelled"). Unknown ids are ignored."""

    def events(self) -> list[Event]:
        """One engine step: deltas, finishes and errors of all requests. Empty when nothing is in flight."""

    def score(self, tokens: list[int], top_k: int) -> Score:
        """Teacher-forced log-probabilities. top_k is cut to the vocabulary."""

    def stats(self) -> Stats:
        """Counters and peaks since load."""

    def close(self) -> None:
        """Frees what the engine holds."""
