"""Opens a run for the browser, and drives its export: the one place where the site meets the study."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from glottoscope.report.browser.source import SiteSource
from glottoscope.study.config import LANGUAGE_NAMES, PretrainModel, Study
from glottoscope.study.plan import expand
from glottoscope.study.site_words import CONTROL_NAMES, licences_of, measures_of, notes_of
from glottoscope.study.stages.context import Context, TokenInfo
from glottoscope.study.store import RunStore

if TYPE_CHECKING:
    from glottoscope.features.clustering import Clustering
    from glottoscope.report.browser.labels import Label

CONTINUE = "`glottoscope run` continues the study"


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
    info, planned = context.token_info, _planned(study)
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
        measures=measures_of(info.languages),
        controls=CONTROL_NAMES,
        names=_names(study),
        middle={run.name: _middle(study, run) for run in planned if run.layers},
        special_ids=info.special_ids,
        licences=licences_of(study),
        notes=notes_of(study, info),
        partial=_partial(study, store, info, planned),
        activation_edges=_activation_edges(),
        clusters=_Clusters(context),
        agreement=_Agreement(store),
    )


class _Planned(NamedTuple):
    """A model of the study, as far as the site has to know it."""

    name: str
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    depth: int  # decoder blocks


def _planned(study: Study) -> list[_Planned]:
    """Models of the study and the controls made from them; without those whose checkpoints were moved away since.

    `plan.expand` says the same, but for models trained here it counts parameters, which loads a tokenizer library.
    """
    found: list[_Planned] = []
    controls = [x for x in ("shuffled", "frozen_decoder") if getattr(study.controls, x)]
    for spec in study.models:
        if isinstance(spec, PretrainModel):
            wanted = spec.layers or study.layers
            layers = tuple(range(1, spec.n_layers + 1)) if isinstance(wanted, str) else tuple(sorted(set(wanted)))
            for seed in spec.seeds:
                run = _Planned(_run_name(spec.name, seed), spec.checkpoints, layers, spec.n_layers)
                made = controls if spec.control == "none" else []
                found += [run, *(run._replace(name=f"{run.name}-{x}", steps=run.steps[-1:]) for x in made)]
    given = tuple(spec for spec in study.models if not isinstance(spec, PretrainModel))
    with contextlib.suppress(InputError):
        for run in expand(study.model_copy(update={"models": given})):
            steps = tuple(c.step for c in run.checkpoints)
            layers = run.layers or ()
            found.append(_Planned(run.name, steps, layers, run.shape.n_layers if run.shape else max(layers, default=0)))
    return found


def _run_name(model: str, seed: int) -> str:
    return model if seed == 0 else f"{model}-s{seed}"


def _middle(study: Study, run: _Planned) -> int:
    """The layer that the report's curves follow."""
    wanted = study.report.layer
    if isinstance(wanted, int) and wanted in run.layers:
        return wanted
    return min(run.layers, key=lambda x: (abs(x - run.depth / 2), x))


def _names(study: Study) -> dict[str, str]:
    """Model -> shown name: one for all seeds of a model, as in the report."""
    names: dict[str, str] = {}
    for spec in study.models:
        seeds = spec.seeds if isinstance(spec, PretrainModel) else (0,)
        for seed in seeds:
            run = _run_name(spec.name, seed)
            names[run] = spec.name
            names |= {f"{run}-{control}": f"{spec.name}-{control}" for control in ("shuffled", "frozen_decoder")}
    return names


# ---- what is missing


def _partial(study: Study, store: RunStore, info: TokenInfo, planned: list[_Planned]) -> tuple[str, ...]:
    """What the run lacks, one plain sentence each; empty where it is complete."""
    folders = setup_folders(store)
    scored = {name for name, folder in folders.items() if (folder / "features.parquet").exists()}
    places = itertools.chain.from_iterable(itertools.product([x.name], x.steps, x.layers, study.sae.seeds) for x in planned)
    wanted = {f"{model}@{step}/layer_{layer:02d}/seed_{seed}" for model, step, layer, seed in places}
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


def export(run: Path, folder: Path, console: Console, force: bool = False, *, dry_run: bool = False) -> None:
    """Write the site of a run into a folder, with a line of progress, and say what was written; a dry run says what would be.

    Raises:
        InputError: as `open_site`; the folder holds something else, or cannot be written.
        KeyboardInterrupt: stopped; every file is whole, and the same command completes the site.
    """
    from glottoscope.report.browser.export import export_site, plan_export

    site = open_site(run)
    for line in site.source.partial:
        console.print(f"note: {line}")
    if dry_run:
        planned = plan_export(site, folder, force=force)
        console.print(f"{folder}: would hold {planned.files:,} files; {planned.there:,} of that name are there already")
        if planned.left:
            would = "would be removed" if force else "would be left (--force removes them)"
            console.print(f"{planned.left:,} files of an earlier export that are no longer part of the site {would}")
        console.print("nothing was changed")
        return
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
