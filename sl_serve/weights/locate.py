"""What the user calls a model -> a path on this machine."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from sl_serve.errors import ModelError
from sl_serve.weights.demo_model import DEMO_NAME, demo_model
from sl_serve.weights.fields import read_json_object

Progress = Callable[[str], None]  # takes one line about what is being done

# Weights, settings, tokenizer; never pickles (.bin, .pt) or code (.py).
_WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WAYS = f"a folder with config.json, a .gguf file, a Hugging Face id (org/name) or {DEMO_NAME}"

_UNREACHABLE = "the Hugging Face hub cannot be reached; give a folder or a .gguf file"


def resolve_model(model: str, progress: Progress | None = None) -> Path:
    """A folder or .gguf file as it is; `smollm2` or `org/name` from the cache or else fetched.

    Raises ModelError, naming the ways to give a model, when there is none of that name."""
    path = Path(os.path.expanduser(model))
    if os.path.exists(path):  # unlike Path.exists, false for a name too long to be one
        return path
    if model == DEMO_NAME or _is_hub_id(model):
        return pull(model, progress)
    similar = _similar(path)
    hint = f" (did you mean {similar}?)" if similar else ""
    raise ModelError(f"no such model: {model[:200]}{hint}; MODEL is {_WAYS}")


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetches `smollm2` or a Hugging Face id unless it lies complete in the cache."""
    if name == DEMO_NAME:
        return demo_model(progress or _silent)
    if not _is_hub_id(name):
        raise ModelError(f"cannot fetch {name[:200]!r}: give {DEMO_NAME} or a Hugging Face id")
    return _cached_snapshot(name) or _download_snapshot(name, progress or _silent)


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not model.endswith(".gguf")


def _cached_snapshot(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_complete(folder) else None


def _download_snapshot(name: str, progress: Progress) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    progress(f"fetching {name} from the Hugging Face hub")
    try:
        folder = Path(snapshot_download(name, allow_patterns=_WANTED_FILES, etag_timeout=10))
    except hub.GatedRepoError:
        raise ModelError(
            f"{name}: its owner asks for an agreement first; accept it on the hub and set HF_TOKEN"
        ) from None
    except hub.RepositoryNotFoundError:
        raise ModelError(f"{name}: no such model on the hub, or it is private") from None
    except hub.LocalEntryNotFoundError:
        raise ModelError(f"{name}: not in the local cache, and {_UNREACHABLE}") from None
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{name}: cannot be fetched: {reason}") from None
    if not _is_complete(folder):  # also what comes back when the hub does not answer
        raise ModelError(f"{name}: no safetensors weights in the local cache, or {_UNREACHABLE}")
    return folder


def _is_complete(folder: Path) -> bool:
    """Other programs leave snapshots with a few files only, such as the tokenizer's."""
    if not (folder / "config.json").is_file():
        return False
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_json_object(index_path).get("weight_map")
    return isinstance(shards, dict) and all(
        isinstance(shard, str) and (folder / shard).is_file() for shard in shards.values()
    )


def _silent(_line: str) -> None:
    pass


def _similar(path: Path) -> str | None:
    """A neighbour of almost this name, or the demo model's name."""
    try:
        neighbours = [str(path.parent / entry.name) for entry in path.parent.iterdir()]
    except OSError:
        neighbours = []
    close = difflib.get_close_matches(str(path), [*neighbours, DEMO_NAME], n=1, cutoff=0.75)
    return close[0] if close else None
