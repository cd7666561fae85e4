"""The GPU loops of a TopK-SAE's training step, written in Triton: decoding, gradients, Adam. Importing this needs triton.

One program of a grid holds whole rows of D entries in registers, padded to BLOCK_D, a power of two: nothing that one
thread stores is read by another, so no barrier is needed. Every sum runs in an order that the inputs fix, without
atomics: equal inputs give equal bits.

Shapes: B batch rows, D d_model, N features, K top-k, A pairs (B * K), C whole chunks of sorted pairs, P partial sums. A
pair is a place in [B, K] laid out flat; order_A holds the pairs sorted by feature, those without a value last, and
feature i has order_A[offsets_N1[i]] .. order_A[offsets_N1[i + 1]].
"""

# Outside of a program the decorated functions raise, so `jit` types their results as NoReturn.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

# With TRITON_INTERPRET=1 at the first import of triton, `jit` gives functions that numpy runs on the CPU.
INTERPRETED = not isinstance(tl.sum, triton.runtime.JITFunction)


@triton.jit
def decode_and_differentiate(
    values_BK, indices_BK, W_dec_ND, centred_BD, scale, residual_BD, dvalues_BK, squares_B,
    d, K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """residual = scale (W_dec^T z + b_dec - u), dvalues = <residual, W_dec[i]> where the value is positive, else 0.

    squares_B: ||u_hat - u||^2. One program a batch row.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    residual_D = -tl.load(centred_BD + row * d + columns, mask=inside, other=0.0)
    for k in range(K):
        value = tl.load(values_BK + row * K + k)
        feature = tl.load(indices_BK + row * K + k)
        residual_D += value * tl.load(W_dec_ND + feature * d + columns, mask=inside, other=0.0)
    tl.store(squares_B + row, tl.sum(residual_D * residual_D, axis=0))
    residual_D = residual_D * scale
    tl.store(residual_BD + row * d + columns, residual_D, mask=inside)
    for k in range(K):
        value = tl.load(values_BK + row * K + k)
        feature = tl.load(indices_BK + row * K + k)
        inner = tl.sum(residual_D * tl.load(W_dec_ND + feature * d + columns, mask=inside, other=0.0), axis=0)
        tl.store(dvalues_BK + row * K + k, tl.where(value != 0.0, inner, 0.0))


@triton.jit
def bias_gradients(
    order_A, offsets_N1, dvalues_A, W_enc_ND, bias_N, through_PD, n, d,
    FEATURES: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """bias = sum dvalue over a feature's pairs; through_PD: sums of bias W_enc over blocks of FEATURES features.

    One program a block; PAIRS pairs are read at a time and summed in float64.
    """
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    lanes = tl.arange(0, PAIRS)
    through_D = tl.zeros([BLOCK_D], tl.float32)
    for feature in range(block * FEATURES, tl.minimum(block * FEATURES + FEATURES, n)):
        low = tl.load(offsets_N1 + feature)
        high = tl.load(offsets_N1 + feature + 1)
        sums = tl.zeros([PAIRS], tl.float64)
        for start in range(low, high, PAIRS):
            within = start + lanes < high
            pairs = tl.load(order_A + start + lanes, mask=within, other=0)
            sums += tl.load(dvalues_A + pairs, mask=within, other=0.0).to(tl.float64)
        bias = tl.sum(sums, axis=0).to(tl.float32)
        tl.store(bias_N + feature, bias)
        through_D += bias * tl.load(W_enc_ND + feature * d + columns, mask=inside, other=0.0)
    tl.store(through_PD + block * d + columns, through_D, mask=inside)


@triton.jit
def _add_pairs(
    enc_D, dec_D, low, high, order_A, values_A, dvalues_A, centred_BD, residual_BD,
    d, columns, inside, K: tl.constexpr, DECODER: tl.constexpr,
):  # fmt: skip
    """enc + sum dvalue centred[row], dec + sum value residual[row] over order_A[low .. high], one pair after the other."""
    for place in range(low, high):
        pair = tl.load(order_A + place)
        offsets = (pair // K) * d + columns
        enc_D += tl.load(dvalues_A + pair) * tl.load(centred_BD + offsets, mask=inside, other=0.0)
        if DECODER:
            dec_D += tl.load(values_A + pair) * tl.load(residual_BD + offsets, mask=inside, other=0.0)
    return enc_D, dec_D


@triton.jit
def sum_whole_chunks(
    feature_A, order_A, values_A, dvalues_A, centred_BD, residual_BD, enc_CD, dec_CD,
    n, d, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, DECODER: tl.constexpr,
):  # fmt: skip
    """Gradients of every run of CHUNK sorted pairs that lies within one feature; other rows of enc_CD and dec_CD stay.

    A feature that is active in most rows would keep one program busy long after the others. One program a chunk.
    """
    chunk = tl.program_id(0).to(tl.int64)
    low = chunk * CHUNK
    feature = tl.load(feature_A + low)
    # feature_A is sorted: equal ends mean equal features. Those without a value stand under feature n.
    if (feature < n) & (feature == tl.load(feature_A + low + CHUNK - 1)):
        columns = tl.arange(0, BLOCK_D)
        inside = columns < d
        enc_D = tl.zeros([BLOCK_D], tl.float32)
        dec_D = tl.zeros([BLOCK_D], tl.float32)
        enc_D, dec_D = _add_pairs(
            enc_D, dec_D, low, low + CHUNK, order_A, values_A, dvalues_A, centred_BD, residual_BD, d, columns, inside, K, DECODER
        )
        tl.store(enc_CD + chunk * d + columns, enc_D, mask=inside)
        if DECODER:
            tl.store(dec_CD + chunk * d + columns, dec_D, mask=inside)


@triton.jit
def _row_gradients(
    feature, offsets_N1, order_A, values_A, dvalues_A, centred_BD, residual_BD, enc_CD,
    dec_CD, d, columns, inside, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    DECODER: tl.constexpr,
):  # fmt: skip
    """Gradients of one feature's rows: the pairs before its first whole chunk, the whole chunks, the pairs after them."""
    low = tl.load(offsets_N1 + feature)
    high = tl.load(offsets_N1 + feature + 1)
    first = (low + CHUNK - 1) // CHUNK
    last = high // CHUNK
    head_end = tl.minimum(first * CHUNK, high)
    tail_start = tl.maximum(last * CHUNK, head_end)
    enc_D = tl.zeros([BLOCK_D], tl.float32)
    dec_D = tl.zeros([BLOCK_D], tl.float32)
    enc_D, dec_D = _add_pairs(
        enc_D, dec_D, low, head_end, order_A, values_A, dvalues_A, centred_BD, residual_BD, d, columns, inside, K, DECODER
    )
    for chunk in range(first, last):
        enc_D += tl.load(enc_CD + chunk * d + columns, mask=inside, other=0.0)
        if DECODER:
            dec_D += tl.load(dec_CD + chunk * d + columns, mask=inside, other=0.0)
    enc_D, dec_D = _add_pairs(
        enc_D, dec_D, tail_start, high, order_A, values_A, dvalues_A, centred_BD, residual_BD, d, columns, inside, K, DECODER
    )
    return enc_D, dec_D


@triton.jit
def write_gradients(
    offsets_N1, order_A, values_A, dvalues_A, centred_BD, residual_BD, enc_CD, dec_CD,
    enc_ND, dec_ND, d, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, DECODER: tl.constexpr,
):  # fmt: skip
    """Gradients of W_enc and W_dec, written out. One program a feature."""
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    enc_D, dec_D = _row_gradients(
        feature, offsets_N1, order_A, values_A, dvalues_A, centred_BD, residual_BD, enc_CD, dec_CD, d, columns, inside, K, CHUNK,
        BLOCK_D, DECODER,
    )  # fmt: skip
    tl.store(enc_ND + feature * d + columns, enc_D, mask=inside)
    if DECODER:
        tl.store(dec_ND + feature * d + columns, dec_D, mask=inside)


@triton.jit
def _adam(
    parameter_ND, gradient_D, first_ND, second_ND, offsets, inside, keep, decay, fresh,
    size, root, eps,
):  # fmt: skip
    """`loops.adam_row`: stores the moments and returns the new row, which the caller stores."""
    first_D = tl.load(first_ND + offsets, mask=inside, other=0.0)
    second_D = tl.load(second_ND + offsets, mask=inside, other=0.0)
    first_D = first_D + (gradient_D - first_D) * keep
    second_D = decay * second_D + fresh * gradient_D * gradient_D
    tl.store(first_ND + offsets, first_D, mask=inside)
    tl.store(second_ND + offsets, second_D, mask=inside)
    # Rounded root and quotient: Triton's plain ones are approximations, and this loop waits for memory anyway.
    step_D = tl.div_rn(size * first_D, tl.sqrt_rn(second_D) * root + eps)
    return tl.load(parameter_ND + offsets, mask=inside, other=0.0) - step_D


@triton.jit
def update_features(
    offsets_N1, order_A, values_A, dvalues_A, centred_BD, residual_BD, enc_CD, dec_CD,
    W_enc_ND, enc_first, enc_second, W_dec_ND, dec_first, dec_second, keep, decay,
    fresh, size, root, eps, d, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    DECODER: tl.constexpr,
):  # fmt: skip
    """Gradients, Adam and the unit norm of decoder rows, in place; gradients are never written out. One program a feature.

    keep .. eps is `adam.Adam.rule`. Without DECODER, W_dec and what stands for its moments are not looked at.
    """
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    offsets = feature * d + columns
    enc_D, dec_D = _row_gradients(
        feature, offsets_N1, order_A, values_A, dvalues_A, centred_BD, residual_BD, enc_CD, dec_CD, d, columns, inside, K, CHUNK,
        BLOCK_D, DECODER,
    )  # fmt: skip
    row_D = _adam(W_enc_ND, enc_D, enc_first, enc_second, offsets, inside, keep, decay, fresh, size, root, eps)
    tl.store(W_enc_ND + offsets, row_D, mask=inside)
    if DECODER:
        row_D = _adam(W_dec_ND, dec_D, dec_first, dec_second, offsets, inside, keep, decay, fresh, size, root, eps)
        row_D = tl.where(inside, row_D, 0.0)  # eps = 0 leaves 0 / 0 in the padding
        norm = tl.sqrt_rn(tl.sum(row_D * row_D, axis=0))
        tl.store(W_dec_ND + offsets, tl.div_rn(row_D, norm), mask=inside)
