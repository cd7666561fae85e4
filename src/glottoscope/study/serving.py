"""`glottoscope browse`: the site of a run over HTTP until Ctrl-C."""

from __future__ import annotations

import ipaddress
import threading
import webbrowser
from pathlib import Path

from rich.console import Console

from glottoscope.report.browser.server import serve
from glottoscope.study.browsing import open_site


def browse(run: Path, *, host: str, port: int, rater: str | None, open_browser: bool, console: Console) -> None:
    """Serve a run's site and take in labels; the address goes to stdout, all else to `console`.

    Raises:
        InputError: as `open_site` and `serve`.
    """
    site = open_site(run)
    server = serve(site, site.labels, host, port, rater)
    try:
        site.labels.latest()
        for line in (*site.source.partial, *site.labels.problems):
            console.print(f"note: {line}", markup=False)
        print(server.url, flush=True)
        console.print(f"labels are saved as {server.rater} in {site.labels.path}; Ctrl-C ends this", markup=False)
        if not _is_loopback(server.host):
            console.print("note: whoever reaches this machine can read the run and write labels under that name", markup=False)
        if open_browser:
            # A browser in the terminal would hold us here, and waits for an answer.
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve_forever()
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        server.server_close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
