"""The objective's two passes over a rank's logits in Triton; `launch` calls them.

Forward, one program a row reads s and t once. It keeps the largest logit so far and, lane by lane, the sums of
`vocab_parallel` under it; where a maximum grows by -delta, the sums move to the new one as they do between ranks:

    alpha = e^delta      Z = alpha Z      A = alpha (A + delta Z)      G = alpha (G + (delta_s - delta_t) Z)

Backward, one program a row reads s (and t) again and writes q_j (kappa + w_R D_j) - w_p p_j with what the top-k set and
the sampled token add, in fp32 until it is stored; the gradient may lie over s. Offsets of rows are 64 bits wide.
A program works at DEPTH runs of LANES columns in a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = bool(triton.knobs.runtime.interpret)
NATIVE = tl.constexpr(not INTERPRETED)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the maximum of no columns
NOWHERE = 2**31 - 1  # a column behind every other


@triton.jit(do_not_specialize=["n"])
def sums_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    student_sums: tl.tensor,  # [3, n]: m, Z, A
    teacher_sums: tl.tensor,
    gap_sums: tl.tensor,  # [2, n]: G_s, G_t
    student_rest: tl.tensor,  # [n]
    teacher_rest: tl.tensor,
    left_out: tl.tensor,  # [n, left_out_stride] int32, ascending, NOWHERE last
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    left_out_stride: tl.tensor,
    n: tl.tensor,
    valid: tl.tensor,
    PAIR: tl.constexpr,  # with a teacher
    REST: tl.constexpr,  # also the sums that leave columns out
    CAREFUL: tl.constexpr,  # 0 · inf = 0
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    step: tl.constexpr = DEPTH * LANES
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m_s = tl.full((), LOWEST, tl.float32)
    m_t = m_s
    z_s = tl.zeros((LANES,), tl.float32)
    a_s, g_s, r_s, z_t, a_t, g_t, r_t = z_s, z_s, z_s, z_s, z_s, z_s, z_s
    if REST:
        left_out += row * left_out_stride
        following = tl.load(left_out)
    whole = valid // step * step
    for masked in tl.static_range(2):  # whole steps first, without a mask: loads then are as wide as they can be
        for start in tl.range(whole * masked, whole + (valid - whole) * masked, step, num_stages=STAGES):
            columns = start + offsets
            if masked:
                inside = columns < valid
                s = tl.load(student + columns, mask=inside, other=-float("inf")).to(tl.float32)
            else:
                s = tl.load(student + columns).to(tl.float32)
            grown = tl.maximum(m_s, tl.max(tl.max(s, 0), 0))
            delta_s = m_s - grown
            m_s = grown
            moved = delta_s < 0
            if PAIR:
                if masked:
                    t = tl.load(teacher + columns, mask=inside, other=-float("inf")).to(tl.float32)
                else:
                    t = tl.load(teacher + columns).to(tl.float32)
                grown = tl.maximum(m_t, tl.max(tl.max(t, 0), 0))
                delta_t = m_t - grown
                m_t = grown
                moved = moved | (delta_t < 0)
            if moved:  # seldom after the first steps
                alpha = _exp(delta_s)
                a_s = tl.where(alpha == 0, 0.0, alpha * (a_s + delta_s * z_s))
                if PAIR:
                    shift = delta_s - delta_t
                    g_s = tl.where(alpha == 0, 0.0, alpha * (g_s + shift * z_s))
                z_s *= alpha
                if REST:
                    r_s *= alpha
                if PAIR:
                    alpha = _exp(delta_t)
                    a_t = tl.where(alpha == 0, 0.0, alpha * (a_t + delta_t * z_t))
                    g_t = tl.where(alpha == 0, 0.0, alpha * (g_t + shift * z_t))
                    z_t *= alpha
                    if REST:
                        r_t *= alpha
            d_s = s - m_s
            e_s = _exp(d_s)
            if masked:
                d_s = tl.where(inside, d_s, 0.0)  # 0 times it is 0: e is 0 there
            z_s += tl.sum(e_s, 0)
            a_s += tl.sum(_times(e_s, d_s, CAREFUL), 0)
            if PAIR:
                d_t = t - m_t
                e_t = _exp(d_t)
                if masked:
                    d_t = tl.where(inside, d_t, 0.0)
                z_t += tl.sum(e_t, 0)
                a_t += tl.sum(_times(e_t, d_t, CAREFUL), 0)
                gap = d_s - d_t
                g_s += tl.sum(_times(e_s, gap, CAREFUL), 0)
                g_t += tl.sum(_times(e_t, gap, CAREFUL), 0)
            if REST:
                while following < start + step:
                    e_s = tl.where(columns == following, 0.0, e_s)
                    if PAIR:
                        e_t = tl.where(columns == following, 0.0, e_t)
                    left_out += 1
                    following = tl.load(left_out)
                r_s += tl.sum(e_s, 0)
                if PAIR:
                    r_t += tl.sum(e_t, 0)
    _store_sums(student_sums + row, n, m_s, z_s, a_s)
    if REST:
        tl.store(student_rest + row, tl.sum(r_s, 0))
    if PAIR:
        _store_sums(teacher_sums + row, n, m_t, z_t, a_t)
        tl.store(gap_sums + row, tl.sum(g_s, 0))
        tl.store(gap_sums + n + row, tl.sum(g_t, 0))
        if REST:
            tl.store(teacher_rest + row, tl.sum(r_t, 0))


@triton.jit
def _exp(value: tl.tensor) -> tl.tensor:
    if NATIVE:  # results below 1e-38 are 0, which saves a quarter of the instructions
        return libdevice.fast_expf(value)
    else:
        return tl.exp(value)


@triton.jit
def _times(weight: tl.tensor, value: tl.tensor, CAREFUL: tl.constexpr) -> tl.tensor:
    product = weight * value
    if CAREFUL:
        product = tl.where(weight == 0, 0.0, product)
    return product


@triton.jit
def _store_sums(sums: tl.tensor, n: tl.tensor, maximum: tl.tensor, total: tl.tensor, weighted: tl.tensor) -> None:
    tl.store(sums, maximum)
    tl.store(sums + n, tl.sum(total, 0))
    tl.store(sums + 2 * n, tl.sum(weighted, 0))


@triton.jit(do_not_specialize=["n"])
def gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    out: tl.tensor,
    numbers: tl.tensor,  # [7, n]: m_s, kappa, w_R, m_t, w_p, kappa inside S, addition at the token
    rows: tl.tensor,  # [programs] int64: the program's row of all but the teacher's logits
    tokens: tl.tensor,  # [n] int32 columns
    kept: tl.tensor,  # [n, kept_stride] int32 columns of S, ascending, NOWHERE last
    additions: tl.tensor,  # [n, kept_stride], at those columns
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    out_stride: tl.tensor,
    kept_stride: tl.tensor,
    n: tl.tensor,
    valid: tl.tensor,
    SOME: tl.constexpr,  # of the rows; without it the program's number is its row
    RATIO: tl.constexpr,  # the exact reverse term: w_R
    TEACHER: tl.constexpr,  # the exact forward term: w_p
    TOKEN: tl.constexpr,
    KEPT: tl.constexpr,
    INSIDE: tl.constexpr,  # another kappa inside S
    CAREFUL: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    if SOME:
        row = tl.load(rows + row)
    student += row * student_stride
    out += row * out_stride
    numbers += row
    m_s = tl.load(numbers)
    kappa = tl.load(numbers + n)
    ratio = tl.load(numbers + 2 * n)
    m_t = tl.load(numbers + 3 * n)
    on_teacher = tl.load(numbers + 4 * n)
    kappa_inside = tl.load(numbers + 5 * n)
    at_token = tl.load(numbers + 6 * n)
    if TOKEN:
        token = tl.load(tokens + row)
    if KEPT:
        kept += row * kept_stride
        additions += row * kept_stride
        following = tl.load(kept)
    step: tl.constexpr = DEPTH * LANES
    whole = valid // step * step
    for masked in tl.static_range(2):
        for start in tl.range(whole * masked, whole + (valid - whole) * masked, step, num_stages=STAGES):
            columns = start + tl.arange(0, step)
            if masked:
                inside = columns < valid
                s = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32)
            else:
                s = tl.load(student + columns).to(tl.float32)
            d = s - m_s
            e_s = _exp(d)
            if RATIO or TEACHER:
                if masked:
                    t = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32)
                else:
                    t = tl.load(teacher + columns).to(tl.float32)
                d_t = t - m_t
            factor = tl.zeros_like(s) + kappa
            added = tl.zeros_like(s)
            if KEPT:
                while following < start + step:
                    added = tl.where(columns == following, tl.load(additions), added)
                    if INSIDE:
                        factor = tl.where(columns == following, kappa_inside, factor)
                    kept += 1
                    additions += 1
                    following = tl.load(kept)
            if RATIO:
                tilt = (d - d_t) * ratio
                if CAREFUL:
                    tilt = tl.where(ratio == 0, 0.0, tilt)
                factor += tilt
            if CAREFUL:
                factor = tl.where(e_s == 0, 0.0, factor)
            value = e_s * factor
            if TEACHER:
                value -= _exp(d_t) * on_teacher
            value += added
            if TOKEN:
                here = (token >= start) & (token < start + step)
                if here:
                    value += tl.where(columns == token, at_token, 0.0)
            value = value.to(out.dtype.element_ty)
            if masked:
                tl.store(out + columns, value, mask=inside)
            else:
                tl.store(out + columns, value)
