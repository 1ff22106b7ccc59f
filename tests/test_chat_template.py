from __future__ import annotations

import time

import pytest

from sl_serve import chat_template
from sl_serve.chat_template import ChatTemplate
from sl_serve.errors import RequestError


def render(source: str) -> str:
    return ChatTemplate(source).render(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tools=None,
        others={"bos_token": "<s>"},
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


LONG = "range(99999)"
ENDLESS = [
    f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}{{% endfor %}}{{% endfor %}}",
    f"{{% for a in {LONG} %}}{{% for b in {LONG} if false %}}{{% endfor %}}{{% endfor %}}",
    f"{{% for a in {LONG} if {LONG}|list|string == '' %}}{{% endfor %}}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% set ns = namespace(d=0) %}{% block a %}{% set ns.d = ns.d + 1 %}{% if ns.d < 99 %}"
    "{{ self.a() }}{{ self.a() }}{% endif %}{% set ns.d = ns.d - 1 %}{% endblock %}",
    "{% for m in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 99 }}{% endfor %}",
    f"{{% for a in {LONG} %}}{{% set in_time = 1 %}}{{{{ {LONG}|list|length }}}}{{% endfor %}}",
    f"{{{{ ([{LONG}] * 99999)|map('list')|map('length')|sum }}}}",
    f"{{{{ ([{LONG}] * 99999)|map('length')|select('in', {LONG}|list)|list|length }}}}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_time_is_limited(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.2)
    start_s = time.monotonic()
    with pytest.raises(RequestError, match=r"refuses the messages: it takes more than 0\.2 s"):
        render(source)
    assert time.monotonic() - start_s < 5


def test_each_rendering_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.2)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    for _ in range(2):
        rendered = template.render(
            [{"content": "Hi"}], add_generation_prompt=False, tools=None, others={}
        )
        assert rendered == "Hi"
        time.sleep(0.25)


def test_compiled_once() -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}")
    first = template._compiled
    assert render(template.source) == "<s>Hi"
    assert template._compiled is first
