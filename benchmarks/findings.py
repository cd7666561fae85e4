"""What finished runs found at the middle layer, as the Markdown table of the README.

    python benchmarks/findings.py runs/planted-full runs/planted-full-seed1 runs/planted-full-seed2

One row per run and model: the mixed share at the first checkpoint, where it is lowest, and at the last; the bilingual share
early (its highest up to step 30) and at the last checkpoint; and, on the planted world, how well phi and the flag agree with
the truth over alive features at the last checkpoint.
"""

from __future__ import annotations

import sys

import glottoscope as gs


def middle_layer(layers: list[int]) -> int:
    """The studied layer nearest to half of the deepest one, the lower on ties."""
    return min(layers, key=lambda x: (abs(x - max(layers) / 2), x))


def main(paths: list[str]) -> None:
    header = (
        "| run | model | mixed: first, lowest (step), last | bilingual: up to step 30, last | features | AUC of phi, of the flag |"
    )
    print(header + "\n|---|---|---|---|---|---|")
    for path in paths:
        run = gs.load_run(path)
        rows = run.evolution.to_pylist()
        for model in dict.fromkeys(r["model"] for r in rows):
            layer = middle_layer(sorted({r["layer"] for r in rows if r["model"] == model}))
            curve = [r for r in rows if r["model"] == model and r["layer"] == layer and r["sae_seed"] == min(run.study.sae.seeds)]
            lowest = min(curve, key=lambda r: r["share_mixed"])
            first, last = curve[0], curve[-1]
            mixed = f"{first['share_mixed']:.2f}, {lowest['share_mixed']:.2f} ({lowest['step']}), {last['share_mixed']:.2f}"
            early = [r["share_bilingual"] for r in curve if r["step"] <= 30 and r["share_bilingual"] is not None]
            bilingual, features = "not measured", ""
            if last["share_bilingual"] is not None:
                bilingual = f"{max(early):.3f}, {last['share_bilingual']:.3f}" if early else f"-, {last['share_bilingual']:.3f}"
                features = f"{last['n_bilingual']} of {last['n_alive']}, next sentence {last['n_bilingual_next']}"
                highest = max(r["share_bilingual"] for r in curve if r["share_bilingual"] is not None)
                bilingual += f" (highest {highest:.3f})" if last["control"] != "none" else ""
            agreement = ""
            if last["truth_auc_phi"] is not None:
                agreement = f"{last['truth_auc_phi']:.2f}, {last['truth_auc_flag']:.2f}"
            print(f"| {run.study.study.name} | {model} | {mixed} | {bilingual} | {features} | {agreement} |")


if __name__ == "__main__":
    main(sys.argv[1:])
