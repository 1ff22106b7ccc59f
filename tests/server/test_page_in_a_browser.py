"""The page as people meet it. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.browser import CHROMIUM, chromium
from tests.server.conftest import SETTINGS, LiveServer
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

KEY = "first-key"
NASTY = "<img src=x onerror=alert(1)>"
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def live(engine: FakeEngine, tmp_path: Path) -> Iterator[LiveServer]:
    settings = replace(SETTINGS, api_keys=(KEY,), jobs_dir=tmp_path / "jobs")
    with LiveServer(engine, settings) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def page(browser: Browser, live: LiveServer) -> Iterator[Page]:
    """On a phone's screen; fails afterwards for anything the browser complained of."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(live.url)
    yield page
    context.close()
    # the one answer that is an error: asked before a key was typed
    refused = re.compile(r"Failed to load resource.*\b401\b")
    assert [c for c in complaints if not refused.search(c)] == []


def unlock(page: Page) -> None:
    page.get_by_label("asks for a key").fill(KEY)
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("heading", name="Engine")).to_be_visible()


def test_nothing_is_shown_until_the_right_key_is_typed(page: Page) -> None:
    field = page.get_by_label("asks for a key")
    expect(field).to_be_visible()
    expect(page.locator("main")).to_be_hidden()
    assert page.locator("#model").inner_text() == ""
    field.fill("wrong-key")
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("alert")).to_contain_text("missing or wrong")
    expect(page.locator("main")).to_be_hidden()
    unlock(page)
    expect(page.locator("#model")).to_have_text("toy/one")
    expect(field).to_be_hidden()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360  # nothing sticks out of a phone's screen


def test_a_chat_is_streamed_as_text_and_can_be_stopped(page: Page, engine: FakeEngine) -> None:
    engine.script = NASTY.encode()
    unlock(page)
    page.get_by_label("Message").fill(f"hello {NASTY}")
    page.get_by_role("button", name="Send").click()
    answer = page.locator("#chat-log .assistant")
    expect(answer).to_have_text(NASTY)
    assert page.locator("#chat-log img").count() == 0
    assert f"hello {NASTY}" in bytes(engine.submitted[0].prompt_ids).decode()
    expect(page.locator("#step-text")).to_contain_text("20 output and 10 prompt tokens in 500 ms")
    copied = "none: 1.1 KiB read and 50 B written in place"  # there is no tier of a device
    expect(page.locator("#copy-text")).to_have_text(copied)
    expect(page.locator("#sub-batches li")).to_have_count(2)
    expect(page.locator("#sub-batches li").first).to_contain_text("1 of 8 rows, 28 tokens")
    expect(page.locator("#tiers caption").first).to_have_text("host: 700 B of 1,000 B")
    assert page.locator("#compute").evaluate("meter => meter.value") == 0.5

    engine.gate.clear()
    page.get_by_label("Message").fill("again")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert engine.wait_idle()
    assert engine.aborted


def test_a_job_is_submitted_followed_and_its_results_downloaded(page: Page, tmp_path: Path) -> None:
    unlock(page)
    asked = [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "alias", "prompt": str(i), "max_tokens": 3},
        }
        for i in range(5)
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)))
    page.get_by_label("JSON lines").set_input_files(file)
    page.get_by_label("Endpoint").select_option("/v1/completions")
    page.get_by_role("button", name="Submit").click()
    job = page.locator("#jobs li")
    expect(job).to_contain_text("completed")
    expect(job).to_contain_text("5 of 5 lines")
    assert job.locator("progress").evaluate("bar => bar.value") == 1
    with page.expect_download(timeout=PATIENCE_MS) as download:
        job.get_by_role("button", name="Results").click()
    results = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert {result["custom_id"] for result in results} == {f"line-{i}" for i in range(5)}
    assert all(result["response"]["status_code"] == 200 for result in results)


def test_why_a_job_was_refused_is_said(page: Page, tmp_path: Path) -> None:
    unlock(page)
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"custom_id": NASTY}))
    page.get_by_label("JSON lines").set_input_files(file)
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#jobs li")).to_contain_text("failed")
    expect(page.locator("#jobs li p")).to_contain_text("lines, ")
    assert page.locator("#jobs img").count() == 0
