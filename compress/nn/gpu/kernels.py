# mypy: ignore-errors
# Triton's language is typed by its compiler.
"""The kernels of `displace`, in Triton's language: imported only where Triton is, and called through that file.

A program handles P positions (image, row, column) of the map that is written, or summed over, and K channels. Strides
are those of (N, C, H, W). What belongs to a position alone or to a channel alone is computed for that alone; for each
number there is one addition and two comparisons.

Those whose names end in `_turned` are for channels last, where channels that lie side by side are read from different
places: a program first turns one image's map of K channels round, in `turned` (N, C, positions), and then reads
positions that lie side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _positions(first, positions, height, width, P: tl.constexpr):
    """Image, row and column of P positions, and whether they are there at all; each (P, 1)."""
    p = first + tl.arange(0, P)[:, None]
    return (p // (height * width)).to(tl.int64), p // width % height, p % width, p < positions


@triton.jit
def _parts(d, c, channels):
    """The whole part (down, right) and the rest (b, a) of the displacements of channels; each as `c`."""
    dy = tl.load(d + 2 * c, mask=c < channels, other=0.0)
    dx = tl.load(d + 2 * c + 1, mask=c < channels, other=0.0)
    top, left = tl.floor(dy), tl.floor(dx)
    return top.to(tl.int32), left.to(tl.int32), dy - top, dx - left


@triton.jit
def _channels(d, channels, K: tl.constexpr):
    """K channels, and the whole part (down, right) and the rest (b, a) of their displacements; each (1, K)."""
    c = tl.program_id(1) * K + tl.arange(0, K)[None, :]
    down, right, b, a = _parts(d, c, channels)
    return c, down, right, b, a


@triton.jit
def _within(at, size):
    return (at >= 0) & (at < size)


@triton.jit
def move(
    x, d, y, positions, channels, height, width, x_height, x_width, xn, xc, xh, xw, yn, yc, yh, yw,
    S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """y = x displaced by d (channels, 2), every S-th position of it."""
    n, h, w, there = _positions(tl.program_id(0) * P, positions, height, width, P)
    c, down, right, b, a = _channels(d, channels, K)
    fine = there & (c < channels)
    start = x + (n * xn + (h * S) * xh + (w * S) * xw)
    step = c * xc + down * xh + right * xw
    row, column = h * S + down, w * S + right
    if WHOLE:
        inside = fine & _within(row, x_height) & _within(column, x_width)
        total = tl.load(start + step, mask=inside, other=0.0).to(tl.float32)
    else:
        above, below = fine & _within(row, x_height), fine & _within(row + 1, x_height)
        before, behind = _within(column, x_width), _within(column + 1, x_width)
        place = start + step
        total = tl.load(place, mask=above & before, other=0.0).to(tl.float32) * ((1 - b) * (1 - a))
        total += tl.load(place + xw, mask=above & behind, other=0.0).to(tl.float32) * ((1 - b) * a)
        total += tl.load(place + xh, mask=below & before, other=0.0).to(tl.float32) * (b * (1 - a))
        total += tl.load(place + xh + xw, mask=below & behind, other=0.0).to(tl.float32) * (b * a)
    tl.store(y + (n * yn + h * yh + w * yw) + c * yc, total.to(y.dtype.element_ty), mask=fine)


@triton.jit
def _taken(at, S: tl.constexpr):
    """Where a stride of S puts the position `at`, and -1 where it skips that."""
    return tl.where((at >= 0) & (at % S == 0), at // S, -1)


@triton.jit
def move_back(
    g, d, y, positions, channels, height, width, g_height, g_width, gn, gc, gh, gw, yn, yc, yh, yw,
    S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The adjoint of `move`, for strides above 1: y gets from g what went from y's positions to g's."""
    n, h, w, there = _positions(tl.program_id(0) * P, positions, height, width, P)
    c, down, right, b, a = _channels(d, channels, K)
    fine = there & (c < channels)
    total = tl.zeros((P, K), tl.float32)
    for i in tl.static_range(1 if WHOLE else 2):
        for j in tl.static_range(1 if WHOLE else 2):
            row, column = _taken(h - down - i, S), _taken(w - right - j, S)
            inside = fine & _within(row, g_height) & _within(column, g_width)
            value = tl.load(g + n * gn + (c * gc + row * gh + column * gw), mask=inside, other=0.0).to(tl.float32)
            if not WHOLE:
                value *= (b if i else 1 - b) * (a if j else 1 - a)
            total += value
    tl.store(y + (n * yn + h * yh + w * yw) + c * yc, total.to(y.dtype.element_ty), mask=fine)


@triton.jit
def slopes(
    x, d, g, parts, positions, channels, height, width, x_height, x_width, xn, xc, xh, xw, gn, gc, gh, gw,
    S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """parts[program, c] = the sum over R * P positions of g times the derivative of x displaced by d, after d."""
    c, down, right, b, a = _channels(d, channels, K)
    step = c * xc + down * xh + right * xw
    by_y = tl.zeros((P, K), tl.float32)
    by_x = tl.zeros((P, K), tl.float32)
    for r in range(R):
        n, h, w, there = _positions((tl.program_id(0) * R + r) * P, positions, height, width, P)
        fine = there & (c < channels)
        grad = tl.load(g + (n * gn + h * gh + w * gw) + c * gc, mask=fine, other=0.0).to(tl.float32)
        row, column = h * S + down, w * S + right
        above, below = fine & _within(row, x_height), fine & _within(row + 1, x_height)
        before, behind = _within(column, x_width), _within(column + 1, x_width)
        place = x + (n * xn + (h * S) * xh + (w * S) * xw) + step
        here = tl.load(place, mask=above & before, other=0.0).to(tl.float32)
        beside = tl.load(place + xw, mask=above & behind, other=0.0).to(tl.float32)
        under = tl.load(place + xh, mask=below & before, other=0.0).to(tl.float32)
        across = tl.load(place + xh + xw, mask=below & behind, other=0.0).to(tl.float32)
        by_y += grad * ((1 - a) * (under - here) + a * (across - beside))
        by_x += grad * ((1 - b) * (beside - here) + b * (across - under))
    place = parts + (tl.program_id(0) * channels + c) * 2
    inside = c < channels
    tl.store(place, tl.sum(by_y, 0)[None, :], mask=inside)
    tl.store(place + 1, tl.sum(by_x, 0)[None, :], mask=inside)


@triton.jit
def _turn(x, turned, channels, size: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Copy one image's map of K channels, `size` positions, from channels last; gives back where the copy starts, and
    the channels (K, 1)."""
    c = tl.program_id(1) * K + tl.arange(0, K)[:, None]
    start = tl.program_id(0).to(tl.int64) * size * channels
    for first in range(0, size, P):
        p = first + tl.arange(0, P)[None, :]
        fine = (p < size) & (c < channels)
        value = tl.load(x + start + (p * channels + c), mask=fine, other=0.0)
        tl.store(turned + start + (c * size + p), value, mask=fine)
    tl.debug_barrier()  # what other threads of this program have copied is read next
    return turned + start + c * size, c


@triton.jit
def _at(source, fine, row, column, height, width):
    """The numbers of turned maps at rows and columns, in float32; zero outside."""
    inside = fine & _within(row, height) & _within(column, width)
    return tl.load(source + (row * width + column), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _from(at, moved, on: tl.constexpr, S: tl.constexpr, BACK: tl.constexpr):
    """From which rows (or columns) the rows `at` are read, and `on` further; -1 for one that is not there."""
    if BACK:
        return _taken(at - moved - on, S)
    return at * S + moved + on


@triton.jit
def move_turned(
    x, turned, d, y, channels, height: tl.constexpr, width: tl.constexpr, x_height: tl.constexpr, x_width: tl.constexpr,
    S: tl.constexpr, P: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """What `move` does (with BACK, `move_back`), for one image's map of K channels, P positions at a time."""
    source, c = _turn(x, turned, channels, x_height * x_width, P, K)
    down, right, b, a = _parts(d, c, channels)
    size: tl.constexpr = height * width
    start = y + tl.program_id(0).to(tl.int64) * size * channels
    for first in range(0, size, P):
        q = first + tl.arange(0, P)[None, :]
        fine = (q < size) & (c < channels)
        row, column = _from(q // width, down, 0, S, BACK), _from(q % width, right, 0, S, BACK)
        total = _at(source, fine, row, column, x_height, x_width)
        if not WHOLE:
            under, beside = _from(q // width, down, 1, S, BACK), _from(q % width, right, 1, S, BACK)
            total *= (1 - b) * (1 - a)
            total += _at(source, fine, row, beside, x_height, x_width) * ((1 - b) * a)
            total += _at(source, fine, under, column, x_height, x_width) * (b * (1 - a))
            total += _at(source, fine, under, beside, x_height, x_width) * (b * a)
        tl.store(start + (q * channels + c), total.to(y.dtype.element_ty), mask=fine)


@triton.jit
def slopes_turned(
    x, turned, d, g, parts, channels,
    height: tl.constexpr, width: tl.constexpr, x_height: tl.constexpr, x_width: tl.constexpr,
    S: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What `slopes` does, for one image's map of K channels, P positions at a time."""
    source, c = _turn(x, turned, channels, x_height * x_width, P, K)
    down, right, b, a = _parts(d, c, channels)
    size: tl.constexpr = height * width
    start = g + tl.program_id(0).to(tl.int64) * size * channels
    by_y = tl.zeros((K, P), tl.float32)
    by_x = tl.zeros((K, P), tl.float32)
    for first in range(0, size, P):
        q = first + tl.arange(0, P)[None, :]
        fine = (q < size) & (c < channels)
        grad = tl.load(start + (q * channels + c), mask=fine, other=0.0).to(tl.float32)
        row, column = q // width * S + down, q % width * S + right
        here = _at(source, fine, row, column, x_height, x_width)
        beside = _at(source, fine, row, column + 1, x_height, x_width)
        under = _at(source, fine, row + 1, column, x_height, x_width)
        across = _at(source, fine, row + 1, column + 1, x_height, x_width)
        by_y += grad * ((1 - a) * (under - here) + a * (across - beside))
        by_x += grad * ((1 - b) * (beside - here) + b * (across - under))
    place = parts + (tl.program_id(0) * channels + c) * 2
    tl.store(place, tl.sum(by_y, 1)[:, None], mask=c < channels)
    tl.store(place + 1, tl.sum(by_x, 1)[:, None], mask=c < channels)
