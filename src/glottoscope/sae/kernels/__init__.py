"""Loss, exact gradients and update of one TopK-SAE training step, by name.

- `compiled`: loops compiled by numba, on a CPU.
- `triton`: the same loops as Triton kernels, on a CUDA device.
- `chunked`: plain torch, on any device.
- `reference`: dense autograd, slow, for tests.
- `auto`: the fastest of them that runs here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from glottoscope.errors import InputError
from glottoscope.sae.encoding import compiled_can, why_not_compiled
from glottoscope.sae.kernels.base import Forward, Gradients, Kernel

if TYPE_CHECKING:
    from glottoscope.sae.model import TopKSAE

__all__ = ["KERNELS", "Forward", "Gradients", "Kernel", "check_kernel", "kernel_class", "resolve_kernel"]

KERNELS = ("compiled", "triton", "chunked", "reference")


def resolve_kernel(name: str, device: str | torch.device, dtype: torch.dtype = torch.float32, d: int = 1) -> str:
    """The kernel that `name` stands for on this device at width `d`: itself, or for "auto" the fastest that runs here.

    Raises:
        InputError: no kernel has this name.
    """
    device = torch.device(device)
    if name == "auto":
        if compiled_can(device, dtype):
            return "compiled"
        if device.type == "cuda" and dtype == torch.float32:
            from glottoscope.sae.kernels.triton import MAX_D, why_not_triton

            if d <= MAX_D and why_not_triton() is None:
                return "triton"
        return "chunked"
    if name not in KERNELS:
        raise InputError(f"unknown SAE kernel {name!r}: use auto or one of {', '.join(KERNELS)}")
    return name


def check_kernel(name: str, device: str | torch.device, d: int) -> None:
    """Find out before a long run whether the kernel `name` can train float32 SAEs of width `d` on this device.

    Raises:
        InputError: it cannot, with the reason.
    """
    device, resolved = torch.device(device), resolve_kernel(name, device, d=d)
    reason = None
    if resolved == "compiled" and not compiled_can(device, torch.float32):
        reason = why_not_compiled() or f"its loops run on a CPU, the device is {device}"
    elif resolved == "triton":
        from glottoscope.sae.kernels.triton import MAX_D, why_not_triton

        reason = why_not_triton() or (f"it takes widths up to {MAX_D}, a model has {d}" if d > MAX_D else None)
    if reason is not None:
        raise InputError(f'sae.kernel = "{name}" cannot be used here: {reason}; use "auto" or "chunked"')


def kernel_class(name: str, sae: TopKSAE) -> type[Kernel]:
    """The class of the kernel `name` ("auto" included) for an SAE."""
    resolved = resolve_kernel(name, sae.W_enc.device, sae.W_enc.dtype, sae.d)
    if resolved == "compiled":
        from glottoscope.sae.kernels.compiled import CompiledKernel as chosen
    elif resolved == "triton":
        from glottoscope.sae.kernels.triton import TritonKernel as chosen
    elif resolved == "chunked":
        from glottoscope.sae.kernels.chunked import ChunkedKernel as chosen
    else:
        from glottoscope.sae.kernels.dense import ReferenceKernel as chosen
    return chosen
