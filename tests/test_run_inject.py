"""`run.inject`, `run.load_lm` and `run.tokenizer`: a model of a run with features taken out, put in, or given by a donor.

Shapes: T positions, D d_model, N features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_fixture import BRIEF, intervened
from test_intervene_study import Pair, dense_codes, documents, features_of, forward, loss, measured, members, pair_of, plan_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

import glottoscope as gs
from glottoscope.errors import InputError
from glottoscope.study.run import Run
from glottoscope.study.store import RunStore

HERE: dict[str, Any] = {"model": "m", "step": 20, "layer": 1}


@pytest.fixture(scope="module")
def opened(tiny: RunStore) -> Run:
    return gs.load_run(tiny.root)


@pytest.fixture(scope="module")
def lm(opened: Run) -> PreTrainedModel:
    return opened.load_lm(model="m", step=20)


@pytest.fixture(scope="module")
def base(opened: Run) -> PreTrainedModel:
    return opened.load_lm(model="m", step=0)


@pytest.fixture(scope="module")
def pair(tiny: RunStore) -> Pair:
    return pair_of(tiny)


@pytest.fixture(scope="module")
def ids(tiny: RunStore) -> list[int]:
    return documents(tiny, 200)[0]


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([list(ids)])).logits[0]


# ---- models and tokenizer


def test_models_and_tokenizer_are_those_of_the_run(tiny: RunStore, opened: Run, lm: PreTrainedModel, ids: list[int]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny.checkpoint_dir("m", 20))
    assert torch.equal(logits_of(lm, ids), logits_of(plain, ids))
    assert not lm.training
    tokenizer = opened.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    text = tokenizer.decode(ids[1:])
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]
    assert AutoTokenizer.from_pretrained(tiny.tokenizer_dir).get_vocab() == tokenizer.get_vocab()


def test_a_model_that_is_not_there(opened: Run) -> None:
    with pytest.raises(InputError, match=r"no model 'm' of step 7; there are: m@0, m@20"):
        opened.load_lm(model="m", step=7)
    with pytest.raises(InputError, match="no model 'n' of step 0"):
        opened.load_lm(model="n", step=0)


# ---- what it does


@pytest.mark.parametrize(
    "change",
    [{"multiply": 1.0}, {"add": 0.0}, {"multiply": 0.0, "features": "density > 2 or feature = 0", "unused": True}],
    ids=["multiply-1", "add-0", "unused"],
)
def test_no_change_is_none_to_the_bit(opened: Run, lm: PreTrainedModel, pair: Pair, ids: list[int], change: dict[str, Any]) -> None:
    wanted = {"features": "all", **change}
    if wanted.pop("unused", False):  # a feature that is not active in this text
        active_N = (dense_codes(pair.donor_sae, forward(lm, ids)[1][1]) > 0).any(dim=0)
        wanted["features"] = [int((~active_N).nonzero()[0, 0])]
    before = logits_of(lm, ids)
    with opened.inject(lm, **HERE, **wanted) as edit:
        assert torch.equal(logits_of(lm, ids), before)
    assert edit.added == 0
    assert edit.positions == len(ids) - 1


@pytest.mark.parametrize("features", ["all", "mixed", "en", "density > 0.1", [1, 2, 3]], ids=str)
@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0])
def test_multiply_scales_the_sum_of_the_features(
    tiny: RunStore, opened: Run, lm: PreTrainedModel, pair: Pair, ids: list[int], features: Any, factor: float
) -> None:
    chosen_N = members(tiny, {"density > 0.1": "dense"}.get(features, features) if isinstance(features, str) else "few", 20)

    def change(h_TD: Tensor) -> Tensor:
        part_TD = (dense_codes(pair.donor_sae, h_TD) * chosen_N) @ pair.donor_sae.W_dec
        new_TD = h_TD + (factor - 1) * h_TD.norm(dim=-1, keepdim=True) * part_TD
        return torch.cat([h_TD[:1], new_TD[1:]])  # BOS stays

    expected, states = forward(lm, ids, {1: change})
    with opened.inject(lm, **HERE, features=features, multiply=factor) as edit:
        found = logits_of(lm, ids)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits_of(lm, ids), atol=1e-3)  # afterwards the model is as it was
    h_TD = states[1]
    moved = ((change(h_TD) - h_TD).norm(dim=-1) / h_TD.norm(dim=-1))[1:].mean()
    assert edit.added / edit.positions == pytest.approx(float(moved), rel=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_add_puts_the_directions_at_every_position(
    tiny: RunStore, opened: Run, lm: PreTrainedModel, ids: list[int], layer: int, strength: float
) -> None:
    sae, table = opened.sae(model="m", step=20, layer=layer), features_of(tiny, 20, layer)
    most_N = torch.tensor(table["max_activation"].to_numpy().copy())
    vector_D = sum((most_N[i] * sae.W_dec[i] for i in (4, 9)), torch.zeros(16))

    def change(h_TD: Tensor) -> Tensor:
        return torch.cat([h_TD[:1], (h_TD + strength * h_TD.norm(dim=-1, keepdim=True) * vector_D)[1:]])

    expected, _ = forward(lm, ids, {layer: change})
    with opened.inject(lm, model="m", step=20, layer=layer, features=[4, 9], add=strength):
        found = logits_of(lm, ids)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits_of(lm, ids), atol=1e-3)


@pytest.mark.parametrize(("mode", "scale"), [("add", "matched"), ("add", "raw"), ("replace", "matched")])
def test_a_donor_gives_what_the_stage_gives(
    tiny: RunStore, tmp_path: Path, opened: Run, base: PreTrainedModel, lm: PreTrainedModel, mode: Any, scale: Any
) -> None:
    store = intervened(tiny, tmp_path / "run", {**BRIEF, "mode": mode, "scale": scale, "alphas": [0.6], "parts": ["mixed"]})
    conditions = plan_of(store)["texts"]["documents"]["conditions"]
    (s,) = (i for i, c in enumerate(conditions) if c["arm"] == "part")
    nll_SU, _ = measured(store, "documents")
    for u, ids in enumerate(documents(store, BRIEF["tokens"])):
        with opened.inject(base, **HERE, features="mixed", donor=lm, alpha=0.6, mode=mode, scale=scale):
            assert loss(logits_of(base, ids), ids) == pytest.approx(nll_SU[s, u], rel=1e-5)


def test_positions_left_out_stay_as_they_are(opened: Run, lm: PreTrainedModel, ids: list[int]) -> None:
    """Padding on either side and the texts beside it change nothing."""
    short = ids[:9]
    rows = torch.tensor([[*([0] * (len(ids) - 9)), *short], ids])
    mask = torch.tensor([[0] * (len(ids) - 9) + [1] * 9, [1] * len(ids)])
    with opened.inject(lm, **HERE, features="mixed", multiply=0.0) as edit, torch.no_grad():
        alone = logits_of(lm, short)
        counted = edit.positions
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        together = lm(input_ids=rows, attention_mask=mask, position_ids=places).logits
    assert torch.allclose(together[0, -9:], alone, atol=1e-5)
    assert (counted, edit.positions) == (8, 8 + 8 + len(ids) - 1)


def greedy(model: PreTrainedModel, ids: Sequence[int], changes: Any, n: int = 8) -> list[int]:
    """The most likely next token n times, each from a whole pass by hand."""
    found = list(ids)
    for _ in range(n):
        found.append(int(forward(model, found, changes(found))[0][-1].argmax()))
    return found


@pytest.mark.parametrize("kind", ["multiply", "add", "donor", "own donor"])
def test_it_works_while_text_is_written(
    tiny: RunStore, opened: Run, base: PreTrainedModel, lm: PreTrainedModel, pair: Pair, ids: list[int], kind: str
) -> None:
    features_N, sae = members(tiny, "mixed", 20), pair.donor_sae
    most_N = torch.tensor(features_of(tiny, 20)["max_activation"].to_numpy().copy())
    model, donor = (base, lm) if kind == "donor" else (lm, lm)

    def changes(text: Sequence[int]) -> dict[int, Any]:
        donor_TD = forward(donor, text)[1][1]
        special = torch.tensor([i in pair.special for i in text])[:, None]

        def change(h_TD: Tensor) -> Tensor:
            source_TD = donor_TD if "donor" in kind else h_TD
            part_TD = (dense_codes(sae, source_TD) * features_N) @ sae.W_dec
            if kind == "add":
                part_TD = ((most_N * features_N) @ sae.W_dec).expand_as(h_TD)
            alpha = {"multiply": -4.0, "add": 0.3}.get(kind, 0.8)
            return torch.where(special, h_TD, h_TD + alpha * h_TD.norm(dim=-1, keepdim=True) * part_TD)

        return {1: change}

    how: dict[str, Any] = {"multiply": {"multiply": -3.0}, "add": {"add": 0.3}}.get(kind, {"donor": donor, "alpha": 0.8})
    prompt = torch.tensor([ids[:6]])
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with opened.inject(model, **HERE, features="mixed", **how):
        found = [model.generate(prompt, use_cache=cached, **settings)[0].tolist() for cached in (True, False)]  # pyright: ignore[reportCallIssue]
    expected = greedy(model, ids[:6], changes)
    assert found == [expected, expected]
    assert expected != greedy(model, ids[:6], lambda _text: {})
    assert model.generate(prompt, **settings)[0].tolist() == greedy(model, ids[:6], lambda _text: {})  # pyright: ignore[reportCallIssue]


def test_an_error_inside_the_block_leaves_the_model_as_it_was(opened: Run, lm: PreTrainedModel, ids: list[int]) -> None:
    before = logits_of(lm, ids)
    with pytest.raises(ZeroDivisionError), opened.inject(lm, **HERE, features="all", multiply=0.0):
        raise ZeroDivisionError
    assert torch.equal(logits_of(lm, ids), before)


def test_two_changes_at_once(tiny: RunStore, opened: Run, lm: PreTrainedModel, ids: list[int]) -> None:
    """Blocks inside each other, at two layers."""
    saes = [opened.sae(model="m", step=20, layer=layer) for layer in (0, 1)]
    most = float(features_of(tiny, 20)["max_activation"][4].as_py())

    def remove(h_TD: Tensor) -> Tensor:
        part_TD = dense_codes(saes[0], h_TD)[:, [2, 3]] @ saes[0].W_dec[[2, 3]]
        return torch.cat([h_TD[:1], (h_TD - h_TD.norm(dim=-1, keepdim=True) * part_TD)[1:]])

    def add(h_TD: Tensor) -> Tensor:
        return torch.cat([h_TD[:1], (h_TD + h_TD.norm(dim=-1, keepdim=True) * 0.2 * most * saes[1].W_dec[4])[1:]])

    with opened.inject(lm, **HERE, features=[4], add=0.2), opened.inject(lm, **{**HERE, "layer": 0}, features=[2, 3], multiply=0.0):
        found = logits_of(lm, ids)
    assert torch.allclose(found, forward(lm, ids, {0: remove, 1: add})[0], atol=1e-5)
    assert not torch.allclose(found, forward(lm, ids, {1: add})[0], atol=1e-3)


# ---- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give exactly one of multiply, add and donor"),
        ({"multiply": 0.0, "add": 1.0}, "give exactly one of multiply, add and donor"),
        ({"multiply": float("nan")}, "multiply = nan: give a finite number"),
        ({"add": float("inf")}, "add = inf: give a finite number"),
        ({"multiply": 0.0, "features": [3, 32]}, "feature 32 does not exist: the SAE has 32, numbered from 0"),
        ({"multiply": 0.0, "features": [-1]}, "feature -1 does not exist"),
        ({"multiply": 0.0, "features": []}, "name no feature of m, step 20, layer 1"),
        (
            {"multiply": 0.0, "features": [1.5]},
            "features [1.5]: give a list of ids (whole numbers), a class, or a condition in SQL",
        ),
        ({"multiply": 0.0, "features": 3}, "features 3: give a list of ids"),
        ({"multiply": 0.0, "mode": "foo"}, "mode = 'foo': choose one of add, replace"),
        ({"add": 0.5, "scale": "bar"}, "scale = 'bar': choose one of matched, raw"),
        ({"multiply": 0.0, "features": "density > 2"}, "name no feature of m, step 20, layer 1"),
        ({"multiply": 0.0, "features": "mixd"}, "'mixd' is no condition on the feature table"),
        ({"multiply": 0.0, "step": 7}, "no SAE for model 'm', step 7, layer 1, seed 0; there are: m@0/layer_00/seed_0"),
        ({"multiply": 0.0, "layer": 3}, "no SAE for model 'm', step 20, layer 3"),
        ({"multiply": 0.0, "seed": 3}, "no SAE for model 'm', step 20, layer 1, seed 3"),
    ],
)
def test_bad_arguments(opened: Run, lm: PreTrainedModel, changes: dict[str, Any], words: str) -> None:
    arguments = {**HERE, "features": "all", **changes}
    with pytest.raises(InputError) as caught, opened.inject(lm, **arguments):
        pass
    assert words in str(caught.value)


def test_bad_donors(opened: Run, lm: PreTrainedModel, base: PreTrainedModel) -> None:
    def other(**sizes: int) -> PreTrainedModel:
        settings = {"hidden_size": 16, "vocab_size": lm.config.vocab_size, "num_hidden_layers": 2, **sizes}
        return AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=2, intermediate_size=8, **settings))

    for donor, alpha, words in (
        (lm, float("nan"), "alpha = nan: give a finite number"),
        (other(hidden_size=32), 1.0, "base lm has width 16 and donor donor has width 32"),
        (other(vocab_size=90), 1.0, "has a vocabulary of"),
    ):
        with pytest.raises(InputError) as caught, opened.inject(base, **HERE, features="all", donor=donor, alpha=alpha):
            pass
        assert words in str(caught.value)
    with pytest.raises(InputError, match="the SAE reads states of width 16 and the model has width 32"):  # noqa: SIM117
        with opened.inject(other(hidden_size=32), **HERE, features="all", multiply=0.0):
            pass


def test_a_run_that_was_moved_can_still_be_steered(text_run: RunStore, tmp_path: Path) -> None:
    """Without the corpus: nothing of it is read."""
    shutil.copytree(text_run.root, tmp_path / "moved")
    study = (tmp_path / "moved" / "study.toml").read_text(encoding="utf-8")
    root = str(Path(text_run.root).parent)
    (tmp_path / "moved" / "study.toml").write_text(study.replace(root, "/nowhere"), encoding="utf-8")
    moved = gs.load_run(tmp_path / "moved")
    model, text = moved.load_lm(model="m", step=20), moved.tokenizer("the river is near the temple .", return_tensors="pt")
    before = model(**text).logits
    with torch.no_grad(), moved.inject(model, **HERE, features="all", multiply=0.0) as edit:
        assert not torch.allclose(model(**text).logits, before, atol=1e-3)
    special = json.loads((text_run.tokens_dir / "info.json").read_text(encoding="utf-8"))["special_ids"]
    assert edit.positions == int((~np.isin(text["input_ids"].numpy(), special)).sum())
