"""From centred states to the K best features of every row: one dense product in bounded pieces, and an exact TopK.

Shape suffixes: B batch rows, R rows of one piece, C columns (features) of one piece, D d_model, N features, K top-k,
P preactivation columns (N padded).

ReLU after TopK is TopK after ReLU, so ReLU touches K values a row. Two selectors give the same result:

- `CompiledSelector` (CPU): pieces of all rows x some features. W_enc is read once, a piece stays in the cache, and a
  compiled loop keeps each row's K best so far.
- `TorchSelector` (any device): pieces of some rows x all features, TopK in two stages of plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from glottoscope.sae.scratch import Scratch

if TYPE_CHECKING:
    from glottoscope.sae.model import TopKSAE

Preselection = Literal["none", "bf16"]
Product = Callable[[slice, slice, Tensor], object]  # rows, features, out [R, C]: writes <centred[row], W_enc[feature]>


class Selected(NamedTuple):
    """The K best features of every row; the tensors may live in scratch memory."""

    values_BK: Tensor  # ReLU'd, in falling order
    indices_BK: Tensor  # int64
    recomputed: int = 0  # rows whose bf16 preselection was not certain


class Encoder(Protocol):
    """Callable on centred states u - b_dec [B, D] of the SAE's dtype and device."""

    def __call__(self, centred_BD: Tensor, /) -> Selected: ...


class Selector(Protocol):
    """The K largest entries of product + bias in every row, in falling order, before ReLU: values and int64 features."""

    def __call__(self, rows: int, product: Product, bias_N: Tensor) -> tuple[Tensor, Tensor]: ...


@cache
def why_not_compiled() -> str | None:
    """None where numba's loops can be used, else the reason in words."""
    try:
        import glottoscope.sae.loops  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return None


def compiled_can(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled loops run on tensors of this device and dtype."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and why_not_compiled() is None


def make_selector(like: Tensor, n: int, k: int, scratch: Scratch, *, compiled: bool | None = None, name: str = "") -> Selector:
    """The fastest selector for tensors of `like`'s device and dtype; `compiled` False asks for plain torch."""
    if compiled is None:
        compiled = compiled_can(like.device, like.dtype)
    return CompiledSelector(n, k, scratch, name) if compiled else TorchSelector(like.device, n, k, scratch, name)


def make_encoder(
    sae: TopKSAE, scratch: Scratch | None = None, *, compiled: bool | None = None, preselection: Preselection = "none"
) -> Encoder:
    """An encoder for the SAE's device and dtype: with the fastest selector, or as asked for."""
    scratch = Scratch() if scratch is None else scratch
    exact = ExactEncoder(sae, make_selector(sae.W_enc, sae.n, sae.k, scratch, compiled=compiled))
    if preselection == "none":
        return exact
    from glottoscope.sae.preselection import PreselectingEncoder

    return PreselectingEncoder(sae, exact, scratch, compiled=compiled)


class ExactEncoder:
    """One dense product in the SAE's own dtype."""

    def __init__(self, sae: TopKSAE, select: Selector) -> None:
        self._sae, self._select = sae, select

    def __call__(self, centred_BD: Tensor) -> Selected:
        W_enc_ND = self._sae.W_enc

        def product(rows: slice, features: slice, out_RC: Tensor) -> None:
            torch.mm(centred_BD[rows], W_enc_ND[features].T, out=out_RC)

        values_BK, indices_BK = self._select(len(centred_BD), product, self._sae.b_enc)
        return Selected(values_BK.relu_(), indices_BK)


class CompiledSelector:
    """Column pieces of all rows (up to `MAX_ROWS` at a time), selected by a compiled loop."""

    MAX_ROWS: int = 2048
    PIECE: int = 2**21  # entries: 8 MB of float32 stays in a CPU's last cache, and the product is still at full speed

    def __init__(self, n: int, k: int, scratch: Scratch, name: str = "") -> None:
        from glottoscope.sae import loops

        self.n, self.k = n, k
        self._scratch, self._loops, self._name = scratch, loops, name

    def __call__(self, rows: int, product: Product, bias_N: Tensor) -> tuple[Tensor, Tensor]:
        values_BK = self._scratch.take(f"{self._name}values", (rows, self.k), bias_N.dtype)
        indices_BK = self._scratch.take(f"{self._name}indices", (rows, self.k), torch.int64)
        values_BK.fill_(-torch.inf)
        indices_BK.zero_()
        for start in range(0, rows, self.MAX_ROWS):
            part = slice(start, min(start + self.MAX_ROWS, rows))
            self._select(part, product, bias_N, values_BK[part], indices_BK[part])
        return values_BK, indices_BK

    def _select(self, part: slice, product: Product, bias_N: Tensor, values_RK: Tensor, indices_RK: Tensor) -> None:
        loops, rows = self._loops, len(values_RK)
        nan_R = torch.zeros(rows, dtype=torch.uint8)
        width = piece_width(self.n, rows, self.PIECE)
        flat = self._scratch.take("piece", (rows * width,), bias_N.dtype)
        arrays = values_RK.numpy(), indices_RK.numpy(), nan_R.numpy()
        grain = max(1, 2**15 // width)
        for first in range(0, self.n, width):
            end = min(first + width, self.n)
            pre_RC = flat[: rows * (end - first)].view(rows, end - first)
            product(part, slice(first, end), pre_RC)
            bias_C = bias_N[first:end].numpy()
            loops.split(loops.select, rows, grain, pre_RC.numpy(), bias_C, first, *arrays)
        if bool(nan_R.any()):  # a NaN is never among the best; the caller must still see it
            values_RK[nan_R.bool()] = torch.nan


def piece_width(n: int, rows: int, piece: int) -> int:
    """Features of one piece: a power of two of at least 256, or all."""
    width = 2 ** round(math.log2(max(256, piece / max(1, rows))))
    return n if n <= width * 3 // 2 else width


class TorchSelector:
    """Row pieces, two-stage TopK.

    torch.topk scans each row's N values at some 1.6 ns each. Taking the maxima of G strided groups first (a vectorised
    reduction), then the K best groups, then TopK among their members is the same result: an entry of the top K
    lies in one of the K groups with the largest maxima. 2-4 times faster.
    """

    def __init__(self, device: torch.device, n: int, k: int, scratch: Scratch, name: str = "") -> None:
        size = min(16, round(math.sqrt(n / k)))  # members per group: balances the two TopK passes
        groups = math.ceil(n / size / 16) * 16 if size > 1 else n  # whole vector registers
        self.two_stage = k <= groups < n
        self.groups = groups
        members = math.ceil(n / groups)
        self.width = groups * members if self.two_stage else n
        # 1 MB of preactivations stays in a CPU core's cache; below 256 rows the matrix product loses speed.
        self.rows = max(256, (2**18 if device.type == "cpu" else 2**26) // self.width)
        self.n, self.k, self.device = n, k, device
        self._scratch, self._name = scratch, name
        self._member_offsets = torch.arange(members, device=device) * groups

    def __call__(self, rows: int, product: Product, bias_N: Tensor) -> tuple[Tensor, Tensor]:
        values_BK = self._scratch.take(f"{self._name}values", (rows, self.k), bias_N.dtype, self.device)
        indices_BK = self._scratch.take(f"{self._name}indices", (rows, self.k), torch.int64, self.device)
        pre_RP = self._scratch.take("preactivations", (min(rows, self.rows), self.width), bias_N.dtype, self.device)
        for start in range(0, rows, self.rows):
            part = slice(start, min(start + self.rows, rows))
            piece_RP = pre_RP[: part.stop - start]
            piece_RP[:, self.n :] = -torch.inf  # keeps the padding out of every top K (k <= n)
            product(part, slice(0, self.n), piece_RP[:, : self.n])
            piece_RP[:, : self.n] += bias_N
            values_BK[part], indices_BK[part] = self.top_k(piece_RP)
        return values_BK, indices_BK

    def top_k(self, pre_RP: Tensor) -> tuple[Tensor, Tensor]:
        """Values [R, K] in falling order and features [R, K]."""
        if not self.two_stage:
            return pre_RP.topk(self.k, dim=1)
        rows = len(pre_RP)
        maxima_RG = pre_RP.view(rows, -1, self.groups).amax(1)
        best_RK = maxima_RG.topk(self.k, dim=1, sorted=False).indices
        candidates = (best_RK.unsqueeze(2) + self._member_offsets).view(rows, -1)
        values, places = pre_RP.gather(1, candidates).topk(self.k, dim=1)
        return values, candidates.gather(1, places)
