"""Keys from a terminal, one at a time, or lines from a file or a pipe."""

from __future__ import annotations

import io
import os
import select
import sys
import termios
import tty
import unicodedata
from types import TracebackType
from typing import Protocol, TextIO

END = ""  # no more input
_ESCAPE, _END_OF_TRANSMISSION = "\x1b", "\x04"
_ESCAPE_SECONDS = 0.05


class Keys(Protocol):
    """Where answers come from."""

    def __enter__(self) -> Keys: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def key(self) -> str:
        """The next key, lower case, full-width forms as plain ones; END where there are no more."""
        ...

    def line(self, prompt: str) -> str:
        """A line of text; "" where there is none."""
        ...


def open_keys(stream: TextIO | None = None) -> Keys:
    """Keys of a terminal, or lines where `stream` (stdin) is none."""
    stream = sys.stdin if stream is None else stream
    if stream is None:  # a service has none
        return LineKeys(io.StringIO())
    return TerminalKeys(stream.fileno()) if stream.isatty() else LineKeys(stream)


def plain(key: str) -> str:
    """A key as it is asked for: Japanese input sends １ for 1."""
    return unicodedata.normalize("NFKC", key).strip().lower()


class TerminalKeys:
    """A terminal that hands on each key at once, until the block ends; Ctrl-C stays an interruption."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._before: list[object] = []

    def __enter__(self) -> TerminalKeys:
        self._before = termios.tcgetattr(self._handle)
        tty.setcbreak(self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        termios.tcsetattr(self._handle, termios.TCSADRAIN, self._before)  # pyright: ignore[reportArgumentType]

    def key(self) -> str:
        while True:
            key = self._character()
            if key in (END, _END_OF_TRANSMISSION):
                return END
            if key == _ESCAPE:
                self._skip_sequence()
            elif plain(key):
                return plain(key)

    def _skip_sequence(self) -> None:
        """Read what an arrow or a function key sends after its ESC: [ and more up to a letter or ~, or O and a letter."""
        if not select.select([self._handle], [], [], _ESCAPE_SECONDS)[0]:
            return  # the key Esc itself
        opened = self._character()
        if opened == "O":
            self._character()
        while opened == "[":
            key = self._character()
            if key == END or "@" <= key <= "~":
                return

    def _character(self) -> str:
        """One character: its first byte says how many follow."""
        data = os.read(self._handle, 1)
        if data and data[0] >= 0xC0:
            missing = 1 + (data[0] >= 0xE0) + (data[0] >= 0xF0)
            while missing and (more := os.read(self._handle, missing)):
                data, missing = data + more, missing - len(more)
        return data.decode("utf-8", "replace")

    def line(self, prompt: str) -> str:
        self.__exit__(None, None, None)  # a note is typed with the terminal's own line editing
        try:
            return input(prompt)
        except EOFError:
            return ""
        finally:
            self.__enter__()


class LineKeys:
    """One key per line; the text of a note stands behind its n or on the line after it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rest = ""

    def __enter__(self) -> LineKeys:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def key(self) -> str:
        for line in iter(self._stream.readline, ""):
            key, _, self._rest = line.strip().partition(" ")
            if key:
                return plain(key)
        return END

    def line(self, prompt: str) -> str:
        rest, self._rest = self._rest.strip(), ""
        return rest or self._stream.readline().strip()
