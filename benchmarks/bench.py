"""All benchmarks in one run: Markdown to stdout, and Markdown and JSON to benchmarks/results/."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import BUSY, HERE, Job, Options, Section, Shape, Verdict, machine, run_job, table, thread_env

SHAPES = (Shape(512, 8192, 2048), Shape(768, 32768, 2048), Shape(2048, 32768, 1024))
QUICK_SHAPES = (Shape(128, 1024, 256), Shape(256, 2048, 512))

EXAMPLES = """\
examples:
  python benchmarks/bench.py                                   everything (about an hour on 2 cores)
  python benchmarks/bench.py --quick                           small shapes, one round (about 3 minutes)
  python benchmarks/bench.py --only sae --threads 1            one section at one thread
  python benchmarks/bench.py --only 'sae/train/768*/glottoscope*' --kernel chunked --steps 9
  python benchmarks/bench.py --only study --full --baseline ../before
"""

COLLECT = """\
import json, sys, collection
section = collection.run(collection.Options(**json.loads(sys.argv[1])))
print(json.dumps({"markdown": section.markdown, "record": section.record}))
"""


def collection(options: Options) -> Section:
    """Feature collection (collection.py), in a fresh process per thread count."""
    parts: list[str] = []
    record: dict[str, Any] = {}
    for threads in options.thread_counts:
        name = f"collection/t{threads}"
        if options.interrupted or not options.selects("collection", f"t{threads}"):
            continue
        size = {"tokens": 50_000, "n": 4096} if options.quick else {}
        command = (sys.executable, "-c", COLLECT, json.dumps({"threads": threads, **size}))
        print(f"{name} ", end="", file=sys.stderr, flush=True)
        try:
            found = run_job(Job(name, command, {**thread_env(threads), "PYTHONPATH": str(HERE)}))
        except KeyboardInterrupt:
            options.interrupted = True
            break
        parts.append(f"failed: {found['error']}" if "error" in found else found["markdown"])
        record[name] = {**found.pop("record", {}), **{key: value for key, value in found.items() if key != "markdown"}}
        print(found.get("error", "done"), file=sys.stderr)
    return Section("Feature collection per 1 M tokens", "\n\n".join(parts), record)


def from_module(name: str) -> Callable[[Options], Section]:
    """`run` of a module beside this one, imported when it is needed."""
    return lambda options: importlib.import_module(name).run(options)


# A section is a function of the options. To add one: a module here with run(options) -> Section, and its name below.
SECTIONS: dict[str, Callable[[Options], Section]] = {
    "sae": from_module("sae_speed"),
    "threads": from_module("threads"),
    "lm": from_module("lm_pass"),
    "intervention": from_module("intervention"),
    "memory": from_module("plan_memory"),
    "collection": collection,
    "browser": from_module("browser"),
    "study": from_module("study"),
}
LEFT_OUT_BY_QUICK = ("study",)  # minutes; --only study asks for it


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Targets, one row each."""
    rows = []
    for v in verdicts:
        measured = "" if v.measured is None else f"{v.measured:.2f}"
        threads = "the study's" if v.threads is None else str(v.threads)
        rows.append([v.target, threads, measured, v.word if v.word != "SHORT" else "**SHORT**"])
    return table(("target", "threads", "measured", "verdict"), rows)


def page(sections: dict[str, Section], about: dict[str, Any], words: str) -> str:
    """The whole run as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = about["commit"] + (f" with {about['changed_files']} changed files" if about["changed_files"] else "")
    parts = [
        f"# Benchmarks, {about['date']}\n",
        f"{about['cpu']}, {about['cores']} cores, {about['instruction_set']}, {about['memory_gb']} GB; {about['system']}; "
        f"Python {about['python']}, {versions}; commit {commit}. {words}\n",
    ]
    others = [cores for section in sections.values() for cores in find_all(section.record, "other_cores")]
    if (disturbed := sum(cores > BUSY for cores in others)) > 0:
        parts.append(
            f"**Not a quiet machine: during {disturbed} of {len(others)} measurements other processes kept more than {BUSY} cores "
            f"busy (up to {max(others):.1f}).**\n"
        )
    verdicts = [verdict for section in sections.values() for verdict in section.verdicts]
    if verdicts:
        parts.append(f"## Targets\n\n{verdict_table(verdicts)}\n")
    parts += [f"## {section.title}\n\n{section.markdown}\n" for section in sections.values()]
    return "\n".join(parts)


def find_all(record: Any, key: str) -> list[Any]:
    """Every value of `key` in nested dictionaries and lists."""
    if isinstance(record, dict):
        own = [record[key]] if key in record else []
        return own + [found for value in record.values() for found in find_all(value, key)]
    return [found for value in record for found in find_all(value, key)] if isinstance(record, list) else []


def write(folder: Path, sections: dict[str, Section], about: dict[str, Any], words: str) -> tuple[Path, str]:
    """Both files of this run, replaced after every section."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bench-{about['local_time']}.json"
    record = {
        "machine": about,
        "command": words,
        "sections": {name: section.record for name, section in sections.items()},
        "targets": [{**v._asdict(), "verdict": v.word} for section in sections.values() for v in section.verdicts],
    }
    text = page(sections, about, words)
    for target, content in ((path, json.dumps(record, indent=1) + "\n"), (path.with_suffix(".md"), text)):
        temporary = target.with_name(f".{target.name}")
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, target)
    return path.with_suffix(".md"), text


def parse(arguments: Sequence[str]) -> tuple[Options, Path]:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN",
        help=f"a section ({', '.join(SECTIONS)}), or SECTION/PATTERN for some of its measurements, whose names are shown as "
        "they run; repeatable",
    )  # fmt: skip
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="DxNxB", help=f"default: {' '.join(map(str, SHAPES))}")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1 2 (1 with --quick)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a process, after one warm-up step (default 3)")
    parser.add_argument("--rounds", type=int, default=None, help="default: 2 (1 with --quick)")
    parser.add_argument("--k", type=int, default=32, help="active features per row (default 32)")
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="NAME",
        help="measure this kernel of glottoscope, too; NAME+bf16 preselects",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, one round, no study: to see that all of it works")
    parser.add_argument("--baseline", type=Path, metavar="TREE", help="source tree of another commit, for the study")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the study's run directory of this tree as FOLDER")
    parser.add_argument("--full", action="store_true", help="the study with three sizes (8 minutes a run)")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="FOLDER", help="default: benchmarks/results")
    a = parser.parse_args(arguments)
    unknown = [p for p in a.only if not any(Options(only=(p,)).wants(name) for name in SECTIONS)]
    if unknown:
        parser.error(f"--only {unknown[0]}: no such section; choose from {', '.join(SECTIONS)}")
    options = Options(
        shapes=tuple(a.shapes or (QUICK_SHAPES if a.quick else SHAPES)),
        thread_counts=tuple(a.threads or ((1,) if a.quick else (1, 2))),
        steps=a.steps, rounds=a.rounds or (1 if a.quick else 2), k=a.k, kernels=tuple(a.kernel), only=tuple(a.only),
        quick=a.quick, baseline=a.baseline, full=a.full, keep=a.keep,
    )  # fmt: skip
    return options, a.out


def shape(text: str) -> Shape:
    """ "768x32768x2048" as a Shape."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxFEATURESxROWS, as in 768x32768x2048")
    return Shape(*map(int, parts))


def interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, folder = parse(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    words = " ".join(("python benchmarks/bench.py", *arguments))
    about = {**machine(), "local_time": datetime.now().strftime("%Y-%m-%d-%H%M%S")}
    sections: dict[str, Section] = {}
    path, text = None, ""
    for name, section in SECTIONS.items():
        left_out = options.quick and name in LEFT_OUT_BY_QUICK and not options.only
        if options.interrupted or left_out or not options.wants(name):
            continue
        try:
            sections[name] = section(options)
        except KeyboardInterrupt:
            options.interrupted = True
        except Exception as error:
            # One section must not take the hour of the others with it.
            traceback.print_exc()
            sections[name] = Section(name, f"failed: {type(error).__name__}: {error}", {"error": str(error)})
        path, text = write(folder, sections, about, words + (" (interrupted)" if options.interrupted else ""))
    print(text)
    if path is not None:
        print(f"{path} and .json written", file=sys.stderr)
    failed = any("error" in section.record for section in sections.values())
    return 130 if options.interrupted else int(failed)


if __name__ == "__main__":
    sys.exit(main())
