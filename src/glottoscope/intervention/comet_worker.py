"""Scores translations with COMET, in COMET's own environment: python comet_worker.py MODEL --batch-size N --gpus N.

This file runs under the interpreter of that environment and imports nothing of glottoscope.

stdin:  JSONL, one {"src": text, "mt": text, "ref": text} per line.
stdout: JSONL, one {"score": number} per line, in the order of stdin, and nothing else.
stderr: {"progress": done, "total": n} after each batch; on failure {"error": message} as the last line, exit code 2. What
        libraries print goes there too.

MODEL is a .ckpt file or the folder that holds hparams.yaml and checkpoints/model.ckpt, as COMET's models are published.
Scores are those of comet's own `predict` in float32. Nothing is downloaded. Each text is cut at the encoder's maximum length.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO, TextIO

FIELDS = ("src", "mt", "ref")
ENCODER_FILES = "config.json tokenizer.json tokenizer_config.json sentencepiece.bpe.model"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class WorkerError(Exception):
    """A failure that has a remedy; the message is one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Score translations with COMET: JSONL on stdin, JSONL on stdout.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-size", type=int, default=16)
    # Several GPUs would make Lightning start this script again, without its stdin.
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0)
    arguments = parser.parse_args()
    results = take_stdout()
    try:
        samples = read_samples(sys.stdin.buffer)
        for value in score(arguments.model.absolute(), samples, arguments.batch_size, arguments.gpus):
            results.write(json.dumps({"score": value}) + "\n")
        results.close()
    except WorkerError as error:
        say({"error": str(error)})
        return 2
    except Exception as error:
        traceback.print_exc()
        say({"error": summary(error)})
        return 2
    return 0


def take_stdout() -> TextIO:
    """Keep stdout for the results; what libraries print to it goes to stderr."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return results


def say(message: dict[str, Any]) -> None:
    print("\n" + json.dumps(message), file=sys.stderr, flush=True)


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def read_samples(stream: BinaryIO) -> list[dict[str, str]]:
    """The lines of stdin. A surrogate without its partner is no text to a tokenizer and becomes U+FFFD."""
    samples = []
    for number, line in enumerate(stream, 1):
        try:
            row = json.loads(line)
            samples.append({field: LONE_SURROGATE.sub("\ufffd", row[field]) for field in FIELDS})
        except (ValueError, KeyError, TypeError) as error:
            raise WorkerError(f"line {number} of the input is not a JSON object of the texts src, mt and ref ({error!r})") from None
    return samples


def score(model_path: Path, samples: list[dict[str, str]], batch_size: int, gpus: int) -> list[float]:
    model = load(model_path, gpus)
    total, done = len(samples), 0
    say({"progress": 0, "total": total})

    def on_predict_batch_end(*_: Any) -> None:
        nonlocal done
        done = min(done + batch_size, total)
        say({"progress": done, "total": total})

    if not samples:
        return []
    model.on_predict_batch_end = on_predict_batch_end  # a hook of Lightning
    # Tokenizing is cheap beside the encoder; loader processes would only be something more that can hang.
    scores = model.predict(samples, batch_size=batch_size, gpus=gpus, progress_bar=False, num_workers=0).scores
    bad = next((i for i, value in enumerate(scores) if not math.isfinite(value)), None)
    if bad is not None:
        raise WorkerError(f"the score of pair {bad + 1} is {scores[bad]}: the checkpoint is damaged, download it again")
    return scores


def load(model_path: Path, gpus: int) -> Any:
    """The model of a checkpoint, in evaluation mode, with every weight of it read from the file."""
    file = model_path / "checkpoints" / "model.ckpt" if model_path.is_dir() else model_path
    folder = file.parents[1]
    if not file.is_file():
        raise WorkerError(f"no checkpoint at {file}")
    if not (folder / "hparams.yaml").is_file():
        raise WorkerError(f"{folder / 'hparams.yaml'} is missing: COMET reads the kind of model from it")
    # transformers reads this when it is imported; without it a tokenizer from the cache still asks the hub about itself.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    # This file's own folder would come first, and holds a comet.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    try:
        torch, comet = importlib.import_module("torch"), importlib.import_module("comet")
    except ImportError as error:
        raise WorkerError(
            f"the environment {sys.prefix} does not hold a working unbabel-comet ({error}): run `glottoscope comet setup`"
        ) from None
    if gpus and not torch.cuda.is_available():
        raise WorkerError(
            "torch sees no CUDA GPU in COMET's environment: score with gpus = 0, or install a CUDA build of torch there"
        )

    missing: list[str] = []

    def on_load_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
        missing.extend(name for name, _ in model.named_parameters() if name not in checkpoint["state_dict"])

    # comet loads without strict, as old checkpoints hold buffers that transformers no longer has. A weight that the file
    # lacks would then stay random without a word.
    comet.models.CometModel.on_load_checkpoint = on_load_checkpoint
    # An encoder is named as on the hub ("xlm-roberta-large"). transformers takes a folder of that name before its cache.
    os.chdir(folder)
    try:
        model = comet.load_from_checkpoint(str(file), local_files_only=True)
    except Exception as error:
        traceback.print_exc()
        raise WorkerError(reason(error, file, folder)) from None
    if missing:
        raise WorkerError(
            f"{file} lacks {len(missing)} of the model's weights, {missing[0]} first: "
            "the file, its hparams.yaml and the encoder do not belong together"
        )
    return model


def reason(error: Exception, file: Path, folder: Path) -> str:
    """What went wrong while a checkpoint was loaded, and the remedy."""
    # transformers reports files it does not find as an OSError without a number.
    if isinstance(error, OSError) and error.errno is None:
        yaml = importlib.import_module("yaml")
        name = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8")).get("pretrained_model", "xlm-roberta-large")
        hub = Path(sys.prefix, "bin", "hf")
        return (
            f"the configuration and tokenizer of the encoder {name}, which {file} is built on, are not on this machine: put "
            f"{ENCODER_FILES.replace(' ', ', ')} of {name} into {folder / str(name)}, or, where there is a network, run "
            f"`{hub} download {name} {ENCODER_FILES}` once"
        )
    if "Unsupported" in str(error) and "weights_only" in str(error):
        return (
            f"{file} holds Python objects beside its weights, and torch loads these only from a file that you trust: "
            "if you do, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
        )
    return f"{file} cannot be loaded as a COMET checkpoint, download it again ({summary(error)})"


if __name__ == "__main__":
    sys.exit(main())
