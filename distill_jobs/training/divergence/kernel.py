"""The Triton kernel between the matrix products: a row's losses and the gradient in its logits, one program a
row.

Three passes over the vocabulary, a block of tokens at a time: log-sum-exps, the divergence's sums, the
gradient. Nothing of the logits' size is made beside them, and no block waits for the one before it: every
lane keeps sums of its own, which meet once, at the end of a pass. The formulas are those of `formulas`.
Imports triton, so only `fused` imports it, and late. Knows nothing of tensors, launches or kinds of teachers.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e4)  # formulas.NEVER: triton reads no other globals
UNSEEN = tl.constexpr(-1e30)
"""The maximum of nothing: -inf less this is -inf, where -inf less -inf is NaN."""


@triton.jit
def _add(top, mass, x):  # type: ignore[no-untyped-def]
    """One more x in each lane's log-sum-exp, top + log(mass), for one exponential; -inf adds nothing."""
    gap = x - top
    shrink = tl.exp(-tl.abs(gap))
    return tl.maximum(top, x), tl.where(gap > 0, mass * shrink + 1, mass + shrink)


@triton.jit
def _log_sum(top, mass):  # type: ignore[no-untyped-def]
    """The log-sum-exp of all lanes."""
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(mass * tl.exp(top - highest), 0))


@triton.jit
def _load(student, columns, vocabulary):  # type: ignore[no-untyped-def]
    return tl.load(student + columns, mask=columns < vocabulary, other=float("-inf"))


@triton.jit
def _tempered(z, teacher, columns, common, sharpness):  # type: ignore[no-untyped-def]
    """Both sides' logits over T, -inf where either side cannot take a token."""
    t = tl.load(teacher + columns, mask=columns < common, other=float("-inf")).to(tl.float32)
    never = tl.minimum(z, t) == float("-inf")
    return tl.where(never, float("-inf"), t * sharpness), tl.where(never, float("-inf"), z * sharpness)


@triton.jit
def _log_masses(  # type: ignore[no-untyped-def]
    student, teacher, vocabulary, common, sharpness, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """First pass: log-sum-exps of the student's logits, and of both sides over T."""
    top = tl.full([BLOCK], UNSEEN, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    p_top, p_mass, q_top, q_mass = top, mass, top, mass
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(student, columns, vocabulary)
        top, mass = _add(top, mass, z)
        if KIND != "none":
            t, q = _tempered(z, teacher, columns, common, sharpness)
            p_top, p_mass = _add(p_top, p_mass, t)
            q_top, q_mass = _add(q_top, q_mass, q)
    log_z = _log_sum(top, mass)
    log_zp, log_zq = log_z, log_z
    if KIND != "none":
        log_zp, log_zq = _log_sum(p_top, p_mass), _log_sum(q_top, q_mass)
    return log_z, log_zp, log_zq


@triton.jit
def _terms(  # type: ignore[no-untyped-def]
    z, teacher, columns, common, sharpness, log_zp, log_zq, share, log_share, log_rest, KIND: tl.constexpr
):
    """Each token's part of the divergence, s = q * dL/dq, and q."""
    t, x = _tempered(z, teacher, columns, common, sharpness)
    log_p, log_q = tl.maximum(t - log_zp, NEVER), tl.maximum(x - log_zq, NEVER)
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == "forward_kl":
        term, slope = p * (log_p - log_q), -p
    elif KIND == "reverse_kl":
        slope = q * (log_q - log_p)
        term = slope
    elif KIND == "total_variation":
        term = tl.abs(q - p) / 2
        slope = tl.where(q > p, q, tl.where(q < p, -q, 0.0)) / 2
    else:
        ours, theirs = log_q + log_rest, log_p + log_share
        log_m = tl.maximum(ours, theirs) + tl.log(1 + tl.exp(-tl.abs(ours - theirs)))
        if KIND == "jsd":
            slope = (1 - share) * q * (log_q - log_m)
            term = share * p * (log_p - log_m) + slope
        elif KIND == "skew_kl":
            term = p * (log_p - log_m)
            slope = (share - 1) * tl.exp(log_p - log_m + log_q)
        else:
            ratio = log_q - log_m
            term = q * ratio
            slope = q * (ratio - share * tl.exp(ratio))
    return term, slope, q


@triton.jit
def row_kernel(  # type: ignore[no-untyped-def]
    student,  # (rows, V) fp32 logits
    teacher,  # (rows, V_teacher) logits
    labels,  # (rows,) integers
    row_weights,  # (rows,) fp32: what a row's gradient is multiplied with
    grad,  # (rows, V): where the gradient goes; may be `student`
    losses,  # (rows, 2) fp32: divergence, cross entropy
    student_stride,
    teacher_stride,
    grad_stride,
    vocabulary,
    common,  # tokens that both sides have
    sharpness,  # 1 / T
    share,  # beta or alpha
    log_share,  # logarithms of the teacher's and of the student's share in the mixture
    log_rest,
    value_scale,  # what the divergence is multiplied with
    slope_scale,  # kd * value_scale / T
    hard,
    KIND: tl.constexpr,  # a divergence, its ends resolved, or "none" for the labels alone
    BLOCK: tl.constexpr,
):
    """A row is read again in every pass: it is longer than what a program may keep."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    grad += row * grad_stride
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < vocabulary)
    # before the gradient takes its place
    at_label = tl.load(student + label, mask=inside, other=float("nan"))
    log_z, log_zp, log_zq = _log_masses(student, teacher, vocabulary, common, sharpness, KIND, BLOCK)

    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    if KIND != "none":
        for start in range(0, common, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _load(student, columns, vocabulary)
            term, slope, _ = _terms(
                z, teacher, columns, common, sharpness, log_zp, log_zq, share, log_share, log_rest, KIND
            )
            values += term
            slopes += slope
    tl.store(losses + 2 * row, value_scale * tl.sum(values, 0))
    tl.store(losses + 2 * row + 1, log_z - at_label)

    scale, lost = tl.load(row_weights + row), slope_scale * tl.sum(slopes, 0)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(student, columns, vocabulary)
        push = hard * (tl.exp(z - log_z) - tl.where(columns == label, 1.0, 0.0))
        if KIND != "none":
            _, slope, q = _terms(
                z, teacher, columns, common, sharpness, log_zp, log_zq, share, log_share, log_rest, KIND
            )
            push += slope_scale * slope - q * lost
        tl.store(grad + columns, scale * push, mask=columns < vocabulary)
