"""What this machine has for the units of a study: its device, its processes, the memory of each. The plan and the run ask here.

Torch is asked only where there is an accelerator to ask about.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from glottoscope.study.config import PretrainModel, Study
from glottoscope.study.engine import usable_cores
from glottoscope.study.plan import BYTES, PROCESS, ModelRun, Room, describe_memory, lm_memory

SHARE = 0.8  # of the memory that is there; the rest is the system's, and the plan's error
DEVICES = ("nvidia*", "nvhost*", "kfd", "dxg")  # below /dev where Linux has an accelerator
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


# ---- memory


def machine_memory() -> int:
    """Bytes of this machine that this process may use: a container or a batch job may get less than there is."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits(CGROUPS, OWN_CGROUP)])


def _limits(root: Path, own: Path) -> Iterator[int]:
    """Bytes that the control groups of a process allow, of both versions; a limit of a group above holds, too."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = base / path.strip("/")
        # A container may see its own group as the root, whatever the path says.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            try:
                yield int((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # no such group here, or "max"
                continue


def room_for(study: Study, workers: int) -> Room:
    """What each of `workers` local processes may use: compute.memory_gb, or its share of the CUDA device or the machine.

    Without bound where the study is for a CUDA device and this machine has none.
    """
    if study.compute.memory_gb is not None:
        return stated_room(study)
    if device_of(study) == "cuda":
        return gpu_room(-(-workers // max(1, len(visible_gpus()))))
    have = machine_memory()
    each = SHARE * have / workers
    source = f"{SHARE:.0%} of this machine's {describe_memory(have)}"
    if workers > 1:
        source += f" by {workers} workers"
    return Room(each, each, source, "fewer --workers", each * workers if workers > 1 else 0.0)


def stated_room(study: Study) -> Room:
    """compute.memory_gb; without bound where the study does not state it."""
    stated = study.compute.memory_gb
    if stated is None:
        return Room(math.inf, math.inf, "no bound is known")
    return Room(stated * 2**30, stated * 2**30)


def gpu_room(sharing: int) -> Room:
    """What each of `sharing` processes of one CUDA device may use: a part of what is free there, and the host's memory for its
    libraries, which the plan counts, too."""
    free = gpu_memory()
    if free is None:
        return Room(math.inf, math.inf, "this machine has no CUDA device")
    each = SHARE * free / sharing + PROCESS
    source = f"{SHARE:.0%} of {describe_memory(free)} free on the GPU"
    if sharing > 1:
        source += f" by {sharing} processes"
    alone = SHARE * free + PROCESS if sharing > 1 else 0.0
    return Room(each, each, source, "fewer processes on a GPU (--workers, compute.gpus_per_unit)", alone)


def gpu_memory() -> int | None:
    """Bytes that are free on the CUDA device; None: there is none."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def reading_memory(study: Study, runs: Sequence[ModelRun], layers: int = 1, saes: int = 0) -> int:
    """Bytes of the host that a unit takes at most which passes text through these models at once, with `saes` SAEs of the widest:
    with an accelerator, what loading takes."""
    shapes = [run.shape for run in runs if run.shape is not None]
    if device_of(study) != "cpu":
        return PROCESS + sum(shape.n_params for shape in shapes) * BYTES
    d = max((shape.d_model for shape in shapes), default=0)
    n = study.sae.n_features(d) if saes else 0
    return PROCESS + sum(lm_memory(study, shape, layers) - PROCESS for shape in shapes) + saes * (2 * n * d + n + d) * BYTES


def pretrain_memory(study: Study, run: ModelRun) -> int:
    """Bytes of the host that training a language model takes, about: weights, gradients, moments, one batch's states and logits."""
    spec, shape = run.spec, run.shape
    assert isinstance(spec, PretrainModel)
    assert shape is not None
    if device_of(study) != "cpu":
        return PROCESS + shape.n_params * BYTES
    # 30 d_model numbers a token and layer are kept for the way back, as measured for widths of 128 to 512.
    states = spec.batch_size * study.corpus.context_length * (30 * shape.n_layers * shape.d_model + 3 * shape.vocab_size)
    return PROCESS + (4 * shape.n_params + states) * BYTES


# ---- devices and processes


def device_of(study: Study) -> str:
    """The device that a run takes: "cpu", "cuda" or "mps". One that the study names need not be here."""
    stated = study.compute.device
    if stated != "auto":
        return stated
    if platform.system() != "Darwin" and not any(any(Path("/dev").glob(name)) for name in DEVICES):
        return "cpu"
    from glottoscope.lm.checkpoints import choose_device

    return choose_device(stated)


def visible_gpus() -> list[str]:
    """CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [x.strip() for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def workers_of(study: Study, workers: int | None = None) -> int:
    """Local processes of a run: as stated, else one per GPU, which several would have to share, or cores / threads."""
    if workers is not None:
        return workers
    device = device_of(study)
    if device == "cuda":
        return max(1, len(visible_gpus()))
    return 1 if device != "cpu" else max(1, len(usable_cores()) // study.compute.threads)
