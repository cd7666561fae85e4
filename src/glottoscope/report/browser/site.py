"""The site: which addresses it has and what lies at each, for the server and for the export alike."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.report.browser.cache import Cache
from glottoscope.report.browser.codec import SCHEMA, dump, pack, unpack
from glottoscope.report.browser.examples import Histogram, read_histogram
from glottoscope.report.browser.index import Setup, overview_record, read_setups, site_record
from glottoscope.report.browser.labels import GRADES, LabelStore, labels_csv
from glottoscope.report.browser.lists import (
    FeatureList,
    Snippets,
    list_record,
    read_columns,
    read_list,
    read_snippets,
    snippets_record,
)
from glottoscope.report.browser.neighbours import Neighbours
from glottoscope.report.browser.query import find, folded, plain
from glottoscope.report.browser.shards import SetupData, Shards, plain_examples, read_data
from glottoscope.report.browser.source import SiteSource
from glottoscope.report.browser.texts import Texts, Used
from glottoscope.report.browser.twin import feature_record

FILES = "data/files.json"
NO_JEKYLL = ".nojekyll"  # an empty file, without which GitHub Pages would leave some files out
STATIC = Path(__file__).parent / "site"
LISTED_FEATURES = 500_000  # whose lists are kept: 150 bytes each
READ_SETUPS = 3  # whose examples are kept: 100 MB each at 32,768 features with 50 examples
PACKED_BYTES = 64 * 2**20  # of answers kept
_NUMBER = "(0|[1-9][0-9]{0,17})"
_CELL = re.compile(r"data/cells/(?P<setup>[^/]+/[^/]+/[^/]+)/(?P<rest>.+)")
_SHARD = re.compile(rf"features/{_NUMBER}-{_NUMBER}\.json\.gz")
_FEATURE = re.compile(rf"features/{_NUMBER}\.json")
_TEXT = re.compile(rf"data/(text|pairs)/{_NUMBER}\.json\.gz")


def files_record(addresses: Iterable[str]) -> bytes:
    """files.json: what belongs to a site, so that a later export knows what it may remove."""
    return dump({"schema": SCHEMA, "files": sorted({*addresses, NO_JEKYLL})})


class Site:
    """The files of a site by address. Reading is safe from many threads; nothing is written.

    Attributes:
        setups: what can be looked at, in the order of site.json.
        labels: what people said of the features.

    Raises:
        InputError: the run has nothing to show yet, or a file of it is damaged.
    """

    def __init__(self, source: SiteSource, *, live: Mapping[str, Any] | None = None) -> None:
        self.source, self.live = source, live
        self.setups = read_setups(source)
        self.texts = Texts(source)
        self.labels = LabelStore(source.store.labels_path, source.store)
        self._numbers = {setup.id: n for n, setup in enumerate(self.setups)}
        self._lists: Cache[FeatureList] = Cache(LISTED_FEATURES, lambda x: x.n)
        self._histograms: Cache[tuple[Histogram | None]] = Cache(READ_SETUPS)
        self._snippets: Cache[Snippets] = Cache(READ_SETUPS)
        self._folded: Cache[Snippets] = Cache(READ_SETUPS)
        self._needles: Cache[NDArray[np.bool_]] = Cache(16)
        self._data: Cache[SetupData] = Cache(READ_SETUPS)
        self._answers: Cache[bytes] = Cache(PACKED_BYTES, len)
        self._neighbours = Neighbours(lambda setup: self.list(setup).alive, self._languages_of)
        self._shards = Shards(source, self.texts.rank, self._neighbours)
        self._blocks = Used(lambda: self._used("examples", "block", self.texts.n_blocks))
        self._pairs = Used(lambda: self._used("pairs", "pair", self.texts.n_pairs))

    # ---- what is where

    def addresses(self) -> Iterator[str]:
        """Every file of the exported site, the index first, then the setups of one SAE after the other."""
        yield from self._plain
        yield from self._static
        yield from ("data/overview.json.gz", "data/tokens.json.gz")
        yield from (f"data/text/{n}.json.gz" for n in self._blocks.files)
        yield from (f"data/pairs/{n}.json.gz" for n in self._pairs.files)
        for setup in sorted(self.setups, key=lambda s: (s.trajectory, self._numbers[s.id])):
            yield from self.setup_addresses(setup)

    def setup_addresses(self, setup: Setup) -> Iterator[str]:
        """Files of one setup."""
        folder = f"data/cells/{setup.id}"
        yield from (f"{folder}/list.json.gz", f"{folder}/snippets.json.gz")
        yield from (f"{folder}/features/{first}-{last}.json.gz" for first, last in setup.shards())

    @cached_property
    def _static(self) -> dict[str, Path]:
        """Pages, modules, styles and libraries, as they lie in the package."""
        files = sorted(p for p in STATIC.rglob("*") if p.is_file())
        names = {p.relative_to(STATIC).as_posix(): p for p in files}
        return {name: path for name, path in names.items() if not any(x.startswith((".", "__")) for x in name.split("/"))}

    @cached_property
    def _plain(self) -> dict[str, Callable[[], bytes]]:
        """Small files, made anew for each reader: labels change."""
        return {
            "data/site.json": lambda: dump(self.record),
            "data/live.json": lambda: dump({"schema": SCHEMA, "live": self.live is not None, **(self.live or {})}),
            "data/labels.json": lambda: dump(self.labels_record()),
            "labels.csv": self._labels_csv,
            FILES: lambda: files_record(self.addresses()),
        }

    def read(self, address: str) -> bytes:
        """The bytes at an address of the site, or of a twin that is only served.

        Raises:
            KeyError: there is no such address.
            InputError: a file of the run is damaged.
        """
        if address in self._plain:
            return self._plain[address]()
        if address in self._static:
            return self._static[address].read_bytes()
        if address.endswith(".json.gz"):
            return self._answers.get(address, lambda: pack(dump(self._record(address))))
        cell = _CELL.fullmatch(address)
        feature = _FEATURE.fullmatch(cell["rest"]) if cell else None
        if cell and feature:
            return dump(self.feature(cell["setup"], int(feature[1])))
        if address.endswith(".json"):
            return unpack(self.read(f"{address}.gz"))
        raise KeyError(address)

    def _record(self, address: str) -> dict[str, Any]:
        """The value of a packed file."""
        if address == "data/overview.json.gz":
            return overview_record(self.source, self.setups)
        if address == "data/tokens.json.gz":
            return self.texts.tokens_record()
        text = _TEXT.fullmatch(address)
        if text and int(text[2]) in (used := self._blocks if text[1] == "text" else self._pairs).files:
            make = self.texts.text_record if text[1] == "text" else self.texts.pairs_record
            return make(int(text[2]), used.numbers)
        cell = _CELL.fullmatch(address)
        if cell is None:
            raise KeyError(address)
        setup, rest = self.setup(cell["setup"]), cell["rest"]
        if rest == "list.json.gz":
            return list_record(self.list(setup))
        if rest == "snippets.json.gz":
            return snippets_record(setup, self.snippets(setup))
        shard = _SHARD.fullmatch(rest)
        if shard is None or (place := (int(shard[1]), int(shard[2]))) not in setup.shards():
            raise KeyError(address)
        return self._shards.record(self.data(setup), self.counterparts(setup), *place)

    # ---- parts

    def setup(self, name: str) -> Setup:
        """The setup of an id; KeyError where there is none."""
        return self.setups[self._numbers[name]]

    def number(self, setup: Setup) -> int:
        """Place of a setup in site.json."""
        return self._numbers[setup.id]

    @cached_property
    def record(self) -> dict[str, Any]:
        """site.json."""
        return site_record(self.source, self.setups, self.texts.n_blocks, self.texts.n_pairs)

    def counterparts(self, setup: Setup) -> list[tuple[int, Setup]]:
        """The same SAE at the other checkpoints, with their numbers in site.json."""
        same = (s for s in self.setups if s.trajectory == setup.trajectory and s.id != setup.id)
        return [(self._numbers[s.id], s) for s in same]

    def _languages_of(self, setup: Setup) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
        """Of each feature the index of its language's class (-1: none) and whether it is mixed; the number of languages."""
        found, n = self.list(setup), len(self.source.languages)
        number = np.nan_to_num(found.columns["class"], nan=-1).astype(np.int64)
        return np.where(number < n, number, -1), number == self.source.classes.index("mixed"), n

    def list(self, setup: Setup) -> FeatureList:
        """All features of a setup."""
        return self._lists.get(setup.id, lambda: read_list(self.source, setup, self.texts, self._histogram(setup)))

    def snippets(self, setup: Setup) -> Snippets:
        """Short pieces of text of every feature of a setup."""
        return self._snippets.get(setup.id, lambda: read_snippets(self.source, setup, self.texts))

    def data(self, setup: Setup) -> SetupData:
        """What the pages of a setup's features are made from."""
        return self._data.get(setup.id, lambda: read_data(self.source, self.list(setup), self._histogram(setup)))

    def _histogram(self, setup: Setup) -> Histogram | None:
        make = lambda: (read_histogram(setup, len(self.source.languages), self.texts.rank, self.texts.by_rank),)  # noqa: E731
        return self._histograms.get(setup.id, make)[0]

    def prepare(self, setup: Setup) -> None:
        """Find the neighbours and clusters of a whole setup at once: the fast way, where all of its shards are read."""
        self._shards.prepare(self.data(setup))
        self._neighbours.prepare(setup, [other for _, other in self.counterparts(setup)])

    def _used(self, table: str, column: str, size: int) -> NDArray[np.int64]:
        """Blocks or pairs that some setup shows, ascending; a damaged file is said where its own setup is read."""
        used = np.zeros(size, bool)
        for setup in self.setups:
            found = None
            with contextlib.suppress(InputError):
                found = read_columns(setup, table, [column])
            if found is not None:
                numbers = found[column].to_numpy()
                if len(numbers) and not 0 <= numbers.min() <= numbers.max() < size:
                    raise InputError(f"{setup.folder / table}.parquet names text that the run has not: run the study again")
                used[numbers] = True
        return np.flatnonzero(used)

    # ---- what is only served

    def tokens_with(self, needle: str) -> NDArray[np.bool_]:
        """bool by rank: tokens whose folded text holds the needle."""
        make = lambda: np.array([needle in text for text in self._folded_tokens], bool)  # noqa: E731
        return self._needles.get(needle, make)

    @cached_property
    def _folded_tokens(self) -> list[str]:
        return [folded(text) for text in self.texts.strings]

    def folded_snippets(self, setup: Setup) -> Snippets:
        """The pieces of text of a setup as they are compared."""

        def make() -> Snippets:
            found = self.snippets(setup)
            return {x: [[folded(plain(text)) for text in texts] for texts in pieces] for x, pieces in found.items()}

        return self._folded.get(setup.id, make)

    def find(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The list that find.html shows for a query, as a record; see `query.find`."""
        return find(self, query)

    def feature(self, setup: str, f: int) -> dict[str, Any]:
        """One feature with names, texts and numbers instead of codes.

        Raises:
            KeyError: no such setup or feature.
        """
        found = self.setup(setup)
        if not 0 <= f < found.n_features:
            raise KeyError(f"{setup} has no feature {f}")
        data = self.data(found)
        record = self._shards.features(data, self.counterparts(found), f, f)[0]
        examples = plain_examples(data.examples, f) if data.examples is not None else {}
        return feature_record(self, found, f, record, examples)

    # ---- labels

    def labels_record(self) -> dict[str, Any]:
        """labels.json: the labels that hold, and how raters and measures agree."""
        labels = self.labels.latest()
        agreement: dict[str, Any] = {"pairs": [], "measures": []}
        if self.source.agreement is not None and labels:
            agreement = self.source.agreement(labels)
        return {
            "schema": SCHEMA,
            "names": {str(grade): name for grade, name in GRADES.items()},
            "raters": sorted({label.rater for label in labels}),
            "labels": [label.entry() for label in labels],
            "agreement": agreement,
        }

    def _labels_csv(self) -> bytes:
        seeds = {setup.id: setup.lm_seed for setup in self.setups}
        return labels_csv(self.labels.latest(), seeds).encode()
