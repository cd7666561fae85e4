"""glottoscope: how language lives inside a language model, and how it came to.

`import glottoscope as gs` loads no torch; what needs it is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["InputError", "Run", "SAETrainer", "TopKSAE", "__version__", "load_run"]

if TYPE_CHECKING:
    from glottoscope.errors import InputError
    from glottoscope.sae.model import TopKSAE
    from glottoscope.sae.trainer import SAETrainer
    from glottoscope.study.run import Run, load_run

_HOMES = {
    "InputError": "glottoscope.errors",
    "Run": "glottoscope.study.run",
    "SAETrainer": "glottoscope.sae.trainer",
    "TopKSAE": "glottoscope.sae.model",
    "load_run": "glottoscope.study.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glottoscope' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
