"""Checkpoints that transformers wrote in bitsandbytes' forms: loaded as they are, to the byte as planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from asking import answer, load_engine, make_plan

from orchestrator import embedded
from orchestrator.backends.protocol import Finished, Request
from orchestrator.config import Config, ModelConfig, PathsConfig
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Session, look, open_session

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
QUESTION = [{"role": "user", "content": "What does len do?"}]
ANSWER = "Return the number of items in a container."
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True)
class Stored:
    """A folder in one form, and the same method made of the unquantized model while it loads."""

    form: str
    folder: Path
    session: Session
    source: Path


@pytest.fixture(scope="module", params=FORMS)
def stored(
    request: pytest.FixtureRequest, merged_embedded: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stored]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("stored")
    model = AutoModelForCausalLM.from_pretrained(
        merged_embedded,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(**FORMS[request.param]),
    )
    model.save_pretrained(folder)  # before any forward pass, which may lay the weights out anew
    AutoTokenizer.from_pretrained(merged_embedded).save_pretrained(folder)
    config = Config(
        model=ModelConfig(path=str(folder), max_context=512),
        paths=PathsConfig(artifacts=str(tmp_path_factory.mktemp("artifacts"))),
    )
    config.hardware.profile = "cpu"
    with open_session(look(config, planning=False), RunFolder(tmp_path_factory.mktemp("run"))) as opened:
        yield Stored(request.param, folder, opened, merged_embedded)


def test_it_is_placed_to_the_byte_as_planned(stored: Stored) -> None:
    session, chosen = stored.session, stored.session.chosen
    assert (chosen.backend, chosen.method) == ("bitsandbytes", stored.form.partition(" ")[0])
    assert chosen.double_quant is ("double" in stored.form)
    assert session.ready.placement == chosen.weights == {"cpu": chosen.host.weights}
    assert (session.model.path, session.model.built) == (stored.folder, ())


def test_it_answers_as_the_model_that_is_quantized_while_it_loads(stored: Stored) -> None:
    session, method = stored.session, stored.form.partition(" ")[0]
    weights = session.chosen.weights
    plan = make_plan(stored.source, method, double_quant="double" in stored.form, weights=weights)
    fresh = load_engine(plan)
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")[:4_000]
    tokens = session.tokenizer.encode([{"role": "user", "content": text}])[:256]
    want, have = fresh.score(tokens, 5), session.engine.score(tokens, 5)
    assert have.logprobs == pytest.approx(want.logprobs, abs=2e-4)
    assert sum(fresh.placement()["cpu"].values()) == weights["cpu"]


def test_its_answers_make_sense(stored: Stored) -> None:
    got = answer(stored.session.engine, [Request("a", stored.session.tokenizer.encode(QUESTION), 40)])["a"]
    assert isinstance(got.end, Finished)
    assert got.end.reason == "stop"
    assert got.text == ANSWER
