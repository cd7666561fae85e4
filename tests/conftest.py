"""One thread per test process: the same numbers whatever the machine, and no fight over two cores."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from study_fixture import PLANTED, run, text_study, write_text

from glottoscope.study.store import RunStore

torch.set_num_threads(1)
# Tests stop processes the way Ctrl-C does, which they would inherit as ignored where tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The tiny planted study, run to its report once. Tests read it and never write into it."""
    return run(PLANTED, tmp_path_factory.mktemp("tiny") / "run", until="report")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic documents in English, Japanese and German with aligned sentences."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, ("en", "ja", "de"))
    return folder


@pytest.fixture(scope="session")
def text_run(text_folder: Path) -> RunStore:
    """The tiny study on real text files, with a tokenizer trained on them."""
    return run(text_study(text_folder), text_folder / "run")
