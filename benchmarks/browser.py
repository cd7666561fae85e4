"""Section: the browser's site (`glottoscope export`): its size and the time to write it.

    python benchmarks/bench.py --only browser
    python benchmarks/browser.py --tokenizer llm-jp-tokenizer.model --corpus corpora/kyoto
    python benchmarks/browser.py --run runs/planted-full --only small

Large: a synthetic run (browser_run.py) of three checkpoints of one SAE of 32,768 features, 50 examples of 64 tokens each, by
default on Zipf text with a vocabulary of 99,574; with --tokenizer and --corpus on real text. Feature data is all that lies
below the setup's folder of the site: lists, snippets and shards. Text is the token blocks and the table of tokens, per token
of the blocks. Small: 45 setups of 192 features, synthetic or the first 45 setups of a run directory; its size is the whole
site's, pages and libraries included. Making the runs is not timed. Each measurement is a process of its own. Where playwright
and the system's Chromium are there (`make test-browser` installs playwright), the list page is opened, too; page: a site of one
such setup with few examples, for that alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from browser_page import list_page_seconds
from browser_run import Sizes, Text, corpus_text, cut_run, quick, synthetic_run
from harness import MB, Options, Progress, Section, Verdict, interleave, median_of, peak_memory, python_job, reset_peak, table

PAGE = Sizes(setups=1, examples=2)  # the list page needs no examples: its site is made in a minute
SMALL = Sizes(features=192, setups=45, examples=20, blocks=800, vocabulary=477, width=128)
FEATURE_MB, TEXT_BYTES, SITE_MB, PAGE_SECONDS = 40.0, 2.0, 20.0, 1.0  # limits; MB = 10^6 bytes


class Sources(NamedTuple):
    """Where real text and a real run are, if they are asked for."""

    tokenizer: Path | None = None
    corpus: Path | None = None
    run: Path | None = None


def run(options: Options, sources: Sources | None = None) -> Section:
    """Both sites, with the targets that they can judge."""
    sources = sources or Sources()
    sizes = {"large": quick(Sizes()) if options.quick else Sizes(), "small": SMALL, "page": quick(PAGE) if options.quick else PAGE}
    weights = {"large": 30.0, "small": 1.0, "page": 3.0}
    jobs = [
        python_job(
            f"browser/{name}", "browser.py",
            {"sizes": sizes[name]._asdict(), "threads": options.thread_counts[-1], **_paths(sources, name)},
            weight=weights[name], rounds=1,
        )
        for name in sizes
        if options.selects("browser", name)
    ]  # fmt: skip
    found = interleave(jobs, options, Progress(jobs))
    rows = [_row(name, records[0]) for name, records in found.items()]
    header = (
        "site", "setups x features", "text", "feature data of a setup (MB)", "of it lists", "snippets", "shards",
        "text (bytes per token)", "whole site (MB)", "export (s)", "open (s)", "list (s)", "a feature (s)", "list page (s)",
        "another class (s)", "peak memory (MB)",
    )  # fmt: skip
    large, small, page = (found.get(f"browser/{name}") for name in ("large", "small", "page"))
    verdicts = [
        Verdict("feature data of a setup, 32,768 x 50 examples (MB)", None, median_of(large, "setup_mb"), FEATURE_MB, False),
        Verdict("text of the site (bytes per token)", None, median_of(large, "bytes_per_token"), TEXT_BYTES, False),
        Verdict("list page of 32,768 features (s)", None, median_of(page, "page_seconds"), PAGE_SECONDS, False),
        Verdict("site of 45 setups x 192 features (MB)", None, median_of(small, "site_mb"), SITE_MB, False),
    ]
    return Section("Browser: the exported site", table(header, rows), found, [] if options.quick else verdicts)


def _paths(sources: Sources, name: str) -> dict[str, str]:
    wanted = ("tokenizer", "corpus") if name == "large" else ("run",)
    return {x: str(path) for x in wanted if (path := getattr(sources, x)) is not None}


def _row(name: str, record: dict[str, Any]) -> list[str]:
    if "error" in record:
        return [name, record["error"], *[""] * 14]
    numbers = [f"{record[x]:.1f}" for x in ("setup_mb", "list_mb", "snippets_mb", "shards_mb")]
    seconds = [f"{record[x]:.1f}" for x in ("seconds", "open_seconds", "list_seconds", "feature_seconds")]
    seconds += [f"{record[x]:.2f}" if x in record else "no browser" for x in ("page_seconds", "filter_seconds")]
    shape = f"{record['setups']} x {record['features']:,}"
    text = [f"{record['bytes_per_token']:.2f}", f"{record['site_mb']:.1f}"]
    return [name, shape, record["text"], *numbers, *text, *seconds, f"{record['peak'] / MB:.0f}"]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Make a run, export it, and look at what was written."""
    from glottoscope.report.browser.export import export_site
    from glottoscope.study.browsing import open_site

    sizes = Sizes(**task["sizes"])
    with tempfile.TemporaryDirectory() as folder:
        root, site_folder = Path(folder) / "run", Path(folder) / "site"
        if "run" in task:
            cut_run(Path(task["run"]), root, sizes.setups)
        else:
            synthetic_run(root, sizes, _text(task, sizes))
        reset_peak()
        started = time.monotonic()
        export_site(open_site(root), site_folder, lambda *_: None)
        seconds, peak = time.monotonic() - started, peak_memory()
        started = time.monotonic()
        site = open_site(root)
        site.read("data/site.json")
        opened = time.monotonic()
        last = site.setups[-1]
        addresses = list(site.setup_addresses(last))
        site.read(addresses[0])
        listed = time.monotonic()
        site.read(addresses[-1])
        shown = time.monotonic()
        pages = list_page_seconds(site_folder, last.id)
        return {
            **_sizes_of(site_folder, len(site.setups)),
            "setups": len(site.setups), "features": last.n_features, "seconds": seconds, "open_seconds": opened - started,
            "list_seconds": listed - opened, "feature_seconds": shown - listed, "peak": peak,
            "text": "of the run" if "run" in task else "corpus" if "corpus" in task else "Zipf",
            **({} if pages is None else dict(zip(("page_seconds", "filter_seconds"), pages, strict=True))),
            "words": f"{seconds:.0f} s",
        }  # fmt: skip


def _text(task: dict[str, Any], sizes: Sizes) -> Text | None:
    if "corpus" not in task:
        return None
    return corpus_text(Path(task["tokenizer"]), Path(task["corpus"]), sizes)


def _sizes_of(folder: Path, setups: int) -> dict[str, float]:
    """MB by kind, of a setup on average, and bytes of text per token."""
    import gzip

    def total(pattern: str) -> int:
        return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())

    cells = {"list_mb": "*/*/*/list.json.gz", "snippets_mb": "*/*/*/snippets.json.gz", "shards_mb": "*/*/*/features/*"}
    blocks = [json.loads(gzip.decompress(path.read_bytes()))["blocks"] for path in folder.glob("data/text/*")]
    tokens = sum(len(ranks) for found in blocks for ranks in found.values())
    return {
        **{name: total(f"data/cells/{pattern}") / setups / 1e6 for name, pattern in cells.items()},
        "setup_mb": total("data/cells/**/*") / setups / 1e6,
        "bytes_per_token": (total("data/text/*") + total("data/tokens.json.gz")) / tokens,
        "site_mb": total("**/*") / 1e6,
    }


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0].startswith("{"):
        print(json.dumps(measure(json.loads(arguments[0]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model, with --corpus")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="en.jsonl, ja.jsonl and parallel.test.jsonl")
    parser.add_argument("--run", type=Path, metavar="RUN", help="run directory whose first 45 setups are the small site")
    parser.add_argument("--only", choices=("large", "small", "page"), help="one of the sites")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the features: to see that all of it works")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the large run in this folder, measure nothing")
    a = parser.parse_args(arguments)
    if (a.tokenizer is None) != (a.corpus is None):
        parser.error("--tokenizer and --corpus belong together")
    sources = Sources(a.tokenizer, a.corpus, a.run)
    if a.keep is not None:
        sizes = quick(Sizes()) if a.quick else Sizes()
        synthetic_run(a.keep, sizes, _text(_paths(sources, "large"), sizes))
        return 0
    options = Options(thread_counts=(a.threads,), quick=a.quick, only=(f"browser/{a.only}",) if a.only else ())
    section = run(options, sources)
    print(section.markdown)
    for verdict in section.verdicts:
        if verdict.measured is not None:
            print(f"\n{verdict.target}: {verdict.measured:.2f}, limit {verdict.limit:g}: {verdict.word}")
    return int(any("error" in record for records in section.record.values() for record in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
