"""A Ray cluster of this machine with several raylets, and what its processes do to the machine."""

from __future__ import annotations

import importlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glottoscope.study.ray_engine import OBJECT_STORE, ON_LOOPBACK, QUIET

PATHS = [str(Path(__file__).parents[2] / "src"), *map(str, Path(__file__).parents[:2])]


@contextmanager
def environment(folder: str) -> Iterator[None]:
    """Ray quiet, all its files below a folder, and the tests' own modules known to its processes."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [before.get("PYTHONPATH")])])
    # Ray would wait longer with every try of a task that it killed for its memory.
    os.environ.update({**QUIET, **ON_LOOPBACK, "RAY_TMPDIR": folder, "RAY_task_oom_retry_delay_base_ms": "0"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def in_background() -> Iterator[None]:
    """What starts here ignores Ctrl-C, as all that a batch script starts in the background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Two nodes with one CPU each, every process of them on 127.0.0.1: a ray.cluster_utils.Cluster.

    The head says that it has a GPU, which need not be there.
    """
    with tempfile.TemporaryDirectory(prefix="gr", dir="/tmp", ignore_cleanup_errors=True) as folder, environment(folder):
        cluster_of = importlib.import_module("ray.cluster_utils").Cluster  # reads the environment
        common = {"num_cpus": 1, "object_store_memory": OBJECT_STORE, "node_ip_address": "127.0.0.1"}
        head = {**common, "num_gpus": 1, "include_dashboard": False}
        with in_background():
            cluster = cluster_of(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            add_node(cluster)
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Any, cpus: int = 1, **settings: str) -> Any:
    """A further node; `settings` are environment variables of its raylet."""
    common = {"object_store_memory": OBJECT_STORE, "node_ip_address": "127.0.0.1", "env_vars": settings}
    with in_background():
        node = cluster.add_node(num_cpus=cpus, **common)
    cluster.wait_for_nodes()
    return node


def raylet(node: Any) -> int:
    """Number of a node's raylet process."""
    return node.all_processes["raylet"][0].process.pid


def kill_raylet(node: Any) -> None:
    os.kill(raylet(node), signal.SIGKILL)


def wait_for(ready: Callable[[], Any], seconds: float = 120.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < limit, "it never came about"
        time.sleep(0.01)
    return found


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def descendants(root: int) -> set[int]:
    """This process and all below it."""
    parents = {int(p.name): parent_of(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}
    found, new = {root}, {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def listening(pids: set[int]) -> dict[str, int]:
    """Addresses on which these processes listen for TCP, as the kernel writes them (hex) -> how many sockets."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {x.removeprefix("socket:[").removesuffix("]") for x in links if x.startswith("socket:")}
    found: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address = fields[1].rpartition(":")[0]
                found[address] = found.get(address, 0) + 1
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, ::1, and mapped
