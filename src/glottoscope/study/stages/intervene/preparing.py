"""The plan of an experiment, made on dev text alone: the sets of features, the strength alpha, and the random draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.atomic import atomic_path, write_json
from glottoscope.errors import InputError
from glottoscope.intervention.conditions import Condition, Readers, edits_of
from glottoscope.intervention.draws import matched_draws
from glottoscope.intervention.perplexity import masses, measure
from glottoscope.intervention.selection import select
from glottoscope.lm.patch import check_pair
from glottoscope.sae.model import TopKSAE
from glottoscope.study.plan import Cell, seed_for
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import Experiment, dev_of, parts_of, possible_texts, prepare_key, read_plan
from glottoscope.study.stages.intervene.losses import save_losses
from glottoscope.study.stages.intervene.texts import text_of
from glottoscope.study.store import read_parquet

Sets = dict[int, dict[str, NDArray[np.bool_]]]  # layer -> name -> [N]
FILES = ["plan.json", "sets.npz"]


class Scene(NamedTuple):
    """The two models of an experiment and the SAEs that read them."""

    base: Any
    donor: Any
    readers: dict[int, Readers]


def open_scene(context: Context, experiment: Experiment) -> Scene:
    """Load models and SAEs.

    Raises:
        InputError: an SAE that is not there, or models that do not fit together.
    """
    base_cell, donor_cell = experiment.cells(context)
    readers = {}
    for layer in experiment.layers:
        donor, base = (_sae(context, cell, layer, experiment.seed) for cell in (donor_cell, base_cell))
        readers[layer] = Readers.of(donor, base)
    base = context.load_lm(base_cell)
    donor = base if donor_cell == base_cell else context.load_lm(donor_cell)
    check_pair(base, donor, experiment.layers, (base_cell.name, donor_cell.name))
    return Scene(base, donor, readers)


def _sae(context: Context, cell: Cell, layer: int, seed: int) -> TopKSAE:
    folder = context.store.setup_dir(cell.model.name, cell.checkpoint.step, layer, seed)
    if not (folder / "features.parquet").exists():
        raise InputError(
            f"{cell.name}, layer {layer}: there is no SAE with scored features in {folder}: `glottoscope run` makes it"
        )
    return TopKSAE.load(folder, device=str(context.device()))


def _features(context: Context, cell: Cell, layer: int, seed: int) -> pa.Table:
    return read_parquet(context.store.setup_dir(cell.model.name, cell.checkpoint.step, layer, seed) / "features.parquet")


def prepare(root: str, raw: dict[str, Any], report: Callable[..., None]) -> None:
    """Write plan.json, sets.npz and the losses on dev of one experiment."""
    context, experiment = Context.open(root), Experiment.parse(raw)
    config, folder = experiment.config, experiment.folder(context)
    context.store.begin(folder, "prepare", "effects")
    scene = open_scene(context, experiment)
    report(0, 3, "activation mass on dev text")
    special, batch = context.token_info.special_ids, context.study.compute.lm_batch
    readers = {layer: r.donor for layer, r in scene.readers.items()}
    dev = text_of(context, config, "dev_documents").windows
    mass = masses(scene.donor, dev, readers, special_ids=special, batch=batch)
    sets, notes = _classes(context, experiment)
    report(1, 3, "alpha on dev text")
    wanted = [*possible_texts(context), "translation"]  # all there are: another choice of texts needs no other plan
    alphas = {name: _choose_alpha(context, experiment, scene, name, sets) for name in {dev_of(context, t): 0 for t in wanted}}
    report(2, 3, "random draws")
    _draw(context, experiment, mass, sets, notes)
    plan = {"texts": {}, "notes": notes, "mass": {}}
    for text in wanted:
        alpha = alphas[dev_of(context, text)]
        conditions = [asdict(c) for c in _conditions(context, experiment, sets, alpha)]
        plan["texts"][text] = {"alpha": alpha, "conditions": conditions}
    names = [name for name in sets[experiment.layers[0]] if not name.startswith("self:")]
    plan["mass"] = {name: _mass_share(mass, sets, name) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "sets.npz") as temporary, open(temporary, "wb") as handle:
        arrays = {f"{layer}/{name}": np.packbits(chosen) for layer, found in sets.items() for name, chosen in found.items()}
        sizes = {f"size/{layer}": np.int64(len(next(iter(found.values())))) for layer, found in sets.items()}
        np.savez(handle, **arrays, **sizes)  # pyright: ignore[reportArgumentType]
    write_json(folder / "plan.json", plan)
    context.store.mark_done(folder, "prepare", prepare_key(context, experiment), {}, [*FILES, *(f"{name}.npz" for name in alphas)])


def _classes(context: Context, experiment: Experiment) -> tuple[Sets, dict[str, str]]:
    """The features of every part, in the donor's SAE and ("self:...") in the base's; notes on empty ones."""
    config, languages = experiment.config, context.study.languages
    base, donor = experiment.cells(context)
    sets: Sets = {layer: {} for layer in experiment.layers}
    notes = {}
    for layer in experiment.layers:
        theirs, own = (_features(context, cell, layer, experiment.seed) for cell in (donor, base))
        for part in parts_of(context, config):
            wanted = config.features.get(part, part)
            sets[layer][part] = select(theirs, wanted, languages)
            if isinstance(wanted, str):  # ids mean nothing in another SAE
                sets[layer][f"self:{part}"] = select(own, wanted, languages)
        # The strength is chosen by it and the draws come from it, whatever parts were asked for.
        sets[layer].setdefault("all", select(theirs, "all", languages))
    for part in parts_of(context, config):
        if not any(found[part].any() for found in sets.values()):
            notes[part] = _why_empty(context, part)
    return sets, notes


def _why_empty(context: Context, part: str) -> str:
    if part == "bilingual" and "test" not in context.token_info.aligned:
        return "empty class: without aligned sentences no feature is known to be bilingual"
    return "empty class: the donor's SAE has no such feature"


def _choose_alpha(context: Context, experiment: Experiment, scene: Scene, name: str, sets: Sets) -> float:
    """The strength with the lowest pooled loss of `all` on dev; the losses are kept for the table."""
    config, dev = experiment.config, text_of(context, experiment.config, name)
    conditions = [Condition("baseline"), Condition("donor")]
    conditions += [Condition("part", "all", alpha=alpha, features="all") for alpha in config.alphas]
    pairs = [(c, edits_of(c, scene.readers, sets, config.mode, config.scale)) for c in conditions]
    found = measure(
        scene.base, scene.donor, dev.windows, pairs, experiment.layers,
        special_ids=context.token_info.special_ids, batch=context.study.compute.lm_batch,
    )  # fmt: skip
    folder = experiment.folder(context)
    folder.mkdir(parents=True, exist_ok=True)
    save_losses(folder / f"{name}.npz", found)
    return config.alphas[int(np.argmin(found.nll[2:].sum(axis=1)))]


def _draw(
    context: Context, experiment: Experiment, mass: Mapping[int, NDArray[np.float64]], sets: Sets, notes: dict[str, str]
) -> None:
    """Add random sets of matched mass, from all alive features and from those outside the part."""
    n_draws = experiment.config.draws
    if n_draws == 0:
        return
    parts = [p for p in sets[experiment.layers[0]] if p != "all" and not p.startswith("self:") and p not in notes]
    for part in parts:
        for arm in ("random", "random_other"):
            drawn = {}
            for layer in experiment.layers:
                alive, member = sets[layer]["all"], sets[layer][part]
                pool = alive & ~member if arm == "random_other" else alive
                seed = seed_for(context.study, "draws", arm, part, layer) % 2**63
                drawn[layer] = matched_draws(mass[layer], member, pool, n_draws=n_draws, seed=seed)
            if reasons := [d.note for d in drawn.values() if d.note]:
                notes[f"{arm}:{part}"] = reasons[0]
            n = min(len(d.members) for d in drawn.values())
            for layer, draws in drawn.items():
                for i in range(n):
                    sets[layer][f"{arm}:{part}:{i}"] = draws.members[i]


def _mass_share(mass: Mapping[int, NDArray[np.float64]], sets: Sets, name: str) -> float:
    """Share of the SAE's activation mass on dev that a set holds, the mean over layers."""
    shares = [
        float(mass[layer][found[name]].sum() / mass[layer].sum()) if mass[layer].sum() else 0.0 for layer, found in sets.items()
    ]
    return sum(shares) / len(shares)


def _conditions(context: Context, experiment: Experiment, sets: Sets, alpha: float) -> list[Condition]:
    config = experiment.config
    first = sets[experiment.layers[0]]
    parts = [p for p in parts_of(context, config) if any(found[p].any() for found in sets.values())]
    result = [Condition("baseline"), Condition("donor"), Condition("identity")]
    result += [Condition("part", p, alpha=a, chosen=a == alpha, features=p) for p in parts for a in config.alphas]
    for part in parts:
        if f"self:{part}" in first and any(found[f"self:{part}"].any() for found in sets.values()):
            result.append(Condition("self", part, alpha=alpha, features=f"self:{part}"))
        result.append(Condition("shuffled", part, alpha=alpha, features=part))
    result += [Condition("reconstruction"), Condition("state", alpha=alpha), Condition("state_replaced")]
    for part in parts:
        for i in range(config.draws):
            for arm in ("random", "random_other"):
                if (name := f"{arm}:{part}:{i}") in first:
                    result.append(Condition(arm, part, draw=i, alpha=alpha, features=name))
    return result


def load_conditions(context: Context, experiment: Experiment, text: str) -> tuple[list[Condition], Sets]:
    """The conditions for a text and the sets of a plan that was written."""
    folder = experiment.folder(context)
    conditions = [Condition(**c) for c in read_plan(folder)["texts"][text]["conditions"]]
    sets: Sets = {layer: {} for layer in experiment.layers}
    with np.load(folder / "sets.npz") as arrays:
        for key in arrays.files:
            layer, _, name = key.partition("/")
            if layer != "size":
                sets[int(layer)][name] = np.unpackbits(arrays[key], count=int(arrays[f"size/{layer}"])).astype(bool)
    return conditions, sets
