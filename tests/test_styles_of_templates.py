"""What published chat templates ask of Jinja works, and gives what transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sl_serve.errors import RequestError
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.checkpoint import open_checkpoint
from tests.styles_of_templates import STYLES
from tests.weights.test_hf_tokenizer import write_byte_level
from tests.weights.tiny_models import tiny_llama

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hi <b>&amp; \n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "naïve 你好?"},
]
REASONED = [
    *MESSAGES,
    {"role": "assistant", "content": "Yes", "reasoning_content": "why", "thinking": "why"},
]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "int"}}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "ä", "parameters": {}}},
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": True},
    {"reasoning_effort": "high", "model_identity": "You are a test."},
    {"date_string": "1 Jan 2026", "builtin_tools": ["code_interpreter", "search"]},
]

Pair = tuple[Tokenizer, PreTrainedTokenizerBase]


@pytest.fixture(scope="module", params=STYLES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=320, eos_token_id=None, bos_token_id=None).save_pretrained(folder)
    write_byte_level(folder)
    (folder / "chat_template.jinja").write_text(STYLES[request.param])
    return open_checkpoint(folder).load_tokenizer(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:], REASONED], ids=len)
def test_chats_equal_transformers(
    pair: Pair, messages: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    ours, theirs = pair
    for tools in (None, TOOLS):
        for prompt in (True, False):
            rendered = theirs.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **settings
            )
            assert rendered == ours.render_chat(
                messages, tools=tools, add_generation_prompt=prompt, settings=settings
            )


def test_switches_change_the_prompt(tmp_path: Path) -> None:
    tiny_llama(vocab_size=320, eos_token_id=None, bos_token_id=None).save_pretrained(tmp_path)
    write_byte_level(tmp_path, chat_template=STYLES["qwen3"])
    tokenizer = open_checkpoint(tmp_path).load_tokenizer()
    plain = tokenizer.render_chat(MESSAGES)
    assert plain.endswith("<|im_start|>assistant\n")
    assert tokenizer.render_chat(MESSAGES, settings={"enable_thinking": False}) == (
        plain + "<think>\n\n</think>\n\n"
    )
    lies = {"messages": [], "tools": TOOLS, "add_generation_prompt": False, "self": 1}
    assert tokenizer.render_chat(MESSAGES, settings=lies) == plain


@pytest.mark.parametrize("style", ["gemma3", "mistral"])
def test_what_a_template_refuses_is_said_in_its_words(style: str, tmp_path: Path) -> None:
    tiny_llama(vocab_size=320, eos_token_id=None, bos_token_id=None).save_pretrained(tmp_path)
    write_byte_level(tmp_path, chat_template=STYLES[style])
    tokenizer = open_checkpoint(tmp_path).load_tokenizer()
    with pytest.raises(RequestError, match="roles must alternate"):
        tokenizer.render_chat([MESSAGES[1], MESSAGES[1]])
