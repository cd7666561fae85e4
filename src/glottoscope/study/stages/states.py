"""Files of a training that is under way: tensors in `state_STEP.safetensors`, the rest in `state_STEP.json`.

The JSON is written last and holds the hash of the tensors and of itself, so a state is whole or it is none. Tensors are
written one after the other from where they lie: a state of many gigabytes needs no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glottoscope.atomic import atomic_path, write_json
from glottoscope.study.store import digest, file_digest
from glottoscope.walking import listed

SCHEMA = 1
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """A training after `steps` steps, as its JSON describes it.

    Attributes:
        keys: part of the training (a model, an SAE) -> key of what it is to become.
        surroundings: what else decides the bytes: versions of libraries, threads, kernel.
        notes: plain values of the training: curves, counters.
    """

    path: Path  # of the JSON
    steps: int
    keys: dict[str, str]
    surroundings: dict[str, Any]
    notes: dict[str, Any]
    tensors_hash: str

    @property
    def tensors_path(self) -> Path:
        return self.path.with_suffix(".safetensors")


def write_state(
    folder: Path, steps: int, keys: Mapping[str, str], surroundings: Mapping[str, Any], notes: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> State:  # fmt: skip
    """Write a state of a training.

    Raises:
        InputError: the disk is full; what was there before is untouched.
    """
    path = folder / f"state_{steps}.json"
    with atomic_path(path.with_suffix(".safetensors")) as temporary:
        tensors_hash = _write_tensors(temporary, tensors)
    record = {
        "schema": SCHEMA, "steps": steps, "keys": dict(keys), "surroundings": dict(surroundings), "notes": dict(notes),
        "tensors": tensors_hash,
    }  # fmt: skip
    write_json(path, {**record, "digest": digest(record)})
    return State(path, steps, dict(keys), dict(surroundings), dict(notes), tensors_hash)


def states_in(folder: Path) -> list[State]:
    """States of a folder with a whole JSON, the one with most steps first; tensors are not looked at."""
    found = [state for path in listed(folder, "state_*.json") if (state := _read(path)) is not None]
    return sorted(found, key=lambda s: -s.steps)


def load_state(state: State, tensors: Mapping[str, Tensor]) -> bool:
    """Copy a state's tensors into `tensors`, which may be a part of them; False, with nothing changed, if it is damaged."""
    try:
        if file_digest(state.tensors_path) != state.tensors_hash:
            return False
        with safe_open(str(state.tensors_path), framework="pt") as file:
            held = set(file.keys())
            for name, tensor in tensors.items():
                if name not in held or file.get_slice(name).get_shape() != list(tensor.shape):
                    return False
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError):
        return False
    return True


def remove_state(path: Path) -> None:
    """Remove a state, given the path of either file; the JSON goes first, without which the rest is nothing."""
    for suffix in (".json", ".safetensors"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def _read(path: Path) -> State | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record.pop("digest")
        if record["schema"] != SCHEMA or digest(record) != found:
            return None
        return State(path, record["steps"], record["keys"], record["surroundings"], record["notes"], record["tensors"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; returns its SHA-256."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hasher = hashlib.sha256()
    with open(path, "wb") as file:
        values = (t.detach().reshape(-1).view(torch.uint8).cpu().numpy().data for t in tensors.values())
        for piece in chain((len(text).to_bytes(8, "little"), text), values):
            hasher.update(piece)
            file.write(piece)
    return hasher.hexdigest()
