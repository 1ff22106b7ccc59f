"""`sl-serve quantise`, from the command line to a folder that generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from sl_serve.weights.checkpoint import open_checkpoint
from tests.test_cli import sl_serve

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ("--tokens", "2048", "--threads", "1")
TEXT = "Some words, again and again, of no meaning at all. " * 60


@pytest.fixture
def folder(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    return tiny[0]


def test_with_a_text(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    asked = ("quantise", str(folder), str(out), "--text", str(text), *FEW)
    code, said, err = sl_serve(capfd, monkeypatch, *asked)
    assert (code, said) == (0, f"{out}\n")
    assert "layers" in err
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["calibration"] == {"method": "gptq", "tokens": 2048, "window_tokens": 256}
    prompt = ("--prompt", "Hello", "--max-tokens", "4", "--json")
    code, answer, _ = sl_serve(capfd, monkeypatch, "generate", str(out), *prompt)
    assert code == 0 and json.loads(answer)["prompt_tokens"] == 5


def test_with_what_the_model_writes_is_the_same_each_time(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        code, _, err = sl_serve(capfd, monkeypatch, "quantise", str(folder), str(out), *FEW)
        assert code == 0, err
    one, two = ((out / "model.safetensors").read_bytes() for out in outs)
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "int8"), "error: --weights 'int8' cannot be calibrated; these can: int4,"),
        (("--text", "short.txt"), "short.txt: 10 tokens, at least 2048 are needed; give a longer"),
        (("--text", "none.txt"), "none.txt: cannot be read (No such file or directory)"),
        (("--text", "latin.txt"), "latin.txt: not a plain text in UTF-8"),
        (("--host-memory", "8 apples"), "error: '8 apples' is no size"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_made(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("ten bytes.")
    Path("latin.txt").write_bytes(TEXT.encode() + b"\xe9")
    code, said, err = sl_serve(capfd, monkeypatch, "quantise", str(folder), "out", *arguments)
    assert (code, said) == (2, "")
    assert message in err and "Traceback" not in err
    assert not Path("out").exists()


def test_a_folder_that_is_there_is_known_at_once(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = sl_serve(capfd, monkeypatch, "quantise", "no-model", str(folder))
    assert code == 2 and "exists already; choose another OUT" in err


def test_blocks_of_a_folder_may_be_quantised_again(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bytes lie is told only of those that are as they are asked for."""
    from sl_serve.weights.requantised import with_weights

    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    sl_serve(capfd, monkeypatch, "quantise", str(folder), str(out), "--text", str(text), *FEW)
    checkpoint = open_checkpoint(out)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = checkpoint.location(name)
    assert found is not None and found.dtype is None
    with found.path.open("rb") as file:
        file.seek(found.offset_bytes)
        assert file.read(found.size_bytes) == checkpoint.read_blocks(name).numpy().tobytes()
    again = with_weights(checkpoint, "int8")
    assert again.format(name).name == "int8_g64_sym" and again.location(name) is None
    checkpoint.close()
