"""Steering: a model's features are removed, added, and given by another checkpoint while it reads and writes.

Any finished run will do. The cells (# %%) run one by one in an editor that knows them, or all at once:

    python examples/steering.py runs/planted

What a generation says is an illustration. Whether a part does something is decided by `glottoscope intervene`, with its
controls and intervals.
"""

# %% A run, its largest model, and the middle one of its layers
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

import glottoscope as gs

run = gs.load_run(sys.argv[1] if len(sys.argv) > 1 else "runs/planted")
languages = run.study.languages
setups = [r for r in run.evolution.to_pylist() if r["control"] == "none"]
name = max(setups, key=lambda r: r["n_params"] or 0)["model"]
setups = [r for r in setups if r["model"] == name]
layers = sorted({r["layer"] for r in setups})
layer = layers[len(layers) // 2]
loss_of_step = {r["step"]: np.mean([r[f"lm_loss_{x}"] for x in languages]) for r in setups}
first, final = min(loss_of_step), max(loss_of_step)
# The base of an intervention: the first checkpoint at which half of the fall in log perplexity is done.
half = min(s for s, loss in loss_of_step.items() if loss <= (loss_of_step[first] + loss_of_step[final]) / 2)
lm, early = run.load_lm(model=name, step=final), run.load_lm(model=name, step=half)
tokenizer = run.tokenizer
# The SAE that reads the states and names the features.
sae: Any = {"model": name, "step": final, "layer": layer, "seed": min(run.study.sae.seeds)}
print(f"{name}, step {final}, layer {layer}; base: step {half}")

# %% Text that neither the models nor the SAEs learned from
tokens = np.load(run.path / "tokens" / "test.tokens.npy").astype(np.int64)  # [B, T]
language = np.load(run.path / "tokens" / "test.language.npy")  # [B, T]; 255 is padding
blocks = {code: np.flatnonzero((language == g).any(axis=1))[:64] for g, code in enumerate(languages)}


@torch.no_grad()
def loss(model: Any, code: str) -> float:
    """Nats per token on some test blocks of one language."""
    ids = torch.from_numpy(tokens[blocks[code]]).to(model.device)
    real = torch.from_numpy(language[blocks[code]] != 255).to(model.device)
    return float(model(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)).loss)


def write(model: Any, prompt: Sequence[int], n: int = 12) -> str:
    """What the model goes on with, the most likely token each time."""
    ids = torch.tensor([list(prompt)], device=model.device)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


# %% Remove: the features of one class, out of the model's own state (0 removes, 2 doubles)
print("\nloss without the features of a class")
print("  nothing removed  ", {code: round(loss(lm, code), 3) for code in languages})
for part in (*languages, "mixed"):
    with run.inject(lm, **sae, features=part, multiply=0.0) as edit:
        found = {code: round(loss(lm, code), 3) for code in languages}
    # The edit sums up what it did: the mean length of the change, as a share of the state's own length.
    print(f"  {part:<17}", found, f"change of the state {edit.added / max(1, edit.positions):.2f}")

# %% Add: one mixed feature, at every position at a share of its largest activation on the test split
folder = run.path / "cells" / f"{name}@{final}" / f"layer_{layer:02d}" / f"seed_{sae['seed']}"
table = pq.read_table(folder / "features.parquet").filter(pc.field("language") == "mixed")
best = max(table.to_pylist(), key=lambda r: (r["phi"] or 0.0) - (r["phi_null"] or 0.0))["feature"]
examples = pq.read_table(folder / "examples.parquet").filter(pc.field("feature") == best).sort_by("rank").to_pylist()
print(f"\nfeature {best}, where it is strongest:")
vocabulary = pq.read_table(run.path / "tokens" / "vocabulary.parquet")["text"].to_pylist()
for code in languages:
    mine = [e for e in examples if e["language"] == code][:5]
    print(f"  {code}:", *(vocabulary[e["tokens"][e["position"] - e["window_start"]]].strip() for e in mine))

for code in languages:
    prompt = tokens[blocks[code][0]][:8]
    print(f"\n{tokenizer.decode(prompt, skip_special_tokens=True)} ...")
    print("  as it is:      ", write(lm, prompt))
    for strength in (0.5, 1.0, 2.0):
        with run.inject(lm, **sae, features=[best], add=strength):
            print(f"  with {strength} of it:", write(lm, prompt))

# %% Donor: the last checkpoint's part, added to a half-trained model that reads the same text
print(f"\nloss of step {half}")
print("  nothing added    ", {code: round(loss(early, code), 3) for code in languages})
for part in (*languages, "mixed", "all"):
    with run.inject(early, **sae, features=part, donor=lm, alpha=0.4):
        print(f"  {part:<17}", {code: round(loss(early, code), 3) for code in languages})
# A condition on the feature table (docs/tables.md) names features, too; and the donor reads along while text is written.
with run.inject(early, **sae, features="phi > 0.4 or language = 'en'", donor=lm, alpha=0.4):
    print("  step", half, "writes:", write(early, tokens[blocks[languages[0]][0]][:8]))
