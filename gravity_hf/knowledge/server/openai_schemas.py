"""OpenAI's chat and text completions, as its clients send them.

Fields that change nothing here (`user`, `metadata`, ...) are accepted; what would change the answer
and is not implemented is refused by `openai_api`, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .schemas import MOST_CHARS, MOST_TOKENS, Key, Seed

Short = Annotated[str, Field(max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MOST_TOKENS)]
Written = Annotated[str, Field(max_length=MOST_CHARS)]


class StreamOptions(BaseModel):
    """`include_usage`: a last piece with the usage."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take. `beliefs`: keys or ids, null for those that the text is about."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Short | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    stop: Short | Annotated[list[Short], Field(max_length=4)] | None = None
    seed: Seed | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    beliefs: Annotated[list[Key] | None, Field(max_length=1000)] = None
    use_knowledge: bool = True


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: (
        Written
        | Annotated[list[Written], Field(min_length=1, max_length=64)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=64)]
    )
    echo: bool | None = None


class ContentPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text"]
    text: Written


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Written | Annotated[list[ContentPart], Field(min_length=1, max_length=64)]

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = None


# Of OpenAI's fields those that ask for something that is not here, with the values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
}
