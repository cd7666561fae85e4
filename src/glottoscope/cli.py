"""The command line: thin commands over `glottoscope.study`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glottoscope import __version__
from glottoscope.atomic import is_disk_full
from glottoscope.errors import InputError, is_interruption

if TYPE_CHECKING:
    from rich.console import Console

    from glottoscope.study.config import Study
    from glottoscope.study.engines import Machines

app = typer.Typer(
    name="glottoscope",
    help="Watch a language model become bilingual: sparse autoencoders over checkpoints, layers and sizes.",
    epilog="First steps: `glottoscope demo` runs the embedded study; `glottoscope init study.toml` writes one to change.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StudyFile = Annotated[Path, typer.Argument(help="Study file (TOML).", show_default=False)]
RunDir = Annotated[Path, typer.Argument(help="Run directory.", show_default=False)]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field: sae.k=16, models.0.lr=1e-3. Repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, change nothing.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Units at once. Default: one per GPU, else cores / compute.threads; with Ray what fits.")
]
EngineOption = Annotated[str, typer.Option("--engine", help="local | ray (docs/cluster.md). It changes no number.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster: HOST:PORT of its head, or auto. Default: one is started on this machine.")
]
Pin = Annotated[bool, typer.Option("--pin/--no-pin", help="Give every local process cores of its own.")]
Plain = Annotated[
    bool, typer.Option("--plain", help="Lines with time stamps instead of a live view. Default where stderr is no terminal.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"glottoscope {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    # Neither a tokenizer's own threads nor a library's telemetry have a place in a reproducible run.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@app.command(epilog="Example: `glottoscope demo --full --out runs/full --seed 1`")
def demo(
    full: Annotated[
        bool, typer.Option("--full", help="Three sizes, five layers, nine checkpoints (12 minutes on 2 cores).")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the study, its text and its models.")] = 0,
    workers: Workers = None,
    engine: EngineOption = "local",
    address: Address = None,
    pin: Pin = True,
    plain: Plain = False,
    dry_run: DryRun = False,
) -> None:
    """Run the embedded study on the planted bilingual world, and say where its report is."""
    from glottoscope.study.load import parse_study, preset_text

    preset = "planted-full" if full else "planted"
    # Another seed is another study: fresh text, fresh models, its own run directory.
    name = preset if seed == 0 else f"{preset}-seed{seed}"
    study = parse_study(
        preset_text(preset), name=preset, folder=Path.cwd(),
        overrides=[f"study.seed={seed}", f"corpus.seed={seed}", f'study.name="{name}"'],
    )  # fmt: skip
    _run(study, out or Path("runs") / name, "report", workers, _machines(engine, address, pin, plain), dry_run=dry_run)


@app.command(epilog="Example: `glottoscope init study.toml --preset text`")
def init(
    path: Annotated[Path, typer.Argument(help="Study file to write.", show_default=False)],
    preset: Annotated[str, typer.Option(help="planted | planted-full | text | llm-jp-3")] = "planted",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented study file."""
    from glottoscope.atomic import write_text
    from glottoscope.study.load import preset_text

    text = preset_text(preset)
    if path.exists() and not force:
        raise InputError(f"{path} exists: choose another name, or --force")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, as in {path / 'study.toml'}")
    write_text(path, text)
    print(f"{path} written. Next: glottoscope plan {path}")


@app.command(epilog="Example: `glottoscope plan examples/llm-jp-3.toml`")
def plan(
    study_file: StudyFile,
    set_: SetOption = [],  # noqa: B006 - typer wants a list
    device_flops: Annotated[
        float | None, typer.Option(min=1.0, help="Speed of the device in FLOP/s, for the time. Default: as calibrated, or a guess.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine at the study's shapes first (half a minute), and keep it.")
    ] = False,
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option(help="Run directory, to see whether its disk is large enough.")] = None,
) -> None:
    """Say what a study amounts to before anything runs: cells, setups, memory, disk, FLOPs, time by stage.

    It reads no weights and uses no network.
    """
    from glottoscope.study.load import load_study
    from glottoscope.study.planning import print_plan

    study, console = load_study(study_file, set_), _console(sys.stdout)
    print_plan(study, device_flops, console, workers=workers, calibrated=calibrate, out=out)


@app.command(epilog="Example: `glottoscope run study.toml --out runs/mine --set sae.k=16 --until features`")
def run(
    study_file: StudyFile,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME.")] = None,
    set_: SetOption = [],  # noqa: B006 - typer wants a list
    until: Annotated[str, typer.Option(help="Last stage: pretrain, tokens, train, features, score, intervene, report.")] = "report",
    workers: Workers = None,
    engine: EngineOption = "local",
    address: Address = None,
    pin: Pin = True,
    plain: Plain = False,
    scale: Annotated[
        str | None,
        typer.Option(metavar="tiny", help="Random models of 1/16 width and planted text in the place of the study's: a rehearsal."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a study, or continue one: complete stages are not run again, changed settings redo only what depends on them."""
    from glottoscope.study.config import STAGES
    from glottoscope.study.load import load_study

    if until not in STAGES:
        raise InputError(f"--until {until}: unknown stage; choose one of {', '.join(STAGES)}")
    machines = _machines(engine, address, pin, plain)
    study = load_study(study_file, set_)
    if scale is not None:
        from glottoscope.study.scaling import scale_study, write_scaled
        from glottoscope.study.store import RunStore

        out = out or Path("runs") / f"{study.study.name}-{scale}"
        study = scale_study(study, scale, out)
        if dry_run and not (RunStore(out).scaled_dir / "done.json").exists():
            from glottoscope.study.dry import dry_scaled

            return dry_scaled(study, out, until=until, workers=workers, console=_console(sys.stdout), machines=machines)
        if not dry_run:
            write_scaled(study, _console())
    _run(study, out or Path("runs") / study.study.name, until, workers, machines, dry_run=dry_run)


@app.command(epilog="Example: `glottoscope status runs/planted`")
def status(run_dir: RunDir) -> None:
    """Say how far a run is, and with what settings of the machine."""
    from rich.table import Table

    from glottoscope.study.runner import at_work
    from glottoscope.study.runner import status as stage_status
    from glottoscope.study.store import RunStore, tree_size
    from glottoscope.study.view import print_signs

    store = RunStore(run_dir)
    manifest, console = store.manifest(), _console(sys.stdout)
    study = store.study()
    table = Table("stage", "state", title=f"{study.study.name} ({run_dir})", title_justify="left")
    for row in stage_status(run_dir):
        table.add_row(row.stage, row.words)
    console.print(table)
    print_signs(at_work(run_dir), console)
    machine = manifest.get("machine", {})
    console.print(
        f"device {machine.get('device')}, {machine.get('threads')} thread(s) per process, "
        f"float32 products: {machine.get('matmul', 'torch default')}, "
        f"SAE kernel: {machine.get('sae_kernel', 'chunked')}; {tree_size(run_dir) / 2**20:,.0f} MiB"
    )
    index = store.report_dir / "index.html"
    if index.exists():
        console.print(f"report: {index}")


@app.command(epilog="Example: `glottoscope report runs/planted`")
def report(run_dir: RunDir) -> None:
    """Make the report of a finished run again, and say where it is."""
    from glottoscope.study.runner import remake_report

    print(f"report: {remake_report(run_dir, _console())}")


@app.command(
    epilog="Examples: `glottoscope intervene runs/full --base 300 --base 600 --donor 1500` ; "
    '`glottoscope intervene runs/full --base 300 --translate --features "steady=phi > 0.6" --set tokens=50000`'
)
def intervene(
    run_dir: RunDir,
    base: Annotated[
        list[int],
        typer.Option(
            help="Step of the base. Repeatable. Default: the study file's, else where half of the fall in log perplexity is done."
        ),
    ] = [],  # noqa: B006 - typer wants a list
    donor: Annotated[int | None, typer.Option(help="Step of the donor. Default: the study file's, else the last.")] = None,
    model: Annotated[
        list[str], typer.Option(help="Model. Repeatable. Default: the study file's, else the largest that is no control.")
    ] = [],  # noqa: B006
    donor_model: Annotated[str | None, typer.Option(help="Model of the donor. Default: the base's own.")] = None,
    layer: Annotated[
        list[int], typer.Option(help="Layer. Repeatable, each alone. Default: the study file's, else the middle one.")
    ] = [],  # noqa: B006
    together: Annotated[bool, typer.Option("--together", help="Patch all these layers at once.")] = False,
    alpha: Annotated[
        list[float], typer.Option(help="Strength. Repeatable; the best on dev is chosen. Default: the study file's.")
    ] = [],  # noqa: B006
    part: Annotated[
        list[str],
        typer.Option(help="A language, mixed, bilingual, bilingual_paper, all. Repeatable. Default: the study file's, else all."),
    ] = [],  # noqa: B006
    features: Annotated[
        list[str],
        typer.Option(metavar="NAME=IDS|SQL", help='A part of your own: "few=3,17" or "steady=phi > 0.6". Repeatable.'),
    ] = [],  # noqa: B006
    mode: Annotated[str | None, typer.Option(help="add | replace")] = None,
    scale: Annotated[str | None, typer.Option(help="matched (to the base's norm) | raw (the donor's)")] = None,
    draws: Annotated[
        int | None, typer.Option(min=0, help="Random draws per part and pool. Default: the study file's, else 32.")
    ] = None,
    translate: Annotated[
        bool | None, typer.Option("--translate/--no-translate", help="Translate, too. Default: as in the study file.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Sentence pairs to translate. Default: the study file's, else 1,000.")
    ] = None,
    comet: Annotated[
        Path | None, typer.Option(metavar="MODEL_PATH", help="COMET checkpoint (file or folder) to score translations with.")
    ] = None,
    comet_environment: Annotated[
        Path | None, typer.Option(help="Where `glottoscope comet setup` put it, if not the default.")
    ] = None,
    comet_gpus: Annotated[int, typer.Option(min=0, max=1, help="GPUs for COMET: 0 or 1.")] = 0,
    comet_batch: Annotated[int, typer.Option(min=1, help="Sentences that COMET reads together.")] = 16,
    name: Annotated[str, typer.Option(help="Name of these experiments in the table; another name keeps both.")] = "cli",
    set_: SetOption = [],  # noqa: B006
    workers: Workers = None,
    engine: EngineOption = "local",
    address: Address = None,
    pin: Pin = True,
    plain: Plain = False,
    dry_run: DryRun = False,
) -> None:
    """Add a part of a trained checkpoint's representation to an earlier one, with controls; loss and translation before and after.

    Needs a finished run. Rows go to tables/intervention.parquet and .csv, figures and words to the report. What no option says
    is as in \\[intervention] of the study file; --set changes any field of it (docs/configuration.md).
    """
    from glottoscope.study.engine import stop_on_sigterm
    from glottoscope.study.interventions import Comet, print_effects, settings_of
    from glottoscope.study.interventions import intervene as run_interventions
    from glottoscope.study.store import RunStore

    given: dict[str, Any] = {
        "bases": base, "donor": donor, "models": model, "donor_model": donor_model, "layers": layer, "alphas": alpha,
        "parts": part, "features": dict(_named_features(x) for x in features), "mode": mode, "scale": scale, "draws": draws,
        "together": together or None,
    }  # fmt: skip
    changes = {key: value for key, value in given.items() if value not in (None, [], {})}
    if translate is False:
        changes["translation"] = None
    elif translate or pairs is not None:
        changes["translation"] = {} if pairs is None else {"pairs": pairs}
    if part and features:
        changes["parts"] = [*part, *changes["features"]]
    stop_on_sigterm()
    console = _console()
    config = settings_of(RunStore(run_dir), changes, set_)
    if dry_run:
        from glottoscope.study.dry import dry_intervene

        dry_intervene(run_dir, config, name, _console(sys.stdout))
        return
    held = None if comet is None else Comet(comet, comet_environment, comet_gpus, comet_batch)
    machines = _machines(engine, address, pin, plain)
    failures = run_interventions(run_dir, config, name=name, workers=workers, console=console, comet=held, machines=machines)
    if failures:
        raise typer.Exit(2 if all(f.bad_input for f in failures) else 1)
    print_effects(run_dir, config, name, _console(sys.stdout))
    print(f"report: {(run_dir / 'report' / 'index.html').resolve()}")


def _named_features(text: str) -> tuple[str, list[int] | str]:
    """NAME=3,17 or NAME=SQL."""
    name, equals, wanted = text.partition("=")
    if not equals or not name.strip() or not wanted.strip():
        raise InputError(f'--features {text!r}: write NAME=IDS or NAME=SQL, as in "few=3,17" or "steady=phi > 0.6"')
    ids = [x.strip() for x in wanted.split(",")]
    return name.strip(), [int(x) for x in ids] if all(x.isdecimal() for x in ids) else wanted.strip()


comet_app = typer.Typer(help="COMET, which needs an environment of its own.", no_args_is_help=True)
app.add_typer(comet_app, name="comet")


@comet_app.command("setup", epilog="Example: `glottoscope comet setup`")
def comet_setup(
    folder: Annotated[Path | None, typer.Option(help="Where. Default: $GLOTTOSCOPE_COMET, or the user's cache.")] = None,
    python: Annotated[str, typer.Option(help="Interpreter, Python 3.11 or 3.12. Default: this one.")] = sys.executable,
    extra_index: Annotated[str | None, typer.Option(help="Another package index beside the usual one.")] = None,
) -> None:
    """Make the environment that COMET runs in; `glottoscope intervene --comet MODEL_PATH` then scores translations.

    It downloads about 1 GB: torch and what unbabel-comet pins. Models are not downloaded: give the folder of one.
    """
    from glottoscope.study.interventions import make_comet_environment

    print(f"ready: {make_comet_environment(folder, python, extra_index)}")


@app.command(epilog="Examples: `glottoscope browse runs/planted` ; `glottoscope browse runs/planted --port 0 --rater mari --open`")
def browse(
    run_dir: RunDir,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other machines see the run and may label where it is not loopback.")
    ] = "127.0.0.1",
    rater: Annotated[str | None, typer.Option(help="Name that labels are saved under. Default: the user's.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the first page in a browser.")] = False,
) -> None:
    """Look at the features of a run in a web browser, and label them. Ctrl-C ends it."""
    from glottoscope.study.engine import stop_on_sigterm
    from glottoscope.study.serving import browse as serve_run

    stop_on_sigterm()
    serve_run(run_dir, host=host, port=port, rater=rater, open_browser=open_, console=_console())


@app.command(epilog="Example: `glottoscope export runs/planted site`")
def export(
    run_dir: RunDir,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the site into.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Also remove files of an earlier export that are no longer part of it.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Write the pages that `browse` serves as files for any web server. Labels and their raters' names are among them."""
    from glottoscope.study.browsing import export as export_run
    from glottoscope.study.engine import stop_on_sigterm

    stop_on_sigterm()
    export_run(run_dir, folder, _console(sys.stdout) if dry_run else _console(), force, dry_run=dry_run)


@app.command(
    epilog="Examples: `glottoscope label runs/planted --sample 100 --blind` ; "
    "`glottoscope label runs/planted --step all --class mixed --class en --rater mari` ; "
    "`glottoscope label runs/planted --csv labels.csv --rater mari`"
)
def label(
    run_dir: RunDir,
    sample: Annotated[int, typer.Option(min=1, help="Features to draw, evenly over setups and classes.")] = 100,
    blind: Annotated[bool, typer.Option("--blind", help="Show text alone: no class, measure, step, layer or number.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw: raters with one seed see the same features.")] = 0,
    rater: Annotated[str | None, typer.Option(help="Name that labels are saved under. Default: the user's.")] = None,
    model: Annotated[list[str], typer.Option(help="Model, or all. Repeatable. Default: the largest that is no control.")] = [],  # noqa: B006
    step: Annotated[list[str], typer.Option(help="Step, or all. Repeatable. Default: the last.")] = [],  # noqa: B006
    layer: Annotated[list[str], typer.Option(help="Layer, or all. Repeatable. Default: the middle one.")] = [],  # noqa: B006
    sae_seed: Annotated[list[str], typer.Option(help="SAE seed, or all. Repeatable. Default: the first.")] = [],  # noqa: B006
    class_: Annotated[
        list[str], typer.Option("--class", help="A language, mixed, bilingual, neutral, unclassified. Repeatable. Default: all.")
    ] = [],  # noqa: B006
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the labels there as CSV instead (of one --rater).")
    ] = None,
) -> None:
    """Grade features in the terminal, one key each: 1 uninterpretable, 2 semantic, 3 synonymous, 4 token-level.

    Labels go to RUN/labels/labels.jsonl at once; the same command goes on where it stopped. At the end it says how the grades agree
    with other raters and with the measures.
    """
    from glottoscope.study.labelling import Choice, write_csv
    from glottoscope.study.labelling import label as label_run

    if csv is not None:
        write_csv(run_dir, csv, rater, _console(sys.stdout))
        return
    choice = Choice(models=model, steps=step, layers=layer, sae_seeds=sae_seed, classes=class_)
    label_run(run_dir, choice, n=sample, blind=blind, seed=seed, rater=rater, console=_console(sys.stdout))


@app.command(epilog="Example: `glottoscope measure features.jsonl --rule v1 --out features.csv`")
def measure(
    examples: Annotated[Path, typer.Argument(help="Feature examples: one JSON object per line.", show_default=False)],
    rule: Annotated[str, typer.Option(help="v1 | script | document (needs document_language per example)")] = "v1",
    out: Annotated[Path | None, typer.Option(help="CSV or Parquet file. Default: a summary.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="script, document: fewer counted positions are unclassified.")] = 20,
) -> None:
    """Class features of any origin by language from their examples (tokens and activations)."""
    from glottoscope.study.measuring import measure_examples, print_summary, write_measured

    table = measure_examples(examples, rule=rule, min_count=min_count)
    if out is not None:
        write_measured(table, out)
        print(f"{out} written: {table.num_rows} features")
    print_summary(table, _console(sys.stdout))


@app.command(epilog="Example: `glottoscope verify runs/mine --quick`")
def verify(
    run_dir: RunDir,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes only.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Only report: leave the records as they are.")] = False,
) -> None:
    """Compare every file of a run with what its record says; the next run makes again what is damaged or missing.

    Exit code 1 where something is.
    """
    from glottoscope.study.verifying import print_verdict
    from glottoscope.study.verifying import verify as verify_run

    verdict = verify_run(run_dir, quick=quick, keep=keep, console=_console())
    print_verdict(run_dir, verdict, _console(sys.stdout), quick=quick, keep=keep)
    if verdict.problems:
        raise typer.Exit(1)


@app.command(epilog="Example: `glottoscope merge runs/mine runs/from-the-other-machine --dry-run`")
def merge(
    run_dir: RunDir,
    other: Annotated[Path, typer.Argument(help="Run directory of the same study; only read.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come over, write nothing.")] = False,
) -> None:
    """Join what another run directory of the same study holds: models, SAEs, features, rulers, interventions.

    Nothing is overwritten. Exit code 1 where something did not come over.
    """
    from glottoscope.study.merging import merge as merge_runs
    from glottoscope.study.merging import print_merge

    found = merge_runs(run_dir, other, dry_run=dry_run, console=_console())
    print_merge(run_dir, other, found, _console(sys.stdout), dry_run=dry_run)
    if not found.is_whole:
        raise typer.Exit(1)


@app.command(epilog="Example: `glottoscope clean runs/mine --dry-run`")
def clean(
    run_dir: RunDir,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
) -> None:
    """Remove what no setting of the study refers to: checkpoints, layers, seeds and models of earlier settings."""
    from glottoscope.study.plan import describe_memory
    from glottoscope.study.runner import clean as clean_run

    removed = clean_run(run_dir, dry_run=dry_run)
    for path, size in removed:
        print(f"{'would remove' if dry_run else 'removed'} {path} ({describe_memory(size)})")
    print(f"{len(removed)} item(s), {describe_memory(sum(size for _, size in removed))}")


def _machines(engine: str, address: str | None, pin: bool, plain: bool) -> Machines:
    from glottoscope.study.engines import Machines

    return Machines(engine, address, pin, plain).checked()  # pyright: ignore[reportArgumentType] - checked() says what is wrong


def _run(study: Study, out: Path, until: str, workers: int | None, machines: Machines, *, dry_run: bool = False) -> None:
    if dry_run:
        from glottoscope.study.dry import dry_run as say_what_would_be_done

        console = _console(sys.stdout)
        say_what_would_be_done(study, out, until=until, workers=workers, console=console, machines=machines)
        return
    from glottoscope.study.engine import stop_on_sigterm
    from glottoscope.study.runner import run_study

    stop_on_sigterm()
    console = _console()
    console.print(f"study [bold]{study.study.name}[/bold] -> {out}")
    result = run_study(study, out, until=until, workers=workers, console=console, machines=machines)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
    index = out / "report" / "index.html"
    if index.exists() and until == "report":
        print(f"report: {index.resolve()}")
    else:
        print(f"{out}: done up to {until}; `glottoscope status {out}` says more")


def _console(file: Any = None) -> Console:
    from rich.console import Console

    console = Console(file=file or sys.stderr, soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width: tables keep their words whole
    return console


def _guarded(command: Callable[[], Any]) -> int:
    try:
        command()
    except InputError as error:
        print(f"glottoscope: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except BaseException as error:
        if is_interruption(error):
            print("glottoscope: interrupted; the same command continues where it stopped", file=sys.stderr)
            return 130
        if not (isinstance(error, OSError) and is_disk_full(error)):
            raise
        print(f"glottoscope: no space left on device ({error}): free some and run the study again", file=sys.stderr)
        return 2
    return 0


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 some cells failed, 2 bad input, 130 interrupted."""
    code = 0

    def command() -> None:
        nonlocal code
        try:
            code = app(standalone_mode=False) or 0
        except typer.Exit as error:
            code = error.exit_code
        except typer.Abort:
            code = 130
        except Exception as error:
            # Typer 0.20 and later bring their own copy of click: its errors are known by what they can do.
            show = getattr(error, "show", None)
            if show is None or not hasattr(error, "exit_code"):
                raise
            show()
            code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
        # Some versions turn Ctrl-C into an exit of their own, without a word.
        if code == 130:
            raise KeyboardInterrupt

    failed = _guarded(command)
    sys.exit(failed or code)


if __name__ == "__main__":
    main()
