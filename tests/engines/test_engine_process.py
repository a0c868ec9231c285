"""The engine's process: its start, its checks, its death and its end.

A real engine where that is possible; a fake for faults that a real one does not have on demand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from socket import socketpair

import pytest
import tiny
from asking import FAKE, Answer, answer, make_plan

from orchestrator.backends.protocol import Delta, Finished, LoadPlan, Request
from orchestrator.engine import wire
from orchestrator.engine.handle import EngineProcess
from orchestrator.engine.in_flight import Held
from orchestrator.engine.process import ChildProcess, child_environment
from orchestrator.errors import EngineError, EngineUnavailableError, OutOfMemoryError, RequestError

Start = Callable[..., EngineProcess]
SOON = 5.0  # seconds in which a death must be noticed


def fake_plan(fault: str = "") -> LoadPlan:
    return replace(make_plan("nowhere"), backend="fake", engine_args={"fault": fault})


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone_soon(*pids: int) -> bool:
    deadline = time.monotonic() + SOON
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def worker_of(engine: EngineProcess) -> int:
    words = engine.log.read_text().split()
    return int(words[words.index("worker") + 1])


def read_until_error(engine: EngineProcess) -> EngineError:
    began = time.monotonic()
    try:
        while time.monotonic() - began < SOON:
            engine.events(timeout=SOON)
    except EngineError as error:
        return error
    pytest.fail("the death was not noticed")


def test_a_real_engine_in_a_child(start: Start, checkpoint: Path) -> None:
    progress: list[wire.Progress] = []
    process = start(make_plan(checkpoint), on_progress=progress.append)
    ready = process.wait_ready(timeout=60)
    assert [p.done for p in progress] == [0, 1, 2, 3, 4]
    assert list(ready.placement) == ["cpu"]
    assert ready.versions["transformers"]
    assert ready.load_s > ready.warmup_s > 0
    assert process.stats().prefill_tokens == 0  # neither the smoke pass nor the warm-up is counted

    requests = [Request(str(i), [10 + i, 20, 30], 12) for i in range(16)]
    alone = answer(process, [replace(requests[1], id="alone")])["alone"].tokens
    answers = {request.id: Answer() for request in requests}
    for request in requests:
        process.submit(request)
    with pytest.raises(RequestError, match="in flight"):
        process.submit(requests[0])
    for i in range(0, 16, 3):
        process.cancel(str(i))
    score = process.score([1, 2, 3, 4], 2)  # in the middle; the events that come meanwhile are kept
    while not all(a.end for a in answers.values()):
        for event in process.events():
            answers[event.id].take(event)
    assert len(score.logprobs) == 3
    reasons = [a.end.reason for a in answers.values() if isinstance(a.end, Finished)]
    assert reasons == ["cancelled" if i % 3 == 0 else "length" for i in range(16)]
    assert answers["1"].tokens == alone
    assert len({tuple(a.tokens) for i, a in answers.items() if int(i) % 3}) == 10  # none is another's
    assert process.stats().decode_tokens >= 10 * 11
    assert process.events(timeout=0.05) == []
    with pytest.raises(RequestError, match="1 tokens to score"):
        process.score([1], 2)

    process.submit(Request("long", [1, 2, 3], 500))
    while not process.events():
        pass
    os.kill(process.pid, signal.SIGKILL)
    error = read_until_error(process)
    assert error.message.startswith("the transformers engine was killed by signal 9 (SIGKILL) while answering; ")
    assert "run out of memory" in error.hint
    assert str(process.log) in error.hint
    with pytest.raises(EngineError, match="signal 9"):
        process.submit(Request("late", [1], 1))


def test_nan_weights_are_refused_by_the_smoke_pass(start: Start, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "poisoned", poison=True)
    with pytest.raises(EngineError, match="gave a probability that is not finite"):
        start(make_plan(folder)).wait_ready(timeout=60)


@pytest.mark.parametrize(
    ("backend", "method", "dtype", "said"),
    [
        ("transformers", "none", "float32", "Its weights hold NaN: check the files"),
        ("transformers", "none", "float16", "or set model.dtype=float32 quant.bits=32"),
        ("bitsandbytes", "nf4", "bfloat16", "or overflow in bfloat16: check the files"),
        ("bitsandbytes", "nf4", "float16", "or set model.dtype=float32"),
        ("vllm", "gptq", "float16", "or set model.dtype=bfloat16"),
        ("exllamav2", "exl2", "float16", "or type backend=bitsandbytes quant.bits=4 on the model before it was"),
    ],
)
def test_the_smoke_pass_names_a_dtype_that_the_engine_has(
    start: Start, backend: str, method: str, dtype: str, said: str
) -> None:
    plan = replace(fake_plan("infinite"), backend=backend, method=method, dtype=dtype)
    with pytest.raises(EngineError, match="not finite") as caught:
        start(plan, FAKE).wait_ready(timeout=20)
    assert said in caught.value.hint
    has_it = backend in ("transformers", "bitsandbytes") and dtype != "float32"
    assert ("model.dtype=float32" in caught.value.hint) == has_it


def test_bytes_that_the_plan_does_not_say(start: Start, checkpoint: Path) -> None:
    process = start(make_plan(checkpoint, weights={"cpu": 50_000_000}))
    with pytest.raises(EngineError, match=r"cpu holds 1,\d{3},\d{3} bytes .* the plan says 50,000,000"):
        process.wait_ready(timeout=60)


def test_a_checkpoint_that_is_not_there(start: Start, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="while loading"):
        start(make_plan(tmp_path / "nothing")).wait_ready(timeout=60)


def test_tensors_elsewhere_are_named(start: Start) -> None:
    with pytest.raises(EngineError) as caught:
        start(fake_plan("stray"), FAKE).wait_ready(timeout=20)
    assert caught.value.message.endswith(
        "layers.0.weight is on meta, planned on cpu; layers.1.weight is on meta, planned on cpu; "
        "layers.2.weight is on meta, planned on cpu and 2 more tensors"
    )


def test_what_the_child_prints_does_not_disturb(start: Start) -> None:
    process = start(fake_plan("talk"), FAKE)
    process.wait_ready(timeout=20)
    got = answer(process, [Request("a", [1, 2, 3], 9)])["a"]
    assert got.tokens == [1, 2, 3]
    process.close()
    log = process.log.read_text(errors="replace")
    assert '{"is":"Close"}' in log
    assert "a C library says hello" in log


def test_tokens_of_quick_steps_travel_together(start: Start) -> None:
    process = start(fake_plan("quick"), FAKE)
    process.wait_ready(timeout=20)
    requests = [Request(name, list(range(1, 301)), 300) for name in "ab"]
    for request in requests:
        process.submit(request)
    answers = {request.id: Answer() for request in requests}
    messages = 0
    while not all(a.end for a in answers.values()):
        events = process.events()
        messages += 1
        assert len([e for e in events if isinstance(e, Delta)]) == len({e.id for e in events if isinstance(e, Delta)})
        for event in events:
            answers[event.id].take(event)
    assert [a.tokens for a in answers.values()] == [r.tokens for r in requests]
    assert {a.text for a in answers.values()} == {"x" * 300}
    assert messages < 150


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("infinite", EngineError, "not finite"),
        ("chained", EngineError, r"See root cause above, because of KeyError: 'rope'"),
        ("package", EngineUnavailableError, "No module named 'a_package_that_is_not_there'"),
        ("full", OutOfMemoryError, "stopped while loading: .*, because of MemoryError: CUDA out of memory"),
        ("exit", EngineError, "exited with code 3 while loading; its last words: no such kernel"),
    ],
)
def test_a_start_that_fails(start: Start, fault: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        start(fake_plan(fault), FAKE).wait_ready(timeout=20)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("step", "the fake engine stopped while answering: RuntimeError: the kernel gave up"),
        ("segv", "(SIGSEGV) while answering; its last words: Fatal Python error: Segmentation fault"),
    ],
)
def test_a_death_in_the_middle_of_an_answer(start: Start, fault: str, message: str) -> None:
    process = start(fake_plan(fault), FAKE)
    process.wait_ready(timeout=20)
    process.submit(Request("a", [1] * 100, 100))
    assert message in str(read_until_error(process))


def test_what_requests_held_at_most_is_known(start: Start) -> None:
    process = start(fake_plan("quick"), FAKE)
    process.wait_ready(timeout=20)
    for name, prompt, made in (("a", 100, 30), ("b", 40, 5)):
        process.submit(Request(name, [1] * prompt, made))
        while not any(isinstance(event, Finished) for event in process.events()):
            pass
    assert process.held == Held(1, 100, 130)


def test_what_was_answered_before_an_engine_fails_is_answered(start: Start) -> None:
    process = start(fake_plan("quick step"), FAKE)
    process.wait_ready(timeout=20)
    process.submit(Request("a", [1] * 100, 100))
    got: list[int] = []

    def read() -> None:
        while True:
            got.extend(t for e in process.events(timeout=SOON) if isinstance(e, Delta) for t in e.tokens)

    with pytest.raises(EngineError, match="the kernel gave up"):
        read()
    assert len(got) == 10  # of 20 steps, the smoke pass and the warm-up took 10


def test_a_death_is_noticed_though_nothing_is_in_flight(start: Start) -> None:
    process = start(fake_plan("idle"), FAKE)
    process.wait_ready(timeout=20)
    with pytest.raises(EngineError, match=r"waiting for requests.*the driver has gone"):
        process.events(timeout=20)


def test_a_death_is_noticed_though_a_worker_holds_the_socket(start: Start) -> None:
    process = start(fake_plan("fork"), FAKE)
    process.wait_ready(timeout=20)
    os.kill(process.pid, signal.SIGKILL)
    assert "while waiting for requests" in read_until_error(process).message


def test_not_ready_in_time(start: Start) -> None:
    process = start(fake_plan("hang"), FAKE)
    with pytest.raises(EngineError, match="was not ready after 1 s"):
        process.wait_ready(timeout=1)
    process.close(timeout=0)
    assert not alive(process.pid)


def test_closing_takes_the_workers_along(start: Start) -> None:
    with start(fake_plan("worker"), FAKE) as process:
        process.wait_ready(timeout=20)
        worker = worker_of(process)
        assert alive(worker)
    assert gone_soon(process.pid, worker)
    process.close()
    with pytest.raises(EngineError, match="is closed"):
        process.events()


def test_an_engine_that_does_not_close_is_ended(start: Start) -> None:
    process = start(fake_plan("deaf"), FAKE)
    process.wait_ready(timeout=20)
    began = time.monotonic()
    process.close(timeout=0.5)
    assert time.monotonic() - began < SOON
    assert not alive(process.pid)


def test_an_interrupt_ends_the_child_and_passes_through(start: Start) -> None:
    process = start(fake_plan("worker"), FAKE)
    process.wait_ready(timeout=20)
    worker = worker_of(process)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), process:
        process.events(timeout=20)
    assert gone_soon(process.pid, worker)


ORPHAN = """
import sys
from pathlib import Path
from dataclasses import replace
from asking import FAKE, make_plan
from orchestrator.backends.protocol import Request
from orchestrator.engine.handle import EngineProcess

plan = replace(make_plan("nowhere"), engine_args={"fault": "worker"})
engine = EngineProcess.start(sys.executable, FAKE, plan, Path(sys.argv[1]))
engine.wait_ready()
engine.submit(Request("a", [1] * 10_000, 10_000))
print(engine.pid, flush=True)
while True:
    engine.events()
"""


def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    with subprocess.Popen([sys.executable, "-c", ORPHAN, log], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        worker = int(log.read_text().split()[1])
        assert alive(child)
        parent.kill()
        assert gone_soon(child, worker)


def test_no_such_interpreter(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="cannot start the fake engine with /no/python"):
        EngineProcess.start("/no/python", FAKE, fake_plan(), tmp_path / "log")


def test_another_interpreter_does_not_get_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert child_environment(sys.executable, {})["PYTHONPATH"] == "/ours"
    assert "PYTHONPATH" not in child_environment("/other/bin/python", {})
    assert child_environment("/other/bin/python", {"PYTHONPATH": "/theirs"})["PYTHONPATH"] == "/theirs"


def test_the_child_needs_nothing_but_the_standard_library_until_it_loads() -> None:
    """-I -S: a bare interpreter without our environment, away from the checkout."""
    code = (
        "import runpy, sys; before = set(sys.modules); runpy.run_path(PATH);"
        "import orchestrator.engine.host, orchestrator.backends.huggingface;"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(n for n in names if n not in sys.stdlib_module_names and n != 'orchestrator'))"
    )
    bootstrap = Path(wire.__file__).with_name("bootstrap.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code.replace("PATH", repr(str(bootstrap)))],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "it fails here\nWARNING Failed to load CPU gemm_4bit_forward from kernels-community: None.\n",
            "it fails here",
        ),
        ("Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.\n", ""),
        ("one\n\ntwo\n\n", "two"),
    ],
)
def test_what_a_library_always_says_is_no_last_word(tmp_path: Path, said: str, words: str) -> None:
    ours, theirs = socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", f"print({said!r}, end='')"]
        child = ChildProcess.start(command, os.environ, tmp_path / "log", theirs.fileno())
        assert child.wait(30)
        child.kill()
    assert child.last_words() == words
