"""What a study amounts to before anything runs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_fixture import as_study, planted, planted_model, text_study

from glottoscope.errors import InputError
from glottoscope.lm.pretrain import LlamaShape, PretrainSettings, build_model
from glottoscope.study.config import Shape
from glottoscope.study.load import load_study, parse_study, preset_text
from glottoscope.study.plan import (
    Room,
    cells_of,
    cost_of,
    expand,
    layer_groups,
    mlp_width,
    seed_for,
    split_layers,
    step_of,
    summary,
    train_memory,
)

INFINITE = float("inf")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["preset", "example"])
def test_the_papers_grid_has_1572_setups(source: str, tmp_path: Path) -> None:
    if source == "preset":
        study = parse_study(preset_text("llm-jp-3"), name="preset", folder=tmp_path)
    else:
        study = load_study(Path(__file__).parents[1] / "examples" / "llm-jp-3.toml")
    rows = summary(study, INFINITE)
    costs = [cost for _, cost in rows if cost is not None]
    assert len(costs) == 5
    assert sum(c.setups for c in costs) == 1572
    assert sum(c.cells for c in costs) == 4 * 16 + 15
    assert [len(run.known_layers()) for run, _ in rows] == [12, 16, 20, 24, 28]
    assert all(run.known_layers()[0] == 1 for run, _ in rows)
    assert not list(tmp_path.iterdir())
    # Matched by tokens: every size ends at the same number of tokens.
    assert len({run.final.tokens_seen for run, _ in rows}) == 1


def test_controls_and_seeds_are_models_of_their_own() -> None:
    raw = planted(controls={"shuffled": True, "frozen_decoder": True}, models=planted_model(seeds=[0, 3]))
    runs = expand(as_study(raw))
    assert [(r.name, r.lm, r.control, r.lm_seed, len(r.checkpoints)) for r in runs] == [
        ("m", "m", "none", 0, 2),
        ("m-s3", "m-s3", "none", 3, 2),
        ("m-shuffled", "m", "shuffled", 0, 1),
        ("m-frozen_decoder", "m", "frozen_decoder", 0, 1),
        ("m-s3-shuffled", "m-s3", "shuffled", 3, 1),
        ("m-s3-frozen_decoder", "m-s3", "frozen_decoder", 3, 1),
    ]
    assert all(r.checkpoints[-1].step == 20 for r in runs)
    assert [c.name for c in cells_of(runs)][:2] == ["m@20", "m@0"]  # the final one first: it chooses learning rates
    assert runs[0].final.tokens_seen == 20 * 16 * 64


def test_names_made_from_seeds_may_not_collide() -> None:
    raw = planted(models=[*planted_model(seeds=[0, 1]), *planted_model(name="m-s1")])
    with pytest.raises(InputError, match="called m-s1"):
        expand(as_study(raw))


@pytest.mark.parametrize(("depth", "layers", "middle"), [(4, [0, 1, 2, 3, 4], 2), (4, [0, 4], 0), (5, "all", 2), (2, [1, 2], 1)])
def test_middle_layer(depth: int, layers: Any, middle: int) -> None:
    (run,) = expand(as_study(planted(layers=layers, models=planted_model(n_layers=depth))))
    assert run.middle_layer == middle


@pytest.mark.parametrize(
    ("name", "step"), [("iter_0000010", 10), ("step_10", 10), ("checkpoint-7", 7), ("llm-3_step2", 2), ("final", None)]
)
def test_step_of(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_checkpoints_of_a_glob(tmp_path: Path) -> None:
    for step in (100, 2, 30):
        (tmp_path / "w" / f"iter_{step:07d}").mkdir(parents=True)
    model = {"name": "lm", "source": "checkpoints", "root": str(tmp_path / "w"), "glob": "iter_*", "tokens_per_step": 8}
    raw = text_study(tmp_path, models=[model])
    del raw["corpus"]["tokenizer_training"]
    (run,) = expand(as_study(raw))
    assert [(c.step, c.tokens_seen) for c in run.checkpoints] == [(2, 16), (30, 240), (100, 800)]
    assert summary(as_study(raw), INFINITE)[0][1] is None  # no config.json: the size is not known
    raw["models"][0]["steps"] = [2, 5]
    with pytest.raises(InputError, match="no checkpoint of step 5"):
        expand(as_study(raw))
    raw["models"][0] |= {"glob": "ckpt_*", "steps": []}
    with pytest.raises(InputError, match="no folder named like iter_0000010"):
        expand(as_study(raw))


@pytest.mark.parametrize(
    "smaller,larger",
    [
        ({}, {"layers": [0, 1, 2]}),
        ({}, {"sae": {"steps": 20}}),
        ({}, {"sae": {"n": 64}}),
        ({}, {"sae": {"seeds": [0, 1]}}),
        ({}, {"sae": {"lr": [1e-3, 3e-3]}}),
        ({}, {"sae": {"lr": [1e-3, 3e-3], "lr_choice": "setup"}}),
        ({"sae": {"lr": [1e-3, 3e-3]}}, {"sae": {"lr": [1e-3, 3e-3], "lr_choice": "setup"}}),
        ({}, {"models": planted_model(checkpoints=[0, 10, 20])}),
        ({}, {"models": planted_model(d_model=32)}),
        ({}, {"sae": {"batch_tokens": 512}}),
    ],
)
def test_more_work_costs_more(smaller: dict[str, Any], larger: dict[str, Any]) -> None:
    def total(changes: dict[str, Any]) -> tuple[float, float, float]:
        study = as_study(planted(**changes))
        cost = cost_of(study, expand(study)[0], INFINITE)
        return cost.sae_flops, cost.lm_flops + cost.sae_flops, cost.disk

    less, more = total(smaller), total(larger)
    assert more[0] > less[0]
    assert more[1] > less[1]
    assert more[2] >= less[2]


@settings(max_examples=60, deadline=None)
@given(
    n_layers=st.integers(1, 28), d=st.sampled_from([64, 512, 2048]), gib=st.floats(0.5, 200), n_lr=st.integers(1, 4),
    n=st.sampled_from([1024, 32768]),
)  # fmt: skip
def test_layer_groups_fit_the_memory(n_layers: int, d: int, gib: float, n_lr: int, n: int) -> None:
    sae = {"n": n, "k": 32, "steps": 1000, "lr": [10.0 ** -(x + 2) for x in range(n_lr)], "buffer_tokens": 131_072}
    study, shape = as_study(planted(sae=sae)), Shape(n_layers=28, d_model=d, n_params=10**8, vocab_size=1000)
    layers, memory = list(range(1, n_layers + 1)), gib * 2**30
    one = train_memory(study, shape, 1)
    try:
        groups = layer_groups(study, shape, layers, memory)
    except InputError as error:
        assert "raise compute.memory_gb" in str(error)
        assert one > memory
        # One layer at a time where that much can be had.
        assert layer_groups(study, shape, layers, Room(memory, one)) == [(x,) for x in layers]
        return
    assert [x for g in groups for x in g] == layers
    assert all(train_memory(study, shape, len(g)) <= memory for g in groups)
    # No smaller number of groups would do.
    assert len(groups) == 1 or train_memory(study, shape, len(groups[0]) + 1) > memory


@given(n=st.integers(1, 40), parts=st.integers(1, 60))
def test_split_layers_are_all_of_them_in_order(n: int, parts: int) -> None:
    found = split_layers(range(n), parts)
    assert [x for part in found for x in part] == list(range(n))
    assert len(found) <= parts and max(map(len, found)) == -(-n // min(parts, n))


@pytest.mark.parametrize("d_model", [16, 32, 64, 100, 128])
def test_the_planned_model_is_the_one_that_is_trained(d_model: int) -> None:
    (run,) = expand(as_study(planted(models=planted_model(d_model=d_model, n_heads=2))))
    assert run.shape is not None
    shape = LlamaShape(d_model=d_model, n_layers=2, n_heads=2, vocab_size=run.shape.vocab_size, context_length=64)
    model = build_model(shape, PretrainSettings(steps=1, lr=1e-3, warmup_steps=0, batch_size=1, checkpoint_steps=(0,)))
    assert run.shape.n_params == sum(p.numel() for p in model.parameters())
    assert mlp_width(d_model) == model.config.intermediate_size


def test_seeds_are_drawn_by_purpose() -> None:
    study, other = as_study(planted()), as_study(planted(study={"seed": 1}))
    assert seed_for(study, "sae", 1, 0) == seed_for(study, "sae", 1, 0)
    found = {seed_for(s, *p) for s in (study, other) for p in (("sae", 1, 0), ("sae", 0, 1), ("stream",))}
    assert len(found) == 6
    assert all(0 <= x < 2**63 for x in found)
