"""Small parts of HTTP: what goes with every answer, what a request's headers ask for, and the page of an error."""

from __future__ import annotations

import hashlib
import html
from email.message import Message
from http import HTTPStatus

HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".json": "application/json", ".csv": "text/csv; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png",
    ".txt": "text/plain; charset=utf-8", ".md": "text/plain; charset=utf-8",
}  # fmt: skip


class Refusal(Exception):
    """A request that ends in a status and a line; the connection ends, too, where a body may be left unread."""

    def __init__(self, status: HTTPStatus, message: str, *, allow: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {} if allow is None else {"Allow": allow}


def accepts_gzip(header: str | None) -> bool:
    """Whether an Accept-Encoding header takes gzip."""
    qualities: dict[str, float] = {}
    for part in (header or "").split(","):
        name, *parameters = (x.strip().lower() for x in part.split(";"))
        quality = next((x[2:] for x in parameters if x.startswith("q=")), "1")
        try:
            qualities[name] = float(quality)
        except ValueError:
            qualities[name] = 0.0
    return qualities.get("gzip", qualities.get("x-gzip", qualities.get("*", 0.0))) > 0


def etag_of(data: bytes) -> str:
    """A name for these bytes."""
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def matches(if_none_match: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names what we have."""
    if if_none_match is None:
        return False
    return any(x.strip().removeprefix("W/") in (etag, "*") for x in if_none_match.split(","))


def has_body(headers: Message) -> bool:
    """Whether a request announces a body."""
    return headers.get("Content-Length", "0").strip() != "0" or "Transfer-Encoding" in headers


def error_page(refusal: Refusal) -> bytes:
    """What a reader sees instead of a page."""
    status = refusal.status
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{status.value} {status.phrase}</title>\n"
        f"<style>:root{{color-scheme:light dark}}body{{font:1rem/1.5 system-ui,sans-serif;max-width:40rem;margin:3rem auto;"
        f"padding:0 1rem}}</style>\n<h1>{status.phrase}</h1>\n<p>{html.escape(refusal.message)}</p>\n"
        f'<p><a href="/">To the first page</a></p>\n</html>\n'
    ).encode("utf-8", "replace")
