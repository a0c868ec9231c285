"""task=serve over HTTP, as OpenAI's clients use it, on loopback; its ends; what it refuses before it loads."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import Done, Orchestrator, Started, gone
from tokenizers import Tokenizer

from orchestrator import embedded

KEY = "~a key, with = and 'quotes'"
QUESTION = "What does len do?"
ANSWER = "Return the number of items in a container."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Server:
    """A server that has been started, and a client of it."""

    def __init__(self, started: Started, key: str = "none") -> None:
        self.started = started
        started.until_state("serving")
        assert started.folder is not None
        self.status = json.loads((started.folder / "status.json").read_text())
        self.url: str = self.status["url"]
        headers = {"Authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def ask(self, question: str, **more: Any) -> dict[str, Any]:
        """A chat's whole answer."""
        reply = self.post(CHAT, messages=[{"role": "user", "content": question}], **more)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer, which has to end with [DONE]."""
        reply = self.post(path, stream=True, **body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = events_of(reply.text)
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def talk(self, prompt: list[int], max_tokens: int = 1900) -> tuple[Iterator[str], Callable[[], None]]:
        """A long streamed answer whose first words have come: the rest of its lines, and how to hang up."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
        reply = self.client.send(self.client.build_request("POST", COMPLETIONS, json=body), stream=True)
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        return lines, reply.close

    def kill(self, number: int = signal.SIGINT) -> None:
        self.started.process.send_signal(number)


def events_of(text: str) -> list[str]:
    assert text.endswith("\n\n")
    events = text[:-2].split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def text_of(answer: dict[str, Any]) -> str:
    [choice] = answer["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.fixture(scope="module")
def server(shared: Orchestrator) -> Iterator[Server]:
    """The embedded model, behind a key."""
    started = shared.start("task=serve", "server.port=0", f"server.api_key={KEY}", "generation.max_tokens=40")
    yield Server(started, KEY)
    family = started.family()
    started.interrupt()
    done = started.done(timeout=10)
    assert (done.code, done.err.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in done.err
    assert done.out == f"{done.json('status.json')['url']}\n"
    assert done.json("status.json")["state"] == "interrupted"
    served = done.json("result.json")["served"]
    assert served["requests"] == served["finished"] + served["failed"]
    assert done.json("result.json")["measured"]["host_peak_bytes"] > 0
    assert gone(family)


@pytest.fixture
def talker(orchestrator: Orchestrator, long_winded: Path) -> Server:
    """A model whose answers take seconds, one at a time."""
    argv = ["backend=transformers", "hardware=cpu", "run.in_flight=1", "server.port=0"]
    return Server(orchestrator.start("task=serve", f"model.path={long_winded}", *argv))


# Answers


def test_health_and_models(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    listed = server.client.get("/v1/models").json()
    assert [(model["id"], model["object"], model["max_model_len"]) for model in listed["data"]] == [
        ("embedded", "model", 2048)
    ]


def test_a_chat_is_answered_as_task_run_answers_it(server: Server) -> None:
    answer = server.ask(QUESTION, model="embedded")
    assert text_of(answer) == ANSWER
    assert (answer["object"], answer["model"]) == ("chat.completion", "embedded")
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}


def test_the_deltas_of_a_stream_are_the_answer(server: Server) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    first, *middle, last, counts = server.stream(CHAT, messages=messages, stream_options={"include_usage": True})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == ANSWER
    assert len(middle) > 1
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (counts["choices"], counts["usage"]["total_tokens"]) == ([], 20)
    chunks = [first, *middle, last, counts]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_text_and_its_tokens_are_completed_alike_whole_and_streamed(server: Server) -> None:
    tokens = Tokenizer.from_file(str(embedded.BASE / "tokenizer.json")).encode("def main").ids
    whole = server.post(COMPLETIONS, prompt="def main", max_tokens=12).json()
    assert (whole["object"], whole["usage"]["completion_tokens"]) == ("text_completion", 12)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert text_of(server.post(COMPLETIONS, prompt=tokens, max_tokens=12).json()) == text_of(whole) != ""
    chunks = server.stream(COMPLETIONS, prompt=tokens, max_tokens=12)
    assert "".join(text_of(chunk) for chunk in chunks) == text_of(whole)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)


def test_several_in_flight_are_not_mixed_up(server: Server) -> None:
    questions = [json.loads(line)["prompt"] for line in embedded.PROMPTS.read_text().splitlines()]
    alone = [text_of(server.ask(question)) for question in questions]
    assert len(set(alone)) > 4

    def asked(number: int) -> str:
        if number % 2:
            return text_of(server.ask(questions[number % len(questions)]))
        chunks = server.stream(CHAT, messages=[{"role": "user", "content": questions[number % len(questions)]}])
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(asked, range(3 * len(questions))))
    assert together == alone * 3


def test_stop_limits_and_sampling_reach_the_engine(server: Server) -> None:
    stopped = server.ask(QUESTION, stop=" items")
    assert (text_of(stopped), stopped["choices"][0]["finish_reason"]) == ("Return the number of", "stop")
    assert text_of(server.ask(QUESTION, stop=["container", "number"])) == "Return the "
    short = server.ask(QUESTION, max_completion_tokens=3)
    assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (3, "length")
    default = server.post(COMPLETIONS, prompt=[1] * 9, stop=[]).json()
    assert default["usage"]["completion_tokens"] <= 40  # generation.max_tokens
    sampled = [text_of(server.ask(QUESTION, temperature=2, seed=seed, max_tokens=20)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    drawn = [text_of(server.ask(QUESTION, temperature=2, max_tokens=20)) for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_an_answer_ends_where_the_context_does(server: Server) -> None:
    answer = server.post(COMPLETIONS, prompt=[9] * 2045, max_tokens=100).json()
    assert answer["usage"]["total_tokens"] <= 2048


# Refusals


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
        (CHAT, {}, 400, "messages", "invalid_value"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 5000}]}, 400, "messages", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [1] * 2048}, 400, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [10**6]}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, 400, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature", "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "n": 2}, 400, "n", "unsupported_parameter"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 1}, 400, "logprobs", "unsupported_parameter"),
        (COMPLETIONS, {"prompt": "a", "top_k": 5}, 400, "top_k", "unknown_parameter"),
        (COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404, "model", "model_not_found"),
        (COMPLETIONS, [1], 400, None, "invalid_json"),
        ("/v1/embeddings", {}, 404, None, None),
    ],
)
def test_what_cannot_be_answered_is_refused_in_openais_way(
    server: Server, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    if isinstance(body, dict):
        body["stream"] = True  # not even begun
    reply = server.client.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}'])
def test_a_body_that_is_not_json_is_refused(server: Server, content: bytes) -> None:
    reply = server.client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_half_a_surrogate_pair_is_refused_wherever_it_is(server: Server) -> None:
    for body in ('{"prompt": "\\ud800"}', '{"prompt": "a", "model": "\\ud800"}', '{"prompt": "a", "\\ud800": 1}'):
        reply = server.client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code in (400, 404)
        assert reply.json()["error"]["message"]


def test_without_the_key_nothing_is_answered(server: Server) -> None:
    for key in ("", "Bearer", "Bearer none", KEY, f"Bearer {KEY}x"):
        headers = {"Authorization": key} if key else {}
        reply = httpx.post(f"{server.url}{CHAT}", content=b"{", headers=headers, trust_env=False)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.url}/v1/models", trust_env=False).status_code == 401


def test_the_key_is_in_no_file_of_the_run(server: Server) -> None:
    assert server.started.folder is not None
    assert all(b"quotes" not in file.read_bytes() for file in server.started.folder.iterdir())


def test_a_port_that_is_taken_costs_a_line_and_nothing_is_loaded(orchestrator: Orchestrator, server: Server) -> None:
    port = server.url.rpartition(":")[2]
    done = orchestrator("task=serve", f"server.port={port}")
    assert done.code == 2
    assert f"server.port={port}" in done.error
    assert "set server.port to another" in done.error
    assert "loading" not in done.err
    assert done.out == ""


def test_an_address_that_is_not_here_costs_a_line(orchestrator: Orchestrator) -> None:
    done = orchestrator("task=serve", "server.host=192.0.2.1")
    assert done.code == 2
    assert "server.host=127.0.0.1" in done.error


def test_a_server_has_nothing_to_resume(orchestrator: Orchestrator, server: Server) -> None:
    assert server.started.folder is not None
    ended = orchestrator.folder / "ended"  # a copy: the server's own folder is in use
    ended.mkdir()
    shutil.copy2(server.started.folder / "config.yaml", ended)
    done = orchestrator(f"run.resume={ended}")
    assert done.code == 2
    assert "task=serve" in done.error


def test_without_its_packages_it_says_what_to_install(orchestrator: Orchestrator) -> None:
    blocked = orchestrator.folder / "blocked" / "fastapi"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ModuleNotFoundError('no', name='fastapi')\n")
    env = orchestrator.env()
    env["PYTHONPATH"] = f"{blocked.parent}:{env['PYTHONPATH']}"
    command = orchestrator.command("task=serve")
    done = subprocess.run(command, cwd=orchestrator.folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert Done(4, done.stdout, done.stderr, None).error == (
        "error: task=serve needs fastapi, which is not installed here. Type: pip install 'orchestrator[server]'"
    )


# Its ends, and its clients'


@pytest.mark.slow
def test_a_client_that_goes_away_cancels_its_request_and_ctrl_c_twice_ends_the_rest(talker: Server) -> None:
    _, hang_up = talker.talk([5, 6, 7])
    hang_up()
    with pytest.raises(httpx.ReadTimeout):
        talker.client.post(COMPLETIONS, json={"prompt": [1, 2], "max_tokens": 1900}, timeout=0.5)
    asked = time.monotonic()  # one at a time: this would wait for both of them
    assert talker.post(COMPLETIONS, prompt=[5], max_tokens=2).json()["usage"]["completion_tokens"] == 2
    assert time.monotonic() - asked < 3

    lines, _ = talker.talk([5, 6, 7])
    family = talker.started.family()
    talker.kill()
    talker.started.until(lambda: refuses_connections(talker.url), 3)
    assert any("text_completion" in next(lines) for _ in range(4))  # it goes on for a while
    talker.kill()
    rest = list(lines)
    assert "the server is stopping" in rest[-2]
    assert "[DONE]" not in "".join(rest)
    done = talker.started.done(timeout=10)
    assert (done.code, done.err.splitlines()[-1]) == (130, "interrupted")
    assert done.json("status.json")["state"] == "interrupted"
    served = done.json("result.json")["served"]
    assert (served["requests"], served["cancelled"], served["finished"], served["failed"]) == (4, 2, 1, 1)
    assert gone(family)


def refuses_connections(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.slow
def test_sigterm_lets_an_answer_finish(talker: Server) -> None:
    lines, _ = talker.talk([5, 6], max_tokens=100)
    talker.kill(signal.SIGTERM)
    rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-4]
    done = talker.started.done(timeout=10)
    assert done.code == 130
    assert done.json("result.json")["served"]["finished"] == 1


@pytest.mark.slow
def test_an_engine_that_is_killed_ends_its_answers_and_the_server_with_its_last_words(talker: Server) -> None:
    lines, _ = talker.talk([5, 6, 7])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(talker.post, COMPLETIONS, prompt=[8], max_tokens=1900)
        time.sleep(1)
        talker.started.engine().kill()
        whole = waiting.result()
    assert whole.status_code == 500
    assert "killed by signal 9" in whole.json()["error"]["message"]
    rest = list(lines)
    assert "killed by signal 9" in rest[-2]
    assert "[DONE]" not in "".join(rest)
    done = talker.started.done(timeout=10)
    assert done.code == 1
    assert "killed by signal 9" in done.error
    status = done.json("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert done.json("result.json")["served"]["failed"] == 2
