"""One study of two: same name and settings, the models, checkpoints, layers and seeds of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from glottoscope.errors import InputError
from glottoscope.study.config import CheckpointEntry, CheckpointModel, PretrainModel, Study

# Settings that change no number, or say where things lie on a machine: those of the first study are kept.
OWN = {"study.notes", "compute.memory_gb", "compute.checkpoint_minutes", "corpus.root"}
OWN_TABLES = ("report.", "logging")
# Joined below, each in its own way.
JOINED = ("models", "layers", "controls", "intervention", "sae.seeds", "features.labels")

Spec = PretrainModel | CheckpointModel
Layers = tuple[int, ...] | str
T = TypeVar("T", bound=int)


class Union(NamedTuple):
    """What two studies come to."""

    study: Study
    gained: list[str]  # what the first lacked, in words
    notes: list[str]  # what differs and is kept as the first has it
    new_final: frozenset[str]  # models whose last checkpoint is another than one of the two took for the last


def unite(first: Study, second: Study) -> Union:
    """The study that holds what both hold.

    Raises:
        InputError: settings that must be equal are not, or what both hold together would have to be made anew; says what
            to put into the study files.
    """
    differing = [
        f"{field} is {_shown(a)} in the first and {_shown(b)} in the second"
        for field, a, b in _differences(first.dump(), second.dump())
        if field not in OWN and not field.startswith((*OWN_TABLES, *JOINED))
    ]
    gained: list[str] = []
    notes: list[str] = []
    specs = {m.name: m for m in first.models}
    for spec in second.models:
        if spec.name not in specs:
            specs[spec.name] = spec
            gained.append(f"model {spec.name}")
            continue
        specs[spec.name] = _same_model(specs[spec.name], spec, differing, gained, notes)
    if differing:
        raise InputError(
            f"the studies differ: {'; '.join(differing)}. Only models, checkpoints, layers and seeds may: "
            "make the study files agree, run the one that changed again, and merge then"
        )
    layers = _layers(first, second, specs)
    raw = first.dump()
    raw["sae"]["seeds"] = _joined(first.sae.seeds, second.sae.seeds, "sae.seeds", gained)
    _join_controls(raw, first, second, gained)
    _join_intervention(raw, first, second, gained, notes)
    if first.features.labels != second.features.labels:
        notes.append("features.labels differ")
    if len(set(layers.values())) == 1:
        raw["layers"] = _plain(next(iter(layers.values())))
    raw["models"] = [
        {**spec.model_dump(mode="json", exclude_none=True, exclude={"layers"}), **_own_layers(layers[name], raw["layers"])}
        for name, spec in specs.items()
    ]
    for name, chosen in layers.items():
        if (old := _chosen(first, name)) is not None and old != chosen:
            new = [x for x in chosen if x not in old] if isinstance(chosen, tuple) and isinstance(old, tuple) else chosen
            gained.append(f"layers {new} of {name}")
    new_final = frozenset(name for name in specs if len(_finals(name, first, second, specs)) > 1)
    _check_choosers(first, second, specs, new_final)
    try:
        return Union(Study.model_validate(raw), gained, notes, new_final)
    except ValidationError as error:
        raise InputError(f"the studies cannot be joined: {error.errors()[0]['msg']}") from None


# ---- models


def _same_model(first: Spec, second: Spec, differing: list[str], gained: list[str], notes: list[str]) -> Spec:
    """One model of both studies; what must be equal and is not goes to `differing`."""
    name = f"models.{first.name}"
    places = {"root", "tokenizer"}
    free = {"checkpoints", "seeds", "steps", "layers", "shape"} if isinstance(first, CheckpointModel) else {"checkpoints", "seeds"}
    found = _differences(first.model_dump(mode="json"), second.model_dump(mode="json"))
    for field, a, b in found:
        top = field.split(".")[0]
        if top in places:
            notes.append(f"{name}.{field} differs")
        elif top not in {*free, "layers"}:
            differing.append(f"{name}.{field} is {_shown(a)} in the first and {_shown(b)} in the second")
    if isinstance(first, PretrainModel) and isinstance(second, PretrainModel):
        update: dict[str, Any] = {
            x: tuple(_joined(getattr(first, x), getattr(second, x), f"{name}.{x}", gained)) for x in ("checkpoints", "seeds")
        }
        return first.model_copy(update=update)
    if isinstance(first, CheckpointModel) and isinstance(second, CheckpointModel):
        return _same_elsewhere(first, second, name, differing, gained)
    return first  # their sources differ: said above


def _same_elsewhere(
    first: CheckpointModel, second: CheckpointModel, name: str, differing: list[str], gained: list[str]
) -> CheckpointModel:
    if bool(first.checkpoints) != bool(second.checkpoints):
        differing.append(f"{name} lists its checkpoints in one and finds them by a pattern in the other: list them in both")
        return first
    if first.shape is not None and second.shape is not None and first.shape != second.shape:
        differing.append(f"{name}.shape differs")
    update: dict[str, Any] = {"shape": first.shape or second.shape}
    if not first.checkpoints:
        # A glob without steps takes all that it finds.
        both = bool(first.steps and second.steps)
        update["steps"] = tuple(_joined(first.steps, second.steps, f"{name}.steps", gained)) if both else ()
        return first.model_copy(update=update)
    entries = {c.step: c for c in first.checkpoints}
    for entry in second.checkpoints:
        known = entries.setdefault(entry.step, entry)
        if known is entry:
            gained.append(f"checkpoint {entry.step} of {first.name}")
        elif _facts(first, known) != _facts(second, entry):
            differing.append(f"{name}: checkpoint {entry.step} has other tokens_seen, learning_rate or revision")
    update["checkpoints"] = tuple(entries[step] for step in sorted(entries))
    return first.model_copy(update=update)


def _facts(spec: CheckpointModel, entry: CheckpointEntry) -> tuple[Any, ...]:
    return _tokens(spec, entry), entry.learning_rate, entry.revision


def _tokens(spec: CheckpointModel, entry: CheckpointEntry) -> int:
    return entry.tokens_seen if entry.tokens_seen is not None else entry.step * int(spec.tokens_per_step or 0)


def _final(spec: Spec) -> int | None:
    """Step of a model's last checkpoint; None where only a folder tells."""
    if isinstance(spec, PretrainModel):
        return max(spec.checkpoints)
    if spec.checkpoints:
        return max(spec.checkpoints, key=lambda c: (_tokens(spec, c), c.step)).step
    return max(spec.steps) if spec.steps else None


def _finals(name: str, first: Study, second: Study, specs: dict[str, Spec]) -> set[int]:
    """The last steps of a model by either study and by both together."""
    models = [m for study in (first, second) for m in study.models if m.name == name]
    return {x for m in (*models, specs[name]) if (x := _final(m)) is not None}


def _check_choosers(first: Study, second: Study, specs: dict[str, Spec], new_final: frozenset[str]) -> None:
    """Where learning rates are chosen once, both must have chosen them at the same place.

    Raises:
        InputError: they did not; all SAEs would be trained again.
    """
    sae = first.sae
    if len(sae.lr) == 1:
        return
    if min(first.sae.seeds) != min(second.sae.seeds):
        seed = min(*first.sae.seeds, *second.sae.seeds)
        raise InputError(
            f"sae.seeds: the smallest seed chooses the learning rate, and the studies have others: add seed {seed} to both, "
            "run them, and merge then"
        )
    if new_final and sae.lr_choice == "final":
        name = min(new_final)
        raise InputError(
            f"models.{name}: the last checkpoint chooses the learning rate, and the studies have others: "
            f"add step {_final(specs[name])} to both, run them, and merge then"
        )


# ---- the rest


def _layers(first: Study, second: Study, specs: dict[str, Spec]) -> dict[str, Layers]:
    """Layers of each model: those of either study."""
    result: dict[str, Layers] = {}
    for name in specs:
        chosen = [x for study in (first, second) if (x := _chosen(study, name)) is not None]
        result[name] = "all" if "all" in chosen else tuple(sorted({layer for x in chosen for layer in x if isinstance(layer, int)}))
        if "all" in chosen and any(0 in x for x in chosen if not isinstance(x, str)):
            raise InputError(
                f"models.{name}.layers: one study has layer 0 and the other 'all', which is 1 and up: list the layers in both"
            )
    return result


def _chosen(study: Study, name: str) -> Layers | None:
    for spec in study.models:
        if spec.name == name:
            chosen = spec.layers or study.layers
            return chosen if isinstance(chosen, str) else tuple(sorted(set(chosen)))
    return None


def _own_layers(chosen: Layers, common: Any) -> dict[str, Any]:
    return {} if _plain(chosen) == common else {"layers": _plain(chosen)}


def _plain(chosen: Layers) -> Any:
    return chosen if isinstance(chosen, str) else list(chosen)


def _joined(first: Sequence[T], second: Sequence[T], field: str, gained: list[str]) -> list[T]:
    if new := sorted(set(second) - set(first)):
        gained.append(f"{field} {', '.join(map(str, new))}")
    return sorted({*first, *second})


def _join_controls(raw: dict[str, Any], first: Study, second: Study, gained: list[str]) -> None:
    for name in type(first.controls).model_fields:
        if getattr(second.controls, name) and not getattr(first.controls, name):
            raw["controls"][name] = True
            gained.append(f"controls.{name}")


def _join_intervention(raw: dict[str, Any], first: Study, second: Study, gained: list[str], notes: list[str]) -> None:
    if first.intervention is None and second.intervention is not None:
        raw["intervention"] = second.dump()["intervention"]
        gained.append("intervention")
    elif second.intervention not in (None, first.intervention):
        notes.append("intervention differs")


def _differences(first: Any, second: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted field, its value, its other value) wherever two dumps differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for key in sorted({*first, *second}):
            found += _differences(first.get(key), second.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if first == second else [(prefix, first, second)]


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)
