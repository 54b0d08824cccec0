"""The law inside a kernel: tiles of q.k become scores, and gradients of scores become gradients of
distances. Every function works on one tile; flags are compile-time, so a term that is absent costs
nothing. Formulas: ../README.md.

Scores are in units of log2 e, so that weights are powers of two.

Two codes for one law. *Plain* (`PLAIN`): force or power with nothing else. The tile is scaled so
that one multiply-add turns q.k into the scaled softened distance `n / unit`, with
`unit = M^2 log2 e` (force: the score is its reciprocal) or about `d2 + eps` (power: the score is
`-M^2` times its logarithm). *General*: curvature, masses, bias, sign, ceiling, cutoff or table, in
the order that `../reference.py` defines.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Weight 0 beside any other key, and a finite score alone: what a query gives itself when excluded.
EXCLUDED = tl.constexpr(-1.0e30)
# Of a repulsive force, in nats: no lower score tells anything, but its slope, up to 1 / eps, would
# multiply what rounding leaves of a gradient that is 0, as where a query sees a single key.
LOWEST_FORCE = tl.constexpr(-8192.0)
# A head without mass would divide by zero; scores of 1e-14 are as good as 0.
SMALLEST_UNIT = tl.constexpr(1.0e-20)
# Eight roundings of float32: what the expanded distance says below this many is noise.
NOISE = tl.constexpr(9.5e-7)


# fmt: off
@triton.jit
def reciprocal(x, NATIVE: tl.constexpr):
    """`1 / x` of positive numbers within one unit in the last place, denormals as zero."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def power_of_two(x, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def logarithm(x, NATIVE: tl.constexpr):
    """To base 2."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def square_root(x, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def cosine(x, NATIVE: tl.constexpr):
    """Absolutely within 2^-20 up to 2 pi, as for the sine; beyond, within what rounding of x
    costs."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.cos(x)


@triton.jit
def sine(x, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sin(x)


@triton.jit
def product(x, y, acc, PRECISION: tl.constexpr, NATIVE: tl.constexpr):
    """`acc + x y` in float32. The interpreter cannot multiply bfloat16; in float32 the products of
    half-precision numbers are exact, as they are in tensor cores."""
    if NATIVE:
        # What is said of float32 does not matter to other dtypes.
        return tl.dot(
            x, y, acc, input_precision="tf32" if PRECISION == "bf16x6" else PRECISION
        )
    else:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def cut_off(x):
    """float32 without what bfloat16 has not."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def upper_half(x):
    """`cut_off(x)` as bfloat16. A conversion would round, and runs at an eighth of the speed."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def thirds(x):
    """float32 as the sum of three bfloat16, which have eight bits each: cut off, not rounded, they
    miss none of the 24."""
    rest = x - cut_off(x)
    return upper_half(x), upper_half(rest), upper_half(rest - cut_off(rest))


@triton.jit
def inner_product(
    x, y, acc, PRECISION: tl.constexpr, NATIVE: tl.constexpr, TURNED: tl.constexpr = False
):
    """`acc + x y^T` of two tiles of vectors. "bf16x6": float32 in six products of thirds, which
    leave out what is below float32's last bit, on tensor cores that read half precision. `TURNED`
    adds them up as `inner_product(y, x)` does: a pair has the same bits in both."""
    if PRECISION == "bf16x6" and NATIVE:
        x_high, x_middle, x_low = thirds(x)
        y_high, y_middle, y_low = thirds(y)
        if TURNED:
            acc = tl.dot(x_high, y_low.T, acc)
            acc = tl.dot(x_low, y_high.T, acc)
        else:
            acc = tl.dot(x_low, y_high.T, acc)
            acc = tl.dot(x_high, y_low.T, acc)
        acc = tl.dot(x_middle, y_middle.T, acc)
        if TURNED:
            acc = tl.dot(x_high, y_middle.T, acc)
            acc = tl.dot(x_middle, y_high.T, acc)
        else:
            acc = tl.dot(x_middle, y_high.T, acc)
            acc = tl.dot(x_high, y_middle.T, acc)
        return tl.dot(x_high, y_high.T, acc)
    else:
        return product(x, y.T, acc, PRECISION, NATIVE)


@triton.jit
def vector_product(x, y, acc, PRECISION: tl.constexpr, NATIVE: tl.constexpr):
    """`acc + x y` of a tile `x` in half precision and vectors `y`. These may be float32: two halves
    of the dtype of `x` then stand for them, which keep 16 (bfloat16) or 22 of their bits."""
    if x.dtype == y.dtype:
        return product(x, y, acc, PRECISION, NATIVE)
    else:
        if x.dtype == tl.bfloat16:
            high, low, _ = thirds(y)
        else:
            high = y.to(x.dtype)
            low = (y - high.to(tl.float32)).to(x.dtype)
        return product(x, low, product(x, high, acc, PRECISION, NATIVE), PRECISION, NATIVE)


@triton.jit
def scaled_sum(vector, scale, term, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`vector * scale + term` as one multiply-add for each pair. Scaling the vector before it is
    broadcast would cost an operation more: every thread would do it for its own columns."""
    vector = tl.broadcast_to(vector, [ROWS, COLUMNS])
    term = tl.broadcast_to(term, [ROWS, COLUMNS])
    return tl.fma(vector, tl.broadcast_to(scale, [ROWS, COLUMNS]), term)


@triton.jit
def unit_of(strength, eps, POWER: tl.constexpr, WIDTH: tl.constexpr):
    """The plain code's unit of squared distance. Under the power law any will do; one in the middle
    of the distances, which for vectors of ordinary size are about their width, keeps logarithms
    small, and so what float32 loses of them."""
    if POWER:
        return eps + WIDTH
    else:
        return tl.maximum(strength * LOG2E, SMALLEST_UNIT)


@triton.jit
def told_apart(softened, eps, lengths):
    """Softened distances, those at `eps` that the arithmetic cannot tell from 0: relative to
    `lengths`, `|q|^2 + |k|^2`. A force with a tiny `eps` would make noise its largest slope."""
    return tl.where(softened - eps <= NOISE * lengths, eps, softened)


@triton.jit
def plain_scores(scaled, strength, POWER: tl.constexpr, NATIVE: tl.constexpr):
    """Scores from scaled softened distances, already clamped."""
    if POWER:
        return -strength * logarithm(scaled, NATIVE)
    else:
        return reciprocal(scaled, NATIVE)


@triton.jit
def curved(distance_sq, kappa, horizon, NATIVE: tl.constexpr):
    """`max(s (1 + kappa cos sqrt(s + horizon)), horizon)` of a squared distance `s >= 0`."""
    bend = 1.0 + kappa * cosine(square_root(distance_sq + horizon, NATIVE), NATIVE)
    return tl.maximum(distance_sq * bend, horizon, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def curved_slope(distance_sq, kappa, horizon, NATIVE: tl.constexpr):
    """Its derivative: 0 at the floor, where squared distances that were clamped at 0 are too."""
    root = square_root(distance_sq + horizon, NATIVE)
    flat = cosine(root, NATIVE)
    turn = distance_sq * sine(root, NATIVE) * reciprocal(root, NATIVE)
    above = distance_sq * (1.0 + kappa * flat) >= horizon
    return tl.where(above, 1.0 + kappa * (flat - 0.5 * turn), 0.0)


@triton.jit
def capped(score, ceiling, CAP: tl.constexpr):
    """A score under its ceiling `c`, and the slope of that: `min(s, c)` or `c tanh(s / c)`."""
    if CAP == "clamp":
        return tl.minimum(score, ceiling), tl.where(score <= ceiling, 1.0, 0.0)
    else:
        x = score / ceiling
        fading = tl.exp(-2.0 * tl.abs(x))
        whole = 1.0 / (1.0 + fading)
        high = (1.0 - fading) * whole
        # Near 0 that difference loses digits; Lambert's continued fraction to its fifth term does
        # not, and is exact to rounding up to 0.7.
        square = x * x
        low = x * (945.0 + square * (105.0 + square))
        low = low / (945.0 + square * (420.0 + square * 15.0))
        value = tl.where(tl.abs(x) < 0.6, low, tl.where(x < 0.0, -high, high))
        return ceiling * value, 4.0 * fading * whole * whole


@triton.jit
def log_sigmoid(x, NATIVE: tl.constexpr):
    fading = power_of_two(tl.abs(x) * -LOG2E, NATIVE)
    return tl.minimum(x, 0.0) - logarithm(1.0 + fading, NATIVE) * LN2


@triton.jit
def general_scores(
    softened, eps, strength, a, b, bias, radius_sq, width, ceiling, LAW: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr,
    CAP: tl.constexpr, CUTOFF: tl.constexpr, NATIVE: tl.constexpr,
):
    """Scores from softened distances (law "table": from inverse distances, or under the power law
    from their logarithms). `a` broadcasts over keys, `b` over queries. `HAS_B` 1: a factor, 2: a
    summand in units of log2 e. Hiding what a hard cutoff hides is the caller's."""
    if LAW == "power":
        score = -strength * (logarithm(softened, NATIVE) * LN2)
    else:
        if LAW == "table":
            score = strength * softened
        else:
            score = strength * reciprocal(softened, NATIVE)
        if REPULSIVE:
            score = -score
        if HAS_BIAS:
            score += bias
        if HAS_A:
            score *= a
        if HAS_B == 1:
            score *= b
        if CAP != "none":
            score, slope = capped(score, ceiling, CAP)
        if REPULSIVE:
            score = tl.maximum(score, LOWEST_FORCE, propagate_nan=tl.PropagateNan.ALL)
    if CUTOFF == "soft":
        score *= tl.maximum(1.0 - (softened - eps) * (1.0 / radius_sq), 0.0)
    if CUTOFF == "log":
        score += log_sigmoid((radius_sq - (softened - eps)) * (1.0 / width), NATIVE)
    score *= LOG2E
    if HAS_B == 2:
        score += b
    return score


@triton.jit
def general_gradients(
    grad, softened, eps, strength, a, b, bias, radius_sq, width, ceiling, LAW: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr,
    CAP: tl.constexpr, CUTOFF: tl.constexpr, NATIVE: tl.constexpr,
):
    """From dL/dscore (natural units) of every pair: dL/d of softened distance (law "table": of
    inverse distance), squared distance in the cutoff, strength, a, b, bias and radius^2, still per
    pair. Terms that are absent come back as `grad`, to be ignored."""
    if LAW == "power":
        inverse = reciprocal(softened, NATIVE)
        logarithms = logarithm(softened, NATIVE) * LN2
        base = -strength * logarithms
    elif LAW == "table":
        inverse = softened
        base = strength * softened
    else:
        inverse = reciprocal(softened, NATIVE)
        base = strength * inverse
    if LAW != "power":
        if REPULSIVE:
            base = -base
        if HAS_BIAS:
            base += bias
    score = base
    if LAW != "power":
        if HAS_A:
            score *= a
        if HAS_B == 1:
            score *= b
        if CAP != "none":
            score, cap_slope = capped(score, ceiling, CAP)
        if REPULSIVE:
            grad = tl.where(score > LOWEST_FORCE, grad, 0.0)
    d_cutoff = grad
    d_radius = grad
    if CUTOFF == "soft":
        part = (softened - eps) * (1.0 / radius_sq)
        share = tl.maximum(1.0 - part, 0.0)
        inside = share > 0.0
        d_cutoff = tl.where(inside, -grad * score * (1.0 / radius_sq), 0.0)
        d_radius = -d_cutoff * part
        grad = grad * share
    elif CUTOFF == "log" or CUTOFF == "hard":
        x = (radius_sq - (softened - eps)) * (1.0 / width)
        outward = reciprocal(1.0 + power_of_two(x * LOG2E, NATIVE), NATIVE)
        d_radius = grad * outward * (1.0 / width)
        d_cutoff = -d_radius
    if LAW == "power":
        d_strength = -grad * logarithms
        d_softened = -grad * strength * inverse
        d_a = grad
        d_b = grad
        d_bias = grad
    else:
        if CAP != "none":
            grad = grad * cap_slope
        d_a = grad * base
        d_b = grad
        if HAS_B == 1:
            d_a *= b
            d_b *= base
            if HAS_A:
                d_b *= a
        if HAS_A:
            grad *= a
        if HAS_B == 1:
            grad *= b
        d_bias = grad
        d_strength = grad * inverse
        if REPULSIVE:
            d_strength = -d_strength
        if LAW == "table":
            d_softened = grad * strength
        else:
            d_softened = -grad * strength * inverse * inverse
        if REPULSIVE:
            d_softened = -d_softened
    if LAW == "table":
        d_cutoff = grad
    return d_softened, d_cutoff, d_strength, d_a, d_b, d_bias, d_radius


@triton.jit
def add_sink(base, total, sink, NATIVE: tl.constexpr):
    """The logarithm `base` and the sum `total` of weights `2^(score - base)`, with that of a sink
    added; and the factor that other sums over these weights need."""
    highest = tl.maximum(base, sink)
    # Nothing seen and no sink: any finite number will do.
    origin = tl.where(highest == -float("inf"), 0.0, highest)
    shrink = power_of_two(base - origin, NATIVE)
    return highest, total * shrink + power_of_two(sink - origin, NATIVE), shrink


@triton.jit
def row_keys(seed, per_row):
    """32 random bits for each row of each head, by Philox."""
    return tl.randint(seed, per_row).to(tl.uint32, bitcast=True)


@triton.jit
def column_keys(first, LENGTH: tl.constexpr):
    """What `drawn` wants to know of keys from `first` on, a multiple of 16. Keys 8 apart share 32
    bits: a thread has both of them, be they rows or columns of its tile."""
    local = tl.arange(0, LENGTH)
    shared = first + (local & ~8)
    return shared.to(tl.uint32) * 0x9E3779B1, (local & 8) != 0


@triton.jit
def drawn(row_key, column_key, upper):
    """What decides whether dropout leaves the weight of a pair, in the upper 16 of 32 bits: a
    function of the row's bits and of the column, so that every kernel draws the same. Rows are
    drawn by Philox; for each pair that would take five times as long as all the rest, and a few
    rounds of multiplying and folding do (Wellons' lowbias32 without its last step)."""
    x = row_key + column_key
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return tl.where(upper, x, x << 16)


@triton.jit
def kept(value, draw, dropout, NATIVE: tl.constexpr):
    """`value`, 0 where it is dropped, with a probability that is `dropout` to 2^-16."""
    # 65536 would leave 32 bits, and with them all that is to be dropped.
    limit = tl.minimum(tl.floor(dropout * 65536.0 + 0.5), 65535.0).to(tl.uint32) << 16
    if NATIVE:
        # Left to itself, the compiler would choose among pairs of halves, after the conversion.
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ge.u32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p;}", "=f,f,r,r",
            [value, draw, limit], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        return tl.where(draw >= limit, value, 0.0)
