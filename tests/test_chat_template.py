from __future__ import annotations

import pytest

from sl_serve import chat_template
from sl_serve.chat_template import ChatTemplate
from sl_serve.errors import RequestError


def render(source: str) -> str:
    return ChatTemplate(source).render(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tools=None,
        special_tokens={"bos_token": "<s>"},
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 5 }}", "str"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{% for %}", "Expected"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{% include 'file' %}", "loader"),
        ("{% for i in range(999999999) %}x{% endfor %}", "[Rr]ange"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("x" * (chat_template.MAX_TEMPLATE_CHARS + 1), "more than"),
    ],
)
def test_failing_and_hostile_templates_are_request_errors(source: str, words: str) -> None:
    with pytest.raises(RequestError, match=f"chat template refuses the messages: .*{words}") as hit:
        render(source)
    assert hit.value.param == "messages"


def test_output_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    assert len(render("{% for i in range(100) %}0123456789{% endfor %}")) == 1000
    with pytest.raises(RequestError, match="more than 1000 characters"):
        render("{% for i in range(101) %}0123456789{% endfor %}")


def test_compiled_once() -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}")
    first = template._compiled
    assert render(template.source) == "<s>Hi"
    assert template._compiled is first
