"""Which float32 matrix product the CPU uses, chosen by measuring its error."""

from __future__ import annotations

import torch

TOLERANCE = 5e-6  # largest error over largest entry of a 768-term product; bfloat16 products are off by some 3e-3


def matmul_error() -> float:
    """Largest error of a float32 product with the settings in force, against float64, over the largest entry."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 768, generator=generator), torch.randn(768, 1024, generator=generator)
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())


def enable_fast_matmul(tolerance: float = TOLERANCE) -> bool:
    """Let this process use oneDNN's faster fp32 matrix product on the CPU, if it is true fp32 on this machine.

    `torch.set_float32_matmul_precision("medium")` selects it; on CPUs with AMX the same setting means bfloat16, so
    the error is measured and the setting is put back when it exceeds `tolerance`. A process-wide switch: for the
    program's entry point, never called from within the library.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if matmul_error() <= tolerance:
        return True
    torch.set_float32_matmul_precision(before)
    return False
