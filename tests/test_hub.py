"""Checkpoints of a hub: what is fetched, how long it stays, and that it stays within its budget."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from study_fixture import as_study, environment, hub_study, write_hub

from glottoscope.errors import InputError
from glottoscope.lm import reservations
from glottoscope.lm.checkpoints import Checkpoint, load_lm
from glottoscope.lm.hub import Downloads, FolderHub, choose_files
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.tokenizing import make_tokenizer
from glottoscope.study.store import RunStore
from glottoscope.walking import tree_size

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


SAFE = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize(
    ("lying", "wanted"),
    [
        ((*SAFE, *PICKLED, "consolidated.safetensors"), SAFE),
        ((*PICKLED, "consolidated.safetensors", "model.safetensors.index.json"), PICKLED),
        (("model.safetensors", *SAFE, *PICKLED), ("model.safetensors",)),
        (("adapter.safetensors", "pytorch_model.bin"), ("pytorch_model.bin",)),
        (("weights.safetensors",), ("weights.safetensors",)),  # loading says what is missing
    ],
)  # fmt: skip
def test_of_two_formats_one_is_chosen_with_its_index(lying: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    here = dict.fromkeys(("config.json", "tokenizer.json", *lying), 1)
    assert set(choose_files(here, "model")) == {"config.json", "tokenizer.json", *wanted}
    assert set(choose_files(here, "tokenizer")) == {"config.json", "tokenizer.json"}


def test_a_sharded_repository_of_both_formats_loads(tmp_path: Path) -> None:
    write_hub(tmp_path / "hub", ["a b c"], ["step0"])
    folder = tmp_path / "hub" / "owner" / "lm" / "step0"
    model = load_lm(Checkpoint(str(folder), 0, 0))
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    model.save_pretrained(folder, max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    named = {
        name: shard.replace("model", "pytorch_model").replace("safetensors", "bin") for name, shard in index["weight_map"].items()
    }
    for shard in set(named.values()):
        torch.save({name: model.state_dict()[name] for name in named if named[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({**index, "weight_map": named}), encoding="utf-8")
    with Downloads(tmp_path / "d", FolderHub(tmp_path / "hub"), remove=True).held("owner/lm", "step0") as place:
        assert sorted(p.name for p in place.glob("*.safetensors")) == shards
        loaded = load_lm(Checkpoint(str(place), 0, 0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_configuration_takes_no_room_and_leaves_nothing(hub: FolderHub, tmp_path: Path) -> None:
    with Downloads(tmp_path / "d", hub, budget=1).held("owner/lm", "step0", "config") as folder:
        assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert not folder.exists()
    assert not (tmp_path / "d").exists()
    (hub.root / "owner" / "lm" / "step0" / "config.json").unlink()
    with pytest.raises(InputError, match=r"owner/lm at revision step0 holds no config\.json"):
        Downloads(tmp_path / "d", hub).held("owner/lm", "step0", "config").__enter__()


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


def small_disk(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the folder pass for a disk of so many bytes."""

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=size - tree_size(folder))

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize("remove", [True, False])
def test_what_others_have_fetched_is_not_counted_twice(
    hub: FolderHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: bool
) -> None:
    small_disk(tmp_path / "d", int(2.6 * WEIGHTS), monkeypatch)
    downloads = Downloads(tmp_path / "d", hub, remove=remove)
    with downloads.held("owner/lm", "step0"), downloads.held("owner/lm", "step1") as folder:
        assert (folder / "model.safetensors").read_bytes()[0] == 1


def test_room_that_others_will_let_go_of_is_waited_for(hub: FolderHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(tmp_path / "d", int(1.5 * WEIGHTS), monkeypatch)
    downloads, read = Downloads(tmp_path / "d", hub, remove=True), []

    def second() -> None:
        with Downloads(tmp_path / "d", hub, remove=True).held("owner/lm", "step1") as folder:
            read.append((folder / "model.safetensors").read_bytes()[0])

    thread = threading.Thread(target=second)
    with downloads.held("owner/lm", "step0"):
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        assert read == []
    thread.join(30)
    assert read == [1]
    small_disk(tmp_path / "d", WEIGHTS // 2, monkeypatch)
    with pytest.raises(InputError, match=r"step0 needs 0.050 MB and .* has 0.025 MB free: it is not fetched"):
        downloads.held("owner/lm", "step0").__enter__()


def test_a_study_whose_tokenizers_do_not_fit_together_waits_for_no_one(tmp_path: Path) -> None:
    raw = hub_study(tmp_path)
    sizes = choose_files(FolderHub(tmp_path / "hub").sizes("owner/lm", "step10"), "tokenizer")
    raw["compute"]["disk_gb"] = 1.5 * sum(sizes.values()) / 1e9
    study, store = as_study(raw, tmp_path), RunStore(tmp_path / "out")
    store.create(study, {})
    thread = threading.Thread(target=make_tokenizer, args=(str(store.root), lambda *_: None), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "tokenizer" in store.done(store.tokenizer_dir)


ELSEWHERE = (
    "import sys, time; from pathlib import Path\n"
    "from glottoscope.lm import reservations; from glottoscope.lm.hub import Downloads, FolderHub\n"
    # Another machine, which no lock of this one reaches.
    "reservations.machine_id, reservations._flock, reservations.BEAT_S = lambda: 'elsewhere', lambda *_: None, 0.1\n"
    "with Downloads(Path(sys.argv[1]), FolderHub(sys.argv[2]), budget=75_000, remove=True).held('owner/lm', 'step3') as folder:\n"
    "    print('held', flush=True); time.sleep(60)"
)


def test_another_machines_checkpoint_stays_for_as_long_as_its_count_goes_up(
    hub: FolderHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservations, "STALE_S", 2.0)
    here, read = Downloads(tmp_path / "d", hub, budget=75_000, remove=True), []

    def second() -> None:
        with here.held("owner/lm", "step0") as folder:
            read.append((folder / "model.safetensors").read_bytes()[0])

    arguments = (sys.executable, "-c", ELSEWHERE, str(tmp_path / "d"), str(hub.root))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(4)
        theirs = [n for n in names(tmp_path / "d") if n.startswith("owner--lm--step3-")]
        assert weights_in(tmp_path / "d") == len(theirs) == 1
        assert thread.is_alive()
        process.send_signal(signal.SIGKILL)
    thread.join(30)
    assert read == [0]
    assert names(tmp_path / "d") == []


@pytest.mark.parametrize("remove", [True, False])
def test_a_start_lets_go_of_what_none_at_work_here_holds(hub: FolderHub, tmp_path: Path, remove: bool) -> None:
    arguments = (sys.executable, "-c", ELSEWHERE, str(tmp_path / "d"), str(hub.root))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
    downloads = Downloads(tmp_path / "d", hub, remove=True)
    with downloads.held("owner/lm", "step0") as folder:
        Downloads(tmp_path / "d", hub, remove=remove).clear()
        assert [n for n in names(tmp_path / "d") if "step" in n] == [folder.name]
        assert (folder / "model.safetensors").exists()
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here says which files are mapped")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_whose_files_are_removed_maps_none_of_them(tmp_path: Path, dtype: str) -> None:
    raw = hub_study(tmp_path, compute={"dtype": dtype})
    for folder in (tmp_path / "hub" / "owner" / "lm").iterdir():
        load_lm(Checkpoint(str(folder), 0, 0), dtype=dtype).save_pretrained(folder)  # as it is read: nothing is converted
    store = RunStore(tmp_path / "out")
    context = Context(as_study(raw, tmp_path), store)
    model = context.load_lm(context.cells[0])
    assert str(store.downloads_dir) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
