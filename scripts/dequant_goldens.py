#!/usr/bin/env python3
"""Write tests/data/dequant: random blocks of each format and what the gguf package makes of them.

Needs: pip install gguf numpy
Usage: scripts/dequant_goldens.py      (from the root of the project; the output never changes)

NAME.in.bin holds blocks, NAME.out.bin their values as little-endian float32. The scales of the first
blocks are extreme: zero, minus zero, subnormal, largest, infinite, NaN.
"""
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

OUT = Path("tests/data/dequant")
EXTREME = {
    "<f2": np.array([0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0x7E00], "<u2"),
    "bf16": np.array([0x0000, 0x8000, 0x0001, 0x007F, 0x7F7F, 0xFF7F, 0x7F80, 0x7FC0], "<u2"),
    "e8m0": np.array([0, 1, 2, 3, 127, 128, 254, 255], "u1"),
}
ORDINARY_BLOCKS = 2

# The kind of a block's scales and their byte offsets.
SCALES = {
    T.F16: ("<f2", [0]), T.Q8_0: ("<f2", [0]), T.Q4_K: ("<f2", [0, 2]), T.Q6_K: ("<f2", [208]),
    T.BF16: ("bf16", [0]), T.Q4_0: ("<f2", [0]), T.Q4_1: ("<f2", [0, 2]), T.Q5_0: ("<f2", [0]),
    T.Q5_1: ("<f2", [0, 2]), T.Q2_K: ("<f2", [80, 82]), T.Q3_K: ("<f2", [108]), T.Q5_K: ("<f2", [0, 2]),
    T.MXFP4: ("e8m0", [0]),
}


def ordinary(rng, kind):
    if kind == "e8m0":
        return rng.integers(110, 125, ORDINARY_BLOCKS, np.uint8)
    values = rng.normal(0, 0.01, ORDINARY_BLOCKS)
    if kind == "bf16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    return values.astype("<f2").view("<u2")


def blocks(rng, ty, size):
    kind, offsets = SCALES[ty]
    extreme = EXTREME[kind]
    n, width = len(extreme) + ORDINARY_BLOCKS, extreme.itemsize
    raw = rng.integers(0, 256, (n, size), np.uint8)
    for i, offset in enumerate(offsets):
        scales = np.concatenate([np.roll(extreme, i), ordinary(rng, kind)])
        raw[:, offset:offset + width] = scales.view(np.uint8).reshape(n, width)
    return raw


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20240607)
    for ty in SCALES:
        raw = blocks(rng, ty, gguf.GGML_QUANT_SIZES[ty][1])
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, ty)
        name = ty.name.lower()
        (OUT / f"{name}.in.bin").write_bytes(raw.tobytes())
        (OUT / f"{name}.out.bin").write_bytes(values.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
