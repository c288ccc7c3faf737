"""Matrix products of tiles with fp32 sums, an fp32 operand that keeps its accuracy, and rounding.

Two things that Triton's interpreter does otherwise than a GPU are put right here: it multiplies
bf16 tiles by their bits (so they are widened first, which is exact, as in a tensor core), and it
truncates to bf16 where machine code rounds to nearest even.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b for tiles of one dtype; fp32 by ieee multiplications, not tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_wide(x, w, acc):
    """acc + x @ w with x in the model's dtype and w fp32.

    bf16: w in two bf16 parts, 16 of its 24 bits, error 2^-17 of a product; two products.
    fp16: tf32x3, error 2^-22, because w may exceed the range of fp16.  fp32: ieee.
    """
    if x.dtype == tl.bfloat16:
        high = round_to(w, tl.bfloat16)
        low = round_to(w - high.to(tl.float32), tl.bfloat16)
        return dot(x, high, dot(x, low, acc))
    elif x.dtype == tl.float16:
        return tl.dot(x.to(tl.float32), w, acc, input_precision="tf32x3")
    else:
        return dot(x, w, acc)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x in another dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
