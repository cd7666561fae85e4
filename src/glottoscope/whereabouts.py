"""Which machine this is, to tell its files from those of others that share a disk with it."""

from __future__ import annotations

import socket
from pathlib import Path


def machine_id() -> str:
    """The running system: containers of one machine share it; another machine, or another start of it, does not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
