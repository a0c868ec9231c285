"""task=run: the prompts of a file, a text or standard input, answered."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from orchestrator import embedded
from orchestrator.backends.protocol import Delta, Failed, Finished, Request
from orchestrator.config import Config
from orchestrator.errors import ConfigError, EngineError, OutputError, RequestError
from orchestrator.plan.types import Candidate
from orchestrator.prompts import Prompt, read_file, read_prompts
from orchestrator.report.console import console, note
from orchestrator.report.streams import silence
from orchestrator.report.tables import fitting, result_table
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.answers import AnswersFile
from orchestrator.tasks.session import Session, look, open_session
from orchestrator.tokenizer import Tokenizer


def run(config: Config, folder: RunFolder) -> None:
    """Plans, prepares, loads, answers, reports.

    Raises:
        OrchestratorError: see orchestrator.errors; every answer that was finished is in answers.jsonl. OutputError:
            all are, and could not be shown.
    """
    started = time.monotonic()
    prompts = _prompts(config, folder)
    answers = AnswersFile(folder.path / "answers.jsonl")
    open_prompts = [prompt for prompt in prompts if prompt.index not in answers.answered]
    if len(open_prompts) < len(prompts):
        note(f"{len(prompts) - len(open_prompts)} of {len(prompts)} prompts are answered already")
    if not open_prompts:
        answers.finish()
        note(f"answers: {answers.path}")
        return
    try:
        _run(config, folder, prompts, open_prompts, answers, started)
    except KeyboardInterrupt:
        note(f"\ngo on with: python -m orchestrator run.resume={folder.path}")
        raise


def _run(
    config: Config,
    folder: RunFolder,
    prompts: list[Prompt],
    open_prompts: list[Prompt],
    answers: AnswersFile,
    started: float,
) -> None:
    planned = look(config, planning=False)
    check_stop_tokens(config, planned.spec.vocab)
    folder.pin(planned.source.commit, [place.commit for place in planned.source.places])
    requests: list[Request] = []

    def check(tokenizer: Tokenizer, chosen: Candidate) -> None:
        requests[:] = [make_request(planned.config, tokenizer, p, chosen.max_context) for p in open_prompts]

    shown = InOrder(open_prompts)
    with open_session(planned, folder, check) as session:
        folder.status("answering", prompts=len(prompts))
        answering = time.monotonic()
        finished = _answer(session, requests, open_prompts, answers, shown)
        answers_s = time.monotonic() - answering
        stats = session.engine.stats()
        session.remember(stats)
        measured = session.measured(stats) | {
            # From the start of its prefill: with more prompts than fit in flight, the rest is the queue's time.
            "ttft_s": statistics.median(end.prefill_s for end in finished),
            "answers_s": answers_s,
            "total_s": time.monotonic() - started,
        }
    answers.finish()
    folder.write("result.json", session.result() | {"measured": measured})
    out = console()
    out.print(fitting(out.width, result_table(session.chosen, measured)))
    note(f"answers, plan.json, result.json, status.json, run.log: {folder.path}")
    if shown.failed is not None:
        raise OutputError(shown.failed.message, f"All answers are in {answers.path}.")


def _prompts(config: Config, folder: RunFolder) -> list[Prompt]:
    """The prompts, kept beside the answers: a resumed run has the same ones, whatever became of their file."""
    kept = folder.path / "prompts.jsonl"
    if config.run.resume is not None and kept.exists():
        return read_file(kept, jsonl=True)
    default = embedded.PROMPTS if config.model.path is None else None
    prompts = read_prompts(config, default)
    text = "".join(json.dumps(prompt.to_json(), ensure_ascii=False) + "\n" for prompt in prompts)
    part = kept.with_name(f".{kept.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(kept)
    return prompts


def check_stop_tokens(config: Config, vocab: int) -> None:
    """Before anything is loaded: an engine would never meet such a token.

    Raises:
        ConfigError: a stop token that the model does not have.
    """
    wrong = next((token for token in config.generation.stop_tokens if not 0 <= token < vocab), None)
    if wrong is not None:
        raise ConfigError(f"generation.stop_tokens has {wrong}, and the model's tokens are 0 to {vocab - 1}")


def make_request(config: Config, tokenizer: Tokenizer, prompt: Prompt, max_context: int) -> Request:
    """One prompt's request: as tokens, with as many new ones as the context has room for.

    Raises:
        RequestError: the prompt leaves no room for a single token.
    """
    try:
        tokens = tokenizer.encode(prompt.messages)
    except ConfigError as error:
        raise ConfigError(f"prompt {prompt.index + 1}: {error.message}", error.hint) from None
    if not tokens:
        raise RequestError(f"prompt {prompt.index + 1} is empty: the chat template makes nothing of it")
    if len(tokens) >= max_context:
        raise RequestError(
            f"prompt {prompt.index + 1} ({prompt.text[:40]!r}...) has {len(tokens)} tokens, "
            f"and the context is {max_context}",
            "Shorten it, or raise model.max_context as far as the model and the memory go.",
        )
    generation = config.generation
    return Request(
        id=str(prompt.index),
        tokens=tokens,
        max_tokens=min(generation.max_tokens, max_context - len(tokens)),
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=generation.seed + prompt.index,
        stop=list(generation.stop),
        stop_tokens=list(generation.stop_tokens),
    )


def _answer(
    session: Session, requests: list[Request], prompts: list[Prompt], answers: AnswersFile, shown: InOrder
) -> list[Finished]:
    """Submits everything, shows and keeps what comes.

    Raises:
        EngineError: the engine died, or a request failed; the finished answers are kept.
    """
    by_id = {str(prompt.index): prompt for prompt in prompts}
    texts: dict[str, list[str]] = {request.id: [] for request in requests}
    finished: list[Finished] = []
    failed: list[Failed] = []
    shown.begin()
    for request in requests:
        session.engine.submit(request)
    while len(finished) + len(failed) < len(requests):
        for event in session.engine.events(timeout=None):
            match event:
                case Delta(id=name, text=text):
                    texts[name].append(text)
                    shown.text(name, text)
                case Finished(id=name):
                    finished.append(event)
                    answers.add(by_id[name], _line("".join(texts[name]), event))
                    shown.end(name)
                case Failed(id=name, message=message):
                    failed.append(event)
                    shown.text(name, f"[failed: {message}]")
                    shown.end(name)
    if failed:
        first = by_id[failed[0].id]
        raise EngineError(
            f"{len(failed)} of {len(requests)} prompts failed, the first is {first.text[:40]!r}: {failed[0].message}",
            f"The others are in {answers.path}; run.resume={answers.path.parent} tries these again.",
        )
    return finished


def _line(text: str, end: Finished) -> dict[str, Any]:
    return {
        "answer": text,
        "finish_reason": end.reason,
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "ttft_s": round(end.ttft_s, 4),
        "seconds": round(end.queue_s + end.prefill_s + end.decode_s, 4),
    }


class InOrder:
    """Answers on stdout in the order of the prompts: the first that is not finished streams, the others wait.

    Where stdout cannot be written the answers are still to be made, and kept: that is said when they are.

    Attributes:
        failed: why they are not shown any more; None also where whoever looked has seen enough.
    """

    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts = {str(prompt.index): prompt for prompt in prompts}
        self._waiting: dict[str, list[str]] = {}
        self._ended: set[str] = set()
        self._order = [str(prompt.index) for prompt in prompts]
        self._at = 0
        self.failed: OutputError | None = None

    def begin(self) -> None:
        """Shows the first prompt."""
        self._title()

    def text(self, name: str, text: str) -> None:
        """More of one answer."""
        if name == self._order[self._at]:
            self._write(text)
        else:
            self._waiting.setdefault(name, []).append(text)

    def end(self, name: str) -> None:
        """One answer is complete."""
        self._ended.add(name)
        while self._at < len(self._order) and self._order[self._at] in self._ended:
            self._write("\n\n")
            self._at += 1
            self._title()

    def _title(self) -> None:
        if self._at < len(self._order):
            name = self._order[self._at]
            self._write(f"> {self._prompts[name].text}\n")
            self._write("".join(self._waiting.pop(name, [])))

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # `... | head`
            silence(sys.stdout)
        except OutputError as error:
            self.failed = error
            silence(sys.stdout)
