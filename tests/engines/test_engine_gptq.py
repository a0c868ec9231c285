"""A GPTQ checkpoint through vLLM on the CPU, on two ranks, against its own weights in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from asking import answer
from gptq_models import write_gptq

from orchestrator import embedded
from orchestrator.backends.protocol import Finished, Request
from orchestrator.config import BackendConfig, Config, ModelConfig, ParallelConfig, PathsConfig
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Session, look, open_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
torch = pytest.importorskip("torch")
ROUNDING = 0.006  # of a log-probability on average, in float16
QUESTION = [{"role": "user", "content": "Which module provides Counter?"}]


@dataclass(frozen=True)
class Written:
    """A GPTQ folder, and the model in float32 that it stands for."""

    folder: Path
    model: Any


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, merged_embedded: Path) -> Written:
    """The embedded model in 4 bits and groups of 128."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "gptq"
    weights = write_gptq(merged_embedded, folder)
    model = AutoModelForCausalLM.from_pretrained(merged_embedded, dtype=torch.float32).eval()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return Written(folder, model)


@pytest.fixture(scope="module")
def session(written: Written, tmp_path_factory: pytest.TempPathFactory, vllm_engines: Path) -> Iterator[Session]:
    config = Config(
        backend=BackendConfig(name="vllm", engine_args={"enforce_eager": True}),
        model=ModelConfig(path=str(written.folder), dtype="float16"),
        parallel=ParallelConfig(tensor=2),
        paths=PathsConfig(artifacts=str(tmp_path_factory.mktemp("artifacts")), engines=str(vllm_engines)),
    )
    config = replace(config, run=replace(config.run, in_flight=4))
    config.hardware.profile = "cpu"
    with open_session(look(config, planning=False), RunFolder(tmp_path_factory.mktemp("run"))) as opened:
        yield opened


def test_it_scores_as_its_weights_do(session: Session, written: Written) -> None:
    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")[:8_000]
    tokens = session.tokenizer.encode([{"role": "user", "content": text}])[:512]
    with torch.no_grad():
        want = torch.log_softmax(written.model(torch.tensor([tokens])).logits[0, :-1].double(), dim=-1)
    score = session.engine.score(tokens, 20)
    have = torch.tensor(score.logprobs, dtype=torch.double)
    off = (want[range(len(have)), tokens[1:]] - have).abs()
    assert float(off.mean()) < ROUNDING
    tops = torch.tensor([row[0] for row in score.top_tokens])
    assert (tops == want.argmax(-1)).float().mean() > 0.95


def test_every_rank_holds_what_the_plan_says(session: Session) -> None:
    chosen = session.chosen
    # vLLM keeps four float32 scales of the cache in each layer.
    cache_scales = 4 * 4 * session.planned.spec.layers * chosen.tensor_parallel
    assert session.ready.placement == {"cpu": chosen.weights["cpu"] + cache_scales}
    assert (chosen.method, chosen.bits) == ("gptq", 4.0)
    assert (session.model.path, session.model.artifacts) == (session.planned.source.base.path, ())


def test_its_answers_make_sense(session: Session) -> None:
    got = answer(session.engine, [Request("a", session.tokenizer.encode(QUESTION), 40)])["a"]
    assert isinstance(got.end, Finished)
    assert "collections" in got.text
