from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from sl_serve.errors import ModelError
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.hf_config import model_config_from_hf
from tests.families import test_gemma3_text
from tests.families.harness import COMMON, FamilyTests, Tiny
from tests.models import with_lively_vectors, write_tokenizer

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class TinyWithEyes(Tiny):
    def write(self, folder: Path, variant: str = "") -> PreTrainedModel:
        text = {**COMMON, **self.settings, **(self.variants[variant] if variant else {})}
        torch.manual_seed(zlib.crc32(variant.encode()))
        whole = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        model = with_lively_vectors(Gemma3ForConditionalGeneration(whole))
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return model


TINY = TinyWithEyes(
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    test_gemma3_text.SETTINGS,
    {"scaled-rope": {"rope_parameters": test_gemma3_text.SCALED}},
)


class TestGemma3(FamilyTests):
    tiny = TINY


@pytest.mark.parametrize("start", ["model.language_model.", "language_model.model."])
def test_names_of_old_and_new_folders(start: str, tmp_path: Path) -> None:
    reference = TINY.write(tmp_path)
    path = tmp_path / "model.safetensors"
    known = re.compile(r"^(model\.language_model|language_model\.model)\.")
    save_file({known.sub(start, name): tensor for name, tensor in load_file(path).items()}, path)
    checkpoint = open_checkpoint(tmp_path)
    expected = {n: p for n, p in reference.state_dict().items() if ".language_model." in n}
    assert expected.keys() < set(checkpoint.names())
    assert all(torch.equal(checkpoint.read(name), p) for name, p in expected.items())
    checkpoint.close()


def test_a_folder_that_gives_only_what_differs() -> None:
    """As the published ones do."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    raw = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    config = model_config_from_hf({**raw, "torch_dtype": "bfloat16"}, {}, "config.json")
    assert (config.family, config.n_layers, config.hidden_size) == ("gemma3", 34, 2560)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (1, 106))
    assert config.tie_embeddings


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "text_config must be an object"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    ],
)
def test_another_text_part_is_refused(text: object, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        model_config_from_hf({"model_type": "gemma3", "text_config": text}, {}, "config.json")
