"""The inner loops of a TopK-SAE on a CPU, compiled by numba: selection, sparse decoding, gradients, Adam.

Numba needs no compiler on the user's machine and keeps what it compiled beside this file or in the user's cache. Every
loop releases the interpreter's lock and works on a range of rows or features, so `split` can spread it over threads;
the ranges that floating-point sums run over are fixed, so the number of threads changes no bit.

Shapes: B batch rows, C columns (features) of one block, D d_model, N features, K top-k, A active (row, feature) pairs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

# Sums may be regrouped and multiply-adds fused, which vector code needs; NaN and Inf keep their meaning.
FAST = {"contract", "reassoc"}
ROW_BLOCK = 64  # rows whose gradients are summed together before they enter a float64 sum
FEATURE_BLOCK = 256  # features of one partial sum of grad b_enc W_enc
PAIR_BLOCK = 128  # pairs of one feature summed in float32 before they are added to the others


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package nor the user's cache folder can be written: compile in every process
        return njit(**options)(function)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="glottoscope-loops")


if hasattr(os, "register_at_fork"):  # a forked process has the pool's record, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def split(loop: Callable[..., None], total: int, grain: int, *arguments: Any) -> None:
    """Call loop(start, end, *arguments) over 0..total, on as many threads as torch uses, cut at multiples of `grain`."""
    threads = torch.get_num_threads()
    grains = -(-total // grain)
    parts = min(threads, grains)
    if parts <= 1:
        loop(0, total, *arguments)
        return
    edges = [min(total, grain * (grains * p // parts)) for p in range(parts + 1)]
    *others, (low, high) = pairwise(edges)
    waiting = [_pool(threads).submit(loop, *edge, *arguments) for edge in others]
    loop(low, high, *arguments)  # this thread does its share
    for future in waiting:
        future.result()


@_compiled
def unit_rows(start: int, end: int, x_BD: Array, u_BD: Array, bad_B: Array) -> None:
    """u = x / ||x|| (0 where x is 0); bad_B = 1 in rows with NaN or Inf, whose u means nothing."""
    width = x_BD.shape[1]
    kind = x_BD.dtype.type
    for b in range(start, end):
        total = 0.0
        for j in range(width):
            value = np.float64(x_BD[b, j])
            total += value * value
        bad_B[b] = 0
        if total > 1e-60 and total < 1e60:
            scale = kind(1.0 / np.sqrt(total))
            for j in range(width):
                u_BD[b, j] = x_BD[b, j] * scale
            continue
        # All zeros, NaN or Inf, or squares beyond the numbers' range: scale by the largest entry first.
        largest = 0.0
        for j in range(width):
            value = abs(np.float64(x_BD[b, j]))
            if not value < np.inf:
                bad_B[b] = 1
            largest = max(largest, value)
        if bad_B[b] == 1 or largest == 0.0:
            for j in range(width):
                u_BD[b, j] = x_BD[b, j]
            continue
        total = 0.0
        for j in range(width):
            value = np.float64(x_BD[b, j]) / largest
            total += value * value
        for j in range(width):
            u_BD[b, j] = np.float64(x_BD[b, j]) / largest / np.sqrt(total)


@_compiled
def _first_bound(row_C: Array, bias_C: Array, folded: Array, k: int) -> Any:
    """A lower bound on the k-th largest of a row: the least of at least k maxima of disjoint groups of its columns.

    Halving folds the row onto itself, so a group's maximum is a vector maximum; an odd column left over belongs to no
    group, which only lowers the bound.
    """
    half = len(row_C) // 2
    for j in range(half):
        low, high = row_C[j] + bias_C[j], row_C[half + j] + bias_C[half + j]
        folded[j] = low if low > high else high
    while half >= 2 * max(k, 16):  # shorter halves are no vectors
        half //= 2
        for j in range(half):
            low, high = folded[j], folded[half + j]
            folded[j] = low if low > high else high
    strands = min(half, k)
    for j in range(strands, half // strands * strands):
        value = folded[j]
        strand = j % strands
        folded[strand] = value if value > folded[strand] else folded[strand]
    least = folded[0]
    for j in range(1, strands):
        least = folded[j] if folded[j] < least else least
    return least


@_compiled
def select(
    start: int, end: int, pre_BC: Array, bias_C: Array, first: int, values_BK: Array, indices_BK: Array, nan_B: Array
) -> None:
    """Take the columns of a block into each row's K best, kept in falling order; equal values keep the smaller index.

    A pass of vector comparisons marks, a byte each, the columns above the row's K-th best so far; eight marks are then
    looked at together, and almost all are empty. `first` is the feature of column 0. nan_B is set where a NaN was met.
    """
    width, k = pre_BC.shape[1], values_BK.shape[1]
    marks = np.zeros((width + 7) // 8 * 8, np.uint8)
    words = marks.view(np.uint64)
    folded = np.empty(width // 2 + 1, pre_BC.dtype)
    zero = np.uint64(0)
    for b in range(start, end):
        row_C, best_K, best_index_K = pre_BC[b], values_BK[b], indices_BK[b]
        bound = best_K[k - 1]
        if bound == -np.inf and width >= 2 * k:
            bound = _first_bound(row_C, bias_C, folded, k)
            for j in range(width):
                marks[j] = not (row_C[j] + bias_C[j] < bound)
        else:
            for j in range(width):
                marks[j] = not (row_C[j] + bias_C[j] <= bound)
        for q in range(len(words)):
            word = words[q]
            while word != zero:
                lowest = word & (~word + np.uint64(1))
                word ^= lowest
                byte = 0
                if lowest > np.uint64(0xFFFFFFFF):
                    byte += 4
                    lowest >>= np.uint64(32)
                if lowest > np.uint64(0xFFFF):
                    byte += 2
                    lowest >>= np.uint64(16)
                if lowest > np.uint64(0xFF):
                    byte += 1
                j = 8 * q + byte
                value = row_C[j] + bias_C[j]
                if value > best_K[k - 1]:
                    place = k - 1
                    while place > 0 and best_K[place - 1] < value:
                        best_K[place] = best_K[place - 1]
                        best_index_K[place] = best_index_K[place - 1]
                        place -= 1
                    best_K[place] = value
                    best_index_K[place] = first + j
                elif value != value:
                    nan_B[b] = 1


@_compiled
def rescore(
    start: int, end: int, centred_BD: Array, W_enc_ND: Array, b_enc_N: Array, candidates_BC: Array, values_BC: Array
) -> None:
    """Preactivations of a few candidate features of every row."""
    width = centred_BD.shape[1]
    for b in range(start, end):
        centred_D = centred_BD[b]
        for c in range(candidates_BC.shape[1]):
            row_D = W_enc_ND[candidates_BC[b, c]]
            inner = centred_D.dtype.type(0)
            for j in range(width):
                inner += centred_D[j] * row_D[j]
            values_BC[b, c] = inner + b_enc_N[candidates_BC[b, c]]


@_compiled
def decode_and_differentiate(
    start: int, end: int, values_BK: Array, indices_BK: Array, W_dec_ND: Array, centred_BD: Array, scale: Any,
    residual_BD: Array, dvalues_BK: Array, squares_B: Array, sums_PD: Array,
) -> None:  # fmt: skip
    """residual = scale (W_dec^T z + b_dec - u), dvalues = <residual, W_dec[i]> where the value is positive, else 0.

    `start` is a multiple of ROW_BLOCK. squares_B: ||u_hat - u||^2; sums_PD [B / ROW_BLOCK, D]: residuals summed by block.
    """
    k_max, width = values_BK.shape[1], W_dec_ND.shape[1]
    for b in range(start, end):
        residual_D, centred_D, sum_D = residual_BD[b], centred_BD[b], sums_PD[b // ROW_BLOCK]
        for j in range(width):
            residual_D[j] = -centred_D[j]
        for k in range(k_max):
            value = values_BK[b, k]
            if value != 0:  # NaN passes: the loss must show it
                row_D = W_dec_ND[indices_BK[b, k]]
                for j in range(width):
                    residual_D[j] += value * row_D[j]
        square = residual_D.dtype.type(0)
        for j in range(width):
            square += residual_D[j] * residual_D[j]
        squares_B[b] = square
        first = b % ROW_BLOCK == 0
        for j in range(width):
            residual_D[j] *= scale
            sum_D[j] = residual_D[j] if first else sum_D[j] + residual_D[j]
        for k in range(k_max):
            inner = residual_D.dtype.type(0)
            if values_BK[b, k] != 0:
                row_D = W_dec_ND[indices_BK[b, k]]
                for j in range(width):
                    inner += residual_D[j] * row_D[j]
            dvalues_BK[b, k] = inner


@_compiled
def sort_pairs(
    values_BK: Array, indices_BK: Array, dvalues_BK: Array, offsets_N1: Array, cursor_N: Array, row_A: Array, value_A: Array,
    dvalue_A: Array,
) -> None:  # fmt: skip
    """Active pairs by feature, then row: feature i has offsets_N1[i] .. offsets_N1[i + 1]. A counting sort."""
    rows, k_max = values_BK.shape
    offsets_N1[:] = 0
    for b in range(rows):
        for k in range(k_max):
            if values_BK[b, k] != 0:
                offsets_N1[indices_BK[b, k] + 1] += 1
    for i in range(len(cursor_N)):
        cursor_N[i] = offsets_N1[i]
        offsets_N1[i + 1] += offsets_N1[i]
    for b in range(rows):
        for k in range(k_max):
            if values_BK[b, k] != 0:
                feature = indices_BK[b, k]
                place = cursor_N[feature]
                cursor_N[feature] = place + 1
                row_A[place] = b
                value_A[place] = values_BK[b, k]
                dvalue_A[place] = dvalues_BK[b, k]


@_compiled
def _sum_pairs(
    low: int, high: int, row_A: Array, value_A: Array, dvalue_A: Array, centred_BD: Array, residual_BD: Array, enc_D: Array,
    dec_D: Array,
) -> None:  # fmt: skip
    """enc = sum dvalue centred[row], dec = sum value residual[row] over the pairs low .. high."""
    width = len(enc_D)
    for j in range(width):
        enc_D[j] = 0
        dec_D[j] = 0
    for pair in range(low, high):
        value, dvalue = value_A[pair], dvalue_A[pair]
        centred_D, residual_D = centred_BD[row_A[pair]], residual_BD[row_A[pair]]
        for j in range(width):
            enc_D[j] += dvalue * centred_D[j]
            dec_D[j] += value * residual_D[j]


@_compiled
def _row_gradients(
    low: int, high: int, row_A: Array, value_A: Array, dvalue_A: Array, centred_BD: Array, residual_BD: Array, enc_D: Array,
    dec_D: Array, part_enc_D: Array, part_dec_D: Array,
) -> float:  # fmt: skip
    """Gradients of one feature's rows into enc_D and dec_D; returns that of its bias. Long lists are summed in blocks."""
    _sum_pairs(low, min(high, low + PAIR_BLOCK), row_A, value_A, dvalue_A, centred_BD, residual_BD, enc_D, dec_D)
    for block in range(low + PAIR_BLOCK, high, PAIR_BLOCK):
        end = min(high, block + PAIR_BLOCK)
        _sum_pairs(block, end, row_A, value_A, dvalue_A, centred_BD, residual_BD, part_enc_D, part_dec_D)
        for j in range(len(enc_D)):
            enc_D[j] += part_enc_D[j]
            dec_D[j] += part_dec_D[j]
    bias = 0.0
    for pair in range(low, high):
        bias += dvalue_A[pair]
    return bias


@_compiled
def write_gradients(
    start: int, end: int, offsets_N1: Array, row_A: Array, value_A: Array, dvalue_A: Array, centred_BD: Array, residual_BD: Array,
    W_enc_ND: Array, enc_ND: Array, bias_N: Array, dec_ND: Array, through_PD: Array,
) -> None:  # fmt: skip
    """Gradients of features start .. end, written out; through_PD sums grad b_enc W_enc over blocks of FEATURE_BLOCK."""
    part_enc_D, part_dec_D = np.empty_like(enc_ND[0]), np.empty_like(enc_ND[0])
    for i in range(start, end):
        through_D = through_PD[i // FEATURE_BLOCK]
        if i % FEATURE_BLOCK == 0:
            through_D[:] = 0
        bias = _row_gradients(
            offsets_N1[i], offsets_N1[i + 1], row_A, value_A, dvalue_A, centred_BD, residual_BD, enc_ND[i], dec_ND[i], part_enc_D,
            part_dec_D,
        )  # fmt: skip
        bias_N[i] = bias
        for j in range(len(through_D)):
            through_D[j] += bias_N[i] * W_enc_ND[i, j]


@_compiled
def adam_row(parameter: Array, gradient: Array, first: Array, second: Array, rule: Array) -> None:
    """One Adam update in place; `rule` is what `adam.Adam.rule` holds."""
    keep, decay, fresh, size, root, eps = rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]
    for j in range(len(parameter)):
        g = gradient[j]
        m = first[j] + (g - first[j]) * keep
        v = decay * second[j] + fresh * g * g
        first[j] = m
        second[j] = v
        parameter[j] -= size * m / (np.sqrt(v) * root + eps)


@_compiled
def update_features(
    start: int, end: int, offsets_N1: Array, row_A: Array, value_A: Array, dvalue_A: Array, centred_BD: Array, residual_BD: Array,
    W_enc_ND: Array, b_enc_N: Array, W_dec_ND: Array, enc_first: Array, enc_second: Array, bias_first: Array, bias_second: Array,
    dec_first: Array, dec_second: Array, rule: Array, learn_decoder: bool, through_PD: Array,
) -> None:  # fmt: skip
    """Gradients, Adam and the unit norm of decoder rows for features start .. end, one row at a time in the cache.

    The gradients are never written out: parameters and moments are read and written once. through_PD as in
    `write_gradients`, with W_enc before the update.
    """
    width = W_enc_ND.shape[1]
    kind = W_enc_ND.dtype.type
    enc_D, dec_D = np.empty_like(W_enc_ND[0]), np.empty_like(W_enc_ND[0])
    part_enc_D, part_dec_D = np.empty_like(enc_D), np.empty_like(enc_D)
    bias_1 = np.empty_like(b_enc_N[:1])
    for i in range(start, end):
        through_D = through_PD[i // FEATURE_BLOCK]
        if i % FEATURE_BLOCK == 0:
            through_D[:] = 0
        low, high = offsets_N1[i], offsets_N1[i + 1]
        bias = kind(
            _row_gradients(low, high, row_A, value_A, dvalue_A, centred_BD, residual_BD, enc_D, dec_D, part_enc_D, part_dec_D)
        )
        row_D = W_enc_ND[i]
        if high > low:
            for j in range(width):
                through_D[j] += bias * row_D[j]
        adam_row(row_D, enc_D, enc_first[i], enc_second[i], rule)
        bias_1[0] = bias
        adam_row(b_enc_N[i : i + 1], bias_1, bias_first[i : i + 1], bias_second[i : i + 1], rule)
        if learn_decoder:
            row_D = W_dec_ND[i]
            adam_row(row_D, dec_D, dec_first[i], dec_second[i], rule)
            square = kind(0)
            for j in range(width):
                square += row_D[j] * row_D[j]
            scale = kind(1) / np.sqrt(square)
            for j in range(width):
                row_D[j] *= scale
