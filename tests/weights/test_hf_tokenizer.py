from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.checkpoint import open_checkpoint
from tests.weights.tiny_models import tiny_llama

TEXTS = ["hello  world 123", " naïve 你好\n", "<s>hello</s><tool>x", ""]
MESSAGES = [
    {"role": "system", "content": " Be <kind> & brief. "},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "naïve?"},
]
TOOLS = [{"type": "function", "function": {"name": "f<x>", "parameters": {"ä": [1, None, True]}}}]
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nDefault<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{% for message in messages %}\n    {%- set content = '<|start|>' + "
    "message['role'] + '<|end|>\\n\\n' + message['content'] | trim + eos_token %}\n"
    "    {{- content }}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}\n{{- '<|start|>assistant<|end|>\\n\\n' }}\n{%- endif %}"
)
WITH_TOOLS = (
    "{%- set ns = namespace(n=0) -%}{{ strftime_now('%Y') }}{% if tools is not none %}"
    "{% for tool in tools %}{{ tool | tojson(indent=2) }}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}"
    "{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}{{ pad_token is defined }}"
)

BLOCK_PER_LINE = """{% for m in messages %}
    {% if m.role == 'user' %}
  > {{ m.content }}
    {% endif %}
{% endfor %}
"""


def write_byte_level(folder: Path, **settings: Any) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["hello world naïve"] * 5, trainer)
    backend.add_tokens(["<tool>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    write(folder, backend, settings)


def write_sentencepiece(folder: Path, **settings: Any) -> None:
    pieces = ["▁", "h", "e", "l", "o", "ll", "he", "▁he"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [("l", "l"), ("h", "e"), ("▁", "he")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    write(folder, backend, settings)


def write(folder: Path, backend: Backend, settings: dict[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(vocab_size=320, eos_token_id=None, bos_token_id=None).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> Tokenizer:
    return open_checkpoint(folder).load_tokenizer()


@pytest.mark.parametrize("write_files", [write_byte_level, write_sentencepiece])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False, "add_eos_token": True}])
def test_ids_and_texts_equal_transformers(
    folder: Path, write_files: Any, settings: dict[str, bool]
) -> None:
    write_files(folder, **settings)
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for add in (True, False):
            ids = ours.encode(text, add_special_tokens=add)
            assert ids == theirs.encode(text, add_special_tokens=add)
            for skip in (True, False):
                ours_back = ours.decode(ids, skip_special_tokens=skip)
                assert ours_back == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", None)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize("template", [CHATML, LLAMA3, WITH_TOOLS, BLOCK_PER_LINE])
@pytest.mark.parametrize("in_file", [True, False])
def test_chats_equal_transformers(folder: Path, template: str, in_file: bool) -> None:
    write_byte_level(folder, **({} if in_file else {"chat_template": template}))
    if in_file:
        (folder / "chat_template.jinja").write_text(template)
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.chat_template == theirs.chat_template == template
    for messages in (MESSAGES, MESSAGES[1:]):
        for tools in (None, TOOLS):
            for prompt in (True, False):
                assert ours.render_chat(
                    messages, tools=tools, add_generation_prompt=prompt
                ) == theirs.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=prompt, tokenize=False
                )


def test_template_for_tools(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write_byte_level(folder, chat_template=named)
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    for tools in (None, TOOLS):
        rendered = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
        assert ours.render_chat(MESSAGES, tools=tools) == rendered
    assert ours.chat_template == "plain"


def test_settings_of_the_model_rule_over_the_tokenizer(folder: Path) -> None:
    write_byte_level(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 6]}))
    assert load(folder).eos_token_ids == (5, 6)


def test_halves_of_surrogate_pairs_are_no_text(folder: Path) -> None:
    """As JSON may name them: an unknown token, and a template that can be rendered."""
    write_byte_level(folder)
    settings = {"bos_token": "\ud800", "chat_template": "a\ud800{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_checkpoint(folder).load_tokenizer()
    text = tokenizer.render_chat([{"role": "user", "content": "hello"}])
    assert text == "a\ufffdhello"
    assert tokenizer.encode(text)


def test_refusals(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json, and none can be made"):
        load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load(folder)
    write_byte_level(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="decoder WordPiece"):
        load(folder)


def test_templates_in_files_of_their_own(folder: Path) -> None:
    write_byte_level(folder, chat_template="of the settings")
    (folder / "chat_template.jinja").write_text("plain")
    others = folder / "additional_chat_templates"
    others.mkdir()
    (others / "tool_use.jinja").write_text("tools")
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    for tools in (None, TOOLS):
        rendered = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
        assert ours.render_chat(MESSAGES, tools=tools) == rendered
    assert (ours.chat_template, ours.tool_template) == ("plain", "tools")


def test_a_template_in_the_file_of_older_folders(folder: Path) -> None:
    write_byte_level(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "plain"}))
    assert load(folder).chat_template == "plain"


@pytest.mark.parametrize("newer", [{}, {"added_tokens_decoder": {}}])
def test_special_tokens_in_the_file_of_older_folders(folder: Path, newer: dict[str, Any]) -> None:
    write_byte_level(folder, **newer)
    names = {"eos_token": {"content": "<tool>"}, "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.pad_token, ours.eos_token) == (theirs.pad_token, theirs.eos_token)
    assert ours.eos_token == ("</s>" if newer else "<tool>")
