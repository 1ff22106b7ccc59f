"""The largest batch: 50,000 lines in 200 MB, uploaded, checked and run in little memory.

Usage: scripts/prove batch-size [--lines N] [--megabytes N]

A server on the fake engine of the tests gets the file over HTTP, without a declared length. Fails
when its peak of resident memory while the file comes in and is checked is 100 MB or more above
where it began, or when a line is missing in the end. Prints the times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
MAX_GROWTH_BYTES = 100e6
BOUNDARY = "batch-size-proof"


def form(n_lines: int, line_bytes: int) -> Iterator[bytes]:
    """A multipart body, line by line; one token is asked for."""
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    yield f'{head}"purpose"\r\n\r\nbatch\r\n{head}"file"; filename="large.jsonl"\r\n\r\n'.encode()
    for i in range(n_lines):
        body: dict[str, Any] = {"model": "toy", "prompt": "", "max_tokens": 1}
        entry = {"custom_id": f"line {i}", "method": "POST", "url": "/v1/completions", "body": body}
        body["prompt"] = "x" * (line_bytes - len(json.dumps(entry)) - 1)
        yield json.dumps(entry).encode() + b"\n"
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


def memory_bytes(pid: int, field: str) -> int:
    """VmRSS or VmHWM (its peak) of a process."""
    for entry in Path(f"/proc/{pid}/status").read_text().splitlines():
        if entry.startswith(f"{field}:"):
            return int(entry.split()[1]) * 1024
    raise LookupError(field)


def poll(client: httpx.Client, path: str, status: str, bar: Progress) -> dict[str, Any]:
    task = bar.add_task(status, total=None)
    while True:
        batch: dict[str, Any] = client.get(path).json()
        bar.update(task, completed=batch["progress"]["lines"], total=batch["progress"]["total"])
        if batch["status"] in (status, "failed"):
            bar.remove_task(task)
            assert batch["status"] == status, batch["errors"]
            return batch
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/prove batch-size")
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--megabytes", type=float, default=200.0)
    args = parser.parse_args()
    console = Console()
    line_bytes = int(args.megabytes * 1e6 / args.lines)
    command = [sys.executable, "-m", "tests.batch.serve_fake"]
    with (
        tempfile.TemporaryDirectory() as folder,
        (Path(folder) / "log").open("w") as log,
        subprocess.Popen(
            [*command, f"{folder}/jobs"], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            with (
                httpx.Client(base_url=url, timeout=600) as client,
                Progress(console=console) as bar,
            ):
                failures = prove(client, server.pid, args.lines, line_bytes, console, bar)
        finally:
            server.terminate()
    for failure in failures:
        console.print(failure, style="bold red")
    return int(bool(failures))


def prove(
    client: httpx.Client, pid: int, n_lines: int, line_bytes: int, console: Console, bar: Progress
) -> list[str]:
    client.get("/v1/models")
    base_bytes, start_s = memory_bytes(pid, "VmRSS"), time.monotonic()
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    upload = client.post("/v1/files", content=form(n_lines, line_bytes), headers=headers)
    file = upload.raise_for_status().json()
    uploaded_s = time.monotonic()
    body = {
        "input_file_id": file["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    made = client.post("/v1/batches", json=body).raise_for_status().json()
    path = f"/v1/batches/{made['id']}"
    poll(client, path, "in_progress", bar)
    checked_s = time.monotonic()
    growth_bytes = memory_bytes(pid, "VmHWM") - base_bytes
    console.print(
        f"{n_lines} lines, {file['bytes'] / 1e6:.0f} MB: uploaded in {uploaded_s - start_s:.0f} s, "
        f"checked in {checked_s - uploaded_s:.0f} s, {growth_bytes / 1e6:.0f} MB more memory"
    )
    done = poll(client, path, "completed", bar)
    ended_s, growth_at_end_bytes = time.monotonic(), memory_bytes(pid, "VmHWM") - base_bytes
    with client.stream("GET", f"/v1/files/{done['output_file_id']}/content") as output:
        n_answers = sum(1 for _ in output.iter_lines())
    console.print(
        f"{n_answers} answers after {ended_s - checked_s:.0f} s more, "
        f"{growth_at_end_bytes / 1e6:.0f} MB more memory"
    )
    failures = []
    if growth_bytes >= MAX_GROWTH_BYTES:
        failures.append(f"memory grew by {growth_bytes / 1e6:.0f} MB")
    if n_answers != n_lines:
        failures.append(f"{n_lines - n_answers} lines are missing")
    return failures


if __name__ == "__main__":
    sys.exit(main())
