"""The system's Chromium, one for all tests, and the sites that they look at, each built once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from site_fixture import Place, Visits, browsed, hostile_run, labelled_run, static
from study_fixture import glottoscope

from glottoscope.study.store import RunStore

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Nothing but this machine can be reached: what is asked of others ends at a proxy that is not there.
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=127.0.0.1",
)
PATIENCE = 60_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"no Chromium on PATH (looked for {', '.join(BROWSERS)}); on Debian: apt install chromium fonts-noto-cjk")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visits(browser: Browser) -> Iterator[Visits]:
    """Opens pages; when the test ends, each has been silent, without failure, and asked nobody but its own site."""
    opened = Visits(browser, PATIENCE)
    yield opened
    opened.check()


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A run on English and Japanese text with labels of two raters. Tests read it and never write into it."""
    return labelled_run(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def exported(study: RunStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `glottoscope export` wrote, below a folder that a web server may serve."""
    folder = tmp_path_factory.mktemp("www") / "some" / "where"
    done = glottoscope("export", study.root, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def export(exported: Path, study: RunStore) -> Iterator[Place]:
    with static(exported) as url:
        yield Place(url, study)


@pytest.fixture(scope="session")
def below(exported: Path, study: RunStore) -> Iterator[Place]:
    """The export under a longer path than "/"."""
    with static(exported.parents[1]) as url:
        yield Place(f"{url}some/where/", study)


@pytest.fixture(scope="session")
def served(study: RunStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A copy of the run behind `glottoscope browse`, which takes labels in."""
    root = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(study.root, root)
    with browsed(root, rater="mari") as url:
        yield Place(url, RunStore(root), rater="mari")


@pytest.fixture(params=["export", "served"])
def place(request: pytest.FixtureRequest) -> Place:
    """The exported site, then the served one."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return hostile_run(tmp_path_factory.mktemp("hostile") / "run")
