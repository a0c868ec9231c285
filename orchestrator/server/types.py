"""What clients may send: OpenAI's chat completions and completions, as far as the engines have them.

Nothing is ignored that would change the answer: a parameter that is not supported is refused by its name, unless it
has the value at which it does nothing (many clients send n=1 and the like).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.prompts import Message

# Parameter -> the values at which it changes nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools either is the same
    "functions": ([],),
    "function_call": ("none", "auto"),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
# About the client, not about the answer.
NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")


def _unicode(text: str) -> str:
    """JSON can hold half a surrogate pair; tokenizers take none."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has half a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Generation(BaseModel):
    """What both routes have. What is left out is as the server's configuration says (generation.*)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: list[Text] | None = None
    stop_token_ids: list[int] | None = None  # as vLLM's own server has it: beside the model's end tokens
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        """Drops what changes nothing, refuses what would."""
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if name not in NOTES}
        for name in NEUTRAL.keys() & kept.keys():
            value = kept.pop(name)
            if value is not None and not any(type(value) is type(n) and value == n for n in NEUTRAL[name]):
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "{param} is not supported here: leave it out",
                    {"param": name},
                )
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if stops is not None and not (isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)):
            raise ValueError("is a text or a list of texts, none of them empty")
        return stops

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_tokens(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, list) and all(type(t) is int and t >= 0 for t in value)):
            raise ValueError("is a list of token ids")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("unsupported_parameter", "{param} needs stream=true", {"param": "stream_options"})
        return self

    @property
    def usage_in_stream(self) -> bool:
        """Whether the last chunk of a stream is to have the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> int | None:
        """Tokens that the answer may have."""
        return self.max_tokens


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: Text

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """A text, or the list of parts that some clients send, if they are all texts."""
        if not isinstance(value, list):
            return value
        if not value or not all(_is_text_part(part) for part in value):
            raise ValueError('is a text, or a list of {"type": "text", "text": ...}: the model reads nothing else')
        return "".join(part["text"] for part in value)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "invalid_value", "{param} and max_completion_tokens are the same: give one", {"param": "max_tokens"}
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def conversation(self) -> list[Message]:
        """The messages as a tokenizer takes them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt: str | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        tokens = isinstance(value, list) and all(type(token) is int for token in value)
        if not value or not (isinstance(value, str) or tokens):
            raise ValueError("is one text, or one list of token ids, and not empty: send several as several requests")
        return _unicode(value) if isinstance(value, str) else value
