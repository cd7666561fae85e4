"""The exported site: the files of the served one, written whole, into no one else's folder."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from browser_fixture import hand_made, site_of
from rich.console import Console
from study_fixture import command

from glottoscope.errors import InputError
from glottoscope.report.browser.export import Exported, export_site
from glottoscope.report.browser.labels import Label
from glottoscope.report.browser.site import FILES, Site
from glottoscope.study.browsing import export
from glottoscope.study.store import RunStore


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site_of(hand_made(tmp_path_factory.mktemp("hand") / "run"))


def quiet(_done: int, _total: int, _words: str) -> None:
    pass


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_files_are_those_of_the_server(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "site"
    done = export_site(site, folder, quiet)
    found = files(folder)
    assert set(found) == {*site.addresses(), ".nojekyll"}
    served = Site(site.source)
    for address in site.addresses():
        assert found[address] == served.read(address), address
    assert done == Exported(len(found), sum(len(x) for x in found.values()), len(found), 0, 0)
    assert FILES in found
    assert json.loads(found[FILES])["files"] == sorted(found)


def test_a_whole_run(tiny: RunStore, tmp_path: Path) -> None:
    out = StringIO()
    export(tiny.root, tmp_path / "site", Console(file=out, width=200))
    assert "files" in out.getvalue()
    found = files(tmp_path / "site")
    shards = [x for x in found if "/features/" in x]
    assert len(shards) == 4  # one of 32 features for each setup
    assert json.loads(found["data/live.json"]) == {"schema": 1, "live": False}
    again = StringIO()
    export(tiny.root, tmp_path / "site", Console(file=again, width=200))
    assert "0 written, 0 removed" in again.getvalue()
    assert files(tmp_path / "site") == found


def test_what_is_there_is_left_alone(site: Site, tmp_path: Path) -> None:
    export_site(site, tmp_path, quiet)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert export_site(site, tmp_path, quiet).written == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "data" / "tokens.json.gz").write_bytes(b"broken")
    assert export_site(site, tmp_path, quiet).written == 1


def test_a_label_given_since_is_in_the_next_export(tmp_path: Path) -> None:
    site = site_of(hand_made(tmp_path / "run"))
    export_site(site, tmp_path / "site", quiet)
    site.labels.append(Label(rater="mari", setup="m@0/layer_01/seed_0", feature=1, granularity=2))
    assert export_site(site, tmp_path / "site", quiet).written == 2
    assert b"mari" in (tmp_path / "site" / "data" / "labels.json").read_bytes()
    assert b"mari" in (tmp_path / "site" / "labels.csv").read_bytes()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_others_is_refused(site: Site, tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty and no earlier export: choose another folder"):
        export_site(site, tmp_path, quiet, force=force)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "site.json").write_text('{"title": "another site"}')
    with pytest.raises(InputError, match="not empty and no earlier export"):
        export_site(site, tmp_path, quiet, force=force)
    assert files(tmp_path).keys() == {"thesis.txt", "data/site.json"}


def test_a_file_is_no_folder(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("")
    with pytest.raises(InputError, match="is a file, not a folder"):
        export_site(site, path, quiet)
    with pytest.raises(InputError, match="cannot be written"):
        export_site(site, path / "below", quiet)


def test_the_run_itself_is_no_place_for_the_site(site: Site) -> None:
    with pytest.raises(InputError, match="no earlier export"):
        export_site(site, site.source.store.root, quiet, force=True)


def test_only_force_removes_what_is_no_longer_there(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    export_site(site_of(hand_made(tmp_path / "run")), folder, quiet)
    (folder / "CNAME").write_text("example.org")
    (folder / "data" / "cells" / "mine.txt").write_text("mine")
    shutil.rmtree(tmp_path / "run")
    smaller = site_of(hand_made(tmp_path / "run", steps=(100,)))
    gone = {x for x in files(folder) if x.startswith("data/cells/m@0/")}
    kept = export_site(smaller, folder, quiet)
    assert (kept.left, kept.removed) == (len(gone), 0)
    assert gone <= files(folder).keys()
    done = export_site(smaller, folder, quiet, force=True)
    assert (done.left, done.removed) == (0, len(gone))
    assert files(folder).keys() == {*smaller.addresses(), ".nojekyll", "CNAME", "data/cells/mine.txt"}
    assert not (folder / "data" / "cells" / "m@0").exists()
    assert export_site(smaller, folder, quiet, force=True).removed == 0


def test_the_export_of_another_study_needs_force(site: Site, tiny: RunStore, tmp_path: Path) -> None:
    from glottoscope.study.browsing import open_site

    export_site(site, tmp_path, quiet)
    other = open_site(tiny.root)
    with pytest.raises(InputError, match=r"holds the site of the study 'hand'.*--force"):
        export_site(other, tmp_path, quiet)
    export_site(other, tmp_path, quiet, force=True)
    assert files(tmp_path).keys() == {*other.addresses(), ".nojekyll"}


@pytest.mark.parametrize("name", ["../outside.txt", "/absolute", "link/inside.txt"])
def test_nothing_outside_of_the_folder_is_removed(site: Site, tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "site", tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "inside.txt").write_text("mine")
    export_site(site, folder, quiet)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    listed = json.loads((folder / FILES).read_bytes())
    (folder / FILES).write_text(json.dumps({**listed, "files": [*listed["files"], name, str(outside)]}))
    export_site(site, folder, quiet, force=True)
    assert outside.read_text() == "mine"
    assert (tmp_path / "elsewhere" / "inside.txt").read_text() == "mine"


@pytest.mark.parametrize("stop", [1, 20, 40])
def test_an_interrupted_export_is_completed_by_the_next(site: Site, tmp_path: Path, stop: int) -> None:
    wanted = tmp_path / "whole"
    export_site(site, wanted, quiet)

    def interrupt(done: int, _total: int, _words: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    folder = tmp_path / "site"
    with pytest.raises(KeyboardInterrupt):
        export_site(site, folder, interrupt)
    found = files(folder)
    assert len(found) < len(files(wanted))
    assert all(data == files(wanted)[name] for name, data in found.items())
    assert {"data/site.json", FILES} <= set(found)
    export_site(site, folder, quiet)
    assert files(folder) == files(wanted)


def test_progress_runs_to_the_end(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    export_site(site, tmp_path, lambda *x: seen.append(x))
    total = len(list(site.addresses()))
    assert [x[0] for x in seen] == list(range(total + 1))
    assert {x[1] for x in seen} == {total}
    assert "m@0/layer_01/seed_0" in {x[2] for x in seen}


def test_a_damaged_file_ends_the_export(tmp_path: Path) -> None:
    store = hand_made(tmp_path / "run")
    path = store.setup_dir("m", 100, 1, 0) / "histogram.parquet"
    path.write_bytes(path.read_bytes()[:100])
    site = site_of(store)
    with pytest.raises(InputError, match=r"m@100.*histogram\.parquet is damaged"):
        export_site(site, tmp_path / "site", quiet)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    ended = command("export", tmp_path / "nothing", tmp_path / "site")
    assert ended.code == 2
    assert "no such run directory" in ended.complaint
    assert not (tmp_path / "site").exists()


def test_the_command_exports(tiny: RunStore, tmp_path: Path) -> None:
    ended = command("export", tiny.root, tmp_path / "site")
    assert ended.code == 0, ended.err
    assert (tmp_path / "site" / "index.html").exists()


def test_a_dry_run_says_what_would_be_written(tiny: RunStore, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    said = command("export", tiny.root, folder, "--dry-run")
    assert said.code == 0
    assert not folder.exists()
    command("export", tiny.root, folder)
    n = sum(p.is_file() for p in folder.rglob("*"))
    assert f"would hold {n:,} files; 0 of that name are there already" in said.out
    before = {p: p.stat().st_ino for p in folder.rglob("*")}
    assert f"would hold {n:,} files; {n:,} of that name are there already" in command("export", tiny.root, folder, "--dry-run").out
    assert {p: p.stat().st_ino for p in folder.rglob("*")} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").touch()
    assert "is not empty and no earlier export" in command("export", tiny.root, other, "--dry-run").complaint


def test_an_interrupted_command_says_how_to_go_on(tiny: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("glottoscope.report.browser.site.Site.prepare", interrupt)
    out = StringIO()
    with pytest.raises(KeyboardInterrupt):
        export(tiny.root, tmp_path / "site", Console(file=out, width=200))
    assert "the same command completes it" in out.getvalue()
