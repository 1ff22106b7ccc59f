"""Published layouts against their definitions in float64, and the refusal of damaged ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sl_serve.config import EngineConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import open_checkpoint
from tests.engine.running import GREEDY, config, engine, random_prompts, run
from tests.weights import published_models as models
from tests.weights.published_models import Model, Pack, change_settings, change_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = {"group_0": {"weights": {"block_structure": [128, 128]}}}
F32 = torch.float32

# name -> how a module is packed, the settings, and the format that its matrices are kept in, by
# inputs: 128 and 192
LAYOUTS: dict[str, tuple[Pack, dict[str, Any], tuple[str, str]]] = {
    "gptq": (models.gptq(), GPTQ, ("int4_g64", "int4_g64")),
    "gptq-8": (models.gptq(8), GPTQ | {"bits": 8}, ("int8_g64", "int8_g64")),
    "gptq-v2": (
        models.gptq(v2=True),
        GPTQ | {"checkpoint_format": "gptq_v2"},
        ("int4_g64", "int4_g64"),
    ),
    "gptq-columns": (models.gptq(group=-1), GPTQ | {"group_size": -1}, ("int4_g128", "int4_g64")),
    "gptq-ordered": (
        models.gptq(shuffled=True),
        GPTQ | {"desc_act": True},
        ("float32", "float32"),
    ),
    "gptq-long-scales": (models.gptq(dtype=F32), GPTQ, ("float32", "float32")),
    "awq": (models.awq(), AWQ, ("int4_g64", "int4_g64")),
    "awq-32": (models.awq(32), AWQ | {"group_size": 32}, ("int4_g32", "int4_g32")),
    "packed": (models.pack_quantized(), PACKED, ("int4_g64_sym", "int4_g64_sym")),
    "packed-zeros": (models.pack_quantized(symmetric=False), PACKED, ("int4_g64", "int4_g64")),
    "packed-8": (
        models.pack_quantized(8, None, dtype=F32),
        PACKED,
        ("int8_g128_sym", "int8_g64_sym"),
    ),
    "packed-8-zeros": (
        models.pack_quantized(8, 32, symmetric=False),
        PACKED,
        ("int8_g32", "int8_g32"),
    ),
    "packed-ordered": (models.pack_quantized(shuffled=True), PACKED, ("float32", "float32")),
    "int-quantized": (
        models.one_byte("int8", (1, -1)),
        PACKED | {"format": "int-quantized"},
        ("int8_g128_sym", "int8_g64_sym"),
    ),
    "int-quantized-zeros": (
        models.one_byte("int8", (1, 64), symmetric=False),
        PACKED | {"format": "int-quantized"},
        ("int8_g64", "int8_g64"),
    ),
    "float-quantized": (
        models.one_byte("fp8", (1, -1)),
        PACKED | {"format": "float-quantized"},
        ("fp8_g128", "fp8_g64"),
    ),
    "float-quantized-blocks": (
        models.one_byte("fp8", (128, 128)),
        PACKED | {"format": "float-quantized", "config_groups": BLOCKS},
        ("fp8_g128", "fp8_g64"),
    ),
    "fp8-blocks": (
        models.one_byte("fp8", (128, 128), F32, "weight_scale_inv"),
        FP8 | {"weight_block_size": [128, 128]},
        ("fp8_g128", "fp8_g64"),
    ),
    "fp8-tensors": (models.one_byte("fp8", None, F32), FP8, ("fp8_g128", "fp8_g64")),
}
PROMPTS = random_prompts(3, longest=30, seed=4)
SHORT = replace(GREEDY, max_tokens=8)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Model]:
    """Each layout's folder, written when it is first asked for; not to be changed."""
    done: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in done:
            pack, settings, _ = LAYOUTS[name]
            done[name] = models.write(
                tmp_path_factory.mktemp(name), pack, settings, dtype="float32"
            )
        return done[name]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_numbers_are_those_of_the_definition(written: Callable[[str], Model], name: str) -> None:
    model = written(name)
    checkpoint = open_checkpoint(model.folder)
    assert len(model.expected) == 3 * 7 - 1
    for weight, expected in model.expected.items():
        found = checkpoint.read(weight)
        assert found.dtype == F32 and tuple(found.shape) == checkpoint.shape(weight)
        assert np.array_equal(found.numpy(), expected.astype(np.float32)), weight
        format = checkpoint.format(weight)
        assert format.name == LAYOUTS[name][2][0 if expected.shape[1] == 128 else 1]
        if format.dtype is None:
            assert torch.equal(format.widen(checkpoint.read_blocks(weight)), found)
            assert checkpoint.location(weight) is None
    plain = "model.layers.1.self_attn.o_proj.weight"
    assert plain not in model.expected and checkpoint.location(plain) is not None
    assert checkpoint.format(plain).name == "float32"
    weights = {n.removesuffix(".weight") for n in model.expected}
    listed = [n for n in checkpoint.names() if n.rpartition(".")[0] in weights]
    assert sorted(listed) == sorted(model.expected)
    checkpoint.close()


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_those_of_the_dequantised_model(
    written: Callable[[str], Model], name: str, tmp_path: Path
) -> None:
    model = written(name)
    models.write_dequantised(model, tmp_path)
    with engine(tmp_path, config(max_rows=4)) as running:
        expected = run(running, PROMPTS, SHORT)
    with engine(model.folder, config(max_rows=4)) as running:
        assert run(running, PROMPTS, SHORT) == expected


def test_layers_have_the_bytes_of_the_file(written: Callable[[str], Model]) -> None:
    checkpoint = open_checkpoint(written("gptq").folder)
    plan = plan_checkpoint(checkpoint, EngineConfig(kv_memory_bytes=4 << 20))
    in_128, in_192 = 128 + 64 + 64 + 128 + 192 + 192, 128
    packed = in_128 * 2 * 36 + in_192 * 3 * 36
    with_plain_o = packed - 128 * 2 * 36 + 128 * 128 * 4  # the largest layer's: layer 1's
    assert 0 <= plan.weights_bytes // 3 - with_plain_o - 2 * 128 * 4 < 4096
    checkpoint.close()


def test_what_cannot_stay_packed_is_as_long_as_the_model_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models.write(tmp_path, models.gptq(shuffled=True), GPTQ)
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(tmp_path)
    assert "20 matrices cannot stay in their groups; they are held as float16" in caplog.text
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.format(name).name == "float16"
    assert checkpoint.read(name).dtype == torch.float16
    checkpoint.close()


def test_settings_of_activations_are_told_and_ignored(
    written: Callable[[str], Model], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        open_checkpoint(written("fp8-tensors").folder).close()
    assert "activations and KV are not quantised" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "bitsandbytes.*gptq, awq"),
        ("gptq", {"quant_method": ["gptq"]}, "cannot be read"),
        ("gptq", {**GPTQ, "bits": 3}, "3 bits"),
        ("gptq", {**GPTQ, "bits": 8}, "expected"),
        ("gptq", {**GPTQ, "group_size": 128}, "qzeros has shape"),
        ("gptq", {**GPTQ, "group_size": 0}, "group_size must be an integer"),
        ("gptq", {**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ("awq", {**AWQ, "version": "gemv"}, "gemv"),
        ("awq", {**AWQ, "bits": 8}, "8 bits"),
        ("packed", {**PACKED, "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ("packed", {**PACKED, "transform_config": {"R1": {}}}, "transform_config"),
        ("packed", FP8, "no weights quantised with fp8"),
        ("fp8-blocks", {**FP8, "weight_block_size": [64, 64]}, "does not fit"),
        ("fp8-blocks", {**FP8, "weight_block_size": [128]}, "two sizes"),
        ("fp8-blocks", FP8, "no tensor .*weight_scale"),
        ("fp8-tensors", {**FP8, "fmt": "e5m2"}, "e5m2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, settings: dict[str, Any], named: str
) -> None:
    models.write(tmp_path, LAYOUTS[name][0], LAYOUTS[name][1])
    change_settings(tmp_path, quantization_config=settings)
    with pytest.raises(ModelError, match=named):
        open_checkpoint(tmp_path)


Tensors = dict[str, torch.Tensor]
MODULE = "model.layers.0.mlp.up_proj."


def without(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(MODULE + part)


def instead(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def replaced(tensors: Tensors) -> None:
        tensors[MODULE + part] = change(tensors[MODULE + part]).contiguous()

    return replaced


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("gptq", without("scales"), "no tensor .*up_proj.scales"),
        ("gptq", without("qzeros"), "no tensor .*up_proj.qzeros"),
        ("gptq", instead("scales", lambda t: t[:1]), "up_proj.scales has shape"),
        ("gptq", instead("scales", torch.Tensor.int), "up_proj.scales is stored as torch.int32"),
        ("gptq", instead("g_idx", lambda t: t + 1), "names groups that are not there"),
        ("gptq", instead("qweight", lambda t: t[0]), "not a matrix"),
        (
            "gptq",
            instead("qweight", lambda t: t.long()),
            "up_proj.qweight is stored as torch.int64",
        ),
        ("awq", instead("qzeros", lambda t: t[:, :3]), "up_proj.qzeros has shape"),
        ("packed", without("weight_shape"), "no tensor .*up_proj.weight_shape"),
        ("packed", instead("weight_shape", lambda t: t * 2), "not 4 or 8 bits"),
        ("packed", instead("weight_scale", lambda t: t[:, 0]), "does not fit"),
        ("packed-zeros", instead("weight_zero_point", lambda t: t[:3]), "weight_zero_point has"),
        ("int-quantized", without("weight_scale"), "no tensor .*up_proj.weight_scale"),
        ("int-quantized", instead("weight_scale", lambda t: t[:3]), "does not fit"),
        ("fp8-blocks", instead("weight_scale_inv", lambda t: t[:1]), "does not fit"),
    ],
)
def test_damage_is_refused_by_name_before_anything_is_loaded(
    tmp_path: Path, name: str, damage: Callable[[Tensors], None], named: str
) -> None:
    models.write(tmp_path, LAYOUTS[name][0], LAYOUTS[name][1])
    change_tensors(tmp_path, damage)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["a\nb.qweight", "a" * 300])
def test_names_that_no_message_could_repeat_are_refused(tmp_path: Path, name: str) -> None:
    models.write(tmp_path, *LAYOUTS["gptq"][:2])
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="is no name of a tensor") as refused:
        open_checkpoint(tmp_path)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


def of_stored_blocks(**changes: Any) -> dict[str, Any]:
    name = MODULE + "weight"
    return {"quant_method": "sl-serve", "version": 1, "formats": {name: "int4_g32_min"}} | changes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (of_stored_blocks(version=2), "version 2 of the layout cannot be read"),
        (of_stored_blocks(formats=[]), "formats must be an object"),
        (of_stored_blocks(formats={}), "no weights quantised with sl-serve"),
        (of_stored_blocks(formats={"a\nb": "q8_0"}), r"no tensor 'a\\nb' in the folder"),
        (of_stored_blocks(formats={MODULE + "weight": "int3"}), "format 'int3' of .* not known"),
        (of_stored_blocks(formats={MODULE + "weight": "q4_k"}), "bytes, no whole q4_k blocks"),
        (of_stored_blocks(formats={"model.norm.weight": "q8_0"}), "not a matrix's"),
        (of_stored_blocks(formats={"lm_head.weight": "q8_0"}), "stored as torch.float32"),
    ],
)
def test_stored_blocks_that_do_not_fit_are_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    models.write_stored_blocks(tmp_path, "int4_g32_min")
    change_settings(tmp_path, quantization_config=settings)
    with pytest.raises(ModelError, match=named):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["int4_g32_min", "int8_g64", "fp8_g64"])
def test_stored_blocks_are_the_numbers_of_their_format(tmp_path: Path, name: str) -> None:
    model = models.write_stored_blocks(tmp_path, name)
    checkpoint = open_checkpoint(tmp_path)
    for weight, expected in model.expected.items():
        assert checkpoint.format(weight).name == name
        assert np.array_equal(checkpoint.read(weight).numpy(), expected.astype(np.float32))
    checkpoint.close()


def test_weights_of_another_shape_than_the_model_has_are_refused(tmp_path: Path) -> None:
    models.write(tmp_path, *LAYOUTS["packed"][:2])
    change_settings(tmp_path, intermediate_size=256)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp.* has shape .*192.* expected .*256"):
        plan_checkpoint(checkpoint, EngineConfig())
    checkpoint.close()
