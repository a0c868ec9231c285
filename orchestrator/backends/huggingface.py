"""transformers, plain or with bitsandbytes: the adapter of the backends `transformers` and `bitsandbytes`."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import Any

from orchestrator.backends.hf_batch import Batch, Steps
from orchestrator.backends.hf_tensors import bytes_per_tensor, keep_4bit_layout, offload_hooks
from orchestrator.backends.offload_folder import OffloadFolder
from orchestrator.backends.protocol import Event, Failed, LoadPlan, Request, Score, Stats
from orchestrator.backends.row import Row, problem
from orchestrator.backends.usage import gpu_peaks, host_peak, installed, one_segment
from orchestrator.errors import CheckpointError, EngineError

_QUANTIZATION: dict[str, dict[str, Any]] = {
    "none": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "bitsandbytes")
_STORES = ("cpu", "disk")
_NAMED = 3  # tensors in a message
_SCORE_ROWS = 256  # positions whose float32 log-probabilities are held at a time


class HuggingFaceEngine:
    """Static batches of up to plan.max_in_flight requests through transformers' `generate`."""

    gather_s = 0.005

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._plan: LoadPlan
        self._ends: frozenset[int] = frozenset()
        self._pad = 0
        self._vocabulary = 0
        self._steps = Steps()
        self._waiting: deque[Row] = deque()
        self._at_once: list[Event] = []  # ends that need no step
        self._batch: Batch | None = None
        self._done = Stats(0, [], 0, 0.0, 0, 0.0)  # counters of the batches that are over
        self._folder: OffloadFolder | None = None

    def load(self, plan: LoadPlan) -> None:
        """Loads plan.model from local safetensors with plan.device_map as it is.

        Raises:
            EngineError: the method is not ours, or what is offloaded would compute elsewhere than planned.
            CheckpointError: tensors are missing or have other shapes than config.json says.
            DoesNotFitError: the disk has no room for what is offloaded there.
        """
        try:
            self._load(plan)
        except BaseException:
            self.close()
            raise

    def _load(self, plan: LoadPlan) -> None:
        # Before the imports: nothing is fetched, neither models nor kernels.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        one_segment()
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        # One warning per int8 layer and step that its input is cast to float16: that is what the method does.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": plan.trust_remote_code}
        self._plan = plan
        self._tokenizer = AutoTokenizer.from_pretrained(plan.model, **local)
        self._model, info = AutoModelForCausalLM.from_pretrained(
            plan.model,
            **self._placed(plan),
            dtype=getattr(torch, plan.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **local,
            **self._quantization(plan, local),
            **plan.engine_args,
        )
        self._check_keys(info)
        self._check_execution(plan)
        self._model.eval()
        if plan.method in ("nf4", "fp4"):
            keep_4bit_layout(self._model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what was held while weights were converted
        self._read_tokens()

    def _placed(self, plan: LoadPlan) -> dict[str, Any]:
        """The keywords that place the model, its offload included."""
        if not _offloads(plan):
            return {"device_map": dict(plan.device_map)}
        placed: dict[str, Any] = {"device_map": {path: _number(device) for path, device in plan.device_map.items()}}
        if "disk" in plan.device_map.values():
            # transformers reads plain weights from the model's own files, and writes here only what it has to change.
            self._folder = OffloadFolder(plan.offload_folder, plan.weights["disk"])
            placed["offload_folder"] = str(self._folder.path)
        return placed

    def _check_execution(self, plan: LoadPlan) -> None:
        """accelerate takes the first device of a set for what is offloaded; the plan kept room on the first by number.

        Raises:
            EngineError: it took another one.
        """
        main = min((_number(device) for device in plan.weights if device not in _STORES), default="cpu")
        for path, module in self._model.named_modules():
            for hook in offload_hooks(module):
                if hook.execution_device != main:
                    raise EngineError(f"{path} is offloaded and would compute on {hook.execution_device}, not {main}")

    @staticmethod
    def _quantization(plan: LoadPlan, local: dict[str, Any]) -> dict[str, Any]:
        """The keywords that make transformers quantize while it loads."""
        if plan.method not in _QUANTIZATION:
            raise EngineError(f"the {plan.backend} engine has no method {plan.method}")
        if plan.method == "none":
            return {}
        import torch
        from transformers import AutoConfig, BitsAndBytesConfig

        config = AutoConfig.from_pretrained(plan.model, **local)
        stored = getattr(config, "quantization_config", None)
        if stored is not None:
            # In this form already: its own configuration describes it, but for the arithmetic, which the plan says.
            stored = stored if isinstance(stored, dict) else stored.to_dict()
            config.quantization_config = stored | {"bnb_4bit_compute_dtype": plan.dtype}
            return {"config": config}
        options = dict(_QUANTIZATION[plan.method])
        if _offloads(plan):  # whatever its name says: these modules stay unquantized, in plan.dtype
            options["llm_int8_enable_fp32_cpu_offload"] = True
        if options.get("load_in_4bit"):
            options["bnb_4bit_use_double_quant"] = plan.double_quant
            options["bnb_4bit_compute_dtype"] = getattr(torch, plan.dtype)
        return {"quantization_config": BitsAndBytesConfig(**options)}

    def _check_keys(self, info: dict[str, Any]) -> None:
        """transformers fills a tensor that it does not find with random numbers and only warns."""
        for what, label in (("missing_keys", "has no"), ("mismatched_keys", "has other shapes of")):
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(what) or ())
            if names:
                more = f" and {len(names) - _NAMED} more tensors" if len(names) > _NAMED else ""
                raise CheckpointError(f"{self._plan.model} {label} {', '.join(names[:_NAMED])}{more}")

    def _read_tokens(self) -> None:
        """The end tokens of generation_config.json and of the tokenizer; the model's own sampling is dropped."""
        from transformers import GenerationConfig

        configured = self._model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        self._ends = frozenset(end for end in (*ends, self._tokenizer.eos_token_id) if end is not None)
        pad = self._tokenizer.pad_token_id
        # Padding is masked, so that any token will do.
        self._pad = min(self._ends, default=0) if pad is None else pad
        self._vocabulary = self._model.get_input_embeddings().weight.shape[0]
        # Requests say how to sample; penalties or forced tokens of the checkpoint would come on top.
        self._model.generation_config = GenerationConfig()

    def placement(self) -> dict[str, dict[str, int]]:
        """device -> {tensor name: bytes}, quantization states included, tied tensors once."""
        return bytes_per_tensor(self._model)

    def versions(self) -> dict[str, str]:
        """Of Python, CUDA and the packages that are installed."""
        return installed(_PACKAGES)

    def submit(self, request: Request) -> None:
        """Queues a request; one that cannot be answered gets its Failed from the next `events`."""
        found = problem(request, self._plan.max_context, self._vocabulary)
        if found:
            self._at_once.append(Failed(request.id, found))
        else:
            self._waiting.append(Row(request, self._decode))

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def cancel(self, request_id: str) -> None:
        """Ends a waiting request at once and a running one at its next step."""
        for row in [row for row in self._waiting if row.request.id == request_id]:
            self._waiting.remove(row)
            self._at_once += row.finish("cancelled")
        for row in self._batch.rows if self._batch else ():
            row.cancelled |= row.request.id == request_id

    def events(self) -> list[Event]:
        """One decoding step of the running batch, or the prefill of the next one."""
        if self._at_once:
            events, self._at_once = self._at_once, []
        elif self._batch is not None:
            events = self._steps.next()
        elif self._waiting:
            events = self._begin()
        else:
            events = []
        if self._batch is not None and self._batch.done:
            self._done = self._totals()
            self._batch = None
        return events

    def _begin(self) -> list[Event]:
        count = min(len(self._waiting), self._plan.max_in_flight)
        rows = [self._waiting.popleft() for _ in range(count)]
        for row in rows:
            row.started = time.monotonic()
        batch = Batch(rows, self._steps, self._ends, self._input_device())
        self._batch = batch
        return self._steps.first(lambda: batch.run(self._model, self._pad))

    def _input_device(self) -> Any:
        """Where the embedding is: inputs go there, whatever the first GPU is."""
        return self._model.get_input_embeddings().weight.device

    def score(self, tokens: list[int], top_k: int) -> Score:
        """One forward pass over all tokens; the softmax in float32.

        Raises:
            ValueError: fewer than two tokens, or one outside of the vocabulary.
        """
        import torch

        if len(tokens) < 2 or min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise ValueError("a score needs at least two tokens of the vocabulary")
        score = Score([], [], [], [])
        with torch.inference_mode():
            given = torch.tensor([tokens], device=self._input_device())
            logits = self._model(input_ids=given, use_cache=False).logits[0, :-1]
            targets = given[0, 1:].to(logits.device)
            for some, target in zip(torch.split(logits, _SCORE_ROWS), torch.split(targets, _SCORE_ROWS), strict=True):
                logprobs = some.float().log_softmax(-1)
                top = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1)
                # Summed over the others, not 1 minus the top: a tail of 1e-9 would be lost to rounding.
                rest = logprobs.scatter(-1, top.indices, float("-inf")).exp().sum(-1)
                score.logprobs.extend(logprobs.gather(-1, target[:, None])[:, 0].tolist())
                score.top_tokens.extend(top.indices.tolist())
                score.top_logprobs.extend(top.values.tolist())
                score.tail.extend(rest.tolist())
        return score

    def stats(self) -> Stats:
        """Counters and peaks since load."""
        return self._totals()

    def _totals(self) -> Stats:
        done, batch = self._done, self._batch
        if batch is None:
            return Stats(
                host_peak(),
                gpu_peaks(),
                done.prefill_tokens,
                done.prefill_s,
                done.decode_tokens,
                done.decode_s,
            )
        return Stats(
            host_peak(),
            gpu_peaks(),
            done.prefill_tokens + sum(len(row.request.tokens) for row in batch.rows),
            done.prefill_s + batch.prefill_s,
            done.decode_tokens + batch.decode_tokens,
            done.decode_s + batch.decode_s,
        )

    def close(self) -> None:
        """Forgets the model; a batch in the middle is left as it is."""
        self._model = None
        self._tokenizer = None
        self._waiting.clear()
        if self._folder is not None:
            self._folder.close()


def _offloads(plan: LoadPlan) -> bool:
    """Whether the map has parts that compute elsewhere than they lie."""
    devices = set(plan.device_map.values())
    return "disk" in devices or ("cpu" in devices and len(devices) > 1)


def _number(device: str) -> int | str:
    """ "cuda:1" as 1: of numbers, accelerate takes the lowest for the main device; of names, any."""
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device
