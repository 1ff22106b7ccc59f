"""A model's chat template: Jinja source from the model's files, run in a sandbox."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sl_serve.errors import RequestError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 64 << 20
MAX_RENDER_S = 10.0  # a long chat takes milliseconds
GIVEN_NAMES = frozenset({"messages", "tools", "add_generation_prompt"})  # what `others` cannot set


class ChatTemplate:
    """Renders messages as transformers does; compiled on first use, then reused."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        others: Mapping[str, Any],
    ) -> str:
        """The prompt's text. `others`: more that the template may read: special tokens by their
        names, switches of the model's own. Raises RequestError with the template's own reason."""
        pieces: list[str] = []
        n_chars = 0
        try:
            self._environment.start()
            given = {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
            for piece in self._compiled.generate({"documents": None, **others, **given}):
                pieces.append(piece)
                n_chars += len(piece)
                if n_chars > MAX_RENDERED_CHARS:
                    raise TemplateError(f"more than {MAX_RENDERED_CHARS} characters")
        except Exception as error:  # a template can fail like any program
            reason = str(error)[:300] or type(error).__name__
            raise RequestError(
                f"the model's chat template refuses the messages: {reason}", param="messages"
            ) from None
        return "".join(pieces)

    @cached_property
    def _compiled(self) -> Template:
        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"the template has more than {MAX_TEMPLATE_CHARS} characters")
        source = self._environment.parse(self.source)
        return self._environment.from_string(_with_time_checks(source))

    @cached_property
    def _environment(self) -> _TimedEnvironment:
        environment = _TimedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment


class _TimedEnvironment(ImmutableSandboxedEnvironment):
    """Ends a rendering that takes too long, in its loops, macros, filters and tests. One step
    that is itself endless, such as multiplying huge numbers, is not interrupted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rendering = threading.local()

    def start(self) -> None:
        """Time counts from here, for this thread."""
        self._rendering.deadline_s = time.monotonic() + MAX_RENDER_S

    def in_time(self) -> bool:
        if time.monotonic() > self._rendering.deadline_s:
            raise TemplateError(f"it takes more than {MAX_RENDER_S} s")
        return True

    def call_filter(self, *args: Any, **options: Any) -> Any:
        self.in_time()
        return super().call_filter(*args, **options)

    def call_test(self, *args: Any, **options: Any) -> Any:
        self.in_time()
        return super().call_test(*args, **options)


def _with_time_checks(template: nodes.Template) -> nodes.Template:
    """Where code can run again: loops, their conditions, macros and blocks. No name that a
    template could redefine is involved."""
    for node in template.find_all(nodes.Stmt):
        if isinstance(node, nodes.For | nodes.Macro | nodes.Block):
            node.body.insert(0, nodes.ExprStmt(_in_time()))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_in_time(), node.test)
    return template


def _in_time() -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("in_time"), [], [], None, None)


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, leaves <, > and & as they are: prompts are not HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
