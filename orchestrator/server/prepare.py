"""A client's request to the engine's: the tokens, and what the client left out."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.backends.protocol import Request
from orchestrator.config import GenerationConfig
from orchestrator.server.errors import ParameterError
from orchestrator.server.types import ChatRequest, CompletionRequest
from orchestrator.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """What requests are measured against.

    Attributes:
        name: what clients call it.
        max_context: tokens of one sequence, prompt and answer.
        vocab: token ids are below it.
        generation: for what a request leaves out.
    """

    name: str
    max_context: int
    vocab: int
    generation: GenerationConfig
    tokenizer: Tokenizer


def check_model(model: ServedModel, asked: str | None) -> None:
    """Refuses a request for another model than the one that is served.

    Raises:
        ParameterError: it is another.
    """
    if asked is not None and asked != model.name:
        raise ParameterError(
            f"the model {asked[:200]!r} is not served here, {model.name!r} is", "model", "model_not_found", 404
        )


def engine_request(model: ServedModel, body: ChatRequest | CompletionRequest, name: str, number: int) -> Request:
    """The engine's request. Tokenizes: not for the event loop.

    Args:
        name: the request's id.
        number: of the request since the start; without a seed of its own, each is another draw.

    Raises:
        ParameterError: the prompt is empty, too long, or has tokens that the model does not have.
        ConfigError: the chat template refuses the messages.
    """
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    _check_tokens(model, body.stop_token_ids or [], "stop_token_ids")
    tokens = _tokens(model, body)
    if not tokens:
        raise ParameterError(f"{param} gives no tokens", param, "invalid_value")
    room = model.max_context - len(tokens)
    if room < 1:
        raise ParameterError(
            f"the context is {model.max_context} tokens, and {param} has {len(tokens)}, which leaves no room for an "
            "answer",
            param,
            "context_length_exceeded",
        )
    default = model.generation
    limit = body.limit or default.max_tokens
    return Request(
        id=name,
        tokens=tokens,
        max_tokens=min(limit, room),
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_p=default.top_p if body.top_p is None else body.top_p,
        seed=(default.seed + number) % 2**63 if body.seed is None else body.seed,
        stop=list(default.stop) if body.stop is None else body.stop,
        stop_tokens=list(default.stop_tokens) if body.stop_token_ids is None else body.stop_token_ids,
    )


def _tokens(model: ServedModel, body: ChatRequest | CompletionRequest) -> list[int]:
    if isinstance(body, ChatRequest):
        return model.tokenizer.encode(body.conversation)
    if isinstance(body.prompt, str):
        return model.tokenizer.encode_prompt(body.prompt)
    _check_tokens(model, body.prompt, "prompt")  # a GPU would stop at it, with all requests that are in flight
    return body.prompt


def _check_tokens(model: ServedModel, tokens: list[int], param: str) -> None:
    wrong = next((token for token in tokens if not 0 <= token < model.vocab), None)
    if wrong is not None:
        raise ParameterError(f"{wrong} is not a token id: the model has 0 to {model.vocab - 1}", param, "invalid_value")
