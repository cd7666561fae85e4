"""Which interventions a study asks for, where their artefacts lie, and the keys that say whether they are complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from glottoscope.corpus.llm_jp_eval import shots_file
from glottoscope.errors import InputError
from glottoscope.study.config import InterventionConfig, TextCorpus
from glottoscope.study.plan import Cell, ModelRun
from glottoscope.study.stages.context import Context, _hash_tree
from glottoscope.study.store import digest
from glottoscope.walking import listed

VERSIONS = {"prepare": 3, "measure": 2, "translate": 2, "effects": 3}
STUDY_NAME = "study"  # experiments that the study file asks for; those of the command line have another name
CHUNK = 96  # conditions measured together: the lower half of the models is read once for them
TRANSLATED_CHUNK = 16
# What changes the conditions or how text is cut, as opposed to where and how often.
_PLAN_FIELDS = {"parts", "features", "mode", "scale", "alphas", "draws", "tokens", "window", "stride"}


@dataclass(frozen=True)
class Experiment:
    """One base, one donor, one set of layers patched together, with the settings of the intervention."""

    name: str
    model: str
    donor_model: str
    base: int
    donor: int
    layers: tuple[int, ...]
    seed: int
    config: InterventionConfig

    @property
    def title(self) -> str:
        layers = "+".join(map(str, self.layers))
        donor = f"{self.donor}" if self.donor_model == self.model else f"{self.donor_model}@{self.donor}"
        return f"{self.model}@{self.base} + {donor} layer {layers}"

    def folder(self, context: Context) -> Path:
        pair = f"{self.model}@{self.base}+{self.donor_model}@{self.donor}"
        layers = "+".join(f"{x:02d}" for x in self.layers)
        return context.store.intervention_dir(self.name, pair, f"{layers}-{self.config.mode}-{self.config.scale}", self.seed)

    def dump(self) -> dict[str, Any]:
        return {
            "name": self.name, "model": self.model, "donor_model": self.donor_model, "base": self.base, "donor": self.donor,
            "layers": list(self.layers), "seed": self.seed, "config": self.config.model_dump(mode="json", exclude_none=True),
        }  # fmt: skip

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Experiment:
        config = InterventionConfig.model_validate(raw["config"])
        return cls(**{**raw, "layers": tuple(raw["layers"]), "config": config})

    def cells(self, context: Context) -> tuple[Cell, Cell]:
        """(base, donor)."""
        return context.cell_of(self.model, self.base), context.cell_of(self.donor_model, self.donor)


# ---- expansion


def experiments(context: Context, config: InterventionConfig, name: str = STUDY_NAME) -> list[Experiment]:
    """The experiments that an intervention's settings amount to, in order.

    Raises:
        InputError: a model, step or layer that the study does not have, widths or vocabularies that do not fit, or
            translation without sentences; names the field and what there is.
    """
    result = []
    seed = min(context.study.sae.seeds)
    for scene in check(context, config):
        groups = [scene.layers] if config.together else [(layer,) for layer in scene.layers]
        for base in half_step(context, scene.run) if config.bases == "half" else dict.fromkeys(config.bases):
            result += [
                Experiment(name, scene.run.name, scene.donor_run.name, base, scene.donor, group, seed, config) for group in groups
            ]
    return result


class Place(NamedTuple):
    """A model that is patched, where, and what it is given."""

    run: ModelRun
    donor_run: ModelRun
    donor: int
    layers: tuple[int, ...]


def check(context: Context, config: InterventionConfig) -> list[Place]:
    """The models, donors and layers that settings name; needs no result of the study.

    Raises:
        InputError: as `experiments`, but for what only results can tell.
    """
    _check_parts(context, config)
    if not texts(context, config):
        raise InputError("intervention.texts: sentences need corpus.aligned.test: give it, or take documents")
    if config.translation is not None:
        _check_translation(context, config)
    result = []
    for run in _models(context, config):
        donor_run = run if config.donor_model is None else _run(context, config.donor_model, "intervention.donor_model")
        donor = donor_run.final.step if config.donor == "final" else _step(donor_run, config.donor, "donor")
        _check_fit(run, donor_run)
        result.append(Place(run, donor_run, donor, _layers(context, run, donor_run, config)))
        for base in () if config.bases == "half" else config.bases:
            _step(run, base, "base")
    _check_ids(context, config, result)
    return result


def _check_ids(context: Context, config: InterventionConfig, found: list[Place]) -> None:
    saes = {(place.donor_run.name, place.donor, layer) for place in found for layer in place.layers}
    for part in parts_of(context, config):
        wanted = config.features.get(part, "")
        if isinstance(wanted, str):
            continue
        if len(saes) > 1:
            several = ", ".join(f"{model}@{step} layer {layer}" for model, step, layer in sorted(saes))
            raise InputError(
                f"features.{part}: ids are those of one SAE and there are several ({several}): give a condition in SQL, or one "
                "layer of one donor"
            )
        for place in found:
            assert place.donor_run.shape is not None
            n = context.study.sae.n_features(place.donor_run.shape.d_model)
            if outside := [i for i in wanted if i >= n]:
                raise InputError(f"features.{part}: feature {outside[0]} does not exist: the SAE has {n:,}, numbered from 0")


def _models(context: Context, config: InterventionConfig) -> list[ModelRun]:
    if config.models is not None:
        return [_run(context, name, "intervention.models") for name in dict.fromkeys(config.models)]
    candidates = [r for r in context.runs if r.control == "none" and r.lm_seed == min(_seeds(context, r))] or list(context.runs)
    return [max(candidates, key=lambda r: (r.shape.n_params if r.shape else 0, -candidates.index(r)))]


def _seeds(context: Context, run: ModelRun) -> list[int]:
    return [r.lm_seed for r in context.runs if r.spec is run.spec]


def _run(context: Context, name: str, field: str) -> ModelRun:
    names = [r.name for r in context.runs]
    if name not in names:
        raise InputError(f"{field}: there is no model {name!r}; there are {', '.join(names)}")
    return context.run_of(name)


def _step(run: ModelRun, step: int, what: str) -> int:
    steps = [c.step for c in run.checkpoints]
    if step not in steps:
        raise InputError(f"{what}: model {run.name} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return step


def _check_fit(run: ModelRun, donor: ModelRun) -> None:
    assert run.shape is not None
    assert donor.shape is not None
    if run.shape.d_model != donor.shape.d_model:
        raise InputError(
            f"base {run.name} has width {run.shape.d_model} and donor {donor.name} has width {donor.shape.d_model}: "
            "a state can only be added to one of the same width"
        )
    if run.shape.vocab_size != donor.shape.vocab_size:
        raise InputError(
            f"base {run.name} has a vocabulary of {run.shape.vocab_size:,} and donor {donor.name} one of "
            f"{donor.shape.vocab_size:,}: both must read the same token ids"
        )


def _layers(context: Context, run: ModelRun, donor: ModelRun, config: InterventionConfig) -> tuple[int, ...]:
    if config.layers == "middle":
        wanted = context.study.report.layer
        return (wanted,) if isinstance(wanted, int) and wanted in run.known_layers() else (run.middle_layer,)
    for layer in config.layers:
        for owner in (run, donor):
            if layer not in owner.known_layers():
                have = ", ".join(map(str, owner.known_layers()))
                raise InputError(f"layer {layer}: there is no SAE of {owner.name} there; the study has layers {have}")
    return tuple(sorted(set(config.layers)))


def _check_parts(context: Context, config: InterventionConfig) -> None:
    if taken := [name for name in config.features if name in context.study.languages]:
        raise InputError(f"intervention.features.{taken[0]}: that is a language of the study; choose another name")
    known = [*default_parts(context, config), "bilingual"]
    for part in (*(config.parts or ()), *(config.translation.drawn or () if config.translation else ())):
        if part not in known:
            raise InputError(f"part {part!r} is unknown: choose from {', '.join(dict.fromkeys(known))}, or name features")


def _check_translation(context: Context, config: InterventionConfig) -> None:
    corpus, translation = context.study.corpus, config.translation
    assert translation is not None
    if translation.files:
        for path in translation.files:
            if not Path(path).is_file():
                raise InputError(f"intervention.translation.files: {path}: no such file")
    elif isinstance(corpus, TextCorpus) and (corpus.aligned is None or corpus.aligned.test is None):
        raise InputError("translation needs sentences: give corpus.aligned.test, or intervention.translation.files")
    parts = translation.drawn
    if parts and "all" in parts:
        raise InputError("intervention.translation.drawn: 'all' has no random draws: every alive feature is in it")


def default_parts(context: Context, config: InterventionConfig) -> list[str]:
    """The parts that are taken where none are named, in the order of every table."""
    pairs = ["bilingual"] if "test" in context._aligned_sets() else []
    return [*context.study.languages, "mixed", *pairs, "bilingual_paper", "all", *config.features]


def parts_of(context: Context, config: InterventionConfig) -> list[str]:
    """The parts that are measured, each once."""
    return list(dict.fromkeys(config.parts or default_parts(context, config)))


def half_step(context: Context, run: ModelRun) -> list[int]:
    """The first checkpoint at which half of the fall in log perplexity from the first to the last is done (METHOD 6)."""
    losses: dict[int, float] = {}
    table = context.store.table("evolution")
    columns = ["model", "step", *(f"lm_loss_{x}" for x in context.study.languages)]
    for row in table.select(columns).to_pylist():
        values = [row[f"lm_loss_{x}"] for x in context.study.languages]
        if row["model"] == run.name and None not in values:
            losses[row["step"]] = sum(values) / len(values)
    steps = [c.step for c in run.checkpoints if c.step in losses]
    if len(steps) < 2 or losses[steps[-1]] >= losses[steps[0]]:
        raise InputError(f"model {run.name}: its loss does not fall between two checkpoints: give intervention.bases")
    half = (losses[steps[0]] + losses[steps[-1]]) / 2
    return [next(step for step in steps if losses[step] <= half)]


# ---- keys


def prepare_key(context: Context, experiment: Experiment) -> str:
    """Key of the plan: everything that decides the conditions and what they do."""
    base, donor = experiment.cells(context)
    saes = [context.score_key(cell, layer, experiment.seed) for cell in (base, donor) for layer in experiment.layers]
    config = experiment.config.model_dump(mode="json", include=_PLAN_FIELDS)
    return digest(
        "prepare", VERSIONS["prepare"], context.lm_key(base), context.lm_key(donor), saes, context.tokens_key,
        context.pass_settings, config, context.study.study.seed,
    )  # fmt: skip


def measure_key(context: Context, experiment: Experiment, text: str) -> str:
    return digest("measure", VERSIONS["measure"], CHUNK, prepare_key(context, experiment), text)


def translate_key(context: Context, experiment: Experiment) -> str:
    translation = experiment.config.translation
    assert translation is not None
    settings = translation.model_dump(mode="json", exclude={"files"})
    paths = [p for file in translation.files for p in (Path(file), shots_file(file)) if p is not None]
    hashes = [_hash_tree(path) for path in paths]
    return digest("translate", VERSIONS["translate"], TRANSLATED_CHUNK, prepare_key(context, experiment), settings, hashes)


def effects_key(context: Context, experiment: Experiment) -> str:
    parts = [measure_key(context, experiment, text) for text in texts(context, experiment.config)]
    if experiment.config.translation is not None:
        parts += [
            translate_key(context, experiment),
            stored_signatures(context, experiment),
            present_comet_key(context, experiment),
        ]
    return digest("effects", VERSIONS["effects"], parts, experiment.config.bootstrap, context.study.study.seed)


def stored_signatures(context: Context, experiment: Experiment) -> dict[str, dict[str, str]]:
    """What computed the scores of the translations that lie there: name of a chunk -> metric -> signature.

    It is what was there when they were scored: BLEU's tokenizer `auto` is not the same on every machine.
    """
    key = translate_key(context, experiment)
    records = context.store.done(experiment.folder(context)).items()
    return {
        name: record["settings"]["signatures"]
        for name, record in sorted(records)
        if name.startswith("translation-") and record.get("key") == key
    }


def comet_key(context: Context, experiment: Experiment, fingerprint: str) -> str:
    """Key of the COMET scores that a model gives to an experiment's translations."""
    return digest("comet", fingerprint, translate_key(context, experiment))


def present_comet_key(context: Context, experiment: Experiment) -> str | None:
    """Key of the COMET scores that lie in an experiment's folder; None where there are none of the present translations."""
    path = experiment.folder(context) / "comet.json"
    if "comet" not in context.store.done(path.parent) or not path.exists():
        return None
    key = comet_key(context, experiment, json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    return key if context.store.is_done(path.parent, "comet", key) else None


# ---- what lies in a run directory


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of an experiment: text -> alpha and conditions; notes; mass."""
    return json.loads((folder / "plan.json").read_text(encoding="utf-8"))


def chunks(folder: Path, text: str) -> list[range]:
    """Runs of conditions that are measured together."""
    n = len(read_plan(folder)["texts"][text]["conditions"])
    return [range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]


def texts(context: Context, config: InterventionConfig) -> list[str]:
    """Texts whose loss is measured: sentences only where there are aligned test sentences."""
    return [text for text in dict.fromkeys(config.texts) if text in possible_texts(context)]


def possible_texts(context: Context) -> list[str]:
    return ["documents", "sentences"] if "test" in context._aligned_sets() else ["documents"]


def dev_of(context: Context, text: str) -> str:
    """The dev text on which the strength for a text is chosen: of its own kind, where there is one."""
    return "dev_documents" if text == "documents" or "dev" not in context._aligned_sets() else "dev_sentences"


def all_experiments(context: Context) -> Iterator[Experiment]:
    """Every experiment of the run directory that is complete with what the run holds now, in a fixed order.

    Of those under the study's own name only what the study file asks for now.
    """
    asked = _asked_for(context)
    for path in listed(context.store.interventions_dir, "*/*/*/*/experiment.json"):
        try:
            experiment = Experiment.parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue  # others at work have just removed it
        if experiment.name == STUDY_NAME and path.parent not in asked:
            continue
        try:
            key = effects_key(context, experiment)
        except (InputError, StopIteration):
            continue  # of a model, step or layer that the study no longer has
        if context.store.is_done(path.parent, "effects", key):
            yield experiment


def _asked_for(context: Context) -> set[Path]:
    config = context.study.intervention
    try:
        return set() if config is None else {e.folder(context) for e in experiments(context, config)}
    except InputError:
        return set()  # the study is not complete
