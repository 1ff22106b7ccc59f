"""Tools and calls as clients send them reach the templates as transformers hands them over."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from server.bodies.chat import ChatBody
from server.bodies.validation import validate
from server.tools import CallTexts, tool_use
from sl_serve.errors import RequestError
from sl_serve.tools.formats import FORMATS, tool_format
from sl_serve.weights.checkpoint import open_checkpoint
from tests.models import EOS, write_tokenizer
from tests.tools.templates import TEMPLATES

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells <the> weather & more",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ARGUMENTS = {"city": "Åbo", "days": None}


def written(folder: Path, tiny: Path, template: str) -> Path:
    (folder / "config.json").write_text((tiny / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    write_tokenizer(folder)
    settings = {"eos_token": EOS, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_with_calls(
    name: str, tmp_path: Path, tiny: tuple[Path, LlamaForCausalLM]
) -> None:
    folder = written(tmp_path, tiny[0], TEMPLATES[name])
    with closing(open_checkpoint(folder)) as checkpoint:
        tokenizer = checkpoint.load_tokenizer()
    assert tool_format("auto", tokenizer.tool_template) is FORMATS[name]
    call_id = FORMATS[name].new_id()
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    sent = [
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "21"},
        {"role": "user", "content": "Thanks"},
    ]
    body = validate(ChatBody, {"messages": sent, "tools": [TOOL]})
    use = tool_use(body, "auto", tokenizer.tool_template)
    assert use is not None
    text = tokenizer.render_chat(
        [message.for_template() for message in body.messages], tools=use.for_template()
    )
    # transformers wants arguments as objects.
    meant: list[Any] = json.loads(json.dumps(sent))
    meant[1]["content"] = ""
    meant[1]["tool_calls"][0]["function"]["arguments"] = ARGUMENTS
    reference = AutoTokenizer.from_pretrained(folder)
    assert text == reference.apply_chat_template(
        meant, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert "Åbo" in text
    # What the template writes for a call is what the parser reads as one.
    said = text[: text.index("21")]
    message = CallTexts(use).message(said[said.index(CALL_BEGINS[name]) :])
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS


CALL_BEGINS = {
    "hermes": '<tool_call>\n{"name": "weather"',
    "llama3": '{"name": "weather", "parameters": {"city"',
    "mistral": "[TOOL_CALLS]",
}


def test_a_template_may_refuse_calls(tmp_path: Path, tiny: tuple[Path, LlamaForCausalLM]) -> None:
    folder = written(tmp_path, tiny[0], TEMPLATES["mistral"])
    with closing(open_checkpoint(folder)) as checkpoint:
        tokenizer = checkpoint.load_tokenizer()
    call = {"id": "short", "function": {"name": "weather", "arguments": {}}}
    with pytest.raises(RequestError, match="ids of calls have nine characters"):
        tokenizer.render_chat([{"role": "assistant", "content": "", "tool_calls": [call]}])
