"""The server of the browser: the same bytes as the export, labels taken in, and nothing for anyone else."""

from __future__ import annotations

import gzip
import http.client
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from study_fixture import command, environment, state

from glottoscope.errors import InputError
from glottoscope.report.browser.answers import TYPES, accepts_gzip
from glottoscope.report.browser.labels import LabelStore
from glottoscope.report.browser.server import MAX_BODY, Server, serve
from glottoscope.report.browser.site import Site
from glottoscope.study.browsing import open_site
from glottoscope.study.store import RunStore

SETUP = "m@20/layer_01/seed_0"
LIST = f"data/cells/{SETUP}/list.json.gz"


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running(NamedTuple):
    """A server at work on a copy of the tiny run."""

    server: Server
    site: Site
    store: RunStore

    def ask(self, method: str, target: str, body: bytes | None = None, /, **headers: str) -> Answer:
        """One request on a connection of its own; headers with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        try:
            connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, target: str, **headers: str) -> Answer:
        return self.ask("GET", f"/{target}", **headers)

    def post(self, value: Any, **headers: str) -> Answer:
        """A label as a page of the site sends it, with some headers changed ("" leaves one out)."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        given = {"Content_Type": "application/json", "X_Glottoscope": self.server.token, "Origin": self.server.url[:-1], **headers}
        return self.ask("POST", "/labels", body, **{name: text for name, text in given.items() if text})

    def raw(self, data: bytes) -> bytes:
        """What comes back for these bytes until the server ends the connection."""
        with socket.create_connection(("127.0.0.1", self.server.server_port), timeout=20) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.fixture(scope="module")
def running(tiny: RunStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(tiny.root, root)
    site = open_site(root)
    server = serve(site, site.labels, rater="mari")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Running(server, site, RunStore(root))
    server.shutdown()
    server.server_close()
    thread.join()


# ---- the files of the site


def test_every_address_has_the_bytes_of_the_export(running: Running) -> None:
    addresses = list(running.site.addresses())
    assert len(addresses) > 20
    for address in addresses:
        answer = running.get(quote(address, safe="/@"), Accept_Encoding="gzip")
        assert answer.status == 200, address
        assert answer.headers["Content-Length"] == str(len(answer.body))
        if address == "data/live.json":
            live = {"schema": 1, "live": True, "rater": "mari", "token": running.server.token}
            assert answer.json == live
        else:
            assert answer.body == running.site.read(address), address
        suffix = "." + address.removesuffix(".gz").rpartition(".")[2]
        assert answer.headers["Content-Type"] == TYPES.get(suffix, TYPES[".txt"]), address
        assert answer.headers["Content-Encoding"] == ("gzip" if address.endswith(".gz") else None)
        head = running.ask("HEAD", f"/{quote(address)}", Accept_Encoding="gzip")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["ETag"] == answer.headers["ETag"]
        assert head.headers["Content-Length"] == answer.headers["Content-Length"]


def test_the_first_page_and_queries_of_pages(running: Running) -> None:
    page = running.get("index.html").body
    assert running.get("").body == page
    assert running.get("?theme=dark").body == page
    assert running.get("find.html?q=%E7%8A%AC&sort=-phi").body == running.site.read("find.html")


def test_packed_files_go_out_as_the_client_takes_them(running: Running) -> None:
    packed, plain = running.get(LIST, Accept_Encoding="br, gzip;q=0.5"), running.get(LIST)
    assert packed.headers["Content-Encoding"] == "gzip"
    assert plain.headers["Content-Encoding"] is None
    assert gzip.decompress(packed.body) == plain.body == running.get(LIST.removesuffix(".gz")).body
    assert {x.headers["Vary"] for x in (packed, plain)} == {"Accept-Encoding"}
    assert packed.headers["ETag"] != plain.headers["ETag"]
    assert packed.headers["Content-Type"] == plain.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (None, False), ("", False), ("gzip", True), ("GZIP", True), ("br", False), ("*", True), ("gzip;q=0", False),
        ("gzip; q=0.0, *", False), ("deflate, gzip;q=1.0", True), ("x-gzip", True), ("identity", False), ("gzip;q=x", False),
    ],
)  # fmt: skip
def test_accepts_gzip(header: str | None, taken: bool) -> None:
    assert accepts_gzip(header) is taken


@pytest.mark.parametrize("target", ["index.html", LIST, "data/site.json"])
def test_what_the_browser_has_is_not_sent_again(running: Running, target: str) -> None:
    first = running.get(target, Accept_Encoding="gzip")
    for known in (first.headers["ETag"], f'"other", W/{first.headers["ETag"]}', "*"):
        again = running.get(target, Accept_Encoding="gzip", If_None_Match=known)
        assert (again.status, again.body) == (304, b"")
        assert again.headers["ETag"] == first.headers["ETag"]
        assert again.headers["Content-Type"] is None
    assert running.get(target, If_None_Match='"other"').status == 200


def test_headers_that_keep_others_out_go_with_every_answer(running: Running) -> None:
    for answer in (running.get(""), running.get("none"), running.post({}), running.ask("PUT", "/index.html"), running.get(LIST)):
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "frame-ancestors 'none'" in policy
        assert answer.headers["Server"] == "glottoscope"
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_connection_serves_one_request_after_the_other(running: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.server_port, timeout=20)
    for target, status in (("/", 200), ("/none", 404), (f"/{LIST}", 200), ("/data/none.json", 404), ("/", 200)):
        connection.request("GET", target)
        response = connection.getresponse()
        response.read()
        assert (response.status, response.will_close) == (status, False)
    connection.close()


# ---- the twins in JSON


def test_twins_are_served(running: Running) -> None:
    feature = running.get(f"data/cells/{SETUP}/features/3.json").json
    assert feature == json.loads(json.dumps(running.site.feature(SETUP, 3)))
    assert running.get("data/overview.json").json == json.loads(gzip.decompress(running.site.read("data/overview.json.gz")))
    assert running.get(f"data/cells/{SETUP}/features/32.json").status == 404


def test_a_list_as_json(running: Running) -> None:
    everything = running.get("data/find.json?alive=all&layer=all&step=all").json
    assert everything["total"] == 4 * 32
    few = running.get(f"data/find.json?{quote('alive=all&class=en,ja&sort=-density&page=1&per=3', safe='=&,')}").json
    assert len(few["rows"]) <= 3
    found = running.get(f"data/find.json?alive=all&q={quote('の')}").json
    assert found["query"]["q"] == "の"
    wrong = running.get("data/find.json?R=abc&colour=red").json
    assert any("abc" in x for x in wrong["problems"])
    assert running.get("data/find.json?q=%ff%fe").status == 200
    assert running.get("data/find.json?" + "&".join(f"a{n}=1" for n in range(300))).status == 400


# ---- labels


def test_a_label_is_written_and_shown(running: Running) -> None:
    given = {"setup": SETUP, "feature": 3, "granularity": 2, "note": "犬 <b>\u202e\x00 = dog", "blind": False}
    answer = running.post(given)
    assert answer.status == 201, answer.body
    assert {k: v for k, v in answer.json.items() if k not in ("time", "rater")} == given
    assert answer.json["rater"] == "mari"
    (line,) = running.store.labels_path.read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["sae"] == running.store.sae_hash(SETUP)
    labels = running.get("data/labels.json").json
    assert labels["labels"] == [answer.json]
    assert labels["raters"] == ["mari"]
    assert b"m,20,1,0,0,3,2,mari,0," in running.get("labels.csv").body
    assert running.post({**given, "granularity": None, "note": ""}).status == 201
    assert running.get("data/labels.json").json["labels"] == []
    assert running.post({"setup": SETUP, "feature": 0, "granularity": 4}).json["note"] == ""
    LabelStore(running.store.labels_path).append(running.site.labels.latest()[0].__class__("ken", SETUP, 0, 4))
    assert running.get("data/labels.json").json["raters"] == ["ken", "mari"]  # another process wrote one


def test_nothing_is_written_but_labels(running: Running) -> None:
    """Whatever is asked for."""
    before = state(running.store.root)
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "MOVE"):
        for target in ("/", "/none", f"/{LIST}", "/labels", "/labels.csv", "/data/labels.json"):
            running.ask(method, target, None if method in ("GET", "HEAD") else b"{}")
    running.post({"setup": SETUP, "feature": 99, "granularity": 1})
    assert state(running.store.root) == before
    assert running.post({"setup": SETUP, "feature": 1, "granularity": 1}).status == 201
    changed = {name for name, value in state(running.store.root).items() if before.get(name) != value}
    assert changed == {"labels/labels.jsonl"}


GOOD = {"setup": SETUP, "feature": 0, "granularity": 1}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**GOOD, "granularity": 5}, "granularity"), ({**GOOD, "feature": 32}, "no feature 32: it has 32"),
        ({**GOOD, "feature": -1}, "feature"), ({**GOOD, "feature": True}, "feature"),
        ({**GOOD, "setup": "m@7/layer_01/seed_0"}, "no setup"),
        ({**GOOD, "setup": "../../x"}, "setup"), ({**GOOD, "note": "x" * 10_001}, "note"), ({**GOOD, "note": 3}, "note"),
        ({**GOOD, "rater": "ken"}, "no 'rater'"), ({**GOOD, "<script>": 1}, "has no '<script>'"),
        ({"setup": SETUP}, "needs 'feature'"),
        ([], "an object"), (b"", "not JSON"), (b"\xff", "not JSON"), (b"{", "not JSON"), (b"[" * 60_000, "not JSON"),
        (b'{"feature": ' + b"9" * 5000 + b"}", "not JSON"), (b'{"a": NaN}', "has no 'a'"),
    ],
)  # fmt: skip
def test_a_label_that_is_none_is_refused_in_one_line(running: Running, value: Any, words: str) -> None:
    before = running.store.labels_path.read_bytes() if running.store.labels_path.exists() else b""
    answer = running.post(value)
    assert answer.status == 400
    assert answer.headers["Content-Type"] == "application/json"
    assert words.replace("an object", "a JSON object") in answer.json["error"]
    assert (running.store.labels_path.read_bytes() if running.store.labels_path.exists() else b"") == before


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X_Glottoscope": ""}, 403), ({"X_Glottoscope": "guess"}, 403), ({"X_Glottoscope": "é"}, 403),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://localhost"}, 403), ({"Origin": ""}, 201), ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415), ({"Content_Type": ""}, 415),
        ({"Content_Type": "application/json; charset=utf-8"}, 201), ({"Host": "evil.example"}, 421),
    ],
)  # fmt: skip
def test_only_a_page_of_this_site_may_label(running: Running, headers: dict[str, str], status: int) -> None:
    assert running.post(GOOD, **headers).status == status


def test_a_label_through_a_tunnel(running: Running) -> None:
    """ssh -L brings another port in front of ours: Host and Origin agree, and that is what counts."""
    assert running.post(GOOD, Host="localhost:9999", Origin="http://localhost:9999").status == 201
    assert running.post(GOOD, Host="localhost:9999", Origin="http://localhost:9998").status == 403


def test_a_body_that_is_too_large_is_not_read(running: Running) -> None:
    answer = running.post(b" " * (MAX_BODY + 1))
    assert answer.status == 413
    assert "64 KiB" in answer.json["error"]
    start = time.monotonic()
    claimed = (
        f"POST /labels HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nX-Glottoscope: {running.server.token}\r\n"
    )
    assert b" 413 " in running.raw(f"{claimed}Content-Length: 99999999999\r\n\r\n".encode()).split(b"\r\n")[0]
    assert b" 411 " in running.raw(f"{claimed}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()).split(b"\r\n")[0]
    assert b" 411 " in running.raw(f"{claimed}\r\n".encode()).split(b"\r\n")[0]
    for length in ("-1", "+5", "5, 5", "0x5", "٥"):
        assert b" 411 " in running.raw(f"{claimed}Content-Length: {length}\r\n\r\n{{}}".encode()).split(b"\r\n")[0], length
    twice = f"{claimed}Content-Length: 2\r\nContent-Length: 9\r\n\r\n{{}}"
    assert b" 411 " in running.raw(twice.encode()).split(b"\r\n")[0]
    assert b" 400 " in running.raw(f"{claimed}Content-Length: 500\r\n\r\n{{}}".encode()).split(b"\r\n")[0]  # ends in the middle
    assert time.monotonic() - start < 15


def test_labels_are_posted_to_one_place(running: Running) -> None:
    for target in ("/", "/data/labels.json", "/none", "/labels/"):
        answer = running.ask("POST", target, b"{}", Content_Type="application/json", X_Glottoscope=running.server.token)
        assert (answer.status, answer.headers["Allow"]) == ((405, "GET, HEAD") if target != "/labels/" else (404, None))
    answer = running.get("labels")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")


def test_many_pages_at_once(running: Running) -> None:
    before = len(running.store.labels_path.read_bytes().splitlines())
    failures: list[Any] = []

    def work(n: int) -> None:
        for feature in range(8):
            found = running.post({"setup": SETUP, "feature": feature, "granularity": 1 + n % 4, "note": "x" * 3000})
            seen = running.get(f"data/cells/{SETUP}/features/{feature}.json")
            if (found.status, seen.status) != (201, 200):
                failures.append((found, seen))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(running.store.labels_path.read_bytes().splitlines()) == before + 48
    running.site.labels.latest()
    assert running.site.labels.problems == []


# ---- what is refused


@pytest.mark.parametrize(
    "target",
    [
        "/../study.toml", "/../../../../etc/passwd", "/%2e%2e/study.toml", "/%2E%2e/%2e%2e/etc/passwd", "/..%2fstudy.toml",
        "/data/../../study.toml", "/data/%2e%2e/site.json", "/..\\study.toml", "/..%5cstudy.toml", "/%5c..%5cstudy.toml",
        "/etc/passwd", "//etc/passwd", "///etc/passwd", "/%2fetc/passwd", "/index.html%00", "/%00", "/index.html%00.json",
        "/./index.html", "/data//site.json", "/index.html/", "/assets/", "/assets", "/data/cells/", "/study.toml", "/manifest.json",
        "/labels/labels.jsonl", "/data/cells/m@20/layer_01/seed_0/sae.safetensors", "/data/cells/../../study.toml",
        "/data/cells/m@20/layer_01/seed_0/../../../../study.toml", "/data/cells/m@20/layer_01/seed_0/features/0-9999.json.gz",
        "/data/cells/m@20/layer_01/seed_0/features/-1.json", "/data/text/999.json.gz",
        "/data/cells/none@1/layer_00/seed_0/list.json",
        "/%252e%252e/study.toml", "/assets/%2e%2e/%2e%2e/server.py", "/assets/../../server.py", "/__init__.py", "/server.py",
        "/site/index.html", "/%ff%fe", "/data/site.json.gz.gz", "/index.html;x", "http://127.0.0.1/index.html", "index.html", "*",
        "/data/cells/m@20/layer_01/seed_0/features/" + "9" * 4000 + ".json", "/" + "a" * 20_000,
    ],
)  # fmt: skip
def test_what_is_no_address_is_404(running: Running, target: str) -> None:
    raw = running.raw(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 404 Not Found", head
    assert b"root:" not in body and b"[study]" not in body and b"import" not in body
    assert len(body) < 1500


def test_errors_are_short_pages_or_json_and_text_in_them_is_text(running: Running) -> None:
    page = running.get("%3Cscript%3Ealert(1)%3C/script%3E")
    assert page.status == 404
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"<script>" not in page.body and b"&lt;script&gt;" in page.body
    value = running.get("data/none.json")
    assert (value.status, value.headers["Content-Type"]) == (404, "application/json")
    assert value.json == {"error": "there is no data/none.json here"}
    head = running.ask("HEAD", "/none")
    assert (head.status, head.body) == (404, b"")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "MOVE", "get"])
def test_other_methods_are_405(running: Running, method: str) -> None:
    raw = running.raw(f"{method} / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    assert raw.startswith(b"HTTP/1.1 405 ") and b"\r\nAllow: GET, HEAD\r\n" in raw
    assert raw.count(b"HTTP/1.1") == 1  # what follows is no second request


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("127.0.0.1", True), ("127.0.0.1:1", True), ("localhost", True), ("LOCALHOST:8000", True), ("localhost.", True),
        ("[::1]:80", True), ("127.9.9.9", True), ("evil.example", False), ("127.0.0.1.evil.example", False), ("192.168.1.1", False),
        ("0.0.0.0", False), ("localhost.evil.example", False), ("", False), ("127.0.0.1:x", False),
        ("evil.example:127.0.0.1", False),
        ("user@127.0.0.1", False), ("127.0.0.1, evil.example", False), ("[::ffff:8.8.8.8]", False), ("[", False), ("é", False),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_hosts(running: Running, host: str, taken: bool) -> None:
    raw = running.raw(f"GET /data/live.json HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 200" if taken else b"HTTP/1.1 421"), raw[:100]
    assert (running.server.token.encode() in raw) is taken


def test_hosts_of_a_server_that_listens_everywhere(running: Running) -> None:
    with serve(running.site, running.site.labels, "0.0.0.0", rater="mari") as server:
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
        assert all(server.is_ours(x) for x in ("192.168.1.5:80", "localhost", socket.gethostname()))
        assert not any(server.is_ours(x) for x in ("evil.example", "192.168.1.5.evil.example"))
    with serve(running.site, running.site.labels, "localhost", rater="mari") as server:
        assert server.url == f"http://localhost:{server.server_port}/"


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"nonsense\r\n\r\n", b"GET  \r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"A%d: b\r\n" % n for n in range(200)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST / HTTP/0.9\r\n\r\n", b"\r\n", b"GET / HTTP/1.1\r\nHost",
    ],
)  # fmt: skip
def test_requests_that_are_none_end_without_a_traceback(
    running: Running, request_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = running.raw(request_)
    # HTTP/0.9 has no status line: the error's text comes bare.
    assert raw == b"" or raw.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505", b"<!doctype html>", b'{"error":')), raw[:80]
    assert b"overview" not in raw.lower()
    assert capfd.readouterr().err == ""
    assert running.get("").status == 200


def test_a_body_with_a_get_is_no_second_request(running: Running) -> None:
    hidden = b"GET /data/site.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    raw = running.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden)
    assert raw.count(b"HTTP/1.1 200") == 1
    assert b"\r\nConnection: close\r\n" in raw


def test_a_client_that_goes_away_is_no_traceback(running: Running, capfd: pytest.CaptureFixture[str]) -> None:
    for data in (b"GET /vendor/plot.umd.min.js HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST /labels HTTP/1.1\r\nHost: loc", b"G"):
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", running.server.server_port))
            # Zero seconds to linger: the connection is reset at once, whatever is under way.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(data)
            client.close()
    for _ in range(20):
        assert running.get("").status == 200
    assert capfd.readouterr().err == ""


def test_damage_and_defects_are_500_and_said_in_the_terminal(
    running: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(error: Exception) -> Callable[[str], bytes]:
        def read(address: str) -> bytes:
            raise error

        return read

    monkeypatch.setattr(running.site, "read", broken(InputError("x.parquet is damaged: remove it")))
    answer = running.get("data/site.json")
    assert (answer.status, answer.json) == (500, {"error": "x.parquet is damaged: remove it"})
    assert capfd.readouterr().err == "glottoscope: x.parquet is damaged: remove it\n"
    for error in (ZeroDivisionError("<secret>"), FileNotFoundError("<secret>")):
        monkeypatch.setattr(running.site, "read", broken(error))
        answer = running.get("index.html")
        assert answer.status == 500
        assert type(error).__name__.encode() in answer.body and b"secret" not in answer.body
        assert "Traceback" in capfd.readouterr().err


def test_a_label_that_cannot_be_saved_is_500(running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a file")
    monkeypatch.setattr(running.server, "labels", LabelStore(tmp_path / "labels" / "labels.jsonl"))
    answer = running.post(GOOD)
    assert answer.status == 500
    assert "the label is not saved" in answer.json["error"]


# ---- starting and ending


def test_a_port_that_is_taken_or_none(running: Running) -> None:
    taken = running.server.server_port
    for port, words in ((taken, f"port {taken} of 127.0.0.1 is taken: choose another with --port, or --port 0"), (70_000, "65535")):
        with pytest.raises(InputError, match=words):
            serve(running.site, running.site.labels, port=port)
    for host in ("203.0.113.1", "no such host", "a..b"):
        with pytest.raises(InputError, match=f"--host '?{host}"):
            serve(running.site, running.site.labels, host)
    with pytest.raises(InputError, match="rater"):
        serve(running.site, running.site.labels, rater="<b>")


def test_every_session_has_a_token_of_its_own(running: Running) -> None:
    with serve(running.site, running.site.labels) as other:
        assert other.token != running.server.token
        assert len(other.token) >= 32


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_browse_prints_its_address_and_ends_at_ctrl_c(tiny: RunStore, tmp_path: Path, number: signal.Signals) -> None:
    root = tmp_path / "run"
    shutil.copytree(tiny.root, root)
    arguments = [sys.executable, "-m", "glottoscope.cli", "browse", str(root), "--port", "0", "--rater", "ken"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:  # fmt: skip
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=20)
        connection.request("GET", "/data/live.json")
        live = json.loads(connection.getresponse().read())
        assert (live["live"], live["rater"]) == (True, "ken")
        process.send_signal(number)  # while a connection is open
        try:
            out, errors = process.communicate(timeout=20)
        finally:
            process.kill()
        connection.close()
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in errors
    assert f"labels are saved as ken in {root / 'labels' / 'labels.jsonl'}" in errors
    assert errors.splitlines()[-1] == "stopped"
    assert not (root / "labels").exists()


def test_browse_of_what_is_no_run(running: Running, tmp_path: Path) -> None:
    assert "no such run directory" in command("browse", tmp_path / "none").complaint
    port = running.server.server_port
    assert f"port {port} of 127.0.0.1 is taken" in command("browse", running.store.root, "--port", str(port)).complaint
    assert command("browse", running.store.root, "--port", "70000").code == 2
    assert "rater" in command("browse", running.store.root, "--rater", "<b>").complaint
