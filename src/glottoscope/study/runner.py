"""Running a study: which units of which stage are missing, in what order, and what the run says of itself.

pretrain > tokens > train > features > score > intervene > report. A stage that is complete with the same settings and inputs is
not run again; what changed is done anew, and what no setting refers to stays until `clean`.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import glottoscope
from glottoscope.errors import InputError
from glottoscope.study.config import STAGES, PlantedCorpus, PretrainModel, Study, TextCorpus
from glottoscope.study.engine import Failure, Outcome, Unit
from glottoscope.study.engines import LOCAL, Machines, check_room, open_engine, room_of
from glottoscope.study.heartbeats import Sign, signs
from glottoscope.study.load import corpus_path
from glottoscope.study.machine import device_of, pretrain_memory, reading_memory, stated_room
from glottoscope.study.plan import BYTES, PROCESS, Cell, Room, parts_of, split_layers, train_memory, unit_name
from glottoscope.study.planning import announce
from glottoscope.study.stages import collecting, pretraining, reporting, rulers, scoring, tables, tokenizing, training
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene import units as intervening
from glottoscope.study.store import RunStore, digest, tree_size
from glottoscope.study.telling import telling
from glottoscope.study.versions import code_hash
from glottoscope.walking import listed

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "scipy",
    "pyarrow",
    "safetensors",
    "matplotlib",
    "pydantic",
)


WITH_STATES = {"pretrain": pretraining.waiting, "train": training.waiting}  # stage -> the states of its units


class RunResult(NamedTuple):
    """What became of a run."""

    failures: list[Failure]
    stage: str  # the last stage that ran

    @property
    def exit_code(self) -> int:
        """0 done, 1 some cells failed, 2 bad input."""
        if not self.failures:
            return 0
        return 2 if all(f.bad_input for f in self.failures) else 1


def run_study(
    study: Study, out: Path, *, until: str = "report", workers: int | None = None, console: Console | None = None,
    machines: Machines = LOCAL,
) -> RunResult:  # fmt: skip
    """Run a study into its run directory, continuing whatever is there.

    Args:
        until: last stage to run.
        workers: processes of this machine; default: cores / compute.threads. It changes no number.
        machines: which engine, and where it runs. They change no number either.

    Raises:
        InputError: bad input found before anything runs.
    """
    console = console or Console(stderr=True)
    # Workers on other machines start elsewhere: a path that says nothing of the current folder.
    store = RunStore(out.resolve())
    # A folder that is not this study's is not even locked: nothing of it changes.
    preflight(study)
    reach_machines(machines)
    store.check_owner(study)
    with store.lock():
        store.create(study, describe_run(study))
        for path in store.leftovers():
            store.remove(path)
        context = Context(store.study(), store)
        if context.downloads is not None:
            context.downloads.clear()  # what a killed process fetched
        if isinstance(study.corpus, TextCorpus):
            store.record_sources({str(corpus_path(study.corpus, p)): h for p, h in context.source_hashes.items()})
        context.record_shapes()
        # Loggers end after the units: they may take their time.
        with telling(study, store, console), open_engine(study, store, console, workers, machines) as engine:
            result, room = RunResult([], STAGES[0]), room_of(engine, study)
            check_room(context, room, until)
            announce(study, out, engine.slots, room, console, nodes=machines.address is not None)
            for stage, units in stages(context, room, engine.slots):
                if STAGES.index(stage) > STAGES.index(until):
                    break
                try:
                    outcome = engine.run(stage, units())
                except InputError as error:
                    if stage != "intervene":
                        raise
                    outcome = Outcome(failures=[Failure("interventions of the study file", str(error), True, "")])
                new = [failure for failure in outcome.failures if failure not in result.failures]
                result = RunResult(result.failures + new, stage)
                if new:
                    explain(console, outcome, stage)
                if not outcome.failures and stage in WITH_STATES:
                    _remove_states(context, stage)
                # The report needs no intervention: it shows those that could be finished.
                if outcome.failures and stage != "intervene":
                    break
    return result


def _remove_states(context: Context, stage: str) -> None:
    """Remove states of units that are complete: these were stopped after their last result and before they removed them.
    States of other settings stay until a training writes its own in their place, or until `clean`."""
    for waiting in WITH_STATES[stage](context):
        if waiting.is_complete:
            context.store.remove(waiting.folder)
            with contextlib.suppress(OSError):  # others' states are there
                waiting.folder.parent.rmdir()


def preflight(study: Study) -> None:
    """Find bad input before anything runs: missing files of corpus and labels, missing checkpoints, k beyond n, an
    intervention that names what the study does not have."""
    if isinstance(study.corpus, TextCorpus):
        aligned = study.corpus.aligned
        paths = [s.path for s in study.corpus.sources]
        paths += [p for p in (aligned.train, aligned.dev, aligned.test) if p] if aligned else []
        for path in paths:
            place = corpus_path(study.corpus, path)
            if not place.exists() and not list(place.parent.glob(place.name)):
                raise InputError(f"{place}: no such file, folder or glob (corpus of the study; set corpus.root?)")
    from glottoscope.lm.hub import FolderHub
    from glottoscope.study.plan import cost_of, expand

    for run in expand(study):
        for ref in run.checkpoints:
            if ref.path is not None and getattr(run.spec, "hub_id", None) is not None:
                if study.compute.hub is not None:
                    FolderHub(study.compute.hub).sizes(ref.path, ref.revision or "main")
                continue
            if ref.path is not None and not Path(ref.path).is_dir():
                raise InputError(f"model {run.name}: no checkpoint folder {ref.path} (step {ref.step})")
            if ref.path is not None and Path(ref.path).is_dir() and not _has_weights(Path(ref.path)):
                raise InputError(f"model {run.name}: {ref.path} holds no weights (*.safetensors or *.bin)")
        if run.shape is not None and study.sae.k > (n := study.sae.n_features(run.shape.d_model)):
            raise InputError(f"model {run.name}: sae.k = {study.sae.k} is larger than its n = {n} features: lower k or raise n")
        if study.compute.memory_gb is not None and run.shape is not None and run.layers is not None:
            cost_of(study, run, study.compute.memory_gb * 2**30)  # not even one layer fits: said before models are trained
    from glottoscope.lm.checkpoints import choose_device
    from glottoscope.sae.kernels import check_kernel

    check_kernel(study.sae.kernel, choose_device(study.compute.device), _widest(study))
    if study.features.rule == "script":
        from glottoscope.features.language import script_languages

        script_languages(study.languages)
    for path in study.features.labels:
        from glottoscope.features.granularity import read_labels

        try:
            read_labels(path)
        except InputError as error:
            raise InputError(f"features.labels: {error}") from None
    if study.intervention is not None:
        intervening.check(study)


def reach_machines(machines: Machines) -> None:
    """Find out that a cluster is not there before the long work of a start, such as hashing a corpus."""
    if machines.checked().engine == "ray":
        from glottoscope.study.ray_engine import reach

        reach(machines.address)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def describe_run(study: Study) -> dict[str, Any]:
    """The manifest: what produced the results, without paths of the machine or times."""
    from importlib.metadata import version

    from glottoscope.lm.checkpoints import choose_device

    return {
        "glottoscope": glottoscope.__version__,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "machine": {
            "system": platform.system(), "architecture": platform.machine(), "device": choose_device(study.compute.device),
            "threads": study.compute.threads,
            "matmul": _matmul(study), "sae_kernel": _kernel(study),
        },
        "seeds": {
            "study": study.study.seed, "sae": list(study.sae.seeds),
            "lm": {m.name: list(m.seeds) if isinstance(m, PretrainModel) else m.seed for m in study.models},
        },
        "hashes": {"study": digest(study.identity()), "code": code_hash()},
    }  # fmt: skip


def _matmul(study: Study) -> str:
    """Which float32 matrix product is in use, as `status` shows it."""
    from glottoscope.lm.checkpoints import choose_device
    from glottoscope.sae.matmul import enable_fast_matmul, matmul_error

    if choose_device(study.compute.device) != "cpu":
        return "torch's default"
    fast = enable_fast_matmul()
    path = 'setting "medium", checked as true float32' if fast else "torch's default"
    return f"{path} (largest error {matmul_error():.0e})"


def _kernel(study: Study) -> str:
    """Which SAE training kernel is in use, as `status` shows it, and why where it is not the fastest."""
    from glottoscope.lm.checkpoints import choose_device
    from glottoscope.sae.encoding import why_not_compiled
    from glottoscope.sae.kernels import resolve_kernel
    from glottoscope.sae.kernels.triton import why_not_triton

    device = choose_device(study.compute.device)
    chosen = resolve_kernel(study.sae.kernel, device, d=_widest(study))
    if study.sae.kernel == "auto" and chosen == "chunked" and device == "cpu":
        return f"chunked: slower than compiled, because {why_not_compiled()}"
    if study.sae.kernel == "auto" and chosen == "chunked" and device == "cuda":
        return f"chunked: slower than triton, because {why_not_triton()}"
    return chosen


def _widest(study: Study) -> int:
    """The largest width of the study's models whose size is known."""
    from glottoscope.study.plan import expand

    return max((run.shape.d_model for run in expand(study) if run.shape is not None), default=1)


def explain(console: Console, outcome: Outcome, stage: str) -> None:
    """Say which units failed, and why."""
    total = len(outcome.done) + len(outcome.failures)
    console.print(f"[red]{stage}: {len(outcome.failures)} of {total} failed[/red]; the rest is kept, run again to continue")
    for failure in outcome.failures:
        console.print(f"  {failure.unit}: {failure.message}", markup=False, highlight=False)


# ---- the graph

Units = Callable[[], list[Unit]]


def stages(context: Context, memory: float | Room, workers: int = 1) -> Iterator[tuple[str, Units]]:
    """Every stage with a function that lists its missing units; asked in order, since later ones depend on earlier."""

    def cells(function: Callable[..., None], missing: Callable[..., list[int]], choosers: bool | None = None) -> list[Unit]:
        return _cell_units(context, memory, workers, function, missing, choosers)

    yield "pretrain", lambda: _tokenizer_units(context)
    yield "pretrain", lambda: _text_units(context)
    yield "pretrain", lambda: _pretrain_units(context)
    yield "tokens", lambda: _token_units(context)
    yield "train", lambda: cells(training.train_cell, training.missing_layers, choosers=True)
    yield "train", lambda: cells(training.train_cell, training.missing_layers, choosers=False)
    yield "features", lambda: cells(collecting.collect_cell, collecting.missing_layers)
    yield "score", lambda: _ruler_units(context)
    yield "score", lambda: _score_units(context)
    yield "score", lambda: _table_units(context)
    yield "intervene", lambda: intervening.prepare_units(context, intervening.of_study(context))
    yield "intervene", lambda: intervening.measure_units(context, intervening.of_study(context))
    yield "intervene", lambda: intervening.effect_units(context, intervening.of_study(context))
    yield "intervene", lambda: intervening.table_units(context)
    yield "report", lambda: _report_units(context)


def _tokenizer_units(context: Context) -> list[Unit]:
    store = context.store
    if store.is_done(store.tokenizer_dir, "tokenizer", context.tokenizer_key):
        return []
    return [Unit("tokenizer", tokenizing.make_tokenizer, (str(store.root),))]


def _text_units(context: Context) -> list[Unit]:
    store = context.store
    wanted = [r for r in pretraining.pretrained_runs(context) if not pretraining.is_pretrained(context, r)]
    if isinstance(context.study.corpus, PlantedCorpus) or not wanted:
        return []
    if store.is_done(pretraining.text_dir(context), "lm_text", context.corpus_key):
        return []
    return [Unit("text for the language model", pretraining.make_lm_text, (str(store.root),))]


def _pretrain_units(context: Context) -> list[Unit]:
    missing = [r for r in pretraining.pretrained_runs(context) if not pretraining.is_pretrained(context, r)]
    units = []
    for run in missing:
        assert run.shape is not None
        assert isinstance(run.spec, PretrainModel)
        weight = run.spec.steps * run.spec.batch_size * (run.shape.n_params + 10**6) / 10**9
        arguments, memory = (str(context.store.root), run.name), pretrain_memory(context.study, run)
        units.append(Unit(run.name, pretraining.pretrain_model, arguments, weight, memory))
    # Longest first: two workers then end at about the same time.
    return sorted(units, key=lambda u: -u.weight)


def _token_units(context: Context) -> list[Unit]:
    store = context.store
    if store.is_done(store.tokens_dir, "tokens", context.tokens_key):
        return []
    return [Unit("token store", tokenizing.make_tokens, (str(store.root),))]


def _cell_units(
    context: Context, memory: float | Room, workers: int, function: Callable[..., None], missing: Callable[..., list[int]],
    choosers: bool | None,
) -> list[Unit]:  # fmt: skip
    """Units of one cell x layer group each, of the cells that choose learning rates, of the others, or of all.

    Groups are as large as memory allows, since each costs a language model pass; but where they are fewer than the
    workers they are split, since an idle core costs more; where a training was stopped, its layers stay together, to go on
    from its state. Groups change no number.
    """
    groups = [
        (cell, layers)
        for cell in context.cells
        if choosers is None or choosers == _is_chooser(context, cell)
        for group in context.groups(cell.model, memory)
        if (found := missing(context, cell, group))
        for layers in (training.kept_together(context, cell, found) if function is training.train_cell else [found])
    ]
    parts = parts_of(len(groups), workers)
    units = []
    for cell, layers in groups:
        assert cell.model.shape is not None
        for part in split_layers(layers, parts):
            arguments = (str(context.store.root), cell.model.name, cell.checkpoint.step, part)
            need = unit_memory(context, cell, len(part))
            units.append(Unit(unit_name(cell, part), function, arguments, len(part) * cell.model.shape.d_model, need))
    return sorted(units, key=lambda u: -u.weight)


def unit_memory(context: Context, cell: Cell, layers: int) -> int:
    """Bytes of the host's memory that a unit of a cell takes at most: with an accelerator, what loading the model takes."""
    shape = cell.model.shape
    assert shape is not None
    if device_of(context.study) == "cpu":
        return train_memory(context.study, shape, layers)
    return PROCESS + shape.n_params * BYTES


def _is_chooser(context: Context, cell: Cell) -> bool:
    return context.chooses_lr(cell)


def _ruler_units(context: Context) -> list[Unit]:
    units = []
    for run in {context.ruler_run(r).name: context.ruler_run(r) for r in context.runs}.values():
        memory = reading_memory(context.study, [run])
        units += [
            Unit(f"{run.name} {name}", rulers.make_rulers, (str(context.store.root), run.name, (name,)), memory=memory)
            for name in rulers.missing_rulers(context, run)
        ]
    return units


def _score_units(context: Context) -> list[Unit]:
    groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for cell in context.cells:
        for layer, seed in scoring.missing_setups(context, cell):
            groups.setdefault((cell.model.name, layer), []).append((cell.checkpoint.step, seed))
    return [
        Unit(
            f"{model} layer {layer}",
            scoring.score_layer,
            (str(context.store.root), model, layer, tuple(cells)),
            len(cells),
        )
        for (model, layer), cells in groups.items()
    ]


def _table_units(context: Context) -> list[Unit]:
    store = context.store
    if store.is_done(store.tables_dir, "tables", tables.tables_key(context)):
        return []
    return [Unit("tables", tables.make_tables, (str(store.root),))]


def _report_units(context: Context) -> list[Unit]:
    key = reporting.report_key(context, tables.tables_key(context))
    if context.store.is_done(context.store.report_dir, "report", key):
        return []
    return [Unit("report", reporting.make_report, (str(context.store.root), key))]


# ---- housekeeping


def at_work(root: Path) -> list[Sign]:
    """Units at work in a run directory, wherever they run."""
    return list(signs(RunStore(root).work_dir))


class StageStatus(NamedTuple):
    """How far a stage is."""

    stage: str
    missing: int  # units
    words: str


def status(root: Path) -> list[StageStatus]:
    """How far every stage of a run directory is."""
    context = Context.open(root)
    # Where the run will go on is not known here: it may be a login node that asks.
    memory = stated_room(context.study)
    counts: dict[str, int] = dict.fromkeys(STAGES, 0)
    unknown = None
    for stage, units in stages(context, memory):
        if unknown is not None:
            break
        try:
            counts[stage] += len(units())
        except (InputError, FileNotFoundError):
            unknown = stage  # an earlier stage has to run before its units can be told
    rows = []
    blocked = False
    halfway = {stage: found(context) for stage, found in WITH_STATES.items() if stage == "pretrain" or unknown is None}
    for stage in STAGES:
        if blocked or (unknown is not None and STAGES.index(stage) >= STAGES.index(unknown)):
            rows.append(StageStatus(stage, -1, "waits for the stages before"))
        else:
            words = [f"{counts[stage]} units to do"]
            words += [f"{w.unit} resumes at step {w.steps:,}" for w in halfway.get(stage, ()) if w.steps is not None]
            rows.append(StageStatus(stage, counts[stage], "; ".join(words) if counts[stage] else "done"))
        blocked = blocked or counts[stage] > 0
    return rows


def clean(root: Path, *, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove what no setting of the study refers to: cells, layers, seeds, models and rulers; returns path and bytes."""
    store = RunStore(root)
    store.manifest()
    with contextlib.nullcontext() if dry_run else store.lock():
        context = Context.open(root)
        wanted = _wanted(context)
        removed = [(path, 0) for path in store.leftovers()]
        for parent in (store.cells_dir, store.models_dir, store.rulers_dir):
            if parent.is_dir():
                removed += [(p, 0) for p in sorted(parent.iterdir()) if p not in wanted]
        removed += [(Path(p), 0) for p in intervening.stale_folders(context, _asked_for(context))]
        for cell in context.cells:
            folder = store.cell_dir(cell.model.name, cell.checkpoint.step)
            for layer in listed(folder, "layer_*"):
                seeds = listed(layer, "seed_*")
                unwanted = [s for s in seeds if s not in wanted]
                removed += [(layer, 0)] if seeds and len(unwanted) == len(seeds) else [(s, 0) for s in unwanted]
        removed += [(w.folder, 0) for found in WITH_STATES.values() for w in found(context) if w.steps is None]
        for run in pretraining.pretrained_runs(context):
            removed += [(p, 0) for p in listed(store.model_dir(run.name), "step_*") if p not in wanted]
        removed += [(p, 0) for p in _stale_metrics(context)]
        if dry_run:
            return [(path, tree_size(path)) for path, _ in removed]
        return [(path, store.remove(path)) for path, _ in removed if path.exists()]


def _stale_metrics(context: Context) -> list[Path]:
    """Metrics of models and cells that the study no longer has, and what TensorBoard was given of them."""
    store = context.store
    units = {cell.name for cell in context.cells} | {run.name for run in pretraining.pretrained_runs(context)}
    known = {store.metrics_path(unit).stem for unit in units}
    found = [*store.metrics_dir.glob("*.jsonl"), *(p for p in store.logger_dir("tensorboard").glob("*") if p.is_dir())]
    # Parts of a cell's layers have its name with more behind it.
    return sorted(p for p in found if re.sub(r"(@\d+)_layers_[\d-]+$", r"\1", p.name.removesuffix(".jsonl")) not in known)


def _asked_for(context: Context) -> list[Any]:
    try:
        return intervening.of_study(context)
    except InputError:
        return []  # the study is not complete: nothing of it is there to be kept


def _wanted(context: Context) -> set[Path]:
    store = context.store
    paths: set[Path] = set()
    for cell in context.cells:
        model, step = cell.model.name, cell.checkpoint.step
        paths |= {store.cell_dir(model, step), store.ruler_dir(cell.model.lm)}
        if cell.checkpoint.path is None:
            paths |= {store.model_dir(cell.model.lm), store.checkpoint_dir(cell.model.lm, step)}
        paths |= {store.setup_dir(model, step, layer, seed) for layer, seed in context.setups(cell)}
    return paths


def remake_report(root: Path, console: Console) -> Path:
    """Make the report again from the tables; returns the path of its page."""
    store = RunStore(root)
    store.manifest()
    with store.lock():
        return remake_report_locked(root, console)


def remake_report_locked(root: Path, console: Console) -> Path:
    """`remake_report` of a run directory that this process holds already."""
    context = Context.open(root)
    store = context.store
    store.table("evolution")  # says what to do where the study is not complete
    key = reporting.report_key(context, tables.tables_key(context))
    reporting.make_report(str(store.root), key, lambda *_: console.print("drawing ..."))
    return store.report_dir / "index.html"
