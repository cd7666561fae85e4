"""COMET scores of translations, from an environment of its own: unbabel-comet needs transformers < 5 and numpy < 2.

`setup` makes that environment, `score` runs comet_worker.py under its interpreter. Source: Rei et al., COMET-22
(WMT 2022). Nothing here imports torch, and no model is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glottoscope.atomic import write_json
from glottoscope.errors import InputError

WORKER = Path(__file__).with_name("comet_worker.py")
REQUIREMENTS = Path(__file__).with_name("comet-requirements.txt")
ENVIRONMENT_VARIABLE = "GLOTTOSCOPE_COMET"
MARKER = "glottoscope-comet.json"  # marks a folder as ours to replace; holds the hash of what was installed
PYTHONS = ((3, 11), (3, 12))  # with wheels of the pinned numpy and pandas
REMEDY = "run `glottoscope comet setup`"


def default_environment() -> Path:
    """The folder of COMET's environment: $GLOTTOSCOPE_COMET, or glottoscope/comet in the user's cache folder."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "glottoscope" / "comet"


def setup(
    folder: Path,
    *,
    python: str = sys.executable,
    extra_index: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Make COMET's environment in `folder`, or leave it if it is complete; return its interpreter.

    Args:
        folder: where; absent, empty, or made by this function before (then it is replaced unless up to date).
        python: an interpreter of Python 3.11 or 3.12 to make the environment with.
        extra_index: address of one more package index, for instance one of CPU builds of torch.
        report: is given lines of progress.

    Raises:
        InputError: `python` does not fit, `folder` holds something else, or the installation fails.
    """
    folder = Path(folder).expanduser().absolute()
    interpreter = folder / "bin" / "python"
    if is_current(folder):
        report(f"COMET's environment in {folder} is up to date")
        return interpreter
    _check_python(python)
    try:
        _clear(folder)
        # Written first: a folder with a marker that is not complete may be replaced.
        write_json(folder / MARKER, {"requirements": None})
        report(f"making COMET's environment in {folder}")
        create_environment(folder, python)
        # Without byte code the installation takes half the time, and most of it is never imported.
        command = [interpreter, "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile"]
        command += ["--progress-bar", "off", "--only-binary", ":all:", "-r", REQUIREMENTS]
        _run(
            [*command, *(["--extra-index-url", extra_index] if extra_index else [])],
            f"COMET's packages could not be installed into {folder}",
            lambda line: report(line) if re.search(r"Downloading .*[MG]B\)", line) else None,
        )
        write_json(folder / MARKER, {"requirements": _requirements_hash()})
    except OSError as error:
        raise InputError(f"COMET's environment in {folder} cannot be written ({error}): give another folder") from None
    report(f"COMET's environment in {folder} is ready")
    return interpreter


def is_current(folder: Path) -> bool:
    """Whether `folder` is a complete environment with today's requirements."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        # The base interpreter can have gone, with an update of the system say.
        return marker["requirements"] == _requirements_hash() and _version(str(folder / "bin" / "python"))[:2] in PYTHONS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def create_environment(folder: Path, python: str) -> None:
    """A virtual environment with pip in `folder`, by venv or, where that lacks ensurepip (Debian), by virtualenv.

    Raises:
        InputError: neither works.
    """
    if subprocess.run([python, "-I", "-m", "venv", folder], capture_output=True).returncode == 0:
        return
    bootstrap = folder / "bootstrap"
    failed = f"`{python} -m venv` does not work and virtualenv could not be used instead: install the system's venv package"
    _run([python, "-m", "pip", "install", "--disable-pip-version-check", "--target", bootstrap, "virtualenv"], failed)
    # --clear would take the marker and the bootstrap with it; what venv left behind is overwritten.
    _run([python, "-m", "virtualenv", folder], failed, environment={**os.environ, "PYTHONPATH": str(bootstrap)})
    shutil.rmtree(bootstrap)


def versions(environment: Path | None = None) -> dict[str, str]:
    """Name and version of every package in the environment, sorted by name, after the version of its Python.

    Raises:
        InputError: there is no environment, or its interpreter has gone.
    """
    interpreter = _interpreter(environment)
    version = _version(str(interpreter))
    if not version:
        raise InputError(f"{interpreter} does not run: {REMEDY}")
    site = interpreter.parents[1] / "lib" / f"python{version[0]}.{version[1]}" / "site-packages"
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=[str(site)])}
    return {"python": ".".join(map(str, version)), **dict(sorted(found.items(), key=lambda item: item[0].lower()))}


def checkpoint_file(model: Path) -> Path:
    """The .ckpt file of a COMET model, given as that file or as the folder with hparams.yaml and checkpoints/model.ckpt.

    Raises:
        InputError: it is not there, or not what it should be.
    """
    model = Path(model).expanduser().absolute()  # not resolved: hparams.yaml is found beside a link, not beside its target
    file = model / "checkpoints" / "model.ckpt" if model.is_dir() else model
    if not file.is_file():
        raise InputError(
            f"no COMET checkpoint at {file}: give the .ckpt file or the model's folder as downloaded, "
            "with hparams.yaml and checkpoints/model.ckpt"
        )
    hparams = file.parents[1] / "hparams.yaml"
    if not hparams.is_file():
        raise InputError(f"{hparams} is missing: COMET reads the kind of model from it, download the whole folder of the model")
    with open(file, "rb") as handle:
        if handle.read(23) == b"version https://git-lfs":
            raise InputError(f"{file} is a Git LFS pointer, not the checkpoint: run `git lfs pull` in its repository")
    return file


def fingerprint(model: Path) -> str:
    """SHA-256 of a model's .ckpt file, in hexadecimal.

    Raises:
        InputError: as `checkpoint_file`.
    """
    with open(checkpoint_file(model), "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def score(
    model: Path,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    environment: Path | None = None,
    batch_size: int = 16,
    gpus: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> list[float]:
    """COMET's score of each hypothesis, in order: `predict` of unbabel-comet in float32. Higher is better.

    Args:
        model: a .ckpt file or the folder of a COMET model; its encoder's configuration and tokenizer must be on this
            machine too, in a folder beside hparams.yaml that has the encoder's name, or in the cache of the hub.
        sources, hypotheses, references: texts, equally many.
        environment: the folder that `setup` made; `default_environment()` when None.
        batch_size: pairs per forward pass. Padding makes scores differ in the last bits between batch sizes.
        gpus: 0 (CPU) or 1.
        report: is called with (pairs done, pairs in all) once the model is loaded and after each batch.

    Raises:
        InputError: the environment, the model or its encoder is missing, the arguments do not fit, or the worker fails.
    """
    if not len(sources) == len(hypotheses) == len(references):
        raise InputError(
            f"COMET needs equally many texts: {len(sources)} sources, {len(hypotheses)} hypotheses, {len(references)} references"
        )
    if batch_size < 1 or gpus not in (0, 1):
        raise InputError(f"COMET: batch_size must be at least 1 and gpus 0 or 1, got batch_size = {batch_size} and gpus = {gpus}")
    file, interpreter = checkpoint_file(model), _interpreter(environment)
    if not sources:
        return []
    # ASCII, so that text that is not valid UTF-8 (lone surrogates) passes too; the worker puts U+FFFD for them.
    rows = [{"src": s, "mt": h, "ref": r} for s, h, r in zip(sources, hypotheses, references, strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
    # -I: nothing of our own environment (PYTHONPATH, the working directory) reaches the other one.
    command = [interpreter, "-I", WORKER, file, "--batch-size", str(batch_size), "--gpus", str(gpus)]
    output = _run_worker([str(part) for part in command], lines, report)
    try:
        scores = [float(json.loads(line)["score"]) for line in output.splitlines()]
    except (ValueError, KeyError, TypeError):
        scores = []
    if len(scores) != len(sources):
        raise InputError(f"the COMET worker gave {len(scores)} scores for {len(sources)} pairs: {REMEDY} with another folder")
    return scores


def _run_worker(command: list[str], lines: bytes, report: Callable[[int, int], None] | None) -> bytes:
    """What the worker writes to stdout. Each of the three pipes has a thread of its own, so that none can fill up."""
    output: list[bytes] = []
    error, last = None, "it said nothing"
    with _child(command, stdin=subprocess.PIPE) as process:
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
        assert stdin is not None and stdout is not None and stderr is not None

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError), stdin:  # a worker that ends early says why on stderr
                stdin.write(lines)

        def collect() -> None:
            with stdout:
                output.append(stdout.read())

        threads = [threading.Thread(target=target, daemon=True) for target in (feed, collect)]
        for thread in threads:
            thread.start()
        with stderr:
            for raw in stderr:
                message = _message(raw)
                if "progress" in message:
                    if report:
                        report(message["progress"], message["total"])
                elif "error" in message:
                    error = message["error"]
                elif text := raw.decode("utf-8", "replace").strip():
                    last = text
        code = process.wait()
        for thread in threads:
            thread.join()
    if error:
        raise InputError(f"COMET: {error}")
    if code < 0:
        raise InputError(
            f"the COMET worker was ended by signal {-code} ({signal.strsignal(-code)}): if memory ran out, use a smaller batch size"
        )
    if code:
        raise InputError(f"the COMET worker ended with exit code {code}: {last}")
    return output[0]


def _message(raw: bytes) -> dict[str, Any]:
    try:
        message = json.loads(raw)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


@contextlib.contextmanager
def _child(
    command: Sequence[str | Path],
    stdin: int = subprocess.DEVNULL,
    stderr: int = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that does not outlive an exception in our own, Ctrl-C included."""
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _run(
    command: Sequence[str | Path],
    failed: str,
    report: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a command, give `report` its lines.

    Raises:
        InputError: it failed; `failed` with the last line of the error.
    """
    said: list[str] = []
    with _child(command, stderr=subprocess.STDOUT, environment=environment) as process:
        assert process.stdout is not None
        with process.stdout as stdout:
            for raw in stdout:
                said.append(raw.decode("utf-8", "replace").strip())
                if report:
                    report(said[-1])
        code = process.wait()
    if code:
        errors = [line for line in said if line.startswith("ERROR:")] or [line for line in said if line] or [f"exit code {code}"]
        raise InputError(f"{failed} ({errors[-1].removeprefix('ERROR:').strip()})")


def _interpreter(environment: Path | None) -> Path:
    folder = Path(environment or default_environment()).expanduser().absolute()
    interpreter = folder / "bin" / "python"
    if not interpreter.is_file():
        raise InputError(f"no environment for COMET in {folder}: {REMEDY}")
    return interpreter


def _version(python: str) -> tuple[int, ...]:
    """(major, minor, micro) of an interpreter, () if it does not run."""
    try:
        code = "import sys; print(*sys.version_info[:3])"
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60)
        return tuple(int(part) for part in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


def _check_python(python: str) -> None:
    version = _version(python)
    if version[:2] not in PYTHONS:
        found = f"is Python {'.'.join(map(str, version))}" if version else "does not run"
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise InputError(f"{python} {found}, and COMET's packages (numpy < 2) have wheels for Python {wanted}: give one of these")


def _clear(folder: Path) -> None:
    """Make way for a new environment, without deleting anything that `setup` did not make."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give another one for COMET's environment")
    if (folder / MARKER).is_file():
        shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} holds other files: give an empty or a new folder for COMET's environment")


def _requirements_hash() -> str:
    return hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
