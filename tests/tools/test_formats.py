from __future__ import annotations

import pytest

from sl_serve.tools.formats import FORMATS, tool_format

HERMES = "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call></tool_call>{% endif %}"
LLAMA = '<|start_header_id|>{% if tools %}{"name": name, "parameters": dictionary}{% endif %}'
MISTRAL = "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS][TOOL_CALLS]"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (HERMES, "hermes"),
        (LLAMA, "llama3"),
        ("{% if x %}<|python_tag|>{% endif %}", "llama3"),
        (MISTRAL, "mistral"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("<tool_call>\n<function=name>", None),
        ("<tool_call>{name}<arg_key>", None),
        (None, None),
    ],
)
def test_the_template_tells_the_format(template: str | None, name: str | None) -> None:
    found = tool_format("auto", template)
    assert found is (FORMATS[name] if name else None)


def test_a_format_that_is_named_is_taken() -> None:
    assert tool_format("mistral", HERMES) is FORMATS["mistral"]
    assert tool_format("none", HERMES) is None


def test_ids_of_calls() -> None:
    """Mistral's templates refuse all but nine letters and digits."""
    ids = {FORMATS["mistral"].new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(i) == 9 and i.isalnum() for i in ids)
    assert FORMATS["hermes"].new_id().startswith("call_")
