"""The TopK sparse autoencoder of Inaba et al. (arXiv 2503.06394) and its files.

Shape suffixes: B rows (positions), R rows of one chunk, C features of one chunk, D d_model, N features, K top-k.

u = x / ||x||;  z = TopK_k(ReLU(W_enc (u - b_dec) + b_enc));  u_hat = W_dec^T z + b_dec; W_enc and W_dec are both
stored [n, d], which makes the unit-norm reset of decoder rows and every gather contiguous.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glottoscope.atomic import atomic_path, write_json
from glottoscope.errors import InputError
from glottoscope.sae.encoding import make_encoder

FORMAT = "glottoscope"
SCHEMA = 1
WEIGHTS_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"
ENCODED_ROWS = 2048  # positions normalised and encoded at a time
TENSOR_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")

Normalization = Literal["unit", "none"]


class TopKSAE(nn.Module):
    """A TopK-SAE over hidden states of width `d` with `n` features, `k` of them active at most.

    Initial weights depend on (d, n, seed) only, whatever the device: rows of W_dec are random directions, W_enc is a
    copy of W_dec, b_enc = 0, and b_dec = 0 until the trainer's first step sets it (`b_dec_initialised`).
    Parameters carry no autograd state (`requires_grad` is False): kernels compute gradients themselves.

    Raises:
        InputError: k > n, a size below 1, or an unknown normalization.
    """

    def __init__(
        self,
        d: int,
        n: int,
        k: int,
        seed: int = 0,
        *,
        normalization: Normalization = "unit",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if min(d, n, k) < 1 or k > n:
            raise InputError(f"an SAE needs d, n, k of at least 1 and k <= n; got d = {d}, n = {n}, k = {k}")
        if normalization not in get_args(Normalization):
            raise InputError(f"unknown SAE normalization {normalization!r}: use one of {get_args(Normalization)}")
        self.d, self.n, self.k, self.seed = d, n, k, seed
        self.normalization: Normalization = normalization
        self.b_dec_initialised = False
        self.extra: dict[str, Any] = {}  # what `save` was given beside the SAE's own settings, after `load`
        if torch.device(device).type == "meta":  # `load` fills these in; no need to draw what is thrown away
            directions_ND = torch.empty(n, d, dtype=dtype, device=device)
        else:
            drawn_ND = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
            directions_ND = F.normalize(drawn_ND, dim=1).to(device=device, dtype=dtype)
        self.W_dec = nn.Parameter(directions_ND, requires_grad=False)
        self.W_enc = nn.Parameter(directions_ND.clone(), requires_grad=False)
        self.b_enc = nn.Parameter(torch.zeros(n, dtype=dtype, device=device), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], k: int, *, seed: int = 0, normalization: Normalization = "unit") -> TopKSAE:
        """An SAE around trained tensors W_enc [n, d], b_enc [n], W_dec [n, d], b_dec [d]; b_dec counts as initialised.

        Raises:
            InputError: a tensor is missing, has the wrong shape, is not floating point, or is not finite.
        """
        missing = [name for name in TENSOR_NAMES if name not in tensors]
        if missing:
            raise InputError(f"tensor {missing[0]} is missing (found: {', '.join(sorted(tensors)) or 'none'})")
        if tensors["W_enc"].ndim != 2:
            raise InputError(f"tensor W_enc has shape {tuple(tensors['W_enc'].shape)}, expected [n, d]")
        n, d = tensors["W_enc"].shape
        sae = cls(d, n, k, seed, normalization=normalization, device="meta")
        for name, shape in (("W_enc", (n, d)), ("b_enc", (n,)), ("W_dec", (n, d)), ("b_dec", (d,))):
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise InputError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise InputError(f"tensor {name} holds values that are not finite floating-point numbers")
            setattr(sae, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        sae.b_dec_initialised = True
        return sae

    def normalize(self, x: Tensor) -> Tensor:
        """u [..., d] in the SAE's dtype: x / ||x||, a zero vector stays zero; x itself for normalization "none"."""
        x = x.to(device=self.W_enc.device, dtype=self.W_enc.dtype)
        return x if self.normalization == "none" else x / self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.masked_fill_(norm == 0, 1.0)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Active features of raw hidden states x [..., d] (any floating dtype).

        Returns:
            values [..., k], ReLU'd, descending, and feature ids [..., k] int64. A pair with value 0 is not active.
        """
        x_BD = x.reshape(-1, self.d)
        encode = make_encoder(self)
        values = torch.empty(len(x_BD), self.k, device=self.W_enc.device, dtype=self.W_enc.dtype)
        indices = torch.empty(len(x_BD), self.k, device=self.W_enc.device, dtype=torch.int64)
        for start in range(0, len(x_BD), ENCODED_ROWS):
            rows = slice(start, start + ENCODED_ROWS)
            found = encode(self.normalize(x_BD[rows]) - self.b_dec)  # never in place: without normalisation it is x itself
            values[rows], indices[rows] = found.values_BK, found.indices_BK
        return values.view(*x.shape[:-1], self.k), indices.view(*x.shape[:-1], self.k)

    @torch.no_grad()
    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """u_hat [..., d] in normalised space, from values [..., k'] and feature ids [..., k']."""
        width = values.shape[-1]
        decoded = F.embedding_bag(indices.reshape(-1, width), self.W_dec, per_sample_weights=values.reshape(-1, width), mode="sum")
        return decoded.add_(self.b_dec).view(*values.shape[:-1], self.d)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The reconstruction of raw x [..., d] in raw space: u_hat ||x||, 0 where x is 0; the SAE's dtype."""
        u_hat = self.decode(*self.encode(x))
        if self.normalization == "none":
            return u_hat
        x = x.to(device=self.W_enc.device, dtype=self.W_enc.dtype)
        return u_hat * torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    @torch.no_grad()
    def max_preactivation(self, x_BD: Tensor) -> Tensor:
        """Each feature's largest ReLU'd activation before TopK over raw x [B, d], as [n] (the maxima m_i of v1)."""
        maxima_N = torch.zeros_like(self.b_enc)
        rows, width = min(len(x_BD), ENCODED_ROWS), min(self.n, 1024)
        pre_RC = torch.empty(rows, width, device=self.W_enc.device, dtype=self.W_enc.dtype)
        for start in range(0, len(x_BD), ENCODED_ROWS):
            centred_RD = self.normalize(x_BD[start : start + ENCODED_ROWS]) - self.b_dec
            for first in range(0, self.n, width):
                end = min(first + width, self.n)
                piece_RC = pre_RC.view(-1)[: len(centred_RD) * (end - first)].view(-1, end - first)
                torch.mm(centred_RD, self.W_enc[first:end].T, out=piece_RC)
                torch.maximum(maxima_N[first:end], piece_RC.amax(0) + self.b_enc[first:end], out=maxima_N[first:end])
        return maxima_N

    def save(self, directory: Path | str, extra: dict[str, Any] | None = None) -> None:
        """Write sae.safetensors and cfg.json into `directory`, each whole or not at all.

        `extra` (layer, model, checkpoint ...) goes into cfg.json beside d, n, k, normalization and seed.
        """
        own: dict[str, Any] = {
            "format": FORMAT,
            "schema": SCHEMA,
            "d": self.d,
            "n": self.n,
            "k": self.k,
            "normalization": self.normalization,
            "seed": self.seed,
            "b_dec_initialised": self.b_dec_initialised,
        }
        with atomic_path(Path(directory) / WEIGHTS_FILE) as temporary:
            save_file({name: getattr(self, name).detach().cpu().contiguous() for name in TENSOR_NAMES}, temporary)
        write_json(Path(directory) / CONFIG_FILE, {**(self.extra if extra is None else extra), **own})

    @classmethod
    def load(cls, directory: Path | str, device: str | torch.device = "cpu") -> TopKSAE:
        """Read what `save` wrote; unknown entries of cfg.json land in `.extra`.

        Raises:
            InputError: a file is missing, truncated or of another or newer format, or a tensor is missing or misshapen.
        """
        directory = Path(directory)
        config = _read_config(directory / CONFIG_FILE)
        weights = directory / WEIGHTS_FILE
        if not weights.is_file():
            raise InputError(f"{weights}: no such file; train the SAE or give the folder that holds it")
        try:
            tensors = load_file(weights, device=str(device))
        except SafetensorError as error:
            raise InputError(f"{weights}: unreadable or truncated ({error}); write it again") from None
        try:
            sae = cls.from_tensors(tensors, config["k"], seed=config["seed"], normalization=config["normalization"])
        except InputError as error:
            raise InputError(f"{weights}: {error}") from None
        if (sae.n, sae.d) != (config["n"], config["d"]):
            raise InputError(
                f"{weights}: tensor W_enc has shape {(sae.n, sae.d)}, but {CONFIG_FILE} says n = {config['n']}, d = {config['d']}"
            )
        sae.b_dec_initialised = config["b_dec_initialised"]
        sae.extra = {key: value for key, value in config.items() if key not in _OWN_KEYS}
        return sae


_OWN_KEYS = {
    "format": str,
    "schema": int,
    "d": int,
    "n": int,
    "k": int,
    "normalization": str,
    "seed": int,
    "b_dec_initialised": bool,
}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; an SAE folder holds {WEIGHTS_FILE} and {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{path}: not a {FORMAT} SAE (its format is not {FORMAT!r}); import other formats first")
    if isinstance(config.get("schema"), int) and config["schema"] > SCHEMA:
        raise InputError(f"{path}: schema {config['schema']} is newer than this version reads ({SCHEMA}); upgrade glottoscope")
    for key, kind in _OWN_KEYS.items():
        if not isinstance(config.get(key), kind):
            raise InputError(f"{path}: field {key} is missing or not of type {kind.__name__}")
    return config


@torch.no_grad()
def geometric_median(u_BD: Tensor, iterations: int = 100, tol: float = 1e-6) -> Tensor:
    """The point [D] with the least sum of distances to the rows of u [B, D].

    Weiszfeld's iteration from the mean, with Vardi and Zhang's (2000) step where the estimate coincides with a data
    point, at which the plain iteration divides by zero or stalls. Stops when a step moves by less than `tol` times
    the mean distance.
    """
    median_D = u_BD.mean(0)
    for _ in range(iterations):
        offset_BD = u_BD - median_D
        distance_B = torch.linalg.vector_norm(offset_BD, dim=1)
        apart_B = distance_B > 1e-12
        weight_B = torch.where(apart_B, 1 / distance_B, 0.0)
        total = weight_B.sum()
        if float(total) == 0.0:  # every point coincides with the estimate
            break
        pull_D = weight_B @ offset_BD
        coincident = (~apart_B).sum()
        # With no coincident point this is 1: the plain Weiszfeld step.
        share = (1 - coincident / torch.linalg.vector_norm(pull_D).clamp_min(1e-30)).clamp_min(0.0)
        step_D = share * pull_D / total
        median_D = median_D + step_D
        if float(torch.linalg.vector_norm(step_D)) <= tol * float(distance_B.mean()):
            break
    return median_D
