"""OpenAI's own client works unchanged, streaming or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from knowledge.server.served import TOKEN, Running, running, solo

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase

openai = pytest.importorskip("openai", reason="needs gravity_hf[serve]")

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def written(base: KnowledgeBase, prompt: str, belief: str | None, tokens: int = 8) -> str:
    return base.tokenizer.decode(solo(base, prompt, belief, tokens), skip_special_tokens=True)


def beliefs(*names: str) -> dict[str, Any]:
    return {"extra_body": {"beliefs": list(names)}}


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gravity_hf"


def test_a_completion_is_what_the_model_writes_under_its_beliefs(
    client: Any, base: KnowledgeBase
) -> None:
    for named in ((), ("geo/3",)):
        found = client.completions.create(prompt=PROMPT, **GREEDY, **beliefs(*named))
        (choice,) = found.choices
        assert choice.text == written(base, PROMPT, *(named or (None,)))
        assert choice.finish_reason in ("length", "stop")
        assert [s["key"] for s in choice.provenance["sources"]] == list(named)
        assert found.usage.prompt_tokens == len(base.tokenizer(PROMPT).input_ids)
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_pieces_of_a_stream_are_the_whole_text(client: Any, base: KnowledgeBase) -> None:
    stream = client.completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY,
        **beliefs("geo/3"),
    )  # fmt: skip
    chunks = list(stream)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == written(base, PROMPT, "geo/3")
    assert sum(bool(text) for text in texts) > 1, "it came in one piece"
    assert chunks[-1].usage.completion_tokens > 0 and chunks[-1].choices == []
    ends = [c for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert len(ends) == 1 and ends[0].provenance["sources"][0]["key"] == "geo/3"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_streams_its_message(client: Any, base: KnowledgeBase) -> None:
    """Without a template the prompt is what was said."""
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY, **beliefs("geo/5"))
    text = whole.choices[0].message.content
    assert text == written(base, PROMPT, "geo/5")
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY, **beliefs("geo/5"))
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text


def test_a_chat_goes_through_the_models_template(
    client: Any, served: Running, base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<reply>{% endif %}"
    )
    monkeypatch.setattr(served.state.inference.tokenizer, "chat_template", template, raising=False)
    messages = [
        {"role": "developer", "content": "Short."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Wa"}, {"type": "text", "text": "ter"}],
        },
        {"role": "assistant", "content": "boils"},
        *MESSAGES,
    ]
    prompt = f"<system>Short.<user>Water<assistant>boils<user>{PROMPT}<reply>"
    found = client.chat.completions.create(messages=messages, **GREEDY, **beliefs())
    assert found.choices[0].message.content == written(base, prompt, None)
    strict = "{{ raise_exception('users only') }}"
    monkeypatch.setattr(served.state.inference.tokenizer, "chat_template", strict, raising=False)
    with pytest.raises(openai.UnprocessableEntityError, match="users only"):
        client.chat.completions.create(messages=messages, **GREEDY)


def test_beliefs_are_found_by_the_text_where_none_is_named(
    client: Any, served: Running, base: KnowledgeBase
) -> None:
    fact = base.snapshot.find("geo/6").fact
    (routed,) = base.selector.router.route([fact.prompt])
    assert routed[0].key == "geo/6"
    found = client.completions.create(prompt=fact.prompt, **GREEDY)
    sources = found.choices[0].provenance["sources"]
    assert [s["key"] for s in sources] == [hit.key for hit in routed]
    assert sources[0]["score"] == pytest.approx(routed[0].score)
    # Of a chat it is the last word of the user that counts.
    chat = [{"role": "system", "content": "Tell me about Hamlet."}, *MESSAGES]
    chat[-1] = {"role": "user", "content": fact.prompt}
    found = client.chat.completions.create(messages=chat, **GREEDY)
    assert [s["key"] for s in found.choices[0].provenance["sources"]] == [h.key for h in routed]
    none = client.completions.create(
        prompt=fact.prompt, **GREEDY, extra_body={"use_knowledge": False}
    )
    assert none.choices[0].provenance["sources"] == []


def test_several_prompts_and_choices_come_in_order(client: Any, base: KnowledgeBase) -> None:
    prompts = ["Water boils at", "Who wrote"]
    found = client.completions.create(prompt=prompts, n=2, **GREEDY, **beliefs())
    texts = [written(base, prompt, None) for prompt in prompts]
    assert [c.text for c in found.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    read = sum(len(base.tokenizer(prompt).input_ids) for prompt in prompts)
    assert found.usage.prompt_tokens == read
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(prompt=prompts, n=2, stream=True, **GREEDY, **beliefs()):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [c.text for c in found.choices]


def test_tokens_are_a_prompt_too(client: Any, base: KnowledgeBase) -> None:
    ids = base.tokenizer(PROMPT).input_ids
    expected = written(base, PROMPT, None)
    for prompt in (ids, [ids, ids]):
        found = client.completions.create(prompt=prompt, **GREEDY, **beliefs())
        assert {choice.text for choice in found.choices} == {expected}
    with pytest.raises(openai.UnprocessableEntityError, match="tokens below 300"):
        client.completions.create(prompt=[5, 300], **GREEDY)


def test_a_seed_gives_the_same_text_again(client: Any) -> None:
    settings = {**GREEDY, "temperature": 1.5, "prompt": PROMPT, "n": 3, **beliefs()}
    first, again, other = (
        [c.text for c in client.completions.create(seed=seed, **settings).choices]
        for seed in (7, 7, 8)
    )
    assert first == again != other and len(set(first)) > 1


def test_a_stop_string_ends_the_text(client: Any, base: KnowledgeBase) -> None:
    text = written(base, PROMPT, None)
    stop = text[3:5]
    found = client.completions.create(prompt=PROMPT, stop=[stop], **GREEDY, **beliefs())
    assert found.choices[0].text == text.partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"logprobs": 3}, openai.BadRequestError),
        ({"echo": True}, openai.BadRequestError),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError),
        ({"best_of": 4}, openai.BadRequestError),
        ({"model": "another"}, openai.NotFoundError),
        ({"n": 100}, openai.UnprocessableEntityError),
        ({"max_tokens": 10_000}, openai.UnprocessableEntityError),
        ({"stop": ["a"] * 5}, openai.UnprocessableEntityError),
        ({"extra_body": {"beliefs": ["nobody"]}}, openai.NotFoundError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_here_is_refused_in_openais_form(
    client: Any, more: dict[str, Any], kind: type[Exception], stream: bool
) -> None:
    with pytest.raises(kind) as refused:
        client.completions.create(**{**GREEDY, "prompt": PROMPT, "stream": stream, **more})
    assert refused.value.body["message"] and refused.value.body["code"]


def test_fields_that_change_nothing_are_accepted(client: Any) -> None:
    client.chat.completions.create(
        messages=MESSAGES, model="tiny", max_completion_tokens=2, user="me", logprobs=False,
        response_format={"type": "text"}, tools=openai.omit, extra_body={"metadata": {"a": "b"}},
    )  # fmt: skip


def test_the_api_key_is_the_token(base: KnowledgeBase) -> None:
    with running(base, token=TOKEN) as server:
        for key, refused in ((TOKEN, False), ("another", True)):
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
            if refused:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
            else:
                client.models.list()


def test_an_error_within_a_stream_reaches_the_client(
    client: Any, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gravity_hf.knowledge.server import decoding

    take, calls = decoding.Text.take, []

    def fails(text: Any, logits: Any) -> Any:
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("no more")
        return take(text, logits)

    monkeypatch.setattr(decoding.Text, "take", fails)
    with pytest.raises(openai.APIError, match="its log says why"):
        list(client.completions.create(prompt=PROMPT, stream=True, **GREEDY, **beliefs("geo/3")))


def test_many_clients_stream_at_once(
    base: KnowledgeBase, served: Running, client: Any, make_base: Callable[..., Any]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> str:
        name = f"geo/{number}"
        stream = client.completions.create(prompt=PROMPT, stream=True, **GREEDY, **beliefs(name))
        return "".join(choice.text for chunk in stream for choice in chunk.choices)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert found == [written(base, PROMPT, f"geo/{number}") for number in range(8)]
