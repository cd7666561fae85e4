"""Opens a run for the browser, and drives its export: the one place where the site meets the study."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from glottoscope import __version__
from glottoscope.errors import InputError
from glottoscope.report.browser.index import setup_folders
from glottoscope.report.browser.site import Site
from glottoscope.report.browser.source import Measure, SiteSource
from glottoscope.study.columns import EVOLUTION, FEATURES, INTERVAL, Column
from glottoscope.study.config import LANGUAGE_NAMES, PlantedCorpus, PretrainModel, Study, TextCorpus
from glottoscope.study.plan import Cell, ModelRun, cells_of, expand
from glottoscope.study.stages.context import Context, TokenInfo
from glottoscope.study.store import RunStore

if TYPE_CHECKING:
    from glottoscope.features.clustering import Clustering
    from glottoscope.report.browser.labels import Label

CONTINUE = "`glottoscope run` continues the study"
CONTROL_NAMES = {
    "none": "trained model",
    "negative": "negative control: no cross-lingual signal in its text",
    "no_switching": "control: trained without code switching",
    "shuffled": "control: final model with shuffled weights",
    "frozen_decoder": "control: SAE with a frozen decoder",
    "embeddings": "control: SAE on the embeddings",
}
KYOTO = (
    "Japanese-English Bilingual Corpus of Wikipedia's Kyoto Articles",
    "CC BY-SA 3.0",
    "National Institute of Information and Communications Technology (NICT); text of Wikipedia's contributors",
)
# Column -> (label, decimals shown). Units and meanings are those of the tables.
_FEATURE_LABELS = {
    "share": ("language share", 2), "share_low": ("language share, low", 2), "share_high": ("language share, high", 2),
    "density": ("density", 5), "max_activation": ("maximum activation", 3), "n_positions": ("positions", 0),
    "n_{lang}": ("{lang} positions", 0), "n_neutral": ("neutral positions", 0), "h_token": ("token entropy", 2),
    "h_semantic": ("cluster entropy", 2), "monosemanticity": ("R", 2), "monosemanticity_hidden": ("R, hidden states", 2),
    "coherence": ("coherence", 2), "coherence_token": ("coherence of tokens", 2), "phi": ("phi", 2),
    "phi_null": ("phi by chance", 2), "n_pairs_a": ("firing sentences, first language", 0),
    "n_pairs_b": ("firing sentences, second language", 0), "single_token": ("single token", 0),
    "supportable": ("enough firing sentences", 0), "bilingual": ("bilingual", 0),
    "bilingual_paper": ("bilingual by the paper's rule", 0), "granularity": ("granularity", 0), "alive": ("alive", 2),
}  # fmt: skip
_SETUP_LABELS = {
    "share_{lang}": ("{lang} share", 2), "share_mixed": ("mixed share", 2), "share_bilingual": ("bilingual share", 2),
    "share_bilingual_paper": ("bilingual share by the paper's rule", 2), "share_supportable": ("supportable share", 2),
    "share_unclassified": ("unclassified share", 2), "share_neutral": ("neutral share", 2), "alive": ("alive share", 2),
    "monosemanticity": ("R", 2), "monosemanticity_multi": ("R without single-token features", 2),
    "monosemanticity_pooled": ("R, pooled", 2), "monosemanticity_hidden": ("R, hidden states", 2),
    "coherence": ("coherence", 2), "coherence_token": ("coherence of tokens", 2), "alignment": ("alignment", 2),
    "alignment_truth": ("alignment, planted truth", 2), "fvu": ("unexplained variance", 3), "cosine": ("reconstruction cosine", 3),
    "l0": ("active features per token", 1), "fvu_{lang}": ("unexplained variance, {lang}", 3),
    "lm_loss_{lang}": ("LM loss, {lang}", 2), "lm_learning_rate": ("LM learning rate", 6),
    "sae_learning_rate": ("SAE learning rate", 6), "theta": ("cluster threshold", 2),
    "theta_hidden": ("cluster threshold, hidden states", 2),
    "monosemanticity_floor_shuffled": ("R by chance (shuffled clusters)", 2),
    "monosemanticity_floor_random": ("R by chance (random vectors)", 2),
    "monosemanticity_hidden_floor_shuffled": ("R, hidden states, by chance", 2),
    "coherence_floor_shuffled": ("coherence by chance", 2), "truth_auc_phi": ("AUC of phi against the truth", 2),
    "truth_auc_flag": ("AUC of the bilingual flag against the truth", 2),
    "truth_auc_mixed": ("AUC of mixed against the truth", 2),
    "n_bilingual_shuffled": ("bilingual with shuffled sentences", 0),
    "n_bilingual_next": ("bilingual with the next sentence", 0),
}  # fmt: skip


def open_site(run: Path, *, live: Mapping[str, Any] | None = None) -> Site:
    """The site of a run directory.

    Raises:
        InputError: there is no such run, it has nothing to show yet, it is damaged, or a newer glottoscope wrote it.
    """
    return Site(gather(RunStore(run)), live=live)


def gather(store: RunStore) -> SiteSource:
    """Everything that the site needs besides the run's own tables."""
    study = store.study()
    context = Context(study, store, recorded=True)
    if not setup_folders(store):
        raise InputError(f"{store.root} holds no features yet: {CONTINUE}")
    info, runs = context.token_info, _runs(study)
    features = study.features
    return SiteSource(
        store=store,
        study=study.study.name,
        title=study.study.name,
        version=__version__,
        languages=info.languages,
        language_names={x: LANGUAGE_NAMES.get(x, x) for x in info.languages},
        thresholds={
            "activation": features.threshold,
            "phi": features.phi_threshold,
            "monosemanticity": features.paper_threshold,
            "language_share": features.language_share,
            "phi_firing": features.phi_firing,
            "min_count": features.min_count,
            "min_firings": features.min_firings,
        },
        rule=features.rule,
        window=min(info.block_length, features.example_window),
        k=study.sae.k,
        measures=_measures(info.languages),
        controls=CONTROL_NAMES,
        names=_names(study),
        middle={run.name: _layer(study, run) for run in runs if run.layers},
        special_ids=info.special_ids,
        licences=_licences(study),
        notes=_notes(study, info),
        partial=_partial(study, store, info, runs),
        activation_edges=_activation_edges(),
        clusters=_Clusters(context),
        agreement=_Agreement(store),
    )


def _runs(study: Study) -> tuple[ModelRun, ...]:
    """Models of the study; none where their checkpoints were moved away since."""
    try:
        return expand(study)
    except InputError:
        return ()


def _layer(study: Study, run: ModelRun) -> int:
    wanted = study.report.layer
    return wanted if isinstance(wanted, int) and wanted in run.known_layers() else run.middle_layer


def _names(study: Study) -> dict[str, str]:
    """Model -> shown name: one for all seeds of a model, as in the report."""
    names: dict[str, str] = {}
    for spec in study.models:
        seeds = spec.seeds if isinstance(spec, PretrainModel) else (0,)
        for seed in seeds:
            run = spec.name if seed == 0 else f"{spec.name}-s{seed}"
            names[run] = spec.name
            names |= {f"{run}-{control}": f"{spec.name}-{control}" for control in ("shuffled", "frozen_decoder")}
    return names


# ---- words


def _measures(languages: tuple[str, ...]) -> tuple[Measure, ...]:
    """Labels, units and meanings of the columns: of features first, then what only setups have."""
    of_setups = {name: _spread(name, label, languages, EVOLUTION) for name, label in _SETUP_LABELS.items()}
    found: dict[str, Measure] = {}
    for name, label in _FEATURE_LABELS.items():
        for measure in _spread(name, label, languages, FEATURES):
            setup = next((m for m in of_setups.get(name, ()) if m.name == measure.name), None)
            found[measure.name] = measure._replace(setup_meaning=setup.meaning if setup else None)
    for measures in of_setups.values():
        for measure in measures:
            found.setdefault(measure.name, measure)
    return tuple(found.values())


def _spread(name: str, label: tuple[str, int], languages: tuple[str, ...], columns: Mapping[str, Column]) -> list[Measure]:
    column = columns.get(name) or columns[name + INTERVAL]
    words, digits = label
    if "{lang}" not in name:
        return [Measure(name, words, column.unit, column.meaning, digits)]
    return [
        Measure(name.format(lang=x), words.format(lang=LANGUAGE_NAMES.get(x, x)), column.unit, column.meaning, digits)
        for x in languages
    ]


def _notes(study: Study, info: TokenInfo) -> tuple[str, ...]:
    notes = [*info.notes, *([study.study.notes] if study.study.notes else [])]
    if isinstance(study.corpus, PlantedCorpus):
        notes.append(
            "The text is a planted world with word-level truth; its default was chosen after trials, so it shows that the "
            "instrument can see and verify the effect and is no independent evidence for the paper."
        )
    if not info.aligned:
        notes.append("There are no aligned sentences: phi and bilingual are not known, and no sentence pairs are shown.")
    elif len(info.languages) > 2:
        notes.append(f"phi and alignment compare {info.languages[0]} with {info.languages[1]} only.")
    return tuple(notes)


def _licences(study: Study) -> tuple[tuple[str, str, str], ...]:
    """Who owns the text that the site shows."""
    rows = [(line, "", "") for line in study.report.licences]
    corpus = study.corpus
    if isinstance(corpus, PlantedCorpus):
        rows.append(("Planted world", "part of glottoscope, Apache-2.0", ""))
    elif isinstance(corpus, TextCorpus) and any(s.format == "kyoto-xml" for s in corpus.sources):
        rows.append(KYOTO)
    elif not rows:
        rows.append(("Text of this study", "not stated", "state it in report.licences of the study file"))
    return tuple(rows)


# ---- what is missing


def _partial(study: Study, store: RunStore, info: TokenInfo, runs: tuple[ModelRun, ...]) -> tuple[str, ...]:
    """What the run lacks, one plain sentence each; empty where it is complete."""
    folders = setup_folders(store)
    scored = {name for name, folder in folders.items() if (folder / "features.parquet").exists()}
    wanted = {_id(cell, layer, seed) for cell in cells_of(runs) for layer in cell.model.layers or () for seed in study.sae.seeds}
    lines = []
    missing = (wanted | set(folders)) - scored
    if missing:
        first = min(missing)
        lines.append(
            f"{len(missing)} of {len(wanted | set(folders))} setups have no scored features yet (the first: {first}) and are "
            f"left out: {CONTINUE}."
        )
    redone = [name for name in sorted(scored) if not {"features", "score"} <= set(store.done(folders[name]))]
    if redone:
        lines.append(f"{len(redone)} setups are being made again (the first: {redone[0]}) and may not fit together: {CONTINUE}.")
    if not store.table_path("evolution").exists():
        lines.append(f"The tables over all setups are not made yet: {CONTINUE}.")
    kinds = {"activations": "histograms of activations", "pairs": "aligned sentences"}
    if "test" not in info.aligned:
        del kinds["pairs"]
    for name, words in kinds.items():
        without = [x for x in sorted(scored) if not (folders[x] / f"{name}.parquet").exists()]
        if without:
            lines.append(
                f"{words.capitalize()} of the features are not there for {len(without)} of {len(scored)} setups, which an older "
                "glottoscope made: run the study again."
            )
    return tuple(lines)


def _id(cell: Cell, layer: int, seed: int) -> str:
    return f"{cell.name}/layer_{layer:02d}/seed_{seed}"


# ---- from the features room


def _activation_edges() -> NDArray[Any]:
    from glottoscope.features.collect import activation_edges

    return activation_edges()


class _Clusters:
    """Clusters of tokens in the hidden states of a layer, as monosemanticity_hidden has them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: dict[tuple[str, int], Clustering | None] = {}

    def __call__(
        self, model: str, layer: int, feature: NDArray[Any], token: NDArray[Any], count: NDArray[Any]
    ) -> NDArray[Any] | None:
        """Cluster of each row (feature, token, count), sorted by feature, then token; None where there are none."""
        from glottoscope.features.clustering import row_labels
        from glottoscope.features.collect import Groups

        clustering = self._clustering(model, layer)
        if clustering is None:
            return None
        # row_labels counts by feature from 0: the features asked for are few of many.
        number, dense = np.unique(feature, return_inverse=True)
        return row_labels(clustering, Groups(dense, token, count), len(number))[0]

    def _clustering(self, model: str, layer: int) -> Clustering | None:
        key = (self._owner(model), layer)
        if key not in self._kept:
            # Two threads may read the same file: the one that comes last is kept, and they are equal.
            self._kept[key] = self._read(*key)
        return self._kept[key]

    def _owner(self, model: str) -> str:
        """The model whose final checkpoint is the ruler of a control made from it."""
        folder = self._context.store.ruler_dir(model)
        return model if folder.is_dir() else model.removesuffix("-shuffled").removesuffix("-frozen_decoder")

    def _read(self, model: str, layer: int) -> Clustering | None:
        from safetensors import SafetensorError, safe_open

        from glottoscope.features.clustering import Clustering, centre_by_language, unit_rows
        from glottoscope.features.language import token_language

        context, name = self._context, f"hidden_layer_{layer:02d}"
        folder = context.store.ruler_dir(model)
        path = folder / f"clusters_{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                theta = float(file.get_tensor("theta")[0])
                if "labels" in file.keys():  # noqa: SIM118 - not a mapping
                    labels = file.get_tensor("labels")
                    return Clustering(np.zeros((len(labels), 1), np.float32), np.ones(len(labels), bool), theta, labels, None)
            # Too many tokens for one clustering: those of each feature are clustered, from the vectors.
            path = folder / f"{name}.safetensors"
            with safe_open(path, "numpy") as file:
                vectors, weights = file.get_tensor("vectors"), file.get_tensor("counts").copy()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it and run the study again") from None
        weights[list(context.token_info.special_ids)] = 0
        counts = context.vocabulary.counts
        language = token_language(counts, counts.sum(axis=0), context.neutral())
        return Clustering(unit_rows(centre_by_language(vectors, language, weights > 0)), weights > 0, theta, None, None)


class _Agreement:
    """How labels agree; what computes it is loaded with the first label."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._function: Callable[[Sequence[Label]], dict[str, Any]] | None = None

    def __call__(self, labels: Sequence[Label]) -> dict[str, Any]:
        if self._function is None:
            from glottoscope.study.label_agreement import agreement_of

            self._function = agreement_of(self._store)
        return self._function(labels)


# ---- export


class _FilesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} files/s" if task.speed else "", style="dim")


def export(run: Path, folder: Path, console: Console, force: bool = False) -> None:
    """Write the site of a run into a folder, with a line of progress, and say what was written.

    Raises:
        InputError: as `open_site`; the folder holds something else, or cannot be written.
        KeyboardInterrupt: stopped; every file is whole, and the same command completes the site.
    """
    from glottoscope.report.browser.export import export_site

    site = open_site(run)
    for line in site.source.partial:
        console.print(f"note: {line}")
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _FilesPerSecond(), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("export", total=None)

            def report(done: int, total: int, words: str) -> None:
                bar.update(task, completed=done, total=total, description=words)

            done = export_site(site, folder, report, force=force)
    except KeyboardInterrupt:
        console.print(f"{folder}: the site is not complete; every file in it is whole, and the same command completes it")
        raise
    console.print(
        f"{folder}: {done.files:,} files, {decimal(done.bytes)} ({done.written:,} written, {done.removed:,} removed) in "
        f"{time.monotonic() - started:.1f} s"
    )
    if done.left:
        console.print(f"{done.left:,} files of an earlier export are no longer part of the site: --force removes them")
