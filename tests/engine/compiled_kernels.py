"""Compiles every kernel for the cards (compute capabilities) that are named; says how many."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sl_serve.ops.triton import expand, kv
from sl_serve.weights.formats import BLOCK_FORMATS
from sl_serve.weights.groups import GROUP_FORMATS

# Of groups one size: the others differ in two numbers.
FORMATS = BLOCK_FORMATS | {g.format.name: g.format for g in GROUP_FORMATS.values() if g.group == 64}


def sources() -> list[ASTSource]:
    found = []
    for name, format in FORMATS.items():
        decode = expand.DECODERS[name]
        for out in ("*u16", "*fp16", "*fp32") if name == "q4_0" else ("*u16",):
            constants = {
                "decode": decode,
                "block_elements": format.block_elements,
                "block_bytes": format.block_bytes,
                "to_bfloat16": out == "*u16",
                "tile": expand.TILE,
            }
            kinds = {"data": "*u8", "out": out, "n_elements": "i32"}
            found.append(ASTSource(expand._expand, signature(kinds, constants), constants))
    numbers = dict.fromkeys(("k", "v", "out", "lines"), "*bf16") | {"targets": "*i64"}
    for kernel in (kv._pack, kv._scatter):
        kinds = {a: numbers.get(a, "i32") for a in kernel.arg_names if a != "tile"}
        found.append(ASTSource(kernel, signature(kinds, {"tile": 1}), {"tile": kv.TILE}))
    return found


def signature(kinds: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    return kinds | dict.fromkeys(constants, "constexpr")


for card in sys.argv[1:]:
    target = GPUTarget("cuda", int(card), 32)
    compiled = [triton.compile(s, target=target).asm["cubin"] for s in sources()]
    print(sum(len(binary) > 0 for binary in compiled))
