"""Parts put into another model's state: equal to a hand-written reference of one sequence, exact where nothing may change.

Shapes: B sequences, T positions, N features, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_lm_patch import BOS, PAD, SPECIAL, logits_of, model_of, rows_of
from torch import Tensor
from transformers import PreTrainedModel

from glottoscope.errors import InputError
from glottoscope.intervention.conditions import Arm, Condition, Readers, added_norm, edits_of
from glottoscope.intervention.parts import Injection, Kind, Mode, Reader, Scale, part_of
from glottoscope.lm.capture import capture
from glottoscope.lm.layers import decoder_blocks
from glottoscope.lm.patch import Donor, Step, patched
from glottoscope.sae.model import Normalization, TopKSAE

WIDTH, FEATURES, ACTIVE = 16, 40, 6
MEMBERS = frozenset(range(0, FEATURES, 3))
WEIGHT = torch.tensor([float(i in MEMBERS) for i in range(FEATURES)])


@cache
def sae_of(normalization: Normalization = "unit", dtype: torch.dtype = torch.float32, seed: int = 0, width: int = WIDTH) -> TopKSAE:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(FEATURES, width, generator=generator),
        "b_enc": 0.2 * torch.randn(FEATURES, generator=generator),
        "W_dec": torch.nn.functional.normalize(torch.randn(FEATURES, width, generator=generator), dim=1),
        "b_dec": 0.2 * torch.randn(width, generator=generator),
    }
    return TopKSAE.from_tensors({name: x.to(dtype) for name, x in tensors.items()}, ACTIVE, normalization=normalization)


# The reference: one sequence, no batch, a loop over positions


def part_by_hand(sae: TopKSAE, x_D: Tensor, members: frozenset[int]) -> Tensor:
    u = x_D / x_D.norm() if sae.normalization == "unit" else x_D
    z = torch.relu(sae.W_enc @ (u - sae.b_dec) + sae.b_enc)
    part = torch.zeros_like(u)
    for i in z.topk(sae.k).indices.tolist():
        if i in members:
            part += z[i] * sae.W_dec[i]
    return part


def change_by_hand(sae: TopKSAE, h_D: Tensor, d_D: Tensor, members: frozenset[int], alpha: float, mode: str, scale: str) -> Tensor:
    unit = sae.normalization == "unit"
    # An SAE of unit-norm states gives a part of a unit-norm state, one of raw states a part of the donor's state.
    of_norm = (1.0 if unit else d_D.norm()), (h_D.norm() if scale == "matched" else d_D.norm())
    addition = part_by_hand(sae, d_D, members) * of_norm[1] / of_norm[0]
    if mode == "replace":
        addition = addition - part_by_hand(sae, h_D, members) * (h_D.norm() if unit else 1.0)
    return h_D + alpha * addition


@torch.no_grad()
def forward(model: PreTrainedModel, ids_T: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Logits [T, V] of one plain pass in which every layer's state [T, D] is replaced by what `change` makes of it."""

    def output_hook(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return change(layer, output[0][0])[None], *output[1:]
            return change(layer, output[0])[None]

        return hook

    blocks = decoder_blocks(model)
    handles = [blocks[0].register_forward_pre_hook(lambda _module, args: (change(0, args[0][0])[None], *args[1:]))]
    handles += [block.register_forward_hook(output_hook(layer)) for layer, block in enumerate(blocks, start=1)]
    logits = model(input_ids=ids_T[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def reference(
    base: PreTrainedModel, donor: PreTrainedModel, ids_T: Tensor, layers: Sequence[int], sae: TopKSAE, members: frozenset[int],
    alpha: float, mode: str, scale: str,
) -> Tensor:  # fmt: skip
    theirs: dict[int, Tensor] = {}

    def read(layer: int, h_TD: Tensor) -> Tensor:
        theirs[layer] = h_TD.clone()
        return h_TD

    def write(layer: int, h_TD: Tensor) -> Tensor:
        h_TD = h_TD.clone()
        for t, token in enumerate(ids_T.tolist()):
            if layer in layers and token not in SPECIAL:
                h_TD[t] = change_by_hand(sae, h_TD[t], theirs[layer][t], members, alpha, mode, scale)
        return h_TD

    forward(donor, ids_T, read)
    return forward(base, ids_T, write)


LENGTHS = (7, 4, 6)


@cache
def texts(side: str) -> tuple[Tensor, Tensor]:
    ids, mask = rows_of(LENGTHS, side)
    ids[0, -3 if side == "left" else 4] = 2  # a special token within the text
    return ids, mask


def assert_is_reference(
    kind: str, dtype: torch.dtype, layers: Sequence[int], normalization: Normalization, mode: Mode, scale: Scale, tolerance: float
) -> None:
    base, donor, sae = model_of(kind, 0, dtype), model_of(kind, 1, dtype), sae_of(normalization, dtype)
    (ids, mask), alpha = texts("right"), 0.7
    rows = [ids[row, :n] for row, n in enumerate(LENGTHS)]
    expected = [reference(base, donor, row, layers, sae, MEMBERS, alpha, mode, scale) for row in rows]
    for side in ("right", "left"):
        ids, mask = texts(side)
        weight = WEIGHT.to(dtype)
        edits = {x: Injection(Reader(sae), x, "part", weight, alpha, mode, scale, Reader(sae)) for x in layers}
        with patched(base, edits, special_ids=SPECIAL, donor=Donor(donor, layers)):
            found = logits_of(base, ids, mask)
        for row, logits_TV in enumerate(expected):
            torch.testing.assert_close(found[row][mask[row].bool()], logits_TV, rtol=0, atol=tolerance)
        assert (found[0][-1] - logits_of(base, ids, mask)[0][-1]).abs().max() > 1e-2  # something was added


SETUPS: list[tuple[tuple[int, ...], Normalization]] = [((2,), "unit"), ((0, 2), "none"), ((3,), "unit"), ((0,), "unit")]
MODES: list[tuple[Mode, Scale]] = [("add", "matched"), ("add", "raw"), ("replace", "matched"), ("replace", "raw")]


@pytest.mark.parametrize("layers", [(0,), (1,), (3,), (1, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("normalization", ["unit", "none"])
@pytest.mark.parametrize(("mode", "scale"), MODES)
def test_the_reference_in_double_precision(mode: Mode, scale: Scale, normalization: Normalization, layers: tuple[int, ...]) -> None:
    assert_is_reference("llama", torch.float64, layers, normalization, mode, scale, 1e-9)


@pytest.mark.parametrize(("mode", "scale"), MODES)
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_the_reference_on_other_architectures(kind: str, mode: Mode, scale: Scale) -> None:
    for layers, normalization in SETUPS:
        assert_is_reference(kind, torch.float64, layers, normalization, mode, scale, 1e-9)


@pytest.mark.parametrize(("mode", "scale"), MODES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_the_reference_in_single_precision(kind: str, mode: Mode, scale: Scale) -> None:
    for layers, normalization in SETUPS:
        assert_is_reference(kind, torch.float32, layers, normalization, mode, scale, 1e-4)


def test_an_sae_in_single_precision_reads_a_model_in_another() -> None:
    """Arithmetic is the SAE's, the state stays the model's."""
    base, donor = model_of("llama", 0, torch.bfloat16), model_of("llama", 1, torch.bfloat16)
    ids, mask = texts("right")
    states = {m: capture(m, ids, mask, [2])[2] for m in (base, donor)}
    edit = Injection(Reader(sae_of()), 2, "part", WEIGHT, 0.5)
    counted = mask.bool()
    changed = edit(states[base], Step(ids, counted, {2: states[donor]}))
    assert changed.dtype == torch.bfloat16
    h, d = states[base][0, 1].float(), states[donor][0, 1].float()
    torch.testing.assert_close(changed[0, 1], change_by_hand(sae_of(), h, d, MEMBERS, 0.5, "add", "matched").bfloat16())


# The other kinds, on states alone


def states_of(seed: int = 0, shape: tuple[int, ...] = (2, 5, WIDTH)) -> Tensor:
    size = torch.rand(*shape[:-1], 1, generator=torch.Generator().manual_seed(seed + 100)) + 0.5
    return 3 * size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(**changed: Any) -> Step:
    """Two rows; the third position of the first and the last of the second are not counted."""
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[0, 2] = counted[1, 4] = False
    return Step(torch.full((2, 5), 7), counted, **{"donor": {1: states_of(1)}, **changed})


def everywhere(function: Callable[[Tensor, Tensor], Tensor], step: Step) -> Tensor:
    """`function(base's state, donor's state)` at every counted position, by a loop."""
    result = states_of()
    for b, t in step.counted_BT.nonzero().tolist():
        result[b, t] = function(result[b, t].clone(), step.donor[1][b, t])
    return result


ALL = frozenset(range(FEATURES))


@pytest.mark.parametrize("normalization", ["unit", "none"])
def test_every_kind_by_hand(normalization: Normalization) -> None:
    sae = sae_of(normalization, torch.float64)
    own = sae_of(normalization, torch.float64, seed=1)
    unit, weight = normalization == "unit", torch.randn(FEATURES, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def scaled(x: Tensor, h: Tensor, d: Tensor) -> Tensor:
        return x * h.norm() / (1 if unit else d.norm())

    expected: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
        "part": lambda h, d: h + 0.6 * scaled(part_by_hand(sae, d, ALL), h, d),
        "self": lambda h, _: h + 0.6 * scaled(part_by_hand(own, h, MEMBERS), h, h),
        "reconstruction": lambda h, d: scaled(part_by_hand(sae, d, ALL) + sae.b_dec, h, d),
        "state": lambda h, d: h + 0.6 * h.norm() * d / d.norm(),
        "state_replaced": lambda _, d: d,
        "identity": lambda h, _: h,
        "steer": lambda h, _: h + 0.6 * (h.norm() if unit else 1) * sum(weight[i] * sae.W_dec[i] for i in range(FEATURES)),
    }
    weights: dict[Kind, Tensor] = {"self": WEIGHT.double(), "steer": weight}
    for kind, function in expected.items():
        edit = Injection(Reader(own if kind == "self" else sae), 1, kind, weights.get(kind), 0.6)
        h, step = states_of(), step_of()
        found = edit(h, step)
        torch.testing.assert_close(found, everywhere(function, step), rtol=1e-10, atol=1e-10, msg=kind)
        assert torch.equal(found[~step.counted_BT], h[~step.counted_BT]) and torch.equal(h, states_of())
        # The added norm, by its definition.
        moved = [float((found[b, t] - h[b, t]).norm() / h[b, t].norm()) for b, t in step.counted_BT.nonzero().tolist()]
        assert edit.positions == len(moved) == 8 and edit.added == pytest.approx(sum(moved), abs=1e-12)
        assert added_norm([edit]) == pytest.approx(np.mean(moved), abs=1e-12)


def test_shuffled_takes_the_parts_of_the_places_named() -> None:
    sae, others = sae_of(dtype=torch.float64), states_of(5, (2, 3, WIDTH))
    source = torch.tensor([[2, 0, 0, 1, 2], [1, 1, 0, 2, 0]])
    step = step_of(donor={1: others}, source_BT=source)
    found = Injection(Reader(sae), 1, "shuffled", WEIGHT.double(), 0.6)(states_of(), step)
    expected = states_of()
    for b, t in step.counted_BT.nonzero().tolist():
        h, d = expected[b, t].clone(), others[b, source[b, t]]
        expected[b, t] = change_by_hand(sae, h, d, MEMBERS, 0.6, "add", "matched")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    raw = Injection(Reader(sae), 1, "shuffled", WEIGHT.double(), 0.6, "replace", "raw", Reader(sae))(states_of(), step)
    h, d = states_of()[0, 0], others[0, 2]
    torch.testing.assert_close(raw[0, 0], change_by_hand(sae, h, d, MEMBERS, 0.6, "replace", "raw"), rtol=1e-10, atol=1e-10)


def test_weights_scale_features() -> None:
    sae, x = sae_of(dtype=torch.float64), states_of()
    codes = Reader(sae).codes(x)
    weight = torch.linspace(-1, 1, FEATURES, dtype=torch.float64)
    single = [part_of(sae, codes, torch.eye(FEATURES, dtype=torch.float64)[i]) * weight[i] for i in range(FEATURES)]
    torch.testing.assert_close(part_of(sae, codes, weight), torch.stack(single).sum(0))
    torch.testing.assert_close(part_of(sae, codes, None) + sae.b_dec, sae.decode(codes.values_BTK, codes.indices_BTK))


# Where nothing may change


@pytest.mark.parametrize("kind", ["part", "self", "shuffled", "state", "steer"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_alpha_0_changes_no_bit(model: str, kind: Kind) -> None:
    base, (ids, mask) = model_of(model), texts("left")
    for mode in ("add", "replace"):
        edits = {x: Injection(Reader(sae_of()), x, kind, WEIGHT, 0.0, mode, "matched", Reader(sae_of())) for x in (0, 2, 3)}
        with patched(base, edits, special_ids=SPECIAL, donor=Donor(model_of(model, 1), [0, 2, 3])):
            found = logits_of(base, ids, mask)
        assert torch.equal(found, logits_of(base, ids, mask))
        assert added_norm(list(edits.values())) == 0.0 and edits[2].positions == 13


UNCHANGED: list[tuple[Kind, Mode, Scale]] = [
    ("identity", "add", "matched"), ("part", "replace", "matched"), ("part", "replace", "raw"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("normalization", ["unit", "none"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_must_change_nothing(model: str, normalization: Normalization, dtype: torch.dtype, tolerance: float) -> None:
    """The state taken apart and put together with its error, and parts replaced by the same model's."""
    base, sae, (ids, mask) = model_of(model, 0, dtype), sae_of(normalization, dtype), texts("right")
    layers = (0, 2, 3)
    plain = logits_of(base, ids, mask)[mask.bool()]
    for kind, mode, scale in UNCHANGED:
        weight = None if kind == "identity" else WEIGHT.to(dtype)
        edits = {x: Injection(Reader(sae), x, kind, weight, 1.0, mode, scale, Reader(sae)) for x in layers}
        with patched(base, edits, special_ids=SPECIAL, donor=Donor(base, layers)):
            found = logits_of(base, ids, mask)[mask.bool()]
        torch.testing.assert_close(found, plain, rtol=0, atol=tolerance)
        assert all(edit.added / edit.positions < tolerance for edit in edits.values())


@pytest.mark.parametrize("kind", ["part", "self", "reconstruction", "state", "state_replaced", "steer"])
def test_special_tokens_and_padding_stay_as_they_were(kind: Kind) -> None:
    base, donor = model_of("llama"), model_of("llama", 1)
    ids, mask = texts("left")
    kept = (ids == PAD) | (ids == BOS) | (ids == 2)
    assert kept.sum() == 4 + 3 + 1
    states: list[tuple[Tensor, Tensor]] = []
    injection = Injection(Reader(sae_of()), 2, kind, torch.ones(FEATURES), 0.7)

    def edit(h_BTD: Tensor, step: Step) -> Tensor:
        states.append((h_BTD.clone(), injection(h_BTD, step)))
        return states[-1][1]

    with patched(base, {2: edit}, special_ids=SPECIAL, donor=Donor(donor, [2])):
        logits_of(base, ids, mask)
    before, after = states[0]
    assert torch.equal(after[kept], before[kept])
    assert bool((after[~kept] != before[~kept]).any(dim=-1).all())


def test_states_of_zeros_stay_finite() -> None:
    """A padding token's embedding is a row of zeros: it has no direction, and no part of it may be infinite."""
    for normalization in ("unit", "none"):
        sae = sae_of(normalization, torch.float64)
        for kind in ("part", "self", "reconstruction", "state", "identity", "steer"):
            h, step = states_of(), step_of()
            h[0, 0] = 0
            step.donor[1][0, 0] = step.donor[1][1, 1] = 0  # type: ignore[index]
            edit = Injection(Reader(sae), 1, kind, WEIGHT.double(), 0.5)
            assert bool(edit(h, step).isfinite().all()), (normalization, kind)
            assert np.isfinite(edit.added)


@pytest.mark.filterwarnings("error")
def test_a_pass_with_gradients() -> None:
    """A notebook seldom says no_grad: the same logits, a gradient through them, and no warning."""
    base, donor, (ids, mask) = model_of("llama"), model_of("llama", 1), texts("right")
    found = []
    for gradients in (False, True):
        edit = Injection(Reader(sae_of()), 2, "part", WEIGHT, 0.7, "replace", own=Reader(sae_of()))
        with patched(base, {2: edit}, special_ids=SPECIAL, donor=Donor(donor, [2])), torch.set_grad_enabled(gradients):
            logits = base(input_ids=ids, attention_mask=mask).logits
        found.append((logits, edit.added))
        assert logits.requires_grad == gradients
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] > 0
    weight = base.get_input_embeddings().weight
    assert torch.autograd.grad(found[1][0].sum(), weight)[0].abs().sum() > 0  # type: ignore[arg-type]


# Readers and conditions


def test_a_reader_remembers_one_tensor_and_never_takes_another_for_it() -> None:
    sae = sae_of(dtype=torch.float64)
    reader, x = Reader(sae), states_of()
    first = reader.codes(x)
    assert reader.codes(x) is first
    equal = reader.codes(x.clone())  # the same numbers in another tensor: read again
    assert equal is not first and torch.equal(equal.values_BTK, first.values_BTK)
    for seed in range(20):  # the tensor before is gone, and its address may be taken again
        found = reader.codes(states_of(seed))
        fresh = Reader(sae).codes(states_of(seed))
        assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))
    y = states_of(3)
    for view in (y, y[:1], y.view(1, 10, WIDTH), y.flip(1)):
        assert all(torch.equal(a, b) for a, b in zip(reader.codes(view), Reader(sae).codes(view), strict=True))
    y.mul_(-1)  # written to in place: the codes of before are another tensor's
    reader.codes(y)
    y.mul_(-1)
    assert torch.equal(reader.codes(y).indices_BTK, Reader(sae).codes(y).indices_BTK)
    with torch.inference_mode():  # where tensors do not count what was written to them
        z = states_of(4)
        reader.codes(z)
        z.mul_(-1)
        assert torch.equal(reader.codes(z).indices_BTK, Reader(sae).codes(z).indices_BTK)


def test_an_sae_of_another_width_says_so() -> None:
    wide = sae_of(width=24)
    ids, mask = texts("right")
    message = "the SAE reads states of width 24, the model's have width 16"
    for kind in ("part", "self", "reconstruction", "state", "identity", "steer"):
        with (
            patched(model_of("llama"), {2: Injection(Reader(wide), 2, kind, WEIGHT)}, donor=Donor(model_of("llama", 1), [2])),
            pytest.raises(InputError, match=message),
        ):
            logits_of(model_of("llama"), ids, mask)


def test_a_part_without_a_donor_says_so() -> None:
    ids, mask = texts("right")
    message = "part at layer 2 takes the donor's state and there is no donor that reads it"
    for donor in (None, Donor(model_of("llama", 1), [1])):
        with (
            patched(model_of("llama"), {2: Injection(Reader(sae_of()), 2, "part", WEIGHT)}, donor=donor),
            pytest.raises(InputError, match=message),
        ):
            logits_of(model_of("llama"), ids, mask)


def test_edits_of_conditions() -> None:
    donor, base = sae_of(), sae_of(seed=1)
    readers = {layer: Readers.of(donor, base) for layer in (1, 2)}
    sets = {layer: {"mixed": WEIGHT.bool().numpy(), "none": np.zeros(FEATURES, bool)} for layer in (1, 2)}
    assert edits_of(Condition("baseline"), readers, sets, "add", "matched") == {}
    assert edits_of(Condition("donor"), readers, sets, "add", "matched") == {}
    edits = edits_of(Condition("part", "mixed", alpha=0.4, features="mixed"), readers, sets, "replace", "raw")
    assert list(edits) == [1, 2]
    for layer, edit in edits.items():
        assert (edit.layer, edit.kind, edit.alpha, edit.mode, edit.scale) == (layer, "part", 0.4, "replace", "raw")
        assert edit.reader.sae is donor and edit.own is not None and edit.own.sae is donor and edit.own is not edit.reader
        assert edit.weight_N is not None and torch.equal(edit.weight_N, WEIGHT)
    arms: list[tuple[Arm, Kind, TopKSAE]] = [
        ("random", "part", donor), ("random_other", "part", donor), ("shuffled", "shuffled", donor), ("self", "self", base),
        ("identity", "identity", base), ("reconstruction", "reconstruction", donor), ("state_replaced", "state_replaced", donor),
    ]  # fmt: skip
    for arm, kind, reads in arms:
        edit = edits_of(Condition(arm, alpha=0.4), readers, sets, "replace", "matched")[1]
        assert (edit.kind, edit.reader.sae, edit.weight_N) == (kind, reads, None)
        assert edit.mode == ("add" if arm == "self" else "replace")
    assert edits_of(Condition("state_replaced"), readers, sets, "add", "matched")[1].alpha == 1.0


def test_the_added_norm_is_the_mean_over_all_positions_and_layers() -> None:
    assert added_norm([]) is None
    reader = Reader(sae_of())
    assert added_norm([Injection(reader, 1)]) is None
    assert added_norm([Injection(reader, 1, added=3.0, positions=4), Injection(reader, 2, added=1.0, positions=1)]) == 0.8
