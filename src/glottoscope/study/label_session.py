"""A person at a terminal who grades one feature after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from glottoscope.errors import InputError
from glottoscope.report.browser.labels import GRADES, MAX_NOTE, Label, LabelStore
from glottoscope.study.label_keys import END, Keys
from glottoscope.study.label_sampling import Item
from glottoscope.study.label_view import View, legend, print_view

HELP = """1  uninterpretable: nothing that the examples have in common
2  concept, semantic similarity: words of one field, as in dog, cat, animal
3  concept, synonymy: words of one meaning, as in big, large or in dog, 犬
4  token-level: one token, or forms of one word
s  skip    n  note (saved at once)    b  back    u  undo    q  quit (the same command goes on)    ?  this help"""
_PROMPT = "1 2 3 4 · s skip · n note · b back · u undo · q quit · ? help"


class Session:
    """Asks for a grade of each item and writes it at once.

    Attributes:
        done: labels written, those taken back not counted.
    """

    def __init__(
        self,
        items: Sequence[Item],
        views: Mapping[Item, View],
        labels: LabelStore,
        *,
        rater: str,
        blind: bool,
        names: Mapping[str, str],
        console: Console,
    ) -> None:
        self._items, self._views, self._labels = items, views, labels
        self._rater, self._blind, self._names, self._console = rater, blind, names, console
        self._said = {Item(x.setup, x.feature, ""): x for x in labels.latest() if x.rater == rater}
        self._undo: list[tuple[int, Label | None]] = []  # place of an item, and what was said of it before

    @property
    def done(self) -> int:
        return len({place for place, _ in self._undo})

    def run(self, keys: Keys) -> None:
        """Ask until the last item is done, `q`, or the end of input."""
        place = 0
        with keys:
            self._console.print(Text(HELP), soft_wrap=True)
            self._console.print(legend(self._console))
            while place < len(self._items):
                self._show(place)
                step = self._ask(place, keys)
                if step is None:
                    return
                place = step
                if place == len(self._items):
                    place = self._after_the_last(keys)

    def _after_the_last(self, keys: Keys) -> int:
        """The last grade may be taken back before all is over."""
        end = len(self._items)
        self._console.print("\nThat was the last one. b back · u undo · any other key ends")
        key = keys.key()
        return end - 1 if key == "b" else self._take_back(end) if key == "u" else end

    def _show(self, place: int) -> None:
        self._console.rule(f"{place + 1} of {len(self._items)}", style="")
        print_view(self._views[self._items[place]], self._names, self._console)
        before = self._said.get(self._key(place))
        if before is not None:
            grade = "a note only" if before.granularity is None else f"{before.granularity} {GRADES[before.granularity]}"
            self._console.print(Text(f"\nyour label: {grade}"))
        self._console.print(Text(f"\n{_PROMPT}"))

    def _ask(self, place: int, keys: Keys) -> int | None:
        """The place to go to; None to stop."""
        while True:
            key = keys.key()
            if key in ("1", "2", "3", "4"):
                self._say(place, granularity=int(key))
                self._console.print(Text(f"{key} {GRADES[int(key)]}"))
                return place + 1
            if key == "s":
                return place + 1
            if key in (END, "q"):
                return None
            if key == "n":
                self._note(place, keys)
            elif key == "b":
                if place:
                    return place - 1
                self._console.print("This is the first one.")
            elif key == "u":
                return self._take_back(place)
            else:
                self._console.print(Text(HELP if key == "?" else f"{key[:20]!r} is no answer: {_PROMPT}"), soft_wrap=True)

    def _key(self, place: int) -> Item:
        return Item(*self._items[place][:2], "")

    def _note(self, place: int, keys: Keys) -> None:
        text = keys.line("note: ").strip()
        if not text:
            self._console.print("No note.")
        elif len(text) > MAX_NOTE:
            self._console.print(f"That note has {len(text):,} characters; at most {MAX_NOTE:,}.")
        else:
            self._say(place, note=text)
            self._console.print("Noted.")

    def _say(self, place: int, *, granularity: int | None = None, note: str | None = None) -> None:
        before = self._said.get(self._key(place))
        if before is not None:
            granularity = before.granularity if granularity is None else granularity
            note = before.note if note is None else note
        self._undo.append((place, before))
        self._write(place, granularity, note or "", self._blind)

    def _take_back(self, place: int) -> int:
        """Make what was said last unsaid; returns its place."""
        if not self._undo:
            self._console.print("There is nothing to undo.")
            return min(place, len(self._items) - 1)
        back, before = self._undo.pop()
        if before is None:
            self._write(back, None, "", self._blind)
            del self._said[self._key(back)]
        else:
            self._write(back, before.granularity, before.note, before.blind)
        return back

    def _write(self, place: int, granularity: int | None, note: str, blind: bool) -> None:
        item = self._items[place]
        label = Label(self._rater, item.setup, item.feature, granularity, note, blind=blind)
        try:
            self._said[self._key(place)] = self._labels.append(label)
        except InputError as error:
            raise InputError(f"{error}; the labels before it are saved") from None
