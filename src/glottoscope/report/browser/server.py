"""The site over HTTP, for people on this machine: the files of the export, their twins in JSON, and labels taken in.

It answers GET and HEAD of the site's own addresses, and POST of a label; it writes nothing but labels. Other pages in the same
browser are kept out: the Host must be this machine (a name that an attacker points here is none), and a label needs the
session's token, which only a page of this site can read, and, where the browser names one, this site as its Origin.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import json
import re
import secrets
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote_to_bytes

from glottoscope.errors import InputError
from glottoscope.report.browser.answers import HEADERS, TYPES, Refusal, accepts_gzip, error_page, etag_of, has_body, matches
from glottoscope.report.browser.codec import SCHEMA, dump, unpack
from glottoscope.report.browser.labels import Label, LabelStore, clean_rater, default_rater

MAX_BODY = 64 * 1024
MAX_QUERY_FIELDS = 200
IDLE_SECONDS = 30
LIVE, FIND, SITE, LABELS = "data/live.json", "data/find.json", "data/site.json", "labels"
_WILDCARDS = ("", "0.0.0.0", "::")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::\d{1,5})?", re.ASCII)
_DRAINED = 1024 * 1024  # bytes of a refused body that are read, so that the client reads the answer before the end


class Pages(Protocol):
    """What the server asks of a site (report.browser.site)."""

    def read(self, address: str) -> bytes:
        """The bytes at an address; KeyError where there are none."""
        ...

    def find(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The list of a query."""
        ...


class Server(ThreadingHTTPServer):
    """A site and its labels, listening at `url`.

    Attributes:
        token: of this session; a label must bring it.
        rater: in whose name labels are written.
    """

    daemon_threads = True

    def __init__(self, site: Pages, labels: LabelStore, host: str, port: int, rater: str) -> None:
        self.site, self.labels, self.rater = site, labels, rater
        self.host = host.strip().strip("[]").lower()
        self.token = secrets.token_urlsafe(24)
        self.writing = threading.Lock()
        self._features: dict[str, int] | None = None
        self.address_family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        super().__init__((self.host, port), Handler)

    def server_bind(self) -> None:
        # Not http.server's: it asks the name service for this machine's name, which can take seconds and serves nothing.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, int(self.server_address[1])

    def server_close(self) -> None:
        with self.writing:  # a label in work is written first
            super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error; anything else is a defect, and is shown in the terminal."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            traceback.print_exc()

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the site."""
        host = {"::": "::1"}.get(self.host, "127.0.0.1") if self.host in _WILDCARDS else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def is_ours(self, host_header: str) -> bool:
        """Whether a Host header names this machine: loopback, or what the server was bound to.

        Where it is bound to every address, any address in digits is taken: an attacker's page comes under a name.
        """
        match = _HOST.fullmatch(host_header.strip().lower())
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".")
        if name in ("localhost", self.host):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return self.host in _WILDCARDS and name == socket.gethostname().lower()
        return address.is_loopback or self.host in _WILDCARDS

    def features_of(self, setup: str) -> int | None:
        """How many features a setup of the site has; None where the site has no such setup."""
        if self._features is None:
            setups = json.loads(self.site.read(SITE))["setups"]
            self._features = {row["id"]: int(row["n_features"]) for row in setups}
        return self._features.get(setup)


def serve(site: Pages, labels: LabelStore, host: str = "127.0.0.1", port: int = 0, rater: str | None = None) -> Server:
    """Listen for the site; the caller runs `serve_forever` and closes it.

    Args:
        port: 0 takes any free one; `Server.url` has it.
        rater: in whose name labels are written; None takes the user's name.

    Raises:
        InputError: a port that is taken or forbidden, a host that is not this machine's, a rater's name that is none.
    """
    rater = default_rater() if rater is None else clean_rater(rater)
    try:
        return Server(site, labels, host, port, rater)
    except OverflowError:
        raise InputError(f"--port {port}: choose one from 1 to 65535, or 0 for any free one") from None
    except UnicodeError:
        raise InputError(f"--host {host!r}: that is no name of a machine; the default is 127.0.0.1") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken: choose another with --port, or --port 0 for any free one") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise InputError(f"port {port} is not yours to listen on: choose one above 1023, or --port 0") from None
        raise InputError(f"--host {host}: cannot listen there ({error.strerror or error}); the default is 127.0.0.1") from None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    _started = False  # whether an answer is on its way
    _read = False  # whether all of the request was read: else what is left would pass for the next one
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._guarded(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _guarded(self, answer: Callable[[], None]) -> None:
        self._started, self._read = False, not has_body(self.headers)
        try:
            self._check_host()
            answer()
        except Refusal as refusal:
            self._refuse(refusal)
        except InputError as error:
            print(f"glottoscope: {error}", file=sys.stderr)
            self._refuse(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)))
        except Exception as error:
            if self._started or isinstance(error, ConnectionError | TimeoutError):
                raise  # the client went away: there is no one to tell
            traceback.print_exc()
            self._refuse(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}; the terminal says more"))

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1:
            raise Refusal(HTTPStatus.BAD_REQUEST, "a request needs one Host header")
        if not self.server.is_ours(hosts[0]):
            raise Refusal(HTTPStatus.MISDIRECTED_REQUEST, f"this server is no {hosts[0][:200]}: open {self.server.url}")

    # ---- GET and HEAD

    def _get(self) -> None:
        address, query = self._target()
        if address == LABELS:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "labels are posted here; data/labels.json has them", allow="POST")
        try:
            data = self._bytes(address, query)
        except KeyError:
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no {address[:200]} here") from None
        headers = {"Content-Type": TYPES.get(PurePosixPath(address).suffix, "application/octet-stream"), "ETag": etag_of(data)}
        if address.endswith(".json.gz"):
            headers |= {"Content-Type": TYPES[".json"], "Vary": "Accept-Encoding"}
            if accepts_gzip(self.headers.get("Accept-Encoding")):
                headers["Content-Encoding"] = "gzip"
            else:
                data = unpack(data)
                headers["ETag"] = etag_of(data)
        elif "." not in PurePosixPath(address).name:  # LICENSE and the like
            headers["Content-Type"] = TYPES[".txt"]
        if matches(self.headers.get("If-None-Match"), headers["ETag"]):
            kept = {name: value for name, value in headers.items() if name in ("ETag", "Vary")}
            self._answer(HTTPStatus.NOT_MODIFIED, None, kept)
        else:
            self._answer(HTTPStatus.OK, data, headers)

    def _bytes(self, address: str, query: str) -> bytes:
        """KeyError where there is nothing."""
        if address == LIVE:
            live = {"schema": SCHEMA, "live": True, "rater": self.server.rater, "token": self.server.token}
            return dump(live)
        if address == FIND:
            try:
                fields = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS, errors="replace")
            except ValueError:
                raise Refusal(HTTPStatus.BAD_REQUEST, f"more than {MAX_QUERY_FIELDS} parameters") from None
            return dump(self.server.site.find(dict(fields)))
        return self.server.site.read(address)

    def _target(self) -> tuple[str, str]:
        """Address in the site (decoded, never with a step upwards) and query of the request.

        Raises:
            Refusal: 404 for what can be no address.
        """
        path, _, query = self.path.partition("?")
        try:
            address = unquote_to_bytes(path.encode("latin-1")).decode()
            text = query.encode("latin-1").decode()
        except UnicodeDecodeError:
            raise Refusal(HTTPStatus.NOT_FOUND, "an address is UTF-8") from None
        if address == "/":
            return "index.html", text
        parts = address.split("/")
        if parts[0] or any(p in ("", ".", "..") for p in parts[1:]) or re.search(r"[\\\x00-\x1f\x7f]", address):
            raise Refusal(HTTPStatus.NOT_FOUND, "that is no address of this site")
        return address[1:], text

    # ---- POST of a label

    def _post(self) -> None:
        address, _ = self._target()
        if address != LABELS:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "only labels are posted, to /labels", allow="GET, HEAD")
        origin, host = self.headers.get("Origin"), self.headers["Host"].strip().lower()
        if origin is not None and origin.strip().lower() not in (f"http://{host}", f"https://{host}"):
            raise Refusal(HTTPStatus.FORBIDDEN, "labels come from this site's own pages")
        token = self.headers.get("X-Glottoscope", "")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise Refusal(HTTPStatus.FORBIDDEN, "this page is of another session: load it again, then save the label")
        label = self._label(self._json())
        with self.server.writing:
            saved = self.server.labels.append(label)
        self._answer(HTTPStatus.CREATED, dump(saved.entry()), {"Content-Type": TYPES[".json"]})

    def _json(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type: application/json")
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not re.fullmatch(r"\d{1,18}", lengths[0].strip(), re.ASCII):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "a label needs its Content-Length")
        length = int(lengths[0])
        if length > MAX_BODY:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a label has at most {MAX_BODY // 1024} KiB")
        body = self.rfile.read(length)
        self._read = True
        if len(body) < length:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request ended in the middle")
        try:
            value = json.loads(body.decode())
        except (ValueError, RecursionError):
            raise Refusal(HTTPStatus.BAD_REQUEST, "not JSON in UTF-8") from None
        if not isinstance(value, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "a label is a JSON object")
        return value

    def _label(self, raw: Mapping[str, Any]) -> Label:
        fields = {"setup", "feature", "granularity", "note", "blind"}
        if unknown := sorted(set(raw) - fields):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"a label has no {unknown[0][:80]!r}: it has {', '.join(sorted(fields))}")
        if missing := sorted({"setup", "feature", "granularity"} - set(raw)):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"a label needs {missing[0]!r}")
        try:
            label = Label(rater=self.server.rater, **raw)
        except InputError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
        n_features = self.server.features_of(label.setup)
        if n_features is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"this run has no setup {label.setup}")
        if label.feature >= n_features:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"{label.setup} has no feature {label.feature}: it has {n_features:,}, from 0")
        return label

    # ---- answers

    def _answer(self, status: HTTPStatus, data: bytes | None, headers: Mapping[str, str]) -> None:
        """Send a response; the body goes out unless it is None or the request was HEAD."""
        self._started = True
        self.send_response(status)
        ending = {} if self._read else {"Connection": "close"}
        for name, value in {**HEADERS, **headers, **ending}.items():
            self.send_header(name, value)
        if data is not None:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if data is not None and self.command != "HEAD":
            self.wfile.write(data)
        if not self._read:
            self._drain()

    def _refuse(self, refusal: Refusal) -> None:
        """Say what is wrong, as JSON or as a page."""
        path = getattr(self, "path", "").partition("?")[0]
        if self.command == "POST" or path.endswith((".json", ".json.gz")):
            body, kind = dump({"error": refusal.message}), TYPES[".json"]
        else:
            body, kind = error_page(refusal), TYPES[".html"]
        self._answer(refusal.status, body, {"Content-Type": kind, **refusal.headers})

    def _drain(self) -> None:
        """Read what is still coming, within limits: closed at once, the connection would be reset before the answer is read."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            left = _DRAINED
            while left > 0 and (piece := self.connection.recv(min(left, 65536))):
                left -= len(piece)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: a request that cannot be read, a method that is not known."""
        self._read = False
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "this server answers GET and HEAD", allow="GET, HEAD"))
        else:
            self._refuse(Refusal(HTTPStatus(code), HTTPStatus(code).phrase))

    def version_string(self) -> str:
        """No versions: they help no reader."""
        return "glottoscope"

    def log_message(self, format: str, *args: Any) -> None:
        """No line per request: the terminal shows the address and what went wrong."""
