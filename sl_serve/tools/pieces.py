"""What a model's output is made of, once its calls of tools are told apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """For the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The `index`-th call of this output begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A part of the arguments, as the model wrote them: mostly, but not surely, valid JSON."""

    index: int
    text: str


Piece = Text | CallStart | Arguments


class Pieces:
    """Gathers pieces in order. Blanks before, between and after calls are no text."""

    def __init__(self) -> None:
        self._new: list[Piece] = []
        self._blanks: list[str] = []
        self._at_edge = True  # nothing but blanks since the beginning or the latest call
        self._n_calls = 0

    def text(self, text: str) -> None:
        if not text:
            return
        if self._at_edge:
            self._blanks.append(text)
            if not text.strip():
                return
            text = "".join(self._blanks)
            self._blanks.clear()
            self._at_edge = False
        self._new.append(Text(text))

    def call(self, name: str) -> None:
        self._blanks.clear()
        self._at_edge = True
        self._new.append(CallStart(self._n_calls, name))
        self._n_calls += 1

    def arguments(self, text: str) -> None:
        if text:
            self._new.append(Arguments(self._n_calls - 1, text))

    def end(self) -> None:
        if not self._n_calls and self._blanks:
            self._new.append(Text("".join(self._blanks)))
            self._blanks.clear()

    def take(self) -> list[Piece]:
        """What is new, neighbours of one kind joined."""
        joined: list[Piece] = []
        for piece in self._new:
            last = joined[-1] if joined else None
            if isinstance(last, Text) and isinstance(piece, Text):
                joined[-1] = Text(last.text + piece.text)
            elif isinstance(last, Arguments) and isinstance(piece, Arguments):
                joined[-1] = Arguments(last.index, last.text + piece.text)
            else:
                joined.append(piece)
        self._new.clear()
        return joined
