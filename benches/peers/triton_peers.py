"""Triton as a peer, in two forms that differ in how they make random numbers.

The seed is an argument of each launch, so a replayed CUDA graph drops the same elements again; a trainer would have to
read it from device memory. That would cost these kernels nothing worth counting, so it is not held against them.
"""

import os
from functools import partial

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tuned(*key):
    """The quickest of some tiles, chosen by trial once for each key. The interpreter has nothing to choose."""
    choices = [(1024, 4), (2048, 4), (2048, 8), (4096, 8)]
    configs = [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in choices]
    bench = partial(triton.testing.do_bench, warmup=2, rep=10)
    return triton.autotune(configs[:1] if INTERPRETED else configs, list(key), do_bench=bench)


# The tutorial's way: a uniform float per element, compared with p.


@triton.jit(do_not_specialize=["seed"])
def simple_kernel(x, residual, y, seed, p, elements, ADD: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < elements
    value = tl.load(x + at, mask=inside).to(tl.float32)
    value = tl.where(tl.rand(seed, at) >= p, value / (1.0 - p), 0.0)
    if ADD:
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def simple(p, seed, x, residual=None):
    y, elements = torch.empty_like(x), x.numel()
    add = residual is not None
    grid = (triton.cdiv(elements, 1024),)
    simple_kernel[grid](x, residual if add else x, y, seed, p, elements, ADD=add, TILE=1024)
    return (y,)


# The strong way: 16 bits an element, so that a Philox block serves eight.


@triton.jit
def kept(seed, octets, threshold, TILE: tl.constexpr):
    """[TILE / 8] numbers of octets -> [TILE] booleans. Each thread owns whole octets, so nothing changes hands."""
    a, b, c, d = tl.randint4x(seed, octets)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [TILE])
    return lanes.to(tl.int32) >= threshold


@tuned("elements", "ADD")
@triton.jit(do_not_specialize=["seed", "threshold"])
def strong_kernel(
    x, residual, y, seed, threshold, scale, elements, ADD: tl.constexpr, TILE: tl.constexpr
):
    octets = tl.program_id(0) * (TILE // 8) + tl.arange(0, TILE // 8)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < elements
    value = tl.load(x + at, mask=inside).to(tl.float32)
    value = tl.where(kept(seed, octets, threshold, TILE), value * scale, 0.0)
    if ADD:
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@tuned("elements")
@triton.jit(do_not_specialize=["seed", "threshold"])
def strong_gelu_kernel(x, bias, y, seed, threshold, scale, elements, cols, TILE: tl.constexpr):
    octets = tl.program_id(0) * (TILE // 8) + tl.arange(0, TILE // 8)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < elements
    value = tl.load(x + at, mask=inside).to(tl.float32)
    value += tl.load(bias + at % cols, mask=inside).to(tl.float32)
    # v (1 + tanh u) / 2 = v sigmoid(2 u), with u = sqrt(2 / pi) (v + 0.044715 v^3).
    value *= tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    value = tl.where(kept(seed, octets, threshold, TILE), value * scale, 0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


# A program a row, which stays in registers: TILE is the row, a power of two.


@triton.jit(do_not_specialize=["seed", "threshold"])
def strong_layernorm_kernel(
    x, residual, weight, norm_bias, s, y, stats, seed, threshold, scale, TILE: tl.constexpr
):
    row = tl.program_id(0)
    cols = tl.arange(0, TILE)
    at = row * TILE + cols
    octets = row * (TILE // 8) + tl.arange(0, TILE // 8)
    value = tl.load(x + at).to(tl.float32)
    value = tl.where(kept(seed, octets, threshold, TILE), value * scale, 0.0)
    # The norm is of s as it is stored, so that the backward pass can start from it.
    rounded = (value + tl.load(residual + at).to(tl.float32)).to(s.dtype.element_ty)
    tl.store(s + at, rounded)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / TILE
    centred = value - mean
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / TILE + 1e-5)
    tl.store(stats + 2 * row, mean)
    tl.store(stats + 2 * row + 1, rstd)
    scaled = centred * rstd * tl.load(weight + cols).to(tl.float32)
    scaled += tl.load(norm_bias + cols).to(tl.float32)
    tl.store(y + at, scaled.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["seed", "threshold"])
def strong_softmax_kernel(x, y, seed, threshold, scale, TILE: tl.constexpr):
    row = tl.program_id(0)
    at = row * TILE + tl.arange(0, TILE)
    octets = row * (TILE // 8) + tl.arange(0, TILE // 8)
    value = tl.load(x + at).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    factor = scale / tl.sum(value, 0)
    value = tl.where(kept(seed, octets, threshold, TILE), value * factor, 0.0)
    tl.store(y + at, value.to(y.dtype.element_ty))


def draw(p):
    """Threshold and scale of a lane of 16 bits; the scale belongs to the rounded probability, so nothing is biased."""
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold)


def tiles(elements):
    return lambda meta: (triton.cdiv(elements, meta["TILE"]),)


def row_warps(cols):
    """Eight elements a thread, and more in rows beyond 4096."""
    return min(max(cols // 256, 1), 16)


def strong(p, seed, x, residual=None):
    y, elements = torch.empty_like(x), x.numel()
    add = residual is not None
    strong_kernel[tiles(elements)](x, residual if add else x, y, seed, *draw(p), elements, ADD=add)
    return (y,)


def strong_gelu(p, seed, x, bias):
    y, elements = torch.empty_like(x), x.numel()
    strong_gelu_kernel[tiles(elements)](x, bias, y, seed, *draw(p), elements, x.shape[-1])
    return (y,)


def strong_layernorm(p, seed, x, residual, weight, norm_bias):
    s, y = torch.empty_like(x), torch.empty_like(x)
    rows, cols = x.shape
    stats = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    strong_layernorm_kernel[(rows,)](
        x, residual, weight, norm_bias, s, y, stats, seed, *draw(p), TILE=cols,
        num_warps=row_warps(cols),
    )  # fmt: skip
    return s, y, stats


def strong_softmax(p, seed, x):
    y = torch.empty_like(x)
    rows, cols = x.shape
    strong_softmax_kernel[(rows,)](x, y, seed, *draw(p), TILE=cols, num_warps=row_warps(cols))
    return (y,)


class Triton:
    """What both forms share; for the interface see torch_peers.py.

    The backward pass of dropout and of dropout + add is the dropout of dy with the seed of the forward pass.
    """

    def has(self, operator, direction):
        return self.kernels.get(operator, (None, None))[direction == "backward"] is not None

    def call(self, point, p, inputs, gradients, seed):
        forward, backward = self.kernels[point.operator]
        if point.direction == "forward":
            return partial(forward, p, seed, **inputs)
        return partial(backward, p, seed, *gradients)

    def both(self, point, p, inputs, gradients, seed):
        forward, backward = self.kernels[point.operator]
        outputs = forward(p, seed, **inputs)
        return outputs, backward and backward(p, seed, *gradients)


class Tutorial(Triton):
    """The seeded dropout of Triton's tutorials, in our own words: `tl.rand` for every element.

    Random words an element: 1 of 32 bits, from a Philox4x32-10 block of its own: three words of four are thrown away,
    and eight times the multiplies of the strong form are done.
    Saved for the backward pass: the seed. Bytes: the least. No tuning: a tile of 1024, four warps.
    Mask: a function of (seed, flat element), the same on every GPU.
    """

    name = "tutorial"
    kernels = {"dropout": (simple, simple), "dropout_add": (simple, simple)}


class Strong(Triton):
    """What somebody who knows Triton well would write: `tl.randint4x`, one Philox block for eight elements.

    Random bits an element: 16, compared as integers; all four words are used. Rounding p to 16 bits changes it by at
    most 2^-17, and the scale is that of the rounded p.
    Saved for the backward pass: the seed, and mean and rstd for LayerNorm. Bytes: the least, in one kernel each; 16-byte
    accesses, tile sizes chosen by trial. In f32 Triton passes the booleans through shared memory, since there a thread
    loads four elements at a time and not eight. Rows must be a power of two of columns, held in a program's registers.
    Mask: a function of (seed, octet, lane), the same on every GPU and for every tile.
    """

    name = "strong"
    kernels = {
        "dropout": (strong, strong),
        "dropout_add": (strong, strong),
        "bias_gelu_dropout": (strong_gelu, None),
        "dropout_add_layernorm": (strong_layernorm, None),
        "softmax_dropout": (strong_softmax, None),
    }
