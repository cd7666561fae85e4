"""Interventions of a study: the table against losses and translations made by hand, determinism, resume, what a study says.

The reference of this module is one sequence at a time through a plain Hugging Face pass with hooks, and an SAE in four
lines. Shapes: T positions, D d_model, N features.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import sacrebleu
import tomli_w
import torch
from sacrebleu.metrics.bleu import BLEU
from study_fixture import (
    BRIEF,
    INTERVENTION,
    PLANTED,
    attempt,
    contents,
    intervened,
    log_lines,
    planted,
    planted_model,
    run,
    state,
    stop_when,
    text_study,
    work_done,
    write_jsonl,
)
from torch import Tensor
from transformers import PreTrainedModel

from glottoscope.errors import InputError
from glottoscope.intervention.perplexity import other_windows
from glottoscope.lm.checkpoints import Checkpoint, load_lm
from glottoscope.sae.model import TopKSAE
from glottoscope.study.columns import columns_of
from glottoscope.study.config import InterventionConfig
from glottoscope.study.plan import seed_for
from glottoscope.study.runner import clean, status
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.intervene.experiments import Experiment, comet_key, experiments
from glottoscope.study.stages.intervene.sentences import tasks_of
from glottoscope.study.stages.intervene.texts import text_of
from glottoscope.study.store import RunStore

Row = dict[str, Any]
Change = Callable[[Tensor], Tensor]
RESULTS = ("tables/intervention.*", "interventions/**/*")
SMALL = {
    **BRIEF, "draws": 2, "texts": ["documents", "sentences"],
    "translation": {"pairs": 3, "draws": 1, "shots": 1, "max_new_tokens": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tiny: RunStore, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """One experiment with everything in it. Tests read it and never write into it."""
    return intervened(tiny, tmp_path_factory.mktemp("study") / "run", INTERVENTION)


@pytest.fixture(scope="module")
def small(tiny: RunStore, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return intervened(tiny, tmp_path_factory.mktemp("small") / "run", SMALL)


@pytest.fixture
def copy(small: RunStore, tmp_path: Path) -> RunStore:
    """A copy of the small run that a test may change."""
    shutil.copytree(small.root, tmp_path / "run")
    return RunStore(tmp_path / "run")


@lru_cache(maxsize=4)
def _rows(path: Path, _changed: int) -> list[Row]:
    return pq.read_table(path).to_pylist()


def rows_of(store: RunStore, **where: Any) -> list[Row]:
    path = store.table_path("intervention")
    return [r for r in _rows(path, path.stat().st_mtime_ns) if all(r[k] == v for k, v in where.items())]


def row_of(store: RunStore, **where: Any) -> Row:
    (row,) = rows_of(store, **where)
    return row


def folder_of(store: RunStore, name: str = "study") -> Path:
    """The folder of the only experiment of that name."""
    (folder,) = (store.interventions_dir / name).glob("*/*/*")
    return folder


def as_config(settings: Mapping[str, Any]) -> InterventionConfig:
    return InterventionConfig.model_validate(settings)


def asked(store: RunStore) -> list[Experiment]:
    context = Context.open(store.root)
    assert context.study.intervention is not None
    return experiments(context, context.study.intervention)


def features_of(store: RunStore, step: int, layer: int = 1) -> pa.Table:
    return pq.read_table(store.setup_dir("m", step, layer, 0) / "features.parquet")


def members(store: RunStore, part: str, step: int, layer: int = 1) -> Tensor:
    """bool [N]: the features of a part, read off the feature table."""
    wanted = {
        "all": lambda r: True, "bilingual": lambda r: r["bilingual"], "bilingual_paper": lambda r: r["bilingual_paper"],
        "few": lambda r: r["feature"] in (1, 2, 3), "dense": lambda r: r["density"] > 0.1, "nothing": lambda r: False,
    }.get(part, lambda r: r["language"] == part)  # fmt: skip
    return torch.tensor([bool(r["alive"] and wanted(r)) for r in features_of(store, step, layer).to_pylist()])


# ---- the table


def test_the_table_has_the_documented_columns_and_no_other(study: RunStore) -> None:
    table, described = study.table("intervention"), columns_of("intervention", ("en", "ja"))
    assert table.column_names == list(described)
    assert [str(f.type) for f in table.schema] == [c.type for c in described.values()]
    for name in table.column_names:
        if pa.types.is_floating(table.schema.field(name).type):
            assert np.isfinite(table[name].drop_null().to_numpy()).all(), name


def test_the_csv_is_the_table(study: RunStore) -> None:
    table = study.table("intervention")
    types = {f.name: f.type for f in table.schema}
    options = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False)
    assert pyarrow.csv.read_csv(study.tables_dir / "intervention.csv", convert_options=options).equals(table)


def condition_of(row: Row) -> tuple[Any, ...]:
    return row["arm"], row["part"], row["draw"], row["alpha"]


def present_parts(store: RunStore) -> list[str]:
    """The parts of the full experiment that have features."""
    parts = ("en", "ja", "mixed", "bilingual", "bilingual_paper", "all", "few", "dense", "nothing")
    return [p for p in parts if members(store, p, 20).any()]


@pytest.mark.parametrize("text", ["documents", "sentences", "translation", "dev_documents", "dev_sentences"])
def test_every_condition_stands_there_once_with_every_metric_and_language(study: RunStore, text: str) -> None:
    rows = [r for r in rows_of(study, text=text) if r["value"] is not None]
    metrics, languages = ("nll", "ppl"), ("en", "ja", "all")
    if text == "translation":
        metrics, languages = ("chrf", "bleu", "exact", "recall"), ("en-ja", "ja-en")
    found = Counter(condition_of(r) for r in rows)
    assert set(found.values()) == {len(metrics) * len(languages)}
    assert {(condition_of(r), r["metric"], r["language"]) for r in rows} == {
        (c, m, x) for c in found for m in metrics for x in languages
    }
    (alpha,) = {r["alpha"] for r in rows if r["chosen"] and r["arm"] == "part"}
    alphas = [alpha] if text == "translation" else INTERVENTION["alphas"]
    parts = ["all"] if text.startswith("dev_") else present_parts(study)
    expected = {("baseline", None, None, None), ("donor", None, None, None)} | {("part", p, None, a) for p in parts for a in alphas}
    if not text.startswith("dev_"):
        # Ids mean nothing in the base's own SAE: a part given by ids has no such control.
        expected |= {("self", p, None, alpha) for p in parts if p != "few" and members(study, p, 0).any()}
        expected |= {("reconstruction", None, None, None), ("state", None, None, alpha), ("state_replaced", None, None, None)}
        expected |= {(arm, p, i, alpha) for arm, p, i, _ in found if "random" in arm}
    if text in ("documents", "sentences"):
        expected |= {("identity", None, None, None)} | {("shuffled", p, None, alpha) for p in parts}
    assert set(found) == expected


def test_keys_of_the_rows(study: RunStore) -> None:
    model = next(r for r in study.table("evolution").to_pylist())
    expected = {
        "experiment": "study", "control": "none", "family": "tiny", "model": "m", "donor_model": "m", "d_model": 16,
        "n_params": model["n_params"], "lm_seed": 0, "sae_seed": 0, "layer": 1, "layers": "1", "base_step": 0, "donor_step": 20,
        "base_tokens": 0, "donor_tokens": 20 * 16 * 64, "mode": "add", "scale": "matched",
    }  # fmt: skip
    for row in rows_of(study):
        assert {name: row[name] for name in expected} == expected


def test_baseline_donor_and_identity(study: RunStore) -> None:
    for row in rows_of(study, arm="baseline"):
        assert (row["change"], row["change_low"], row["change_high"]) == (0, 0, 0)
        assert row["added_norm"] is None
    for row in rows_of(study, arm="donor"):
        if row["change"] != 0:
            assert row["gap_closed"] == 1
        if row["gap_closed_low"] is not None:
            assert (row["gap_closed_low"], row["gap_closed_high"]) == (1, 1)
    found = rows_of(study, arm="identity")
    assert len(found) == 2 * 2 * 3
    assert all(abs(r["change"]) < 1e-6 * r["value"] and r["added_norm"] < 1e-6 for r in found)


def test_a_strength_of_zero_is_the_baseline(study: RunStore) -> None:
    for text in ("documents", "sentences", "dev_documents", "dev_sentences"):
        baseline = {(r["metric"], r["language"]): r["value"] for r in rows_of(study, text=text, arm="baseline")}
        found = rows_of(study, text=text, arm="part", alpha=0.0)
        assert len(found) == 6 * (1 if text.startswith("dev_") else len(present_parts(study)))
        for row in found:
            assert row["value"] == baseline[row["metric"], row["language"]]
            assert (row["change"], row["change_low"], row["change_high"], row["added_norm"]) == (0, 0, 0, 0)
            assert row["change_per_norm"] is None


def test_perplexity_is_the_exponential_and_all_is_pooled_over_tokens(study: RunStore) -> None:
    rows = [r for r in rows_of(study) if r["metric"] in ("nll", "ppl") and r["value"] is not None]
    value = {(r["text"], *condition_of(r), r["metric"], r["language"]): r for r in rows}
    for (*where, metric, language), row in value.items():
        if metric == "ppl":
            assert math.isclose(row["value"], math.exp(value[*where, "nll", language]["value"]), rel_tol=1e-12)
        elif language == "all":
            parts = [value[*where, "nll", x] for x in ("en", "ja")]
            n = sum(p["n_tokens"] for p in parts)
            assert row["n_tokens"] == n
            assert math.isclose(row["value"], sum(p["value"] * p["n_tokens"] for p in parts) / n, rel_tol=1e-12)
    # Eleven documents of 63 tokens fit into half of 1,500 tokens.
    assert {r["n_tokens"] for r in rows if r["text"] == "documents" and r["language"] == "en"} == {693}
    assert {r["n_units"] for r in rows if r["text"] == "documents" and r["language"] == "all"} == {22}


def test_changes_gaps_and_norms_follow_from_the_values(study: RunStore) -> None:
    rows = [r for r in rows_of(study) if r["value"] is not None]
    ends = {(r["arm"], r["text"], r["metric"], r["language"]): r["value"] for r in rows if r["arm"] in ("baseline", "donor")}
    for row in rows:
        where = (row["text"], row["metric"], row["language"])
        baseline, donor = ends["baseline", *where], ends["donor", *where]
        assert row["change"] == row["value"] - baseline
        assert row["change_low"] <= row["change_high"]
        if donor == baseline:
            assert row["gap_closed"] is None
        else:
            assert math.isclose(row["gap_closed"], row["change"] / (donor - baseline), rel_tol=1e-9, abs_tol=1e-12)
        if row["added_norm"]:
            assert math.isclose(row["change_per_norm"], row["change"] / row["added_norm"], rel_tol=1e-9)


def test_the_strength_is_the_best_of_all_on_dev_text_of_the_same_kind(study: RunStore) -> None:
    for text, dev in (("documents", "dev_documents"), ("sentences", "dev_sentences"), ("translation", "dev_sentences")):
        losses = {r["alpha"]: r["value"] for r in rows_of(study, text=dev, arm="part", metric="nll", language="all")}
        best = min(losses, key=losses.__getitem__)
        for name in (text, dev):
            assert {r["alpha"] for r in rows_of(study, text=name, chosen=True) if r["alpha"] is not None} == {best}


def test_random_draws_are_matched_in_mass_and_ranked(study: RunStore) -> None:
    drawn = 0
    for part in present_parts(study):
        for text, n in (("documents", 4), ("sentences", 4), ("translation", 2)):
            for row in rows_of(study, text=text, arm="part", part=part, chosen=True):
                same = {"text": text, "part": part, "metric": row["metric"], "language": row["language"]}
                for arm, rank, count in (("random", "rank", "n_random"), ("random_other", "rank_other", "n_random_other")):
                    draws = rows_of(study, arm=arm, **same)
                    drawn += len(draws)
                    if not draws:
                        assert row[rank] is None
                        # Every alive feature is in `all`; sentences are translated with draws from all features only.
                        no_draws = part == "all" or (text == "translation" and arm == "random_other")
                        assert no_draws or f"{arm}: the pool holds" in row["note"]
                        continue
                    assert [d["draw"] for d in draws] == list(range(n))
                    higher = row["metric"] not in ("nll", "ppl")
                    ahead = [d["value"] >= row["value"] if higher else d["value"] <= row["value"] for d in draws]
                    assert (row[rank], row[count]) == (1 + sum(ahead), n)
                    assert row["note"] or all(abs(d["mass"] / row["mass"] - 1) <= 0.05 for d in draws)
    assert drawn > 300
    unranked = [r for r in rows_of(study) if not (r["arm"] == "part" and r["chosen"])]
    assert all(r["rank"] is None and r["rank_other"] is None and r["n_random"] is None for r in unranked)


def test_controls_add_as_much_as_what_they_control_for(study: RunStore) -> None:
    for part in present_parts(study):
        same: Row = {"text": "documents", "part": part, "metric": "nll", "language": "all"}
        row, moved = row_of(study, arm="part", chosen=True, **same), row_of(study, arm="shuffled", **same)
        assert row["n_features"] == moved["n_features"] == int(members(study, part, 20).sum())
        assert row["mass"] == moved["mass"]
        # Documents are equally long here: each state stands in for exactly one other.
        assert math.isclose(row["added_norm"], moved["added_norm"], rel_tol=1e-5)
        for own in rows_of(study, arm="self", **same):
            assert (own["n_features"], own["mass"]) == (int(members(study, part, 0).sum()), None)
    share = {r["part"]: r["mass"] for r in rows_of(study, text="documents", arm="part", metric="nll", language="all", alpha=1.0)}
    assert share["all"] == 1
    assert math.isclose(share["en"] + share["ja"] + share["mixed"], 1)  # no other class here
    for row in rows_of(study, text="documents", arm="state"):
        assert math.isclose(row["added_norm"], row["alpha"], rel_tol=1e-6)


def test_an_empty_class_is_a_row_with_a_note(study: RunStore) -> None:
    empty = {"bilingual", "bilingual_paper", "nothing"} - set(present_parts(study))
    assert "nothing" in empty
    for part in empty:
        row = row_of(study, part=part)
        assert row["note"].startswith("empty class: ")
        assert (row["arm"], row["text"], row["value"], row["n_features"]) == ("part", "documents", None, 0)


# ---- the numbers, by hand


def dense_codes(sae: TopKSAE, x_TD: Tensor) -> Tensor:
    """[T, N]"""
    u_TD = x_TD / x_TD.norm(dim=-1, keepdim=True)
    z_TN = torch.relu((u_TD - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    active = z_TN.topk(sae.k).indices
    return torch.zeros_like(z_TN).scatter(-1, active, z_TN.gather(-1, active))


@torch.no_grad()
def forward(
    model: PreTrainedModel, ids: Sequence[int], changes: Mapping[int, Change] | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [T, V] of a plain pass, and every layer's state [T, D] before it is changed."""
    states: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., Any]:
        def change(_module: Any, _args: Any, output: Any) -> Any:
            states[layer] = (output[0] if isinstance(output, tuple) else output)[0]
            if layer not in (changes or {}):
                return None
            changed = (changes or {})[layer](states[layer])[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change

    inner: Any = model.base_model
    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate([inner.embed_tokens, *inner.layers])]
    try:
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0], states
    finally:
        for handle in handles:
            handle.remove()


def loss(logits_TV: Tensor, ids: Sequence[int], first: int = 1) -> float:
    """Nats of the tokens from position `first` on."""
    log_p = torch.log_softmax(logits_TV.double(), dim=-1)
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(first, len(ids)))


class Pair(NamedTuple):
    """A base and a donor with their SAEs of one layer, and how parts are added."""

    base: PreTrainedModel
    donor: PreTrainedModel
    base_sae: TopKSAE
    donor_sae: TopKSAE
    special: tuple[int, ...]
    mode: str = "add"
    scale: str = "matched"

    def change(
        self, condition: Row, members_N: Tensor, ids: Sequence[int], donor_TD: Tensor, other_TD: Tensor | None = None
    ) -> Change:
        """What a condition makes of the base's state; `other_TD` are the donor's states that `shuffled` takes."""

        def change(h_TD: Tensor) -> Tensor:
            arm, alpha, sae = condition["arm"], condition["alpha"], self.donor_sae
            d_TD = h_TD if arm == "self" else donor_TD
            if arm == "shuffled":
                assert other_TD is not None
                d_TD = other_TD
            norm_T1 = (h_TD if self.scale == "matched" else d_TD).norm(dim=-1, keepdim=True)
            codes_TN = dense_codes(self.base_sae if arm == "self" else sae, d_TD)
            if arm in ("baseline", "donor", "identity"):
                new = h_TD
            elif arm == "reconstruction":
                new = norm_T1 * (codes_TN @ sae.W_dec + sae.b_dec)
            elif arm == "state_replaced":
                new = d_TD
            elif arm == "state":
                new = h_TD + alpha * norm_T1 * d_TD / d_TD.norm(dim=-1, keepdim=True)
            elif arm == "self":
                new = h_TD + alpha * norm_T1 * ((codes_TN * members_N) @ self.base_sae.W_dec)
            else:
                part = norm_T1 * ((codes_TN * members_N) @ sae.W_dec)
                if self.mode == "replace":
                    part = part - h_TD.norm(dim=-1, keepdim=True) * ((dense_codes(sae, h_TD) * members_N) @ sae.W_dec)
                new = h_TD + alpha * part
            kept = torch.tensor([i in self.special for i in ids])[:, None]
            return torch.where(kept, h_TD, new)

        return change


def pair_of(store: RunStore, layer: int = 1, base: int = 0, donor: int = 20, mode: str = "add", scale: str = "matched") -> Pair:
    steps = (base, donor)
    lms = [load_lm(Checkpoint(str(store.checkpoint_dir("m", s)), s, 0), device="cpu", dtype="float32") for s in steps]
    saes = [TopKSAE.load(store.setup_dir("m", s, layer, 0)) for s in steps]
    special = tuple(json.loads((store.tokens_dir / "info.json").read_text(encoding="utf-8"))["special_ids"])
    return Pair(lms[0], lms[1], saes[0], saes[1], special, mode, scale)


def documents(store: RunStore, tokens: int, split: str = "test") -> list[list[int]]:
    """Ids, BOS first, of the documents that are measured: the first of each language up to half of the tokens."""
    names = ("tokens", "language", "document")
    ids, language, document = (np.load(store.tokens_dir / f"{split}.{name}.npy") for name in names)
    spent, kept = Counter[int](), []
    for row in np.argsort(document[:, -1], kind="stable"):
        g = int(language[row, -1])
        spent[g] += ids.shape[1] - 1
        if spent[g] <= tokens // 2:
            kept.append(ids[row].tolist())
    return kept


def sentences(store: RunStore, tokens: int, which: str = "test") -> list[list[int]]:
    """Ids, BOS first, of the aligned sentences that are measured: all of one language, then those of the other."""
    ids, length = (np.load(store.aligned_dir / f"{which}.{name}.npy") for name in ("tokens", "length"))
    n = int((np.cumsum((length - 1).sum(axis=0)) <= tokens).sum())
    return [ids[g, p, : length[g, p]].tolist() for g in range(len(ids)) for p in range(n)]


def plan_of(store: RunStore) -> dict[str, Any]:
    return json.loads((folder_of(store) / "plan.json").read_text(encoding="utf-8"))


def measured(store: RunStore, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Nats [S, U] and tokens [U] of a text, as they were stored."""
    found = [np.load(p) for p in sorted(folder_of(store).glob(f"{text}-*.npz"))]
    return np.concatenate([f["nll"] for f in found]), found[0]["tokens"]


def chosen_features(store: RunStore, condition: Row, layer: int = 1) -> Tensor:
    """bool [N]: a class from the feature table, a random draw from what was stored."""
    if condition["features"] is None:
        return torch.zeros(32, dtype=torch.bool)
    if condition["draw"] is None:
        return members(store, condition["part"], 0 if condition["arm"] == "self" else 20, layer)
    with np.load(folder_of(store) / "sets.npz") as sets:
        return torch.tensor(np.unpackbits(sets[f"{layer}/{condition['features']}"], count=32).astype(bool))


@pytest.mark.parametrize("text", ["documents", "sentences"])
def test_losses_equal_a_plain_pass_with_a_hook(study: RunStore, text: str) -> None:
    """Every condition of two units; sentences differ in length, so that other texts are taken from their start again."""
    pair, context = pair_of(study), Context.open(study.root)
    units = (documents if text == "documents" else sentences)(study, INTERVENTION["tokens"])
    nll_SU, tokens_U = measured(study, text)
    assert [len(ids) - 1 for ids in units] == tokens_U.tolist()
    found = text_of(context, asked(study)[0].config, text)
    other_U = other_windows(found.windows, found.language, seed_for(context.study, "other-text", text))
    conditions = plan_of(study)["texts"][text]["conditions"]
    assert len(conditions) == len(nll_SU) > 64  # more than are measured together
    for u in (2, len(units) - 1):
        ids, other = units[u], units[other_U[u]]
        donor_TD, other_TD = (forward(pair.donor, x)[1][1] for x in (ids, other))
        place = [0, *(1 + (t - 1) % (len(other) - 1) for t in range(1, len(ids)))]
        for s, condition in enumerate(conditions):
            change = pair.change(condition, chosen_features(study, condition), ids, donor_TD, other_TD[place])
            logits, _ = forward(pair.donor if condition["arm"] == "donor" else pair.base, ids, {1: change})
            assert abs(nll_SU[s, u] - loss(logits, ids)) < 1e-4 * len(ids), condition


@pytest.mark.parametrize(
    ("changes", "mode", "scale"),
    [
        ({"mode": "replace"}, "replace", "matched"),
        ({"scale": "raw"}, "add", "raw"),
        ({"window": 20, "stride": 8}, "add", "matched"),
    ],
    ids=["replace", "raw", "windows"],
)
def test_ways_to_add_and_to_cut(tiny: RunStore, tmp_path: Path, changes: dict[str, Any], mode: str, scale: str) -> None:
    store = intervened(tiny, tmp_path / "run", {**BRIEF, "alphas": [0.7], **changes})
    assert {(r["mode"], r["scale"]) for r in rows_of(store)} == {(mode, scale)}
    assert folder_of(store).parent.name == f"layers_01-{mode}-{scale}"
    pair, ids = pair_of(store, mode=mode, scale=scale), documents(store, BRIEF["tokens"])[1]
    nll_SU, tokens_U = measured(store, "documents")
    words, expected = ids[1:], np.zeros(len(nll_SU))
    size, stride = changes.get("window", 64) - 1, changes.get("stride", 64)
    for start in range(0, max(1, len(words) - size + stride), stride):
        window = [ids[0], *words[start : start + size]]
        first = 1 if start == 0 else 1 + size - stride  # what the window before has scored is context only
        donor_TD = forward(pair.donor, window)[1][1]
        for s, condition in enumerate(plan_of(store)["texts"]["documents"]["conditions"]):
            if condition["arm"] == "shuffled":
                continue
            change = pair.change(condition, chosen_features(store, condition), window, donor_TD)
            logits, _ = forward(pair.donor if condition["arm"] == "donor" else pair.base, window, {1: change})
            expected[s] += loss(logits, window, first)
    assert tokens_U[1] == len(words)
    compared = expected > 0
    assert compared.sum() == len(expected) - 2  # two parts on other text
    np.testing.assert_allclose(nll_SU[compared, 1], expected[compared], rtol=1e-5)


def test_layers_alone_and_together(tiny: RunStore, tmp_path: Path) -> None:
    layers = {**BRIEF, "layers": [1, 0], "draws": 2}
    store = intervened(tiny, tmp_path / "alone", layers)
    assert {(r["layer"], r["layers"]) for r in rows_of(store)} == {(0, "0"), (1, "1")}
    store = intervened(tiny, tmp_path / "together", {**layers, "together": True})
    assert {(r["layer"], r["layers"]) for r in rows_of(store)} == {(0, "0+1")}
    pairs, ids = [pair_of(store, layer) for layer in (0, 1)], documents(store, BRIEF["tokens"])[0]
    nll_SU, _ = measured(store, "documents")
    donor = forward(pairs[0].donor, ids)[1]
    arms = Counter()
    for s, condition in enumerate(plan_of(store)["texts"]["documents"]["conditions"]):
        if condition["arm"] != "shuffled":
            arms[condition["arm"]] += 1
            features = [chosen_features(store, condition, layer) for layer in (0, 1)]
            changes = {i: pairs[i].change(condition, features[i], ids, donor[i]) for i in (0, 1)}
            model = pairs[0].donor if condition["arm"] == "donor" else pairs[0].base
            assert math.isclose(nll_SU[s, 0], loss(forward(model, ids, changes)[0], ids), rel_tol=1e-5), condition
    assert arms["part"] == 2
    assert arms["random"] == 2
    row = row_of(store, text="documents", arm="part", part="mixed", metric="nll", language="all")
    assert row["n_features"] == sum(int(members(store, "mixed", 20, layer).sum()) for layer in (0, 1))


def test_half_is_the_first_step_with_half_of_the_fall(tiny: RunStore, tmp_path: Path) -> None:
    raw = planted(models=planted_model(checkpoints=[0, 15, 20]))
    store = intervened(tiny, tmp_path / "run", {**BRIEF, "bases": "half"}, raw=raw)
    losses = {r["step"]: (r["lm_loss_en"] + r["lm_loss_ja"]) / 2 for r in store.table("evolution").to_pylist()}
    expected = min(s for s, x in losses.items() if x <= (losses[0] + losses[20]) / 2)
    assert 0 < expected < 20
    assert {(r["base_step"], r["donor_step"]) for r in rows_of(store)} == {(expected, 20)}


def test_a_model_that_is_its_own_donor(tiny: RunStore, tmp_path: Path) -> None:
    store = intervened(tiny, tmp_path / "run", {**SMALL, "bases": [20]})
    rows = rows_of(store)
    assert all(r["gap_closed"] is None and r["gap_closed_low"] is None for r in rows)
    assert all(r["change"] == 0 for r in rows if r["arm"] == "donor")
    for text in ("documents", "sentences", "translation"):
        found: dict[str, list[float]] = {
            arm: [r["value"] for r in rows if (r["text"], r["arm"], r["part"]) == (text, arm, part)]
            for arm, part in (("baseline", None), ("state_replaced", None), ("part", "all"), ("self", "all"))
        }
        assert found["state_replaced"] == pytest.approx(found["baseline"], rel=1e-6)
        assert found["self"] == pytest.approx(found["part"], rel=1e-6)
        assert len(found["part"]) == (8 if text == "translation" else 6)


# ---- translation


def world_pairs(store: RunStore, which: str, chosen: Sequence[int]) -> list[tuple[str, str]]:
    """(English, Japanese) of aligned sentences of the planted world."""
    world = Context.open(store.root).world()
    ids, length = (np.load(store.aligned_dir / f"{which}.{name}.npy") for name in ("tokens", "length"))
    texts = [[world.text(ids[g, p, 1 : length[g, p]]) for p in chosen] for g in (0, 1)]
    return list(zip(*texts, strict=True))


def outputs(store: RunStore, direction: str) -> dict[tuple[Any, ...], list[str]]:
    """Condition -> its translations, in the order of the pairs."""
    conditions = plan_of(store)["texts"]["translation"]["conditions"]
    found: dict[tuple[Any, ...], list[str]] = {}
    for path in sorted(folder_of(store).glob(f"translation-{direction}-*.parquet")):
        table = pq.read_table(path)
        assert table.column_names == list(columns_of("translations", ("en", "ja")))
        for row in table.to_pylist():
            c = conditions[row["condition"]]
            texts = found.setdefault((c["arm"], c["part"], c["draw"]), [])
            assert row["pair"] == len(texts)
            texts.append(row["text"])
    return found


def concept_recall(store: RunStore, texts: Sequence[str], references: Sequence[str]) -> float:
    vocabulary = pq.read_table(store.tokens_dir / "vocabulary.parquet").to_pylist()
    concept = {r["text"].strip(): r["concept"] for r in vocabulary if r["concept"] >= 0}
    hits = total = 0
    for text, reference in zip(texts, references, strict=True):
        mine, wanted = (Counter(concept[w] for w in x.split() if w in concept) for x in (text, reference))
        hits, total = hits + (mine & wanted).total(), total + wanted.total()
    return hits / total


@pytest.mark.parametrize("direction", ["en-ja", "ja-en"])
def test_scores_of_translations_are_sacrebleus_on_the_stored_texts(study: RunStore, direction: str) -> None:
    references = [p[direction == "en-ja"] for p in world_pairs(study, "test", range(10))]
    found = outputs(study, direction)
    value = {(r["arm"], r["part"], r["draw"], r["metric"]): r for r in rows_of(study, text="translation", language=direction)}
    assert len(value) == 4 * len(found)
    for key, texts in found.items():
        expected = {
            "chrf": sacrebleu.corpus_chrf(texts, [references]).score,
            "bleu": BLEU(tokenize="none", force=True).corpus_score(texts, [references]).score,
            "exact": sum(a == b for a, b in zip(texts, references, strict=True)) / 10,
            "recall": concept_recall(study, texts, references),
        }
        for metric, score in expected.items():
            row = value[*key, metric]
            assert math.isclose(row["value"], score, rel_tol=1e-9, abs_tol=1e-9), (key, metric)
            assert row["n_tokens"] is None
            assert metric in row["signature"].lower()
            assert row["n_units"] == 2  # articles of eight sentences
    assert len({x for texts in found.values() for x in texts}) > 20


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)], ids=["en-ja", "ja-en"])
def test_translations_are_greedy_generation_by_hand(study: RunStore, source: int, target: int) -> None:
    """The donor's is its own; a part is added at every step, from the donor's states of the same text."""
    import glottoscope as gs

    tokenizer, world, pair = gs.load_run(study.root).tokenizer, Context.open(study.root).world(), pair_of(study)
    shots = world_pairs(study, "dev", (0, 8))  # of two articles
    found = outputs(study, "en-ja" if source == 0 else "ja-en")
    conditions = plan_of(study)["texts"]["translation"]["conditions"]
    for p, sentence in enumerate(world_pairs(study, "test", range(3))):
        text = "".join(f"{x[source]} <sep> {x[target]} <sep> " for x in shots) + f"{sentence[source]} <sep>"
        prompt = [1, *tokenizer(text, add_special_tokens=False).input_ids]
        for key in (("baseline", None, None), ("donor", None, None), ("part", "mixed", None), ("self", "en", None),
                    ("state_replaced", None, None)):  # fmt: skip
            condition = next(c for c in conditions if (c["arm"], c["part"], c["draw"]) == key and c["chosen"])
            ids = list(prompt)
            while len(ids) < len(prompt) + 8:
                donor_TD = forward(pair.donor, ids)[1][1]
                change = pair.change(condition, chosen_features(study, condition), ids, donor_TD)
                new = int(forward(pair.donor if key[0] == "donor" else pair.base, ids, {1: change})[0][-1].argmax())
                if new in pair.special:
                    break
                ids.append(new)
            assert found[key][p] == world.text(np.array(ids[len(prompt) :], np.int64)), (key, p)


def planted_files(store: RunStore, folder: Path) -> dict[str, list[str]]:
    """Pairs 30 to 34 of the aligned test sentences in every format that is read; name -> files."""
    pairs = world_pairs(store, "test", range(30, 35))
    rows = [{"id": f"a{i // 2}.{i % 2}", "en": en, "ja": ja} for i, (en, ja) in enumerate(pairs)]
    write_jsonl(folder / "pairs.jsonl", rows)
    lines = ["id\ten\tja", *("\t".join(r.values()) for r in rows)]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    both = [{"input": en, "output": ja} for en, ja in pairs], [{"input": ja, "output": en} for en, ja in pairs]
    for place, samples in (("test", slice(0, 3)), ("train", slice(3, 5))):
        (folder / place).mkdir()
        for name, found in zip(("alt-e-to-j", "alt-j-to-e"), both, strict=True):
            content = {"instruction": "Translate.", "output_length": 20, "samples": found[samples]}
            (folder / place / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    content = {"instruction": "Translate.", "few_shots": both[0][4:], "samples": both[0][:3]}
    (folder / "wikicorpus-e-to-j.json").write_text(json.dumps(content), encoding="utf-8")
    return {
        "jsonl": ["pairs.jsonl"], "tsv": ["pairs.tsv"], "json": ["wikicorpus-e-to-j.json"],
        "two": ["test/alt-e-to-j.json", "test/alt-j-to-e.json"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "json", "two"])
def test_sentences_from_files(small: RunStore, tmp_path: Path, kind: str) -> None:
    names = planted_files(small, tmp_path)[kind]  # relative to the study file
    before = log_lines(small)
    store = intervened(small, tmp_path / "run", {**SMALL, "translation": {**SMALL["translation"], "draws": 0, "files": names}})
    ways = {"en-ja": 1} if kind == "json" else {"en-ja": 1, "ja-en": -1}
    assert {r["language"] for r in rows_of(store, text="translation")} == set(ways)
    assert work_done(store, before)["intervene"] == 2 + len(ways)  # losses stay
    # Examples: what the file brings, what lies beside it for training, else aligned dev sentences.
    shot = {"json": ("test", 34), "two": ("test", 33)}.get(kind, ("dev", 0))
    for task, (direction, way) in zip(tasks_of(Context.open(store.root), asked(store)[0]), ways.items(), strict=True):
        pairs = [p[::way] for p in world_pairs(small, "test", range(30, 33))]
        assert (f"{task.source}-{task.target}", task.pairs) == (direction, pairs)
        assert task.shots == [p[::way] for p in world_pairs(small, shot[0], [shot[1]])]
        texts = outputs(store, direction)["baseline", None, None]
        row = row_of(store, text="translation", arm="baseline", metric="chrf", language=direction)
        assert math.isclose(row["value"], sacrebleu.corpus_chrf(texts, [[p[1] for p in pairs]]).score, rel_tol=1e-9)
        assert row["n_units"] == (2 if shot[0] == "dev" else 3)  # samples of LLM-jp-eval name no article


def test_a_changed_file_is_translated_again(small: RunStore, tmp_path: Path) -> None:
    planted_files(small, tmp_path)
    settings = {**SMALL, "translation": {**SMALL["translation"], "draws": 0, "files": ["test/alt-e-to-j.json"]}}
    store = intervened(small, tmp_path / "run", settings)
    shutil.copy(tmp_path / "test" / "alt-j-to-e.json", tmp_path / "train" / "alt-e-to-j.json")  # other examples
    before = log_lines(store)
    intervened(small, tmp_path / "run", settings)
    assert work_done(store, before)["intervene"] == 3


def test_comet_scores_count_for_the_translations_they_were_made_of(copy: RunStore) -> None:
    """The scores are made up; that real ones are COMET's own is for the tests in tests/comet."""
    context, folder, (experiment,) = Context.open(copy.root), folder_of(copy), asked(copy)
    conditions = plan_of(copy)["texts"]["translation"]["conditions"]
    scored = [c for c, condition in enumerate(conditions) if condition["arm"] in ("baseline", "donor")]
    rows = [(d, c, p) for d in ("en-ja", "ja-en") for c in scored for p in range(3)]
    scores = [0.5 + 0.1 * p + 0.01 * c for _, c, p in rows]
    table = pa.table([*zip(*rows, strict=True), scores], names=["direction", "condition", "pair", "score"])
    pq.write_table(table, folder / "comet.parquet")
    about = {"key": comet_key(context, experiment, "f" * 64), "fingerprint": "f" * 64, "model": "wmt22"}
    (folder / "comet.json").write_text(json.dumps(about), encoding="utf-8")
    before = log_lines(copy)
    intervened(copy, copy.root, SMALL)
    assert work_done(copy, before).get("intervene", 0) == 0  # whole or half written: nothing says that they are complete
    copy.mark_done(folder, "comet", about["key"], {}, ["comet.parquet", "comet.json"])
    intervened(copy, copy.root, SMALL)
    assert work_done(copy, before)["intervene"] == 2  # effects and the table
    found = rows_of(copy, metric="comet")
    assert {(r["arm"], r["language"]) for r in found} == {(a, d) for a in ("baseline", "donor") for d in ("en-ja", "ja-en")}
    assert row_of(copy, metric="comet", arm="donor", language="en-ja")["value"] == pytest.approx(0.6 + 0.01 * scored[1])
    assert {r["signature"] for r in found} == {f"COMET|wmt22|{'f' * 64}"}
    # Other translations have no scores yet: none are shown, rather than those of the old ones.
    intervened(copy, copy.root, {**SMALL, "translation": {**SMALL["translation"], "pairs": 2}})
    assert rows_of(copy, metric="comet") == []


# ---- real text


@pytest.fixture(scope="module")
def text_interventions(text_run: RunStore, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    translation = {
        "pairs": 4, "draws": 0, "shots": 1, "max_new_tokens": 4, "shot": "{source} = {target}\n", "query": "{source} =",
        "stop": "\n",
    }  # fmt: skip
    settings = {**SMALL, "alphas": [0.5], "tokens": 400, "translation": translation}
    return intervened(text_run, tmp_path_factory.mktemp("iv") / "run", settings, raw=text_study(text_folder))


def test_real_text_with_aligned_sentences(text_interventions: RunStore) -> None:
    store = text_interventions
    found = {(r["text"], r["metric"], r["language"]) for r in rows_of(store)}
    losses = ("documents", "sentences", "dev_documents", "dev_sentences")
    assert found == {(t, m, x) for t in losses for m in ("nll", "ppl") for x in ("en", "ja", "all")} | {
        ("translation", m, d) for m in ("chrf", "bleu", "exact") for d in ("en-ja", "ja-en")
    }
    pair, ids = pair_of(store), documents(store, 400)[3]
    nll_SU, _ = measured(store, "documents")
    donor_TD = forward(pair.donor, ids)[1][1]
    for s, condition in enumerate(plan_of(store)["texts"]["documents"]["conditions"]):
        if condition["arm"] in ("baseline", "part", "self", "random"):
            change = pair.change(condition, chosen_features(store, condition), ids, donor_TD)
            assert math.isclose(nll_SU[s, 3], loss(forward(pair.base, ids, {1: change})[0], ids), rel_tol=1e-5), condition


def test_real_text_is_scored_with_the_tokenizer_of_its_language(text_interventions: RunStore, text_folder: Path) -> None:
    lines = (text_folder / "pairs.test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    for target, direction in (("ja", "en-ja"), ("en", "ja-en")):
        references = [json.loads(x)[target] for x in lines]
        texts = outputs(text_interventions, direction)["donor", None, None]
        row = row_of(text_interventions, text="translation", arm="donor", metric="bleu", language=direction)
        expected = BLEU(tokenize="ja-mecab" if target == "ja" else "13a", force=True).corpus_score(texts, [references]).score
        assert math.isclose(row["value"], expected, rel_tol=1e-9)
        assert any(texts)
        assert not any("\n" in x for x in texts)
        record = json.loads((folder_of(text_interventions) / "done.json").read_text(encoding="utf-8"))
        # The model's 24 positions have no room for an example.
        found = record[f"translation-{direction}-000"]["settings"]
        assert found["dropped_shots"] == 1
        assert found["signatures"]["bleu"] == row["signature"]


# ---- determinism and resume


def again(store: RunStore, settings: dict[str, Any] | None, **raw: Any) -> int:
    """Run the study with these interventions; returns how many units of the stage that took."""
    before = log_lines(store)
    run({**planted(**raw), **({} if settings is None else {"intervention": settings})}, store.root, until="intervene")
    return work_done(store, before)["intervene"]


def changed(store: RunStore, before: dict[str, tuple[int, str]]) -> set[str]:
    """Names of the files of the experiment that are there and were written again, without their folder."""
    return {Path(n).name for n, found in state(store.root, RESULTS).items() if before.get(n) != found}


EFFECTS = {"intervention.parquet", "intervention.csv", "experiment.json", "done.json"}
LOSSES = {"documents-000.npz", "sentences-000.npz"}
PLAN = {"plan.json", "sets.npz", "dev_documents.npz", "dev_sentences.npz"}
TRANSLATIONS = {f"translation-{d}-000.{x}" for d in ("en-ja", "ja-en") for x in ("npz", "parquet")}


def test_a_complete_stage_is_not_run_again(copy: RunStore) -> None:
    before = state(copy.root, RESULTS)
    assert again(copy, SMALL) == 0
    assert state(copy.root, RESULTS) == before


@pytest.mark.parametrize(
    ("changes", "units", "files"),
    [
        ({"bootstrap": 30}, 2, EFFECTS),
        ({"alphas": [1.0, 0.25]}, 7, EFFECTS | PLAN | LOSSES | TRANSLATIONS),
        ({"translation": {**SMALL["translation"], "pairs": 2}}, 4, EFFECTS | TRANSLATIONS),
        ({"texts": ["documents"]}, 2, EFFECTS),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_changed_settings_redo_only_what_depends_on_them(
    copy: RunStore, tiny: RunStore, tmp_path: Path, changes: dict[str, Any], units: int, files: set[str]
) -> None:
    before = state(copy.root, RESULTS)
    assert again(copy, {**SMALL, **changes}) == units
    assert changed(copy, before) <= files
    assert "intervention.parquet" in changed(copy, before)
    if "bootstrap" in changes:  # the table is what one run with these settings would have given
        fresh = intervened(tiny, tmp_path / "fresh", {**SMALL, **changes})
        assert contents(copy.root, ("tables/intervention.*",)) == contents(fresh.root, ("tables/intervention.*",))
    else:
        assert len(rows_of(copy)) > 100


def test_texts_and_translations_are_added_to_what_is_there(copy: RunStore, tiny: RunStore, tmp_path: Path) -> None:
    store = intervened(tiny, tmp_path / "grown", {k: v for k, v in SMALL.items() if k != "translation"} | {"texts": ["documents"]})
    assert {r["text"] for r in rows_of(store)} == {"documents", "dev_documents"}
    before = state(store.root, RESULTS)
    assert again(store, SMALL) == 5
    assert not changed(store, before) & (PLAN | {"documents-000.npz"})
    assert contents(store.root, RESULTS) == contents(copy.root, RESULTS)


def test_experiments_that_the_study_no_longer_asks_for_leave_the_table(tiny: RunStore, tmp_path: Path) -> None:
    store = intervened(tiny, tmp_path / "run", BRIEF)
    first = folder_of(store)
    assert again(store, {**BRIEF, "bases": [20]}) == 4
    assert {r["base_step"] for r in rows_of(store)} == {20}
    assert (first / "done.json").exists()
    planned = clean(store.root, dry_run=True)
    assert [path for path, _ in planned] == [first]
    assert again(store, BRIEF) == 1  # it lies there still: only the table is made again
    assert {r["base_step"] for r in rows_of(store)} == {0}
    (second,) = (path for path, _ in clean(store.root))
    assert "m@20+m@20" in str(second)
    assert not second.exists()
    assert again(store, BRIEF) == 0
    assert clean(store.root) == []


def test_other_saes_make_the_stage_anew(tiny: RunStore, tmp_path: Path) -> None:
    store = intervened(tiny, tmp_path / "run", BRIEF)
    before = rows_of(store)
    assert again(store, BRIEF, sae={"steps": 12}) == 4
    assert len(rows_of(store)) == len(before)
    assert rows_of(store) != before
    assert again(store, None, sae={"steps": 12}) == 1
    assert store.table("intervention").num_rows == 0  # the study asks for none
    assert store.table("intervention").column_names == list(columns_of("intervention", ("en", "ja")))


def test_status_tells_the_units_of_the_stage(tiny: RunStore, copy: RunStore, tmp_path: Path) -> None:
    def words(store: RunStore) -> str:
        return next(row.words for row in status(store.root) if row.stage == "intervene")

    assert words(tiny) == words(copy) == "done"
    shutil.copytree(tiny.root, tmp_path / "new")
    new = run({**PLANTED, "intervention": SMALL}, tmp_path / "new", until="score")
    assert words(new) == "1 units to do"  # what there is to measure is known when there is a plan
    (folder_of(copy) / "documents-000.npz").unlink()
    assert words(copy) == "1 units to do"


def test_the_same_experiment_named_twice_is_made_once(tiny: RunStore, tmp_path: Path) -> None:
    twice = {**BRIEF, "bases": [0, 0], "models": ["m", "m"], "parts": ["mixed", "all", "mixed"], "layers": [1, 1],
             "texts": ["documents", "documents"]}  # fmt: skip
    stores = [intervened(tiny, tmp_path / name, settings) for name, settings in (("twice", twice), ("once", BRIEF))]
    assert stores[0].table("intervention").equals(stores[1].table("intervention"))
    assert [work_done(s)["intervene"] for s in stores] == [4, 4]


def test_a_killed_stage_continues_to_the_same_bytes_whatever_the_workers(small: RunStore, tiny: RunStore, tmp_path: Path) -> None:
    raw, root = {**PLANTED, "intervention": SMALL}, tmp_path / "run"
    shutil.copytree(tiny.root, root)
    (tmp_path / "study.toml").write_text(tomli_w.dumps(raw), encoding="utf-8")
    arguments = ["run", tmp_path / "study.toml", "--out", root, "--until", "intervene", "--workers", "1"]
    returned, _ = stop_when(arguments, lambda: any(root.glob("interventions/**/*-000.npz")), signal.SIGKILL)
    assert returned == -signal.SIGKILL
    store = RunStore(root)
    record = json.loads((folder_of(store) / "done.json").read_text(encoding="utf-8"))
    complete = {name for stage in record.values() for name in stage["files"]}
    assert complete
    assert not store.table_path("intervention").exists()
    before = {n: x for n, x in state(root, RESULTS).items() if Path(n).name in complete}
    run(raw, root, until="intervene", workers=2)  # the run that this is compared with had one
    assert store.leftovers() == []
    found = contents(root, RESULTS)
    assert {"tables/intervention.parquet", "tables/intervention.csv"} < set(found)
    assert sum(name.endswith(".npz") for name in found) == 7
    assert found == contents(small.root, RESULTS)
    after = state(root, RESULTS)
    assert {n: after[n] for n in before} == before  # what was complete was not made again


# ---- bad input in the study file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bases": [7]}, "base: model m has no checkpoint of step 7; it has 0, 20"),
        ({"parts": ["mixd"]}, "part 'mixd' is unknown: choose from en, ja, mixed, bilingual, bilingual_paper, all"),
        ({"translation": {"drawn": ["mixd"]}}, "part 'mixd' is unknown"),
        ({"translation": {"drawn": ["all"]}}, "'all' has no random draws"),
        ({"features": {"en": [1]}}, "intervention.features.en: that is a language of the study"),
        ({"models": ["n"]}, "intervention.models: there is no model 'n'; there are m"),
        ({"layers": [2]}, "layer 2: there is no SAE of m there; the study has layers 0, 1"),
        ({"translation": {"files": ["none.jsonl"]}}, "none.jsonl: no such file"),
        ({"translation": {"shots": 100}}, "translation needs 100 examples and has 60"),
        ({"translation": {"query": "{sauce}"}}, "template query: unknown field {sauce}"),
        ({"translation": {"bleu_tokenize": "14a"}}, "BLEU has no tokenizer '14a'"),
        ({"features": {"few": [3, 32]}, "parts": ["few"]}, "features.few: feature 32 does not exist: the SAE has 32"),
        ({"features": {"few": [3]}, "parts": ["few"], "layers": [0, 1]}, "features.few: ids are those of one SAE"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_a_wrong_intervention_is_one_line_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        run({**PLANTED, "intervention": {**BRIEF, **changes}}, tmp_path / "run", until="pretrain")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_two_files_for_one_direction(small: RunStore, tmp_path: Path) -> None:
    planted_files(small, tmp_path)
    files = ["wikicorpus-e-to-j.json", "test/alt-e-to-j.json"]
    with pytest.raises(InputError, match=r"alt-e-to-j.json: there is another file with sentences from en to ja"):
        run({**PLANTED, "intervention": {**BRIEF, "translation": {"files": files, "shots": 1}}}, tmp_path / "run", until="pretrain")
    assert not (tmp_path / "run").exists()


def test_wrong_prompts_of_real_text_are_told_before_anything_is_made(text_folder: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"shots": 100}, "translation needs 100 examples and has 80"),
        ({"intro": "{instruction}"}, "template intro: {instruction} is used, but this data has no instruction"),
        ({"shot": "{source} = {target} is\n", "query": "{source} =", "stop": " is"}, "shot 1: its translation holds the stop"),
    ):
        with pytest.raises(InputError) as caught:
            raw = {**text_study(text_folder), "intervention": {**BRIEF, "translation": changes}}
            run(raw, tmp_path / "run", until="pretrain")
        assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_failed_intervention_leaves_the_report_and_what_could_be_finished(tiny: RunStore, tmp_path: Path) -> None:
    """The condition can only be read once there are features; the experiments of the other model are finished."""
    shutil.copytree(tiny.root, tmp_path / "run")
    wrong = {**BRIEF, "parts": ["mixed", "all", "odd"], "features": {"odd": "phy > 0.5"}}
    result = attempt({**PLANTED, "intervention": wrong}, tmp_path / "run", until="report")
    assert (result.exit_code, result.stage) == (2, "report")
    (failure,) = result.failures
    assert "features 'phy > 0.5' is no condition on the feature table" in failure.message
    store = RunStore(tmp_path / "run")
    assert (store.report_dir / "index.html").exists()
    # The step 20 is patched as well; its unit of the plan is made to fail alone by a folder in the place of its files.
    both = {**BRIEF, "bases": [0, 20]}
    first, second = (e.folder(Context.open(store.root)) for e in experiments(Context.open(store.root), as_config(both)))
    second.parent.mkdir(parents=True)
    second.write_text("in the way", encoding="utf-8")
    result = attempt({**PLANTED, "intervention": both}, store.root, until="report")
    assert result.exit_code == 1 and len(result.failures) == 1
    assert {r["base_step"] for r in rows_of(store)} == {0}
    assert "Base: step 0." in (store.report_dir / "index.html").read_text(encoding="utf-8")
    second.unlink()
    assert attempt({**PLANTED, "intervention": both}, store.root, until="report").exit_code == 0
    assert {r["base_step"] for r in rows_of(store)} == {0, 20}
    assert first.exists()


def test_a_half_that_cannot_be_told_leaves_the_report(tiny: RunStore, tmp_path: Path) -> None:
    """It is asked for by the driver itself, before there is any unit."""
    one = planted(models=planted_model(checkpoints=[20]))
    result = attempt({**one, "intervention": {**BRIEF, "bases": "half"}}, tmp_path / "run", until="report")
    assert (result.exit_code, len(result.failures)) == (2, 1)
    assert "its loss does not fall between two checkpoints: give intervention.bases" in result.failures[0].message
    assert (tmp_path / "run" / "report" / "index.html").exists()
