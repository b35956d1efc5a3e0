# mypy: ignore-errors
# Triton's language is typed by its compiler.
"""The kernels of `displace`, in Triton's language: imported only where Triton is, and called through that file.

A program handles P positions (image, row, column) of the map that is written, or summed over, and K channels. Strides
are those of (N, C, H, W).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _at(x, n, c, row, column, height, width, fine, sn, sc, sh, sw):
    """x[n, c, row, column] in float32; zero outside the map and where `fine` is false."""
    fine = fine & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(x + n * sn + c * sc + row * sh + column * sw, mask=fine, other=0.0).to(tl.float32)


@triton.jit
def _back(at, S: tl.constexpr):
    """The position at which a stride of S reads `at`, and -1 where it skips that."""
    return tl.where((at >= 0) & (at % S == 0), at // S, -1)


@triton.jit
def move(
    x, d, y, positions, channels, height, width, x_height, x_width, xn, xc, xh, xw, yn, yc, yh, yw,
    S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """y = x displaced by d (channels, 2), every S-th position of it; with BACK the adjoint of that."""
    p = tl.program_id(0) * P + tl.arange(0, P)[:, None]
    c = tl.program_id(1) * K + tl.arange(0, K)[None, :]
    fine = (p < positions) & (c < channels)
    dy = tl.load(d + 2 * c, mask=c < channels, other=0.0)
    dx = tl.load(d + 2 * c + 1, mask=c < channels, other=0.0)
    n = (p // (height * width)).to(tl.int64)
    h = p // width % height
    w = p % width
    top = tl.floor(dy)
    left = tl.floor(dx)
    total = tl.zeros((P, K), tl.float32)
    for i in tl.static_range(1 if WHOLE else 2):
        for j in tl.static_range(1 if WHOLE else 2):
            down = top.to(tl.int32) + i
            right = left.to(tl.int32) + j
            if BACK:
                row = _back(h - down, S)
                column = _back(w - right, S)
            else:
                row = h * S + down
                column = w * S + right
            value = _at(x, n, c, row, column, x_height, x_width, fine, xn, xc, xh, xw)
            if not WHOLE:
                value *= (dy - top if i else 1 - (dy - top)) * (dx - left if j else 1 - (dx - left))
            total += value
    tl.store(y + n * yn + c * yc + h * yh + w * yw, total.to(y.dtype.element_ty), mask=fine)


@triton.jit
def slopes(
    x, d, g, parts, positions, channels, height, width, x_height, x_width, xn, xc, xh, xw, gn, gc, gh, gw,
    S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """parts[program, c] = the sum over R * P positions of g times the derivative of x displaced by d, after d."""
    c = tl.program_id(1) * K + tl.arange(0, K)[None, :]
    dy = tl.load(d + 2 * c, mask=c < channels, other=0.0)
    dx = tl.load(d + 2 * c + 1, mask=c < channels, other=0.0)
    top = tl.floor(dy)
    left = tl.floor(dx)
    b = dy - top
    a = dx - left
    down = top.to(tl.int32)
    right = left.to(tl.int32)
    by_y = tl.zeros((P, K), tl.float32)
    by_x = tl.zeros((P, K), tl.float32)
    for r in range(R):
        p = (tl.program_id(0) * R + r) * P + tl.arange(0, P)[:, None]
        fine = (p < positions) & (c < channels)
        n = (p // (height * width)).to(tl.int64)
        h = p // width % height
        w = p % width
        row = h * S + down
        column = w * S + right
        grad = tl.load(g + n * gn + c * gc + h * gh + w * gw, mask=fine, other=0.0).to(tl.float32)
        here = _at(x, n, c, row, column, x_height, x_width, fine, xn, xc, xh, xw)
        beside = _at(x, n, c, row, column + 1, x_height, x_width, fine, xn, xc, xh, xw)
        below = _at(x, n, c, row + 1, column, x_height, x_width, fine, xn, xc, xh, xw)
        across = _at(x, n, c, row + 1, column + 1, x_height, x_width, fine, xn, xc, xh, xw)
        by_y += grad * ((1 - a) * (below - here) + a * (across - beside))
        by_x += grad * ((1 - b) * (beside - here) + b * (across - below))
    place = parts + (tl.program_id(0) * channels + c) * 2
    inside = c < channels
    tl.store(place, tl.sum(by_y, 0)[None, :], mask=inside)
    tl.store(place + 1, tl.sum(by_x, 0)[None, :], mask=inside)
