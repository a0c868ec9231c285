"""The embedded model's whole way against PEFT: merged in float32 it is the unmerged adapter on its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import embedded
from orchestrator.backends.protocol import Delta, Finished, Request
from orchestrator.config import BackendConfig, Config, ConvertConfig, PathsConfig, QuantConfig
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Session, look, open_session

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
TOLERANCE = 1e-4
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """transformers in float32 on a merge that was written in float32."""
    config = Config(
        backend=BackendConfig(name="transformers"),
        quant=QuantConfig(bits=32.0),
        convert=ConvertConfig(dtype="float32"),
        paths=PathsConfig(artifacts=str(tmp_path_factory.mktemp("artifacts"))),
    )
    planned = look(config, planning=False)
    with open_session(planned, RunFolder(tmp_path_factory.mktemp("run"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def unmerged() -> Any:
    """PEFT's adapter on the base, in float32."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded.BASE, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, embedded.ADAPTER).eval()


def prompts(session: Session) -> list[list[int]]:
    lines = embedded.PROMPTS.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    return [session.tokenizer.encode([{"role": "user", "content": text}]) for text in texts]


def peft_answer(model: Any, tokens: list[int]) -> list[int]:
    with torch.no_grad():
        out = model.generate(input_ids=torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return [int(token) for token in out[0, len(tokens) :]]


def our_answers(session: Session, all_tokens: list[list[int]]) -> list[list[int]]:
    for i, tokens in enumerate(all_tokens):
        session.engine.submit(Request(id=str(i), tokens=tokens, max_tokens=NEW_TOKENS))
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(all_tokens))}
    left = set(answers)
    while left:
        for event in session.engine.events(timeout=60):
            if isinstance(event, Delta):
                answers[event.id] += event.tokens
            else:
                assert isinstance(event, Finished), event
                left.discard(event.id)
    return [answers[str(i)] for i in range(len(all_tokens))]


def test_merged_logits_are_those_of_the_unmerged_adapter(session: Session, unmerged: Any) -> None:
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(session.model.path, dtype=torch.float32).eval()
    for tokens in prompts(session):
        whole = torch.tensor([tokens + peft_answer(unmerged, tokens)])
        with torch.no_grad():
            want, have = unmerged(whole).logits, merged(whole).logits
        assert float((want - have).abs().max()) < TOLERANCE


def test_the_engine_scores_as_the_unmerged_adapter_does(session: Session, unmerged: Any) -> None:
    for tokens in prompts(session):
        whole = tokens + peft_answer(unmerged, tokens)
        with torch.no_grad():
            want = torch.log_softmax(unmerged(torch.tensor([whole])).logits[0, :-1].double(), dim=-1)
        score = session.engine.score(whole, session.planned.spec.vocab)
        have = torch.empty_like(want).scatter_(
            1, torch.tensor(score.top_tokens), torch.tensor(score.top_logprobs, dtype=torch.double)
        )
        assert float((want - have).abs().max()) < TOLERANCE


def test_greedy_answers_are_the_same(session: Session, unmerged: Any) -> None:
    all_tokens = prompts(session)
    for ours, tokens in zip(our_answers(session, all_tokens), all_tokens, strict=True):
        assert ours == peft_answer(unmerged, tokens)


def test_the_adapter_visibly_changes_the_answers(session: Session, unmerged: Any) -> None:
    tokens = prompts(session)[0]
    with unmerged.disable_adapter():
        without = peft_answer(unmerged, tokens)
    assert without != peft_answer(unmerged, tokens)


def test_the_embedded_model_is_small_and_names_no_machine() -> None:
    files = [path for path in embedded.FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 12 * 10**6
    config = json.loads((embedded.ADAPTER / "adapter_config.json").read_text())
    assert not Path(config["base_model_name_or_path"]).is_absolute()
