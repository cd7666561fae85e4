"""The engine of many machines: every unit is a Ray task that says what it needs.

Ray schedules, spreads, and does again what was on a lost process or node. Results go through the run directory, which all
nodes see; through the driver go names of units, failures, and how far units are (their signs of life in that directory).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import signal
import socket
import tempfile
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

import glottoscope
from glottoscope.errors import InputError
from glottoscope.study.engine import Ended, Engine, Failure, Unit, lost, prepare_process, run_unit, usable_cores
from glottoscope.study.heartbeats import read_sign
from glottoscope.study.machine import gpu_room
from glottoscope.study.plan import Room, describe_memory, describe_time
from glottoscope.study.store import RunStore, file_digest
from glottoscope.study.versions import code_hash
from glottoscope.study.view import View

RETRIES = 3  # of a unit whose process or node was lost; what a unit itself reports is not tried again
OBJECT_STORE = 150 * 2**20  # of a cluster started here: objects are names and failures
LOOK_S = 2.0  # between two looks at the signs of life
PROBE_S = 120.0  # a node that does not answer for so long
GONE_S = 60.0  # units that no node has room for any more wait so long for one
STOP_S = 240.0  # for units to write their state when a run is stopped: it may be tens of GB
AT_ONCE_S = 3.0  # in which most units have stopped
# What has to be the same on every node, since it can change a number.
SAME = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pyarrow", "safetensors", "numba", "triton")
NO_RAY = "--engine ray needs Ray: pip install 'glottoscope[ray]', on every node"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "false",
    "RAY_enable_open_telemetry": "false",
    # Else a unit that Ray kills to save its node's memory is tried again without end.
    "RAY_task_oom_retries": str(RETRIES),
}


# Ray takes the name of this machine for loopback, unless it is told that there are no other machines; read at its import.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class Node(NamedTuple):
    """A node of the cluster and what it has for units."""

    id: str
    host: str
    cpus: float
    gpus: float
    memory: float  # bytes


class RayEngine(Engine):
    """Units on a Ray cluster.

    Args:
        device: the driver's; units on another kind of device are refused, since it would change numbers.
        gpus: GPUs that a unit asks for; 0: it runs on a CPU.
        address: of a cluster that is there, HOST:PORT of its head or "auto"; None: one is started on this machine.
        workers: units at once; default: as many as the nodes have room for.
    """

    def __init__(
        self, store: RunStore, threads: int, console: Console | None = None, *, device: str = "cpu", gpus: float = 0.0,
        fast_matmul: bool = True, address: str | None = None, workers: int | None = None, plain: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(store, threads, console, plain=plain)
        self.device, self.gpus, self.address, self.fast_matmul = device, gpus, address, fast_matmul
        self.workers = workers
        self.slots = workers or 1
        self._nodes: list[Node] = []
        self._stranded_since: float | None = None
        self._ray: Any = None
        self._folder: str | None = None  # of a cluster started here
        self._mine = False  # whether this engine connected, and so has to let go

    def start(self) -> None:
        """Connect to the cluster, or start one, and see that every node can do the work.

        Raises:
            InputError: no Ray, no such cluster, other versions there, or a node that does not see the run directory.
        """
        self._ray = reach(self.address)
        self._mine = not self._ray.is_initialized()
        try:
            if self._mine:
                self._connect()
            self._nodes = self._usable_nodes()
            if not self._nodes:
                raise InputError(f"no node of the Ray cluster has {self._need()}, which is what a unit needs (compute.threads)")
            self._probe()
        except BaseException:
            self.stop(kill=True)
            raise
        room = sum(self._room(node) for node in self._nodes)
        self.slots = min(self.workers or room, room)
        where = "started here" if self.address is None else self.address
        self.console.print(f"Ray {self._ray.__version__}, {where}: {len(self._nodes)} node(s), {self.slots} unit(s) at once")
        if not self.gpus and (unused := sum(node.gpus for node in self._nodes)):
            self.console.print(f"{unused:g} GPU(s) of the cluster are not used: units work on the {self.device}, as this process")

    def _connect(self) -> None:
        common = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if self.address is None:
            cores = (self.workers or max(1, len(usable_cores()) // self.threads)) * self.threads
            # Sockets have short names only; a home or scratch folder may not.
            self._folder = tempfile.mkdtemp(prefix="gr", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
            # "local": else RAY_ADDRESS in the environment would be another cluster to connect to.
            settings = {"address": "local", "num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE,
                        "_node_ip_address": "127.0.0.1", "_temp_dir": self._folder}  # fmt: skip
        else:
            settings = {"address": self.address}
        try:
            with _own_sigterm():
                self._ray.init(**settings, **common)
        except (RuntimeError, ConnectionError, ValueError, TimeoutError) as error:
            what = (
                "Ray could not be started here" if self.address is None else f"--address {self.address}: no Ray cluster to work on"
            )
            # Ray takes its token from the home directory for a cluster of its own only.
            token = "; it wants a token: set RAY_AUTH_MODE=token" if "AuthToken" in f"{error} {error.__cause__}" else ""
            raise InputError(f"{what}: {_line(error)}{token}") from None
        if self.address is None and any(n["NodeManagerAddress"] != "127.0.0.1" for n in self._ray.nodes()):
            raise InputError(
                "Ray was imported before and would listen to the network: run in a process of its own, or with --address"
            )

    def _usable_nodes(self) -> list[Node]:
        """Nodes that are alive and have room for a unit."""
        nodes = []
        for found in self._ray.nodes():
            has = found["Resources"]
            node = Node(found["NodeID"], found["NodeManagerHostname"], has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0))
            if found["Alive"] and self._room(node):
                nodes.append(node)
        return nodes

    def _need(self) -> str:
        return f"{self.threads} CPU(s)" + (f" and {self.gpus:g} GPU(s)" if self.gpus else "")

    def _room(self, node: Node) -> int:
        """Units that fit on a node by its CPUs and GPUs."""
        room = int(node.cpus // self.threads)
        return min(room, int(node.gpus / self.gpus + 1e-9)) if self.gpus else room

    def memory_per_unit(self) -> Room | None:
        if self.gpus:
            return gpu_room(max(1, int(1 / self.gpus + 1e-9)))  # the driver's GPU is like the others
        # One layer may take a whole node: by what units declare, Ray then runs fewer at once.
        share = min(node.memory / min(self._room(node), self.slots) for node in self._nodes)
        return Room(share, max(node.memory for node in self._nodes), "the largest node's memory", alone=0.0)

    def _probe(self) -> None:
        """One task per node: is it the same program, and does it see the run directory?"""
        ray = self._ray
        strategy = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        task = ray.remote(max_retries=0, num_cpus=0)(_describe_node)
        root = str(self.store.root.resolve())
        asked = {n: task.options(scheduling_strategy=strategy(n.id, soft=False)).remote(root) for n in self._nodes}
        own = describe_node(root)
        for node, answer in asked.items():
            try:
                theirs = ray.get(answer, timeout=PROBE_S)
            except ray.exceptions.GetTimeoutError:
                raise InputError(f"node {node.host} of the Ray cluster has not answered for {PROBE_S:.0f} s") from None
            except ray.exceptions.RayError as error:
                why = "it ran out of memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else _line(error)
                raise InputError(f"node {node.host} of the Ray cluster cannot run glottoscope: {why}") from None
            if theirs["manifest"] != own["manifest"]:
                raise InputError(f"node {node.host} of the Ray cluster {_seen(theirs, root)}: all nodes need one shared folder")
            if not theirs["writable"]:
                raise InputError(f"node {node.host} of the Ray cluster cannot write into {root}")
            if other := [k for k in own["versions"] if theirs["versions"].get(k) != own["versions"][k]]:
                name = other[0]
                raise InputError(
                    f"node {node.host} of the Ray cluster has {name} {theirs['versions'].get(name) or '(none)'} and this process "
                    f"has {own['versions'][name] or '(none)'}: use the same environment on all nodes"
                )

    def work(self, stage: str, units: Sequence[Unit], view: View, finish: Callable[[Unit, Ended], None]) -> None:
        ray = self._ray
        task = ray.remote(max_retries=RETRIES, retry_exceptions=False, scheduling_strategy="SPREAD")(_run)
        code, root = describe_node(None)["versions"], str(self.store.root.resolve())
        queue, waiting = deque(units), {}
        looked = 0.0
        self._stranded_since = None
        try:
            while queue or waiting:
                # Never more than there is room for: Ray holds what waits, but --workers is a limit.
                while queue and (self.workers is None or len(waiting) < self.slots):
                    unit = queue.popleft()
                    if unit.memory > max(node.memory for node in self._nodes):
                        finish(unit, self._no_room(unit))
                        continue
                    asked = task.options(num_cpus=self.threads, num_gpus=self.gpus, memory=unit.memory or None, name=unit.name)
                    answer = asked.remote(unit, stage, root, self.threads, self.fast_matmul, self.device, code)
                    waiting[answer] = unit
                if not waiting:
                    break
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=0.2, fetch_local=False)
                if ready:
                    ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
                for answer in ready:
                    unit = waiting.pop(answer)
                    finish(unit, self._answer(unit, answer))
                if time.monotonic() - looked > LOOK_S:
                    self._look(waiting.values(), view)
                    for answer in self._stranded(waiting):
                        ray.cancel(answer)
                        unit = waiting.pop(answer)
                        finish(unit, self._no_room(unit))
                    looked = time.monotonic()
        except BaseException:
            self._cancel(list(waiting))
            raise

    def _no_room(self, unit: Unit) -> Ended:
        most = describe_memory(max(node.memory for node in self._nodes))
        message = f"it needs {describe_memory(unit.memory)}, and the largest node offers {most}: set compute.memory_gb"
        return Ended(Failure(unit.name, message, True, ""), 0.0, 0)

    def _stranded(self, waiting: Mapping[Any, Unit]) -> list[Any]:
        """Answers that will not come: for GONE_S no node that is left had room for their units.

        Raises:
            InputError: no node is left at all.
        """
        nodes = self._usable_nodes()
        self._nodes = nodes or self._nodes
        most = max((node.memory for node in nodes), default=-1)
        found = [answer for answer, unit in waiting.items() if unit.memory > most]
        if not found:
            self._stranded_since = None
            return []
        now = time.monotonic()
        if self._stranded_since is None:
            self._stranded_since = now
        if now - self._stranded_since < GONE_S:
            return []
        if not nodes:
            raise InputError(
                f"no node of the Ray cluster is left that has {self._need()}, which is what a unit needs: "
                f"{len(waiting)} unit(s) wait; start nodes, and the same command continues"
            )
        return found

    def _answer(self, unit: Unit, answer: Any) -> Ended:
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer)
        except errors.RayError as error:
            # Its sign of life is a dead process's.
            with contextlib.suppress(OSError):
                self.store.sign_path(unit.name).unlink(missing_ok=True)
            if isinstance(error, errors.OutOfMemoryError):
                message = f"its node ran out of memory, {RETRIES + 1} times: set compute.memory_gb, or fewer --workers"
                return Ended(Failure(unit.name, message, True, ""), 0.0, 0)
            # What a unit raises comes back as its answer: this is of before it began.
            began = not isinstance(error, errors.RayTaskError)
            what = f"its process or node was lost, {RETRIES + 1} times" if began else "it could not begin on its node"
            return lost(unit, f"{what}: {_line(error)}")

    def _look(self, units: Any, view: View) -> None:
        try:
            there = {path.name for path in self.store.work_dir.iterdir()}
        except OSError:
            return
        for unit in units:
            path = self.store.sign_path(unit.name)
            if path.name in there and (sign := read_sign(path)) is not None:
                view.update(unit.name, sign.done, sign.total, sign.words)

    def _cancel(self, answers: list[Any]) -> None:
        """Stop units the way Ctrl-C does, so that long trainings keep their state; after a while without asking."""
        ray, left = self._ray, answers
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            with contextlib.suppress(KeyboardInterrupt):
                for answer in answers:
                    ray.cancel(answer)
                _, left = ray.wait(left, num_returns=len(left), timeout=AT_ONCE_S) if left else ([], [])
                if left:
                    limit = f"at most {describe_time(STOP_S)}"
                    self.console.print(f"waiting for the states of {len(left)} unit(s), {limit}; Ctrl-C again stops at once")
                    _, left = ray.wait(left, num_returns=len(left), timeout=STOP_S)
            for answer in left:
                ray.cancel(answer, force=True)

    def stop(self, kill: bool) -> None:
        if self._ray is not None and self._mine and self._ray.is_initialized():
            self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


# ---- on the nodes


def _describe_node(root: str) -> dict[str, Any]:
    return describe_node(root)


def describe_node(root: str | None) -> dict[str, Any]:
    """What of a machine decides numbers (versions of the program and its libraries), and what it sees of a run directory."""
    versions: dict[str, str] = {"Python": platform.python_version(), "glottoscope": glottoscope.__version__}
    for name in SAME:
        versions[name] = ""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions["glottoscope's code"] = code_hash()[:12]
    if root is None:
        return {"versions": versions}
    manifest = RunStore(root).manifest_path
    with contextlib.suppress(OSError):
        return {"versions": versions, "manifest": file_digest(manifest), "writable": os.access(root, os.W_OK)}
    return {"versions": versions, "manifest": "", "writable": False}


_checked = False


def _run(
    unit: Unit, stage: str, root: str, threads: int, fast_matmul: bool, device: str, versions: dict[str, str]
) -> Ended:  # fmt: skip
    """A unit, in a process of Ray's."""
    global _checked
    if not _checked and (own := describe_node(None)["versions"]) != versions:
        name = next(k for k in versions if own.get(k) != versions[k])
        message = f"node {socket.gethostname()}, which joined the Ray cluster later, has another {name}: {own.get(name)}"
        return Ended(Failure(unit.name, message, True, ""), 0.0, 0)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device == "cpu":
        # Ray may leave a node's GPUs visible to a unit that asked for none; read when CUDA starts, which is later.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not _checked and (why := _lacks(device)):
        message = f"node {socket.gethostname()} of the Ray cluster works on another device than this process: {why}"
        return Ended(Failure(unit.name, message, True, ""), 0.0, 0)
    _checked = True
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # As in what a batch script starts in the background, and its children. A unit is stopped by this signal's handler.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_process(threads, fast_matmul)
    return run_unit(unit, stage, root)


def _lacks(device: str) -> str:
    from glottoscope.lm.checkpoints import choose_device

    try:
        choose_device(device)
    except InputError as error:
        return str(error)
    return ""


# ---- small things


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which Ray replaces by an end without states when it starts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def reach(address: str | None) -> Any:
    """Ray's module, once it is sure that something answers where a cluster is to be.

    Raises:
        InputError: no Ray, or nothing at the address.
    """
    host = "127.0.0.1" if address is None else address.rpartition(":")[0]
    quiet = {**QUIET, **(ON_LOOPBACK if host in ("127.0.0.1", "localhost", "[::1]") else {})}
    os.environ.update({k: os.environ.get(k, v) for k, v in quiet.items()})
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise InputError(NO_RAY) from None
    if not hasattr(ray, "__version__"):  # a folder of that name beside the program
        raise InputError(NO_RAY)
    if address is not None:
        _look_at(address)
    return ray


def _look_at(address: str) -> None:
    """Raise where nothing answers at HOST:PORT: Ray itself would try for minutes."""
    if address == "auto":
        return
    if "://" in address:
        raise InputError(f"--address {address}: give HOST:PORT of the head, and run on a node of the cluster")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise InputError(f"--address {address}: give HOST:PORT of the cluster's head, as in 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there ({error})") from None


def _seen(theirs: dict[str, Any], root: str) -> str:
    return f"sees another {root}" if theirs["manifest"] else f"does not see {root}"


def _line(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [type(error).__name__]
    # A traceback says it last; Ray says it first, and advises at length.
    return textwrap.shorten(lines[-1] if hasattr(error, "traceback_str") else lines[0], 200, placeholder=" ...")
