"""Checkpoints of a hub: what is fetched, how long it stays, and that it stays within its budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from study_fixture import environment

from glottoscope.errors import InputError
from glottoscope.lm.hub import Downloads, FolderHub, choose_files

WEIGHTS = 50_000


@pytest.fixture
def hub(tmp_path: Path) -> FolderHub:
    for step in range(4):
        folder = tmp_path / "hub" / "owner" / "lm" / f"step{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([step]) * WEIGHTS)
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("[]")
        (folder / "README.md").write_text("not fetched")
    return FolderHub(tmp_path / "hub")


def names(folder: Path) -> list[str]:
    """What lies in the folder of downloads, locks aside."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []


def test_only_what_loading_needs_is_chosen() -> None:
    here = {"model.safetensors": 9, "pytorch_model.bin": 9, "config.json": 1, "tokenizer.model": 2, "x/config.json": 1, "a.md": 1}
    assert choose_files(here, "config") == {"config.json": 1}
    assert set(choose_files(here, "tokenizer")) == {"config.json", "tokenizer.model"}
    assert set(choose_files(here, "model")) == {"config.json", "tokenizer.model", "model.safetensors"}
    del here["model.safetensors"]
    assert set(choose_files(here, "model")) == {"config.json", "tokenizer.model", "pytorch_model.bin"}


def test_removed_after_the_block(hub: FolderHub, tmp_path: Path) -> None:
    downloads = Downloads(tmp_path / "d", hub, remove=True)
    with downloads.held("owner/lm", "step2") as folder:
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert (folder / "model.safetensors").read_bytes() == bytes([2]) * WEIGHTS
    assert names(tmp_path / "d") == []
    with pytest.raises(ValueError, match="loading"), downloads.held("owner/lm", "step2"):
        raise ValueError("loading")
    assert names(tmp_path / "d") == []


def test_kept_and_found_again(hub: FolderHub, tmp_path: Path) -> None:
    downloads = Downloads(tmp_path / "d", hub)
    with downloads.held("owner/lm", "step1") as first:
        pass
    (hub.root / "owner" / "lm" / "step1" / "model.safetensors").unlink()
    with downloads.held("owner/lm", "step1") as again:
        assert again == first
        assert (again / "model.safetensors").stat().st_size == WEIGHTS


def test_what_does_not_fit_is_not_fetched(hub: FolderHub, tmp_path: Path) -> None:
    small = Downloads(tmp_path / "a", hub, budget=WEIGHTS, remove=True)  # the configuration comes on top
    with pytest.raises(InputError, match=r"owner/lm at revision step0 needs 0.050 MB and compute.disk_gb allows"):
        small.held("owner/lm", "step0").__enter__()
    assert names(tmp_path / "a") == []
    kept = Downloads(tmp_path / "b", hub, budget=2.5 * WEIGHTS)
    for step in (0, 1):
        with kept.held("owner/lm", f"step{step}"):
            pass
    with pytest.raises(InputError, match=r"step2 needs .* are taken: it is not fetched; set compute.remove_downloads = true"):
        kept.held("owner/lm", "step2").__enter__()
    assert names(tmp_path / "b") == ["owner--lm--step0", "owner--lm--step1"]
    with pytest.raises(InputError, match="has no owner/lm at revision step9"):
        kept.held("owner/lm", "step9").__enter__()


def weights_in(folder: Path) -> int:
    """How many weights lie there; other threads may be removing some (pathlib's rglob fails then)."""
    return sum(name == "model.safetensors" for _, _, names in os.walk(folder) for name in names)


def test_those_who_need_room_wait_for_each_other(hub: FolderHub, tmp_path: Path) -> None:
    at_once, most, failures = 0, 0, []
    guard = threading.Lock()

    def read(step: int) -> None:
        nonlocal at_once, most
        try:
            with Downloads(tmp_path / "d", hub, budget=2.5 * WEIGHTS, remove=True).held("owner/lm", f"step{step}") as folder:
                with guard:
                    at_once += 1
                    most = max(most, at_once)
                    assert weights_in(tmp_path / "d") <= 2
                assert (folder / "model.safetensors").read_bytes()[0] == step
                with guard:
                    at_once -= 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(n % 4,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert 1 <= most <= 2
    assert names(tmp_path / "d") == []


def test_a_killed_process_holds_no_room(hub: FolderHub, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from glottoscope.lm.hub import Downloads, FolderHub\n"
        "with Downloads(Path(sys.argv[1]), FolderHub(sys.argv[2]), budget=75_000, remove=True).held('owner/lm', 'step3'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    arguments = (sys.executable, "-c", code, str(tmp_path / "d"), str(hub.root))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
    assert any(n.startswith("owner--lm--step3-") for n in names(tmp_path / "d"))
    with Downloads(tmp_path / "d", hub, budget=75_000, remove=True).held("owner/lm", "step0") as folder:
        assert [n for n in names(tmp_path / "d") if "step" in n] == [folder.name]


class Handler(BaseHTTPRequestHandler):
    """The two addresses of a hub that fetching asks for, from a folder."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        type(self).asked.append(self.path)
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.root / "/".join(parts[2:4]) / parts[5]
            if not folder.is_dir():
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(folder.iterdir())]
            self._send(json.dumps({"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": files}).encode(), body, {})
            return
        repo, name = "/".join(parts[:2]), parts[4]
        revision = parts[3] if parts[3] != "0" * 40 else "step1"  # a commit is asked for once its hash is known
        data = (self.root / repo / revision / name).read_bytes()
        self._send(data, body, {"X-Repo-Commit": "0" * 40, "ETag": f'"{len(data)}-{name}"'})

    def _send(self, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(hub: FolderHub) -> Iterator[str]:
    Handler.root, Handler.asked = hub.root, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_hub_that_is_asked_over_http(server: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from glottoscope.lm.hub import Downloads, PublicHub\n"
        "from glottoscope.errors import InputError\n"
        "downloads = Downloads(Path(sys.argv[1]), PublicHub(), budget=60_000, remove=True)\n"
        "with downloads.held('owner/lm', 'step1') as folder:\n"
        "    print(sorted((p.name, p.stat().st_size) for p in folder.rglob('*') if p.is_file()))\n"
        "print(sorted(p.name for p in Path(sys.argv[1]).iterdir() if not p.name.startswith('.')))\n"
        "try:\n    downloads.held('owner/lm', 'step9').__enter__()\nexcept InputError as error:\n    print(error)\n"
    )
    env = {**environment(), "HF_ENDPOINT": server, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    command = (sys.executable, "-c", code, str(tmp_path / "d"))
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert ended.returncode == 0, ended.stderr
    files, left, error = ended.stdout.splitlines()
    assert files == f"[('config.json', 2), ('model.safetensors', {WEIGHTS}), ('tokenizer.json', 2)]"
    assert left == "[]"
    assert error.startswith("the hub does not show owner/lm at revision step9:")
    assert not any("README.md" in x for x in Handler.asked)
