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
EXTREME = np.array([0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0x7E00], "<u2")
ORDINARY_BLOCKS = 2

# Byte offsets of the half-precision fields of a block.
HALVES = {T.F16: [0], T.Q8_0: [0], T.Q4_K: [0, 2], T.Q6_K: [208]}


def blocks(rng, ty, size):
    n = len(EXTREME) + ORDINARY_BLOCKS
    raw = rng.integers(0, 256, (n, size), np.uint8)
    for i, offset in enumerate(HALVES[ty]):
        ordinary = rng.normal(0, 0.01, ORDINARY_BLOCKS).astype("<f2").view("<u2")
        halves = np.concatenate([np.roll(EXTREME, i), ordinary])
        raw[:, offset:offset + 2] = halves.view(np.uint8).reshape(n, 2)
    return raw


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20240607)
    for ty in HALVES:
        raw = blocks(rng, ty, gguf.GGML_QUANT_SIZES[ty][1])
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, ty)
        name = ty.name.lower()
        (OUT / f"{name}.in.bin").write_bytes(raw.tobytes())
        (OUT / f"{name}.out.bin").write_bytes(values.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
