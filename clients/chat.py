"""`sl-chat`: a conversation with the server in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console

from clients.client import Client
from clients.protocol import (
    DEFAULT_URL,
    ENV_API_KEY,
    ENV_URL,
    ClientError,
    Message,
    chat_call,
)

HELP = """\
/reset   forget the conversation (the system message stays)
/help    this list
/exit    leave (so does Ctrl-D)
Ctrl-C stops the answer that is being written."""


@dataclass(slots=True)
class Chat:
    """The conversation so far, and the terminal it is shown on."""

    client: Client
    console: Console
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def run(self, read_line: Callable[[], str]) -> None:
        """Reads lines and answers them until /exit or the end of input."""
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print("\n[dim]/exit or Ctrl-D leaves[/dim]")
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.ask(line)

    def command(self, line: str) -> None:
        if line == "/reset":
            self.reset()
            self.console.print("[dim]a new conversation[/dim]")
        elif line == "/help":
            self.console.print(HELP, markup=False, highlight=False)
        else:
            self.console.print(f"no command {line}; /help lists them", markup=False)

    def ask(self, text: str) -> None:
        """One turn. A stopped answer stays in the conversation; a failed turn leaves no trace."""
        turn: list[Message] = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            with self.client.stream(chat_call(turn, **self.options)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    self._show(piece)
        except KeyboardInterrupt:
            self._show(" [stopped]")
        except ClientError as error:
            self.console.print(f"\nerror: {error}", style="red", markup=False)
            return
        self.console.print()
        self.messages = [*turn, {"role": "assistant", "content": "".join(pieces)}]

    def _show(self, piece: str) -> None:
        # An escape character in the answer must not drive the terminal.
        shown = piece.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")
        self.console.print(shown, end="", markup=False, highlight=False, soft_wrap=True)


def chat(
    url: Annotated[str, typer.Option(envvar=ENV_URL, help="Address of the server.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Default: the server's first model.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit of one answer.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=ENV_API_KEY)] = None,
) -> None:
    """Chat with an sl-serve server. Commands: /reset, /help, /exit; Ctrl-C stops an answer."""
    console = Console()
    options = {"temperature": temperature, "max_tokens": max_tokens}
    try:
        with Client(url, model=model, api_key=api_key) as client:
            console.print(f"[dim]{client.model()} at {url}; /help lists the commands[/dim]")
            talk = Chat(client, console, system, options)
            talk.run(lambda: console.input("[bold]> [/bold]"))
    except ClientError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


def main() -> None:
    typer.run(chat)


if __name__ == "__main__":
    main()
