from __future__ import annotations

import io
import json
from collections.abc import Iterator

import httpx
import pytest
from fake_api import FakeServer
from rich.console import Console
from typer.testing import CliRunner

from clients import chat as chat_module
from clients.chat import Chat
from clients.client import Client


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def talk(fake_server: FakeServer, screen: io.StringIO) -> Iterator[Chat]:
    with Client("http://test", transport=fake_server.transport) as client:
        console = Console(file=screen, width=80)
        yield Chat(client, console, "be brief", {"max_tokens": 5, "temperature": None})


def run(talk: Chat, *lines: str | BaseException) -> None:
    source = iter(lines)

    def read_line() -> str:
        line = next(source, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    talk.run(read_line)


def test_the_conversation_is_sent_with_each_turn(
    talk: Chat, fake_server: FakeServer, screen: io.StringIO
) -> None:
    run(talk, "abc", "", "de", "/exit", "never read")
    assert screen.getvalue() == "cba\ned\n"
    assert fake_server.bodies[1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "cba"},
        {"role": "user", "content": "de"},
    ]
    assert fake_server.bodies[1]["max_tokens"] == 5
    assert "temperature" not in fake_server.bodies[1]


def test_commands(talk: Chat, fake_server: FakeServer, screen: io.StringIO) -> None:
    run(talk, "abc", "/reset", "de", "/help", "/nonsense", KeyboardInterrupt())
    assert [m["content"] for m in fake_server.bodies[1]["messages"]] == ["be brief", "de"]
    shown = screen.getvalue()
    assert "/reset   forget" in shown
    assert "no command /nonsense" in shown
    assert "Ctrl-D leaves" in shown
    assert len(fake_server.bodies) == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    talk: Chat, fake_server: FakeServer, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = Chat._show

    def interrupted(self: Chat, piece: str) -> None:
        show(self, piece)
        if piece == "b":
            raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "_show", interrupted)
    run(talk, "abcd")
    assert screen.getvalue() == "dcb [stopped]\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "dcb"}
    assert fake_server.streams[0].closed


def test_a_failed_turn_leaves_no_trace(
    talk: Chat, fake_server: FakeServer, screen: io.StringIO
) -> None:
    fake_server.refusals = [httpx.Response(400, json={"error": {"message": "too [long]"}})]
    run(talk, "abc", "de")
    assert "error: too [long] (HTTP 400)" in screen.getvalue()
    assert [m["content"] for m in talk.messages] == ["be brief", "de", "ed"]


def test_answers_cannot_drive_the_terminal(talk: Chat, screen: io.StringIO) -> None:
    run(talk, "m13[\x1b")
    assert "\x1b" not in screen.getvalue()
    assert "[31m" in screen.getvalue()


def test_the_command_takes_options_and_environment(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(url: str, **settings: object) -> Client:
        return Client(url, transport=fake_server.transport, **settings)

    monkeypatch.setattr(chat_module, "Client", client)
    app = chat_module.typer.Typer()
    app.command()(chat_module.chat)
    result = CliRunner().invoke(
        app,
        ["--temperature", "0.5", "--max-tokens", "2"],
        input="abc\n/exit\n",
        env={"SL_SERVE_URL": "http://there", "SL_SERVE_API_KEY": "k"},
    )
    assert result.exit_code == 0, result.output
    assert "echo-1 at http://there" in result.output
    assert "cb" in result.output
    request = fake_server.requests[-1]
    assert request.url.host == "there"
    assert request.headers["authorization"] == "Bearer k"
    assert json.loads(request.content)["temperature"] == 0.5


def test_no_server_is_one_line_and_exit_code_1() -> None:
    app = chat_module.typer.Typer()
    app.command()(chat_module.chat)
    result = CliRunner().invoke(app, ["--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "error: no answer from the server" in result.output
    assert "Traceback" not in result.output
