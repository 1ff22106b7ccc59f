"""The status page over a real engine: a job of 200 lines and a chat, in Chromium; a screenshot.

Usage: scripts/prove page [--screenshot FILE]

Serves SmolLM2, submits the job and asks a question through the page, checks what it shows while
both run, and waits until the job has ended. Needs a Chromium on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clients.server_process import server_process
from tests.server.browser import CHROMIUM, chromium

N_LINES, MAX_TOKENS = 200, 48
READY_S, STOP_S = 120.0, 60.0
SCREEN = {"width": 1280, "height": 880}
TOPICS = ("the sea", "a bridge", "winter", "a violin", "bread", "maps", "the moon", "a clock")
QUESTION = "Why is the sky blue? Answer in two sentences."


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/prove page")
    parser.add_argument("--screenshot", type=Path, help="where to keep a picture of both at work")
    args = parser.parse_args()
    if CHROMIUM is None:
        print("page: there is no Chromium on this machine", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = [sys.executable, "-c", "from sl_serve.cli import main; main()"]
        small = ["--max-rows", "32", "--sub-batches", "4", "--kv-memory", "512MiB"]
        options = ["serve", "smollm2", *small, "--jobs-dir", str(folder / "jobs")]
        with server_process([*program, *options]) as server:
            server.wait_ready(READY_S)
            with chromium() as browser:
                page = browser.new_page(viewport=SCREEN, color_scheme="light")
                page.goto(server.url)
                look(page, job_file(folder), args.screenshot)
            server.stop(STOP_S)
    return 0


def job_file(folder: Path) -> Path:
    path = folder / "stories.jsonl"
    lines = [
        {
            "custom_id": f"story-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "smollm2",
                "messages": [{"role": "user", "content": f"Story {i} about {topic}, please."}],
                "max_tokens": MAX_TOKENS,
            },
        }
        for i in range(N_LINES)
        for topic in [TOPICS[i % len(TOPICS)]]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def look(page: Page, file: Path, screenshot: Path | None) -> None:
    expect.set_options(timeout=300_000)
    page.get_by_label("JSON lines").set_input_files(file)
    page.get_by_role("button", name="Submit").click()
    job = page.locator("#jobs li").first
    expect(job).to_contain_text("in_progress")
    expect(job.locator("progress")).not_to_have_js_property("value", 0)
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    answer = page.locator("#chat-log .assistant")
    expect(answer).to_contain_text(" ")
    expect(page.locator("#sub-batches li")).to_have_count(4)
    print(f"page: {page.locator('#step-text').inner_text()}")
    print(f"page: {job.inner_text()!r}")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    print(f"page: the answer while the job runs: {answer.inner_text()!r}")
    expect(job).to_contain_text("in_progress")  # it has gone on
    if screenshot is not None:
        page.screenshot(path=screenshot, full_page=True)
    expect(job).to_contain_text("completed")
    expect(job).to_contain_text(f"{N_LINES} of {N_LINES} lines")
    print(f"page: {job.inner_text()!r}")


if __name__ == "__main__":
    sys.exit(main())
