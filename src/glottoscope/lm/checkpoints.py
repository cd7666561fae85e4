"""Language-model checkpoints: loading them with everything checked, and naming what they are.

A checkpoint is any Hugging Face causal LM: a local directory, or a hub id with a revision. Loading is strict, because
a silently re-initialised layer looks like a finding: whatever the files do not say about the weights is an error here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from glottoscope.errors import InputError
from glottoscope.lm.layers import n_layers

# transformers' models take seconds to import: functions that load one import them.
if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# In the order in which transformers looks for them: an index counts only where what comes before is not there.
READ_FIRST = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Older Llama and GPT-NeoX checkpoints store tables that newer transformers recompute.
RECOMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|attention\.(masked_bias|bias)$|attn\.(masked_bias|bias)$")
SAMPLED_BYTES = 1 << 20
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    EOFError,
    ImportError,
    pickle.UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of one model: where it is, and how far its training had come."""

    path: str  # local directory or hub id
    step: int
    tokens_seen: int
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.path).expanduser().exists() or not HUB_ID.fullmatch(self.path)


@dataclass(frozen=True)
class ModelShape:
    n_layers: int
    d_model: int
    vocab_size: int
    n_params: int  # tied weights counted once


def load_lm(
    checkpoint: Checkpoint, *, device: str = "cpu", dtype: str = "float32", local_files_only: bool | None = None,
    files_stay: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """Load a causal LM in eval mode, without cache, every weight accounted for.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        local_files_only: never ask the hub; None means only for local directories.
        files_stay: False: the files are removed while the model is in use, so none of them stays mapped into memory.

    Raises:
        InputError: directory or weights missing; a truncated or corrupt file (named); missing, unexpected or
            mis-shaped tensors (named; heads tied to the embedding may be absent); NaN or Inf in a weight.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    source = _source(checkpoint)
    if checkpoint.is_local:
        _check_files(Path(source))
    dtype_name = "dtype" if _transformers_version() >= (4, 56) else "torch_dtype"
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=checkpoint.revision or "main",
                local_files_only=checkpoint.is_local if local_files_only is None else local_files_only,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name
                **{dtype_name: DTYPES[dtype]},
            )
    except LOAD_ERRORS as error:
        raise InputError(f"cannot load a language model from {_name(checkpoint)}: {_first_line(error)}") from None
    model, info = loaded
    _check_loading(info, checkpoint)
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{_name(checkpoint)}: weight {name} holds NaN or Inf; this checkpoint is not usable")
    model.config.use_cache = False
    model.config.output_hidden_states = False
    model = model.to(device).eval()
    if not files_stay and model.device.type == "cpu":
        _let_go_of_files(model)
    return model


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what may lie in a mapped file: the disk is free only when nothing maps it. Tied tensors come once, and stay tied."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def load_tokenizer(path: str, revision: str | None = None, *, local_files_only: bool | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local directory or hub id.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    checkpoint = Checkpoint(path, 0, 0, revision)
    source = _source(checkpoint)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                source,
                revision=revision or "main",
                local_files_only=checkpoint.is_local if local_files_only is None else local_files_only,
            )
    except LOAD_ERRORS as error:
        raise InputError(f"cannot load a tokenizer from {_name(checkpoint)}: {_first_line(error)}") from None


def choose_device(name: str = "auto") -> str:
    """ "auto" is CUDA, else MPS, else CPU.

    Raises:
        InputError: an unknown device, or one that this machine lacks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, is_there in available.items() if is_there)
    kind = name.partition(":")[0]
    if kind not in available:
        raise InputError(f"device {name!r}: choose auto, cpu, cuda or mps")
    if not available[kind]:
        raise InputError(f"device {name!r} is not available here; use cpu or auto")
    return name


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hex digest that changes when the checkpoint does, without reading all of it.

    A local directory: config.json, and of every weight file its name, size, first MiB (the safetensors header) and
    three sampled MiB. A hub id: the id and the revision.
    """
    digest = hashlib.sha256()
    if not checkpoint.is_local:
        digest.update(f"{checkpoint.path}@{checkpoint.revision or 'main'}".encode())
        return digest.hexdigest()
    directory = Path(_source(checkpoint))
    config = directory / "config.json"
    if config.exists():
        digest.update(config.read_bytes())
    for file in _weight_files(directory):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as handle:
            header = 8 + int.from_bytes(handle.read(8), "little") if file.suffix == ".safetensors" else 0
            for offset in (0, header, size // 3, size // 2, size - SAMPLED_BYTES):
                handle.seek(max(0, min(offset, size)))
                digest.update(handle.read(SAMPLED_BYTES))
    return digest.hexdigest()


def shuffle_weights(model: PreTrainedModel, seed: int) -> None:
    """Permute the entries inside every weight tensor, in place: each keeps its distribution and loses its structure."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # tied tensors come once
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def describe(checkpoint: Checkpoint | PreTrainedModel) -> ModelShape:
    """Layers, width, vocabulary and parameters, from the model or from a checkpoint's config.json (no weights are
    read).

    Raises:
        InputError: no readable config.json, or an architecture transformers does not know.
    """
    if not isinstance(checkpoint, Checkpoint):
        model = checkpoint
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        source = _source(checkpoint)
        if checkpoint.is_local:
            _check_config(Path(source))
        try:
            with _quiet():
                config: PretrainedConfig = AutoConfig.from_pretrained(
                    source, revision=checkpoint.revision or "main", local_files_only=checkpoint.is_local
                )
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config)
        except LOAD_ERRORS as error:
            raise InputError(f"cannot read the model configuration of {_name(checkpoint)}: {_first_line(error)}") from None
    text_config: Any = model.config.get_text_config()
    n_params = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(n_layers(model), int(text_config.hidden_size), int(text_config.vocab_size), n_params)


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.path if checkpoint.revision is None else f"{checkpoint.path} (revision {checkpoint.revision})"


def _source(checkpoint: Checkpoint) -> str:
    if not checkpoint.is_local:
        return checkpoint.path
    directory = Path(checkpoint.path).expanduser()
    if not directory.is_dir():
        raise InputError(f"checkpoint directory {directory} does not exist")
    return str(directory)


def _weight_files(directory: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHT_FILES for file in directory.glob(pattern))


def _check_config(directory: Path) -> None:
    """Without the file transformers 4 guesses an architecture from the folder's name."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} holds no config.json: not a Hugging Face checkpoint")


def _check_files(directory: Path) -> None:
    """What is wrong with files is said about files, before transformers turns it into something about tensors."""
    _check_config(directory)
    # An index of the other format may have come without its shards.
    first = next((name for name in READ_FIRST if (directory / name).is_file()), "")
    if first.endswith(".index.json"):
        index = directory / first
        try:
            wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a readable weight index: {_first_line(error)}") from None
        missing = [name for name in wanted if not (directory / name).is_file()]
        if missing:
            raise InputError(f"{directory} lacks {missing[0]}, which {index.name} names; copy the checkpoint again")
    files = _weight_files(directory)
    if not files:
        raise InputError(f"{directory} holds no weights: expected model.safetensors (or shards, or pytorch_model.bin)")
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):  # type: ignore[no-untyped-call]
                    pass  # opening compares the header with the size of the file
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is truncated or corrupt ({_first_line(error)}); copy the checkpoint again") from None
        elif os.path.getsize(file) == 0:
            raise InputError(f"{file} is empty; copy the checkpoint again")


def _check_loading(info: dict[str, Any], checkpoint: Checkpoint) -> None:
    where = _name(checkpoint)
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"], key=str)
        raise InputError(f"{where}: tensor {name} has shape {tuple(found)}, config.json says {tuple(expected)}")
    unexpected = sorted(key for key in info["unexpected_keys"] if not RECOMPUTED.search(key))
    missing = sorted(info["missing_keys"])
    for kind, keys in (("lacks", missing), ("has unexpected", unexpected)):
        if keys:
            others = f" and {len(keys) - 1} others" if len(keys) > 1 else ""
            raise InputError(f"{where} {kind} the weight {keys[0]}{others}: the weights do not belong to this config.json")
    if info.get("error_msgs"):
        raise InputError(f"{where}: {str(info['error_msgs'][0]).strip().splitlines()[0]}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _transformers_version() -> tuple[int, int]:
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No tables of missing keys and no progress bars: what matters is raised."""
    from transformers.utils import logging as hf_logging

    level, had_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if had_bar:
            hf_logging.enable_progress_bar()
