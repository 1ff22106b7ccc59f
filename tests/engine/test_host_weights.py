from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.config import ModelConfig
from sl_serve.errors import CheckpointError
from sl_serve.models import llama
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.host import (
    check_checkpoint,
    host_images,
    load_image,
    load_static,
)
from sl_serve.weights.layout import (
    ALIGNMENT_BYTES,
    IMAGE_ALIGNMENT_BYTES,
    LayerLayout,
    LayerWeights,
    Param,
    source_name,
)
from sl_serve.weights.readers import make_readers
from sl_serve.weights.tiers import open_store

FEW = settings(derandomize=True, max_examples=60, deadline=None)
MODEL = ModelConfig(
    family="llama",
    n_layers=12,  # two digits in a name
    hidden_size=20,
    intermediate_size=28,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    vocab_size=31,
    max_positions=64,
    attention_bias=True,
    mlp_bias=True,
)
PARAMS = llama.layer_params(MODEL)
STATIC = dict(llama.static_tensors(MODEL).values())


class FakeCheckpoint:
    """Tensors in memory; keeps the names of those that were read."""

    path = Path("model-folder")
    config = MODEL

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(11)
        self.tensors = {
            name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes().items()
        }
        self.read_names: list[str] = []

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        self.read_names.append(name)
        return self.tensors[name]

    def format(self, name: str) -> Format:
        return plain(self.tensors[name].dtype)

    def read_blocks(self, name: str) -> torch.Tensor:
        raise AssertionError("these tensors are plain numbers")

    def location(self, name: str) -> FileRange | None:
        return None

    def drop_pages(self) -> None:
        pass

    def load_tokenizer(self) -> Tokenizer:
        raise AssertionError("weights need no tokenizer")

    def close(self) -> None:
        pass


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama as Hugging Face stores them, written down by hand."""
    found = {"model.embed_tokens.weight": (31, 20), "model.norm.weight": (20,)}
    found["lm_head.weight"] = (31, 20)
    for i in range(MODEL.n_layers):
        layer = {
            "input_layernorm.weight": (20,),
            "post_attention_layernorm.weight": (20,),
            "self_attn.q_proj.weight": (24, 20),
            "self_attn.k_proj.weight": (12, 20),
            "self_attn.v_proj.weight": (12, 20),
            "self_attn.o_proj.weight": (20, 24),
            "self_attn.q_proj.bias": (24,),
            "self_attn.k_proj.bias": (12,),
            "self_attn.v_proj.bias": (12,),
            "self_attn.o_proj.bias": (20,),
            "mlp.gate_proj.weight": (28, 20),
            "mlp.up_proj.weight": (28, 20),
            "mlp.down_proj.weight": (20, 28),
            "mlp.gate_proj.bias": (28,),
            "mlp.up_proj.bias": (28,),
            "mlp.down_proj.bias": (20,),
        }
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def expected_layer(checkpoint: FakeCheckpoint, layer: int) -> LayerWeights:
    """Joined along the outputs, matrices as (in, out)."""

    def joined(*names: str) -> torch.Tensor:
        parts = [checkpoint.tensors[f"model.layers.{layer}.{name}"] for name in names]
        return torch.cat(parts).float().t() if parts[0].ndim == 2 else torch.cat(parts).float()

    qkv = [f"self_attn.{n}_proj" for n in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"]
    return {
        "input_norm": joined("input_layernorm.weight"),
        "post_norm": joined("post_attention_layernorm.weight"),
        "qkv": joined(*(f"{n}.weight" for n in qkv)),
        "qkv_bias": joined(*(f"{n}.bias" for n in qkv)),
        "o": joined("self_attn.o_proj.weight"),
        "o_bias": joined("self_attn.o_proj.bias"),
        "gate_up": joined(*(f"{n}.weight" for n in gate_up)),
        "gate_up_bias": joined(*(f"{n}.bias" for n in gate_up)),
        "down": joined("mlp.down_proj.weight"),
        "down_bias": joined("mlp.down_proj.bias"),
    }


@st.composite
def layouts(draw: st.DrawFn) -> LayerLayout:
    sizes = st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple)
    drawn = draw(st.lists(sizes, min_size=1, max_size=6))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return LayerLayout([Param(f"p{i}", s, ("x",), s[-1:]) for i, s in enumerate(drawn)], dtype)


@FEW
@given(layouts())
def test_segments_are_aligned_hold_their_tensor_and_do_not_overlap(layout: LayerLayout) -> None:
    owners = [0] * layout.image_bytes
    for segment in layout.segments(0):
        assert segment.offset_bytes % ALIGNMENT_BYTES == 0
        assert segment.size_bytes == math.prod(segment.param.shape) * layout.dtype.itemsize
        for byte in range(segment.offset_bytes, segment.offset_bytes + segment.size_bytes):
            owners[byte] += 1
    assert max(owners) == 1


@FEW
@given(layouts())
def test_images_follow_one_another_aligned_and_waste_less_than_the_alignment(
    layout: LayerLayout,
) -> None:
    assert layout.image_bytes % IMAGE_ALIGNMENT_BYTES == 0
    padding = layout.image_bytes - sum(s.size_bytes for s in layout.segments(0))
    assert padding < ALIGNMENT_BYTES * len(layout.segments(0)) + IMAGE_ALIGNMENT_BYTES


@FEW
@given(layouts())
def test_a_view_is_exactly_the_bytes_of_its_segment(layout: LayerLayout) -> None:
    image = torch.zeros(layout.image_bytes, dtype=torch.uint8)
    for segment in layout.segments(0):
        view = layout.views(image, 0)[segment.param.name]
        assert tuple(view.shape) == segment.param.shape
        ones = torch.ones(segment.size_bytes, dtype=torch.uint8).view(layout.dtype)
        view.copy_(ones[0])
        written = image.nonzero().flatten().tolist()
        assert written == list(
            range(segment.offset_bytes, segment.offset_bytes + segment.size_bytes)
        )
        image.zero_()


def test_an_image_of_another_length_is_refused() -> None:
    layout = LayerLayout(PARAMS, torch.float32)
    with pytest.raises(AssertionError):
        layout.views(torch.zeros(layout.image_bytes - 1, dtype=torch.uint8), 0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_images_are_the_checkpoints_tensors_joined_and_seen_transposed(stored: torch.dtype) -> None:
    checkpoint = FakeCheckpoint(stored)
    layout = LayerLayout(PARAMS, torch.float32)
    for layer, image in host_images(layout, range(MODEL.n_layers)).items():
        load_image(checkpoint, layout, layer, image)
        views = layout.views(image, layer)
        expected = expected_layer(checkpoint, layer)
        assert views.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(views[name], tensor, rtol=0, atol=0)


def test_images_convert_to_the_engines_dtype() -> None:
    checkpoint = FakeCheckpoint()
    layout = LayerLayout(PARAMS, torch.bfloat16)
    image = host_images(layout, [3])[3]
    load_image(checkpoint, layout, 3, image)
    expected = expected_layer(checkpoint, 3)["qkv"].bfloat16()
    assert torch.equal(layout.views(image, 3)["qkv"], expected)


def test_loading_reads_each_tensor_once_and_tells_of_each_layer() -> None:
    checkpoint = FakeCheckpoint()
    heard: list[int] = []
    layout = LayerLayout(PARAMS, torch.float32)
    store = open_store(
        checkpoint,
        layout,
        range(MODEL.n_layers),
        0,
        1,
        None,
        make_readers(),
        lambda: heard.append(len(checkpoint.read_names)),
    )
    assert store.n_layers == MODEL.n_layers
    assert heard == [16 * (i + 1) for i in range(MODEL.n_layers)]
    assert sorted(checkpoint.read_names) == sorted(shapes().keys() - STATIC.keys())


def test_static_weights_keep_shape_and_convert() -> None:
    checkpoint = FakeCheckpoint(torch.bfloat16)
    names = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    static = load_static(checkpoint, names, torch.float32)
    for ours, source in names.items():
        assert torch.equal(static[ours], checkpoint.tensors[source].float())


def test_a_tied_head_is_read_and_counted_once() -> None:
    checkpoint = FakeCheckpoint()
    names = {"embed": "model.embed_tokens.weight", "head": "model.embed_tokens.weight"}
    static = load_static(checkpoint, names, torch.float32)
    assert static["embed"] is static["head"]
    assert checkpoint.read_names == ["model.embed_tokens.weight"]


def test_a_complete_checkpoint_passes_the_check_unread() -> None:
    checkpoint = FakeCheckpoint()
    check_checkpoint(checkpoint, PARAMS, STATIC)
    assert checkpoint.read_names == []


@pytest.mark.parametrize(
    "name", ["model.layers.10.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.bias"]
)
def test_a_missing_tensor_is_named_with_its_shape_before_any_read(name: str) -> None:
    checkpoint = FakeCheckpoint()
    shape = checkpoint.shape(name)
    del checkpoint.tensors[name]
    with pytest.raises(CheckpointError) as refusal:
        check_checkpoint(checkpoint, PARAMS, STATIC)
    for part in (name, str(shape), "model-folder"):
        assert part in str(refusal.value)
    assert checkpoint.read_names == []


def test_a_missing_static_tensor_is_named() -> None:
    checkpoint = FakeCheckpoint()
    del checkpoint.tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*\(31, 20\)"):
        check_checkpoint(checkpoint, PARAMS, STATIC)


@pytest.mark.parametrize("shape", [(20, 24), (24, 21), (480,)])
def test_a_misshapen_tensor_is_named_with_both_shapes_before_any_read(
    shape: tuple[int, ...],
) -> None:
    checkpoint = FakeCheckpoint()
    name = "model.layers.7.self_attn.q_proj.weight"
    checkpoint.tensors[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError) as refusal:
        check_checkpoint(checkpoint, PARAMS, STATIC)
    for part in (name, str(shape), "(24, 20)", "model-folder"):
        assert part in str(refusal.value)
    assert checkpoint.read_names == []


def test_the_layers_number_stands_in_its_tensors_names() -> None:
    assert source_name("model.layers.{layer}.a.{layer}", 11) == "model.layers.11.a.11"
