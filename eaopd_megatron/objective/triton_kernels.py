"""The objective's two passes over a rank's logits in Triton; `triton_launch` starts them.

Forward: one program per token reads s and t once. It keeps the running maxima m and, lane by lane, the sums of
`vocab_parallel` under them. Where a maximum grows by -delta, the sums are rescaled as in the merge between ranks:

    alpha = e^delta      Z = alpha Z      A = alpha (A + delta Z)      G = alpha (G + (delta_s - delta_t) Z)

Backward: one program per token reads s (and t) again and writes q_j (kappa + w_R D_j) - w_p p_j plus the addends at the
top-k ids and the sampled token, in fp32 until the store; the gradient may overwrite s. Row offsets are 64-bit.
A program processes DEPTH runs of LANES columns per step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = bool(triton.knobs.runtime.interpret)
NATIVE = tl.constexpr(not INTERPRETED)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # initial maximum


@triton.jit(do_not_specialize=["n"])
def sums_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    student_sums: tl.tensor,  # [3, n]: m, Z, A
    teacher_sums: tl.tensor,
    gap_sums: tl.tensor,  # [2, n]: G_s, G_t
    student_tail: tl.tensor,  # [n]
    teacher_tail: tl.tensor,
    excluded: tl.tensor,  # [n, excluded_stride] int32, ascending, END_OF_COLUMNS last
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    excluded_stride: tl.tensor,
    n: tl.tensor,
    num_valid: tl.tensor,
    HAS_TEACHER: tl.constexpr,  # also Z_t, A_t, G_s, G_t
    HAS_TAIL: tl.constexpr,  # also Z without the excluded columns
    HAS_NEG_INF: tl.constexpr,  # logits hold -inf, so 0 * inf = 0
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
    a_s, g_s, tail_s, z_t, a_t, g_t, tail_t = z_s, z_s, z_s, z_s, z_s, z_s, z_s
    if HAS_TAIL:
        excluded += row * excluded_stride
        next_column = tl.load(excluded)
    full_end = num_valid // step * step
    for masked in tl.static_range(2):  # full steps first: loads without a mask are widest
        for start in tl.range(full_end * masked, full_end + (num_valid - full_end) * masked, step, num_stages=STAGES):
            columns = start + offsets
            if masked:
                in_bounds = columns < num_valid
                s = tl.load(student + columns, mask=in_bounds, other=-float("inf")).to(tl.float32)
            else:
                s = tl.load(student + columns).to(tl.float32)
            new_max = tl.maximum(m_s, tl.max(tl.max(s, 0), 0))
            delta_s = m_s - new_max
            m_s = new_max
            max_grew = delta_s < 0
            if HAS_TEACHER:
                if masked:
                    t = tl.load(teacher + columns, mask=in_bounds, other=-float("inf")).to(tl.float32)
                else:
                    t = tl.load(teacher + columns).to(tl.float32)
                new_max = tl.maximum(m_t, tl.max(tl.max(t, 0), 0))
                delta_t = m_t - new_max
                m_t = new_max
                max_grew = max_grew | (delta_t < 0)
            if max_grew:  # rare after the first steps
                alpha = _exp(delta_s)
                a_s = tl.where(alpha == 0, 0.0, alpha * (a_s + delta_s * z_s))
                if HAS_TEACHER:
                    shift = delta_s - delta_t
                    g_s = tl.where(alpha == 0, 0.0, alpha * (g_s + shift * z_s))
                z_s *= alpha
                if HAS_TAIL:
                    tail_s *= alpha
                if HAS_TEACHER:
                    alpha = _exp(delta_t)
                    a_t = tl.where(alpha == 0, 0.0, alpha * (a_t + delta_t * z_t))
                    g_t = tl.where(alpha == 0, 0.0, alpha * (g_t + shift * z_t))
                    z_t *= alpha
                    if HAS_TAIL:
                        tail_t *= alpha
            d_s = s - m_s
            e_s = _exp(d_s)
            if masked:
                d_s = tl.where(in_bounds, d_s, 0.0)  # e is 0 there, and 0 * 0 = 0
            z_s += tl.sum(e_s, 0)
            a_s += tl.sum(_times(e_s, d_s, HAS_NEG_INF), 0)
            if HAS_TEACHER:
                d_t = t - m_t
                e_t = _exp(d_t)
                if masked:
                    d_t = tl.where(in_bounds, d_t, 0.0)
                z_t += tl.sum(e_t, 0)
                a_t += tl.sum(_times(e_t, d_t, HAS_NEG_INF), 0)
                gap = d_s - d_t
                g_s += tl.sum(_times(e_s, gap, HAS_NEG_INF), 0)
                g_t += tl.sum(_times(e_t, gap, HAS_NEG_INF), 0)
            if HAS_TAIL:
                while next_column < start + step:
                    e_s = tl.where(columns == next_column, 0.0, e_s)
                    if HAS_TEACHER:
                        e_t = tl.where(columns == next_column, 0.0, e_t)
                    excluded += 1
                    next_column = tl.load(excluded)
                tail_s += tl.sum(e_s, 0)
                if HAS_TEACHER:
                    tail_t += tl.sum(e_t, 0)
    _store_sums(student_sums + row, n, m_s, z_s, a_s)
    if HAS_TAIL:
        tl.store(student_tail + row, tl.sum(tail_s, 0))
    if HAS_TEACHER:
        _store_sums(teacher_sums + row, n, m_t, z_t, a_t)
        tl.store(gap_sums + row, tl.sum(g_s, 0))
        tl.store(gap_sums + n + row, tl.sum(g_t, 0))
        if HAS_TAIL:
            tl.store(teacher_tail + row, tl.sum(tail_t, 0))


@triton.jit
def _exp(value: tl.tensor) -> tl.tensor:
    if NATIVE:  # flushes results below 1e-38 to 0: a quarter fewer instructions
        return libdevice.fast_expf(value)
    else:
        return tl.exp(value)


@triton.jit
def _times(weight: tl.tensor, value: tl.tensor, HAS_NEG_INF: tl.constexpr) -> tl.tensor:
    product = weight * value
    if HAS_NEG_INF:
        product = tl.where(weight == 0, 0.0, product)
    return product


@triton.jit
def _store_sums(sums: tl.tensor, n: tl.tensor, m: tl.tensor, z: tl.tensor, a: tl.tensor) -> None:
    tl.store(sums, m)
    tl.store(sums + n, tl.sum(z, 0))
    tl.store(sums + 2 * n, tl.sum(a, 0))


@triton.jit(do_not_specialize=["n"])
def gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    out: tl.tensor,
    factors: tl.tensor,  # [7, n]: m_s, kappa, w_R, m_t, w_p, kappa inside S, addend at the token
    rows: tl.tensor,  # [programs] int64: each program's row, of all but the teacher's logits
    tokens: tl.tensor,  # [n] int32 columns
    top_k_columns: tl.tensor,  # [n, top_k_stride] int32, ascending, END_OF_COLUMNS last
    addends: tl.tensor,  # [n, top_k_stride], added at those columns
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    out_stride: tl.tensor,
    top_k_stride: tl.tensor,
    n: tl.tensor,
    num_valid: tl.tensor,
    HAS_ROWS: tl.constexpr,  # else the program id is the row
    HAS_REVERSE: tl.constexpr,  # the exact reverse term: w_R
    HAS_FORWARD: tl.constexpr,  # the exact forward term: w_p
    HAS_TOKEN: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_K_KAPPA: tl.constexpr,  # another kappa inside S
    HAS_NEG_INF: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    if HAS_ROWS:
        row = tl.load(rows + row)
    student += row * student_stride
    out += row * out_stride
    factors += row
    m_s = tl.load(factors)
    kappa = tl.load(factors + n)
    reverse = tl.load(factors + 2 * n)
    m_t = tl.load(factors + 3 * n)
    forward = tl.load(factors + 4 * n)
    top_k_kappa = tl.load(factors + 5 * n)
    token_addend = tl.load(factors + 6 * n)
    if HAS_TOKEN:
        token = tl.load(tokens + row)
    if HAS_TOP_K:
        top_k_columns += row * top_k_stride
        addends += row * top_k_stride
        next_column = tl.load(top_k_columns)
    step: tl.constexpr = DEPTH * LANES
    full_end = num_valid // step * step
    for masked in tl.static_range(2):
        for start in tl.range(full_end * masked, full_end + (num_valid - full_end) * masked, step, num_stages=STAGES):
            columns = start + tl.arange(0, step)
            if masked:
                in_bounds = columns < num_valid
                s = tl.load(student + columns, mask=in_bounds, other=0.0).to(tl.float32)
            else:
                s = tl.load(student + columns).to(tl.float32)
            d = s - m_s
            e_s = _exp(d)
            if HAS_REVERSE or HAS_FORWARD:
                if masked:
                    t = tl.load(teacher + columns, mask=in_bounds, other=0.0).to(tl.float32)
                else:
                    t = tl.load(teacher + columns).to(tl.float32)
                d_t = t - m_t
            factor = tl.zeros_like(s) + kappa
            addend = tl.zeros_like(s)
            if HAS_TOP_K:
                while next_column < start + step:
                    addend = tl.where(columns == next_column, tl.load(addends), addend)
                    if HAS_TOP_K_KAPPA:
                        factor = tl.where(columns == next_column, top_k_kappa, factor)
                    top_k_columns += 1
                    addends += 1
                    next_column = tl.load(top_k_columns)
            if HAS_REVERSE:
                reverse_factor = (d - d_t) * reverse
                if HAS_NEG_INF:
                    reverse_factor = tl.where(reverse == 0, 0.0, reverse_factor)
                factor += reverse_factor
            if HAS_NEG_INF:
                factor = tl.where(e_s == 0, 0.0, factor)
            value = e_s * factor
            if HAS_FORWARD:
                value -= _exp(d_t) * forward
            value += addend
            if HAS_TOKEN:
                in_step = (token >= start) & (token < start + step)
                if in_step:
                    value += tl.where(columns == token, token_addend, 0.0)
            value = value.to(out.dtype.element_ty)
            if masked:
                tl.store(out + columns, value, mask=in_bounds)
            else:
                tl.store(out + columns, value)
