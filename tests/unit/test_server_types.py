"""What clients may send: read as OpenAI means it, or refused by its name; nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.backends.protocol import Finished
from orchestrator.config import GenerationConfig
from orchestrator.errors import ConfigError, EngineError, RequestError
from orchestrator.prompts import Message
from orchestrator.server.errors import ParameterError, ServerStoppingError, body_of, status_of
from orchestrator.server.prepare import ServedModel, check_model, engine_request
from orchestrator.server.replies import Reply, sse
from orchestrator.server.types import NEUTRAL, NOTES, ChatRequest, CompletionRequest

HI = {"messages": [{"role": "user", "content": "hi"}]}
END = Finished("7", "length", 3, 5, 0, 0, 0, 0)


class Words:
    """A tokenizer whose tokens are the lengths of words."""

    def encode(self, messages: list[Message]) -> list[int]:
        return self.encode_prompt(" ".join(message["content"] for message in messages))

    def encode_prompt(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def model(**generation: Any) -> ServedModel:
    return ServedModel("tiny", 16, 100, GenerationConfig(**generation), Words())  # type: ignore[arg-type]


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({**HI, **more})


def text(prompt: Any, **more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": prompt, **more})


def refusal(**more: Any) -> tuple[str, str]:
    """The type of the one error, and the parameter."""
    with pytest.raises(ValidationError) as caught:
        chat(**more)
    [error] = caught.value.errors()
    return error["type"], error.get("ctx", {}).get("param") or ".".join(map(str, error["loc"]))


# Parameters


def test_a_request_is_read() -> None:
    body = chat(
        model="m", max_completion_tokens=5, temperature=1, top_p=0.5, seed=3, stop="x", stream=True, user="someone"
    )
    assert (body.limit, body.temperature, body.top_p, body.seed, body.stop) == (5, 1.0, 0.5, 3, ["x"])
    assert body.conversation == HI["messages"]
    assert chat(max_tokens=6).limit == 6
    assert chat(stop=["a", "b"]).stop == ["a", "b"]
    assert chat(stop_token_ids=[2, 0]).stop_token_ids == [2, 0]


@pytest.mark.parametrize("name", [*NEUTRAL, *NOTES, "max_tokens", "temperature", "stop", "stream", "stream_options"])
def test_null_is_the_same_as_nothing(name: str) -> None:
    assert chat(**{name: None}) == chat()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NEUTRAL.items() for value in values])
def test_a_value_that_changes_nothing_is_taken(name: str, value: Any) -> None:
    assert chat(**{name: value}) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("logprobs", 0),  # in completions: the chosen token's
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "end"),
        ("store", True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_its_name(name: str, value: Any) -> None:
    assert refusal(**{name: value}) == ("unsupported_parameter", name)


@given(st.text(min_size=1))
def test_an_unknown_parameter_is_refused(name: str) -> None:
    if name not in (*NEUTRAL, *NOTES, *ChatRequest.model_fields):
        assert refusal(**{name: 1}) == ("extra_forbidden", name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", float("inf")),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a", 3]),
        ("stop_token_ids", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stream", "yes"),
        ("model", 3),
        ("messages", []),
        ("messages", "hi"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any) -> None:
    assert refusal(**{name: value})[1] == name


def test_the_two_limits_and_options_without_a_stream_contradict() -> None:
    assert refusal(max_tokens=1, max_completion_tokens=1) == ("invalid_value", "max_tokens")
    assert refusal(stream_options={"include_usage": True}) == ("unsupported_parameter", "stream_options")
    assert refusal(stream=True, stream_options={"x": 1})[1] == "stream_options.x"
    assert chat(stream=True, stream_options={"include_usage": True}).usage_in_stream


# Messages and prompts


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": "x", "tool_calls": []},
        {"role": "user", "content": "\ud800"},
        "hi",
    ],
)
def test_a_message_that_the_model_cannot_read_is_refused(message: Any) -> None:
    assert refusal(messages=[message])[1].startswith("messages.0")


def test_parts_that_are_texts_are_one_text() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).conversation[0]["content"] == "a b"


@pytest.mark.parametrize("prompt", ["", "\ud800", [], ["a"], [[1]], [1, "a"], [True], 5, None, {"a": 1}])
def test_a_prompt_is_one_text_or_one_list_of_tokens(prompt: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        text(prompt)
    assert [error["loc"] for error in caught.value.errors()] == [("prompt",)]


# The engine's request


def test_what_is_left_out_is_as_the_configuration_says() -> None:
    served = model(max_tokens=9, temperature=0.5, top_p=0.7, seed=11, stop=["END"], stop_tokens=[7])
    made = engine_request(served, chat(), "a", 3)
    assert (made.id, made.tokens, made.max_tokens, made.stop, made.stop_tokens) == ("a", [2], 9, ["END"], [7])
    assert engine_request(served, chat(stop_token_ids=[]), "a", 3).stop_tokens == []
    assert (made.temperature, made.top_p, made.seed) == (0.5, 0.7, 14)
    given = engine_request(served, chat(max_tokens=2, temperature=0, top_p=1, seed=5, stop=[]), "a", 3)
    assert (given.max_tokens, given.temperature, given.top_p, given.seed, given.stop) == (2, 0.0, 1.0, 5, [])


def test_an_answer_is_no_longer_than_the_context_has_room_for() -> None:
    assert engine_request(model(), text("one two three"), "a", 0).max_tokens == 13
    assert engine_request(model(), text([1] * 15, max_tokens=99), "a", 0).max_tokens == 1


def wrong(body: ChatRequest | CompletionRequest) -> tuple[str, str, int]:
    with pytest.raises(ParameterError) as caught:
        engine_request(model(), body, "a", 0)
    return caught.value.param, caught.value.code, caught.value.status


def test_a_prompt_that_is_longer_than_the_context_is_refused() -> None:
    assert wrong(text([1] * 16)) == ("prompt", "context_length_exceeded", 400)
    long = [{"role": "user", "content": "a " * 20}]
    assert wrong(chat(messages=long)) == ("messages", "context_length_exceeded", 400)


@pytest.mark.parametrize("token", [-1, 100, 2**70])
def test_a_token_that_the_model_does_not_have_is_refused(token: int) -> None:
    assert wrong(text([1, token])) == ("prompt", "invalid_value", 400)
    assert engine_request(model(), text([0, 99]), "a", 0).tokens == [0, 99]
    if token >= 0:
        assert wrong(chat(stop_token_ids=[99, token])) == ("stop_token_ids", "invalid_value", 400)


def test_a_prompt_without_tokens_is_refused() -> None:
    assert wrong(text("  ")) == ("prompt", "invalid_value", 400)


def test_only_the_served_model_is_there() -> None:
    check_model(model(), None)
    check_model(model(), "tiny")
    with pytest.raises(ParameterError, match="'tiny' is") as caught:
        check_model(model(), "gpt")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


# Replies


def test_a_chunk_is_one_line() -> None:
    assert sse({"text": "a\nb\r\u2028é"}) == 'data: {"text":"a\\nb\\r\u2028é"}\n\n'


@pytest.mark.parametrize("is_chat", [True, False])
def test_usage_comes_last_where_it_was_asked_for(is_chat: bool) -> None:
    reply = Reply("7", "tiny", is_chat, with_usage=True)
    last, counts = reply.last(END)
    assert (last["choices"][0]["finish_reason"], last["usage"]) == ("length", None)
    assert (counts["choices"], counts["usage"]["total_tokens"]) == ([], 8)
    [only] = Reply("7", "tiny", is_chat).last(END)
    assert "usage" not in only


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ConfigError("no"), 400, "invalid_request_error"),
        (RequestError("no"), 400, "invalid_request_error"),
        (ServerStoppingError("no"), 503, "server_error"),
        (EngineError("no"), 500, "server_error"),
    ],
)
def test_an_error_has_openais_shape(error: Any, status: int, kind: str) -> None:
    assert status_of(error) == status
    assert body_of(error) == {"error": {"message": "no", "type": kind, "param": None, "code": None}}


def test_an_error_about_what_is_no_text_can_be_sent() -> None:
    error = ParameterError("\ud800 is unknown", "\udfff", "unknown_parameter")
    assert body_of(error)["error"]["message"] == "? is unknown"
    assert body_of(error)["error"]["param"] == "?"
