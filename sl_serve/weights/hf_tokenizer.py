"""The tokenizer files of a Hugging Face folder -> Tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from sl_serve.chat_template import MAX_TEMPLATE_CHARS
from sl_serve.config import ModelConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.fields import read_json_object

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_hf_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def load_hf_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """From tokenizer.json, or converted by transformers where only the older files exist.

    tokenizer.json alone says what is put around a text, as in transformers 5; add_bos_token in
    tokenizer_config.json is for the older files."""
    settings = _optional_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # older folders: special tokens have their own file
        settings |= _optional_json(folder / "special_tokens_map.json")
    if (folder / "tokenizer.json").is_file():
        backend = _load_backend(folder / "tokenizer.json")
    else:
        backend = _convert_with_transformers(folder)
    special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(settings.get(name)))}
    return Tokenizer(
        backend,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        special_tokens=special,
        chat_templates=_chat_templates(folder, settings),
    )


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer ({str(error)[:160]!r})") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _convert_with_transformers(folder: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return loaded.backend_tokenizer
    except Exception as error:  # whatever goes wrong there, the folder has no usable tokenizer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{folder}: no tokenizer.json, and none can be made: {reason}") from None


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Jinja source; "default" is the one for every request without a better one. Files go
    before settings, as in transformers."""
    paths = {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    paths["default"] = folder / "chat_template.jinja"
    in_files = {name: _read_template(path) for name, path in paths.items() if path.is_file()}
    if in_files:
        return in_files
    written = settings.get("chat_template")
    if written is None:  # folders of models that also see images had a file of its own for it
        written = _optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(written, str):
        return {"default": _encodable(written)}
    entries = written if isinstance(written, list) else []
    return {
        entry["name"]: _encodable(entry["template"])
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }


def _read_template(path: Path) -> str:
    if path.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are no chat template")
    return path.read_text(encoding="utf-8", errors="replace")


def _token_text(value: object) -> str | None:
    """A token is written as its text or as an object with its text under `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return _encodable(text) if isinstance(text, str) else None


def _encodable(text: str) -> str:
    """JSON may name halves of surrogate pairs, which no encoding takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
