"""A static batch of requests through transformers' own `generate`, one step at a time.

`generate` runs in a thread and greedily. Everything of a request's own (sampling, its end, its cancellation) is done
in the two places that `generate` calls at each step: the logits processor and the stopping criteria. In the second
the thread waits until the engine asks for the next step, so nothing runs between steps.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from orchestrator.backends.protocol import Event, Request
from orchestrator.backends.row import Row


class Sampler:
    """Makes the greedy choice of one row a random one: temperature, top_p, then noise of the request's own seed.

    The maximum of logits plus Gumbel noise is a sample of their softmax. The noise comes from a generator per
    request, so that a seed gives the same answer whatever else is in the batch.
    """

    def __init__(self, request: Request, device: Any) -> None:
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(request.temperature)])
        if request.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(request.top_p))
        self._generator = torch.Generator(device=device)
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """[1, V] logits, float32, to [1, V] whose maximum is the sample."""
        import torch

        exponential = torch.empty_like(logits).exponential_(generator=self._generator)
        noise = -exponential.clamp_min_(torch.finfo(logits.dtype).tiny).log_()
        return self._warpers(tokens, logits) + noise


class Steps:
    """A thread that runs one job at a time and stops after each of its steps until the next is asked for."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Event] | BaseException] = queue.SimpleQueue()
        self._go = threading.Semaphore(0)
        # One thread for all batches: OpenMP keeps a team of threads for each thread that computes.
        threading.Thread(target=self._work, name="generate", daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except BaseException as error:
                # Not swallowed: it is raised in the engine's thread, by first or next.
                self._results.put(error)

    def first(self, job: Callable[[], None]) -> list[Event]:
        """Starts a job; the result of its first step. Raises what the job raises."""
        self._jobs.put(job)
        return self._result()

    def next(self) -> list[Event]:
        """The result of the job's next step. Raises what the job raises."""
        self._go.release()
        return self._result()

    def _result(self) -> list[Event]:
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def publish(self, result: list[Event], last: bool) -> None:
        """In the job: hands over a step's result and, unless it is the last, waits for `next`."""
        self._results.put(result)
        if not last:
            self._go.acquire()


class Batch:
    """Rows that are prefilled together and decoded until the last of them is done."""

    def __init__(self, rows: list[Row], steps: Steps, ends: Collection[int], device: Any) -> None:
        self.rows = rows
        self.done = False
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.decode_tokens = 0
        self._steps = steps
        self._ends = ends
        self._device = device
        self._finite: Any = None
        self._samplers = {
            index: Sampler(row.request, device) for index, row in enumerate(rows) if row.request.temperature > 0
        }

    def run(self, model: Any, pad: int) -> None:
        """Generates until every row is done. In the thread of `steps`."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        prompts = [row.request.tokens for row in self.rows]
        width = max(map(len, prompts))
        tokens = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(row.request.max_tokens for row in self.rows),
            pad_token_id=pad,
            disable_compile=True,
        )
        self._step_began = time.monotonic()
        self._is_prefill = True
        model.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([self._choose]),
            stopping_criteria=StoppingCriteriaList([self._stop]),
        )

    def _choose(self, tokens: Any, logits: Any) -> Any:
        """The logits processor: [B, T] tokens, [B, V] float32 logits to those whose maximum is the choice."""
        import torch

        # Finite unless there is a NaN or a +inf, or nothing but -inf; a single -inf is a masked token.
        self._finite = torch.logsumexp(logits, dim=-1).isfinite()
        for index, sampler in self._samplers.items():
            if not self.rows[index].done:
                here = slice(index, index + 1)
                logits[here] = sampler(tokens[here], logits[here])
        return logits

    def _stop(self, tokens: Any, scores: Any) -> Any:
        """The stopping criteria: publishes the step's events and says which rows are done, a bool [B]."""
        import torch

        alive = sum(not row.done for row in self.rows)
        events: list[Event] = []
        for row, token, finite in zip(self.rows, tokens[:, -1].tolist(), self._finite.tolist(), strict=True):
            events += row.take(token, finite, self._ends)
        self._count(alive)
        self.done = all(row.done for row in self.rows)
        self._steps.publish(events, last=self.done)
        self._step_began = time.monotonic()
        return torch.tensor([row.done for row in self.rows], device=tokens.device)

    def _count(self, alive: int) -> None:
        took = time.monotonic() - self._step_began
        if self._is_prefill:
            self.prefill_s += took
            self._is_prefill = False
        else:
            self.decode_s += took
            self.decode_tokens += alive
