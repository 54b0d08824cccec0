"""From OpenAI's request bodies to the texts to write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .inference import Inference
from .openai_schemas import REFUSED, ChatRequest, Common, CompletionRequest, Message
from .problems import ApiError
from .sampling import Sampling
from .text_job import Wanted

# OpenAI's defaults where a client leaves them out.
_COMPLETION_TOKENS = 16
_TEMPERATURE = 1.0


def check_supported(body: Common) -> None:
    """Raise where a field asks for something that is not here.

    Raises:
        ApiError: 400, naming the field.
    """
    given = {**(body.model_extra or {}), **body.model_dump(include={"echo"})}
    for name, harmless in REFUSED.items():
        if name in given and given[name] not in harmless:
            raise ApiError(
                400, f"{name}: not supported by this server; leave it out", "unsupported_field"
            )


def choices_of(service: Inference, body: CompletionRequest, request_id: str) -> list[Wanted]:
    """The texts of a completion request: `n` for each prompt."""
    prompts: list[Any] = [body.prompt]
    if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        prompts = list(body.prompt)
    _check_count(service, len(prompts) * (body.n or 1))
    wanted = []
    limit = body.max_tokens or _COMPLETION_TOKENS
    for prompt in prompts:
        text, ids = _text_and_ids(service, prompt)
        wanted += _repeated(body, _wanted(service, body, request_id, text, text, ids, limit))
    return wanted


def chat_prompt(service: Inference, body: ChatRequest, request_id: str) -> list[Wanted]:
    """The texts of a chat request: `n` answers."""
    _check_count(service, body.n or 1)
    text, ids = _rendered(service, body.messages)
    query = next((m.text() for m in reversed(body.messages) if m.role == "user"), text)
    limit = body.max_completion_tokens or body.max_tokens or _room(service, len(ids))
    return _repeated(body, _wanted(service, body, request_id, text, query, ids, limit))


def _rendered(service: Inference, messages: list[Message]) -> tuple[str, tuple[int, ...]]:
    """The prompt and its tokens: by the tokenizer's chat template; without one, what was said,
    line by line, for the model to go on."""
    tokenizer = service.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        text = "\n".join(message.text() for message in messages)
        return text, service.encode(text)
    turns = [{"role": _role(m.role), "content": m.text()} for m in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # Templates refuse orders of roles by raising whatever they like.
        raise ApiError(422, f"messages: the model's chat template refuses them: {error}") from error
    # A template writes its own begin token.
    return text, service.encode(text, special=False)


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _wanted(
    service: Inference,
    body: Common,
    request_id: str,
    text: str,
    query: str,
    ids: tuple[int, ...],
    limit: int,
) -> Wanted:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Wanted(
        request_id=request_id,
        prompt=text,
        query=query,
        prompt_ids=ids,
        max_new_tokens=limit,
        sampling=Sampling(
            temperature=_TEMPERATURE if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
        ),
        stops=tuple(stop),
        use_knowledge=body.use_knowledge,
        beliefs=None if body.beliefs is None else tuple(body.beliefs),
    )


def _repeated(body: Common, wanted: Wanted) -> list[Wanted]:
    """`n` choices; with a seed each draws from one of its own."""
    seed = wanted.sampling.seed
    return [
        replace(
            wanted,
            sampling=replace(wanted.sampling, seed=None if seed is None else (seed + i) % 2**63),
        )
        for i in range(body.n or 1)
    ]


def _text_and_ids(service: Inference, prompt: Any) -> tuple[str, tuple[int, ...]]:
    """Of a prompt that is text, or tokens."""
    if isinstance(prompt, str):
        return prompt, service.encode(prompt)
    ids = tuple(prompt)
    most = service.base.model.config.get_text_config().vocab_size
    if max(ids) >= most:
        raise ApiError(422, f"prompt: expected tokens below {most}, got {max(ids)}")
    return service.tokenizer.decode(ids), ids


def _room(service: Inference, prompt_tokens: int) -> int:
    """As many new tokens as there is room for."""
    most = service.settings.max_new_tokens
    return most if service.context is None else max(1, min(most, service.context - prompt_tokens))


def _check_count(service: Inference, count: int) -> None:
    most = service.settings.max_choices
    if count > most:
        raise ApiError(422, f"expected at most {most} texts in one request, got {count}")
