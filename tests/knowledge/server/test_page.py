"""The page in a headless browser: answers as they are written, their sources, the switches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from knowledge.server.served import TOKEN, Running, running, solo
from scripts.space_browser import chromium

from gravity_hf.knowledge.server.knowledge_base import KnowledgeBase

PROMPT = "The capital of France is"
TOKENS = 8
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, url: str, **options: Any) -> Any:
    page = browser.new_page(viewport={"width": 1200, "height": 900}, **options)
    page.wrong = []
    page.set_default_timeout(20_000)
    page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(url) else page.wrong.append(r.url))
    page.goto(url)
    return page


@pytest.fixture(scope="module")
def one_page(browser: Any, served: Running) -> Iterator[Any]:
    page = opened(browser, served.url)
    yield page
    page.close()


@pytest.fixture
def page(one_page: Any) -> Iterator[Any]:
    """Loaded anew for every test."""
    one_page.reload()
    one_page.locator("#beliefs li").first.wait_for()
    one_page.locator("#tokens").fill(str(TOKENS))
    yield one_page
    assert one_page.wrong == []


def ask(page: Any, text: str) -> Any:
    """The turn, once it is whole."""
    count = page.locator("#turns > li").count()
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    turn = page.locator("#turns > li").nth(count)
    turn.locator(".facts, .failed").wait_for()
    return turn


def written(base: KnowledgeBase, belief: str | None) -> str:
    return base.tokenizer.decode(solo(base, PROMPT, belief, TOKENS), skip_special_tokens=True)


def switch(page: Any, key: str) -> Any:
    return page.locator("#beliefs li", has_text=key).locator("input")


def test_an_answer_with_its_sources(page: Any, base: KnowledgeBase) -> None:
    page.locator("#filter").fill("geo/3")
    switch(page, "geo/3").check()
    assert page.locator("input[value=chosen]").is_checked()
    turn = ask(page, PROMPT)
    assert turn.locator(".answer").text_content() == PROMPT + written(base, "geo/3")
    source = turn.locator(".source").text_content()
    assert "geo/3" in source and "v1" in source and "similarity" in source and "nats" in source
    assert "not calibrated" in turn.locator(".facts").text_content()
    assert page.locator("#beliefs li.used").count() == 1


def test_switched_off_again_it_is_the_base_that_answers(page: Any, base: KnowledgeBase) -> None:
    page.locator("#filter").fill("geo/3")
    switch(page, "geo/3").check()
    switch(page, "geo/3").uncheck()
    assert "0 switched on" in page.locator("#count").text_content()
    turn = ask(page, PROMPT)
    assert turn.locator(".answer").text_content() == PROMPT + written(base, None)
    assert "base model alone" in turn.locator(".facts").text_content()


def test_beliefs_are_found_by_the_text(page: Any, base: KnowledgeBase) -> None:
    fact = base.snapshot.find("geo/6").fact
    turn = ask(page, fact.prompt)
    assert "geo/6" in turn.locator(".source").first.text_content()


def test_a_chat_remembers_what_was_said(page: Any, served: Running) -> None:
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    page.locator("input[value=chat]").check()
    page.locator("input[value=none]").check()
    first = ask(page, "Hello")
    answer = first.locator(".answer").text_content()
    ask(page, "And then?")
    said = [message["content"] for message in sent[-1]["messages"]]
    assert said == ["Hello", answer, "And then?"] and sent[-1]["use_knowledge"] is False
    page.locator("#clear").click()
    assert page.locator("#turns > li").count() == 0
    ask(page, "Again")
    assert len(sent[-1]["messages"]) == 1


def test_everything_can_be_reached_by_keyboard(page: Any) -> None:
    page.locator("body").press("Tab")
    names = []
    for _ in range(60):
        names.append(page.evaluate(
            "() => document.activeElement.id || document.activeElement.value"
            " || document.activeElement.closest('li')?.dataset.id || document.activeElement.tagName"
        ))  # fmt: skip
        page.keyboard.press("Tab")
    for name in (
        "prompt",
        "complete",
        "tokens",
        "temperature",
        "send",
        "clear",
        "filter",
        "SUMMARY",
    ):
        assert name in names, names
    boxes = page.locator("#beliefs input")
    boxes.first.focus()
    page.keyboard.press("Space")
    assert boxes.first.is_checked()
    page.keyboard.press("Space")
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


def test_every_field_has_a_label(page: Any) -> None:
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('input, textarea, button')].filter(e =>"
        " !(e.labels?.length) && !e.textContent.trim()).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_escape_stops_an_answer(page: Any, served: Running, monkeypatch: Any) -> None:
    import time

    from knowledge.server.served import until

    decoder = served.state.worker._decoder
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda: (time.sleep(0.05), step())[1])
    page.locator("#tokens").fill("100")
    page.locator("#prompt").fill(PROMPT)
    page.keyboard.press("Enter")
    page.locator("#turns .writing").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped", exact=True).wait_for()
    assert page.locator("#send").is_enabled()
    until(lambda: served.state.worker.load == (0, 0), "the row is free")


def test_markup_in_an_answer_or_a_belief_is_text(
    page: Any, served: Running, monkeypatch: Any
) -> None:
    from gravity_hf.knowledge.server.text_stream import TextStream

    evil = "<img src=x onerror=alert(1)>"
    page.on("dialog", lambda dialog: page.wrong.append("markup was run"))
    monkeypatch.setattr(TextStream, "push", lambda self, token: evil)
    turn = ask(page, evil)
    assert turn.locator(".answer").text_content().startswith(evil + evil)
    assert turn.locator("img").count() == 0


def test_scripts_come_from_the_server_alone(page: Any, served: Running) -> None:
    policy = served.ask("GET", "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    html = served.ask("GET", "/").text
    assert "<style" not in html and "onclick" not in html and "style=" not in html
    assert html.count("<script") == 1 and 'src="page/app.js"' in html
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.ran = 1';
        document.body.append(script);
    }""")
    assert page.evaluate("() => window.ran") is None
    page.wrong.clear()  # the browser complains, as it should


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380], ids=["wide", "narrow"])
def test_it_fits_and_can_be_read(browser: Any, served: Running, scheme: str, width: int) -> None:
    page = opened(browser, served.url, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#beliefs li").first.wait_for()
    assert page.evaluate(OVERFLOW) <= 0
    ground, ink = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; }"
    )
    light = [sum(map(int, c[4:-1].split(","))) for c in (ground, ink)]
    assert (light[0] > light[1]) == (scheme == "light") and abs(light[0] - light[1]) > 400
    assert page.wrong == []
    page.close()


def test_where_a_token_is_asked_for_the_page_says_so_and_takes_it(
    browser: Any, base: KnowledgeBase
) -> None:
    with running(base, token=TOKEN) as server:
        page = opened(browser, server.url)
        page.get_by_role("alert").get_by_text("expected a token").wait_for()
        page.locator("summary").click()
        page.locator("#token").fill(TOKEN)
        page.keyboard.press("Tab")
        page.locator("#beliefs li").first.wait_for()
        assert page.locator("#problem").is_hidden()
        page.close()
