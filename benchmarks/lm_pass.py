"""Section: one pass of a language model for the states of all layers, beside the other ways to get them.

    python benchmarks/bench.py --only lm

A measurement runs as `python benchmarks/lm_pass.py '{"what": "all", "dtype": "float32", "threads": 1, ...}'`. The model is a
Llama with random weights: values do not change the time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from harness import Job, Options, Progress, Section, interleave, median_of, python_job, range_of, table

LAYERS, WIDTH, VOCABULARY, SEQUENCES, LENGTH = 6, 256, 8192, 16, 256
WAYS = {
    "all": "one pass for all layers (`lm.capture`)",
    "each": "one stopped pass per layer",
    "full": "full pass with head, cache and `output_hidden_states`",
}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Median seconds in which the states of layers 1..LAYERS of one batch are had."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from glottoscope.lm.capture import capture
    from glottoscope.sae.matmul import enable_fast_matmul

    torch.set_num_threads(task["threads"])
    enable_fast_matmul()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, task["dtype"])).eval()
    ids = torch.randint(VOCABULARY, (task["sequences"], LENGTH))
    mask = torch.ones_like(ids)
    layers = list(range(1, LAYERS + 1))

    def once() -> None:
        if task["what"] == "all":
            capture(model, ids, mask, layers)
        elif task["what"] == "each":
            for layer in layers:
                capture(model, ids, mask, [layer])
        else:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, output_hidden_states=True)

    once()
    seconds = []
    for _ in range(task["steps"]):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {"seconds": median, "steps": seconds, "tokens_per_second": ids.numel() / median, "words": f"{median:.3g} s"}


def run(options: Options) -> Section:
    """Tokens per second of every way, in float32 and bfloat16, at each thread count."""
    sequences = 2 if options.quick else SEQUENCES
    jobs: list[Job] = []
    for threads in options.thread_counts:
        for dtype in ("float32", "bfloat16"):
            for what in WAYS:
                name = f"lm/{dtype}/t{threads}/{what}"
                task = {"what": what, "dtype": dtype, "threads": threads, "steps": options.steps, "sequences": sequences}
                if options.selects("lm", name.removeprefix("lm/")):
                    jobs.append(python_job(name, "lm_pass.py", task, weight=3.0 if what == "each" else 1.0, rounds=options.rounds))
    results = interleave(jobs, options, Progress(jobs))
    rows = []
    for threads in options.thread_counts:
        for dtype in ("float32", "bfloat16"):
            own = median_of(results.get(f"lm/{dtype}/t{threads}/all"), "tokens_per_second")
            for what, words in WAYS.items():
                records = results.get(f"lm/{dtype}/t{threads}/{what}", [])
                speed = median_of(records, "tokens_per_second")
                if speed is None:
                    if records:
                        rows.append([words, dtype, str(threads), f"failed: {records[-1]['error']}", "", ""])
                    continue
                ratio = f"{own / speed:.2f} x" if own and what != "all" else ""
                rows.append([words, dtype, str(threads), f"{speed:,.0f}", range_of(records, "seconds"), ratio])
    header = ("", "dtype", "threads", "tokens/s", "s, lowest-highest", "all layers at once is faster by")
    markdown = (
        f"Llama, d = {WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY:,}, random weights; {sequences} sequences of {LENGTH} "
        f"tokens; states of layers 1 to {LAYERS}.\n\n" + table(header, rows)
    )
    return Section("LM pass", markdown, {"measurements": results})


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
