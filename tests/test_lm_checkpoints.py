"""Checkpoints: loaded strictly, broken ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lm_capture import COMMON, CONFIGS
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from glottoscope.errors import InputError
from glottoscope.lm.checkpoints import (
    Checkpoint,
    choose_device,
    describe,
    fingerprint,
    load_lm,
    load_tokenizer,
    shuffle_weights,
)

WEIGHTS = "model.safetensors"


def make(config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    make(CONFIGS["llama"]).save_pretrained(tmp_path / "llama")
    return Checkpoint(str(tmp_path / "llama"), 10, 1000)


def change(checkpoint: Checkpoint, edit: Any) -> None:
    file = Path(checkpoint.path) / WEIGHTS
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(checkpoint: Checkpoint, **fields: Any) -> None:
    file = Path(checkpoint.path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("shards", [False, True])
def test_every_architecture_loads_as_saved(kind: str, shards: bool, tmp_path: Path) -> None:
    model = make(CONFIGS[kind])
    model.save_pretrained(tmp_path / kind, max_shard_size="4KB" if shards else "1GB")
    checkpoint = Checkpoint(str(tmp_path / kind), 0, 0)
    loaded = load_lm(checkpoint)
    assert not loaded.training and not loaded.config.use_cache
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    shape = describe(checkpoint)
    assert shape == describe(model)
    assert (shape.n_layers, shape.d_model, shape.vocab_size) == (3, 16, 50)
    assert shape.n_params == sum(p.numel() for p in model.parameters())


def test_tied_heads_are_not_missing(tmp_path: Path) -> None:
    make(LlamaConfig(**COMMON, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    model: Any = load_lm(Checkpoint(str(tmp_path / "tied"), 0, 0))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert describe(model) == describe(Checkpoint(str(tmp_path / "tied"), 0, 0))


def test_bfloat16(saved: Checkpoint) -> None:
    assert {p.dtype for p in load_lm(saved, dtype="bfloat16").parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="dtype 'int4'"):
        load_lm(saved, dtype="int4")


def test_missing_directory_and_files(saved: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint directory .*nowhere does not exist"):
        load_lm(Checkpoint(str(tmp_path / "nowhere"), 0, 0))
    (Path(saved.path) / WEIGHTS).unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_lm(saved)
    (Path(saved.path) / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_lm(saved)
    with pytest.raises(InputError, match=r"no config\.json"):
        describe(saved)


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"cannot load a language model from no-such-org/no-such-model"):
        load_lm(Checkpoint("no-such-org/no-such-model", 0, 0, "step10"), local_files_only=True)
    with pytest.raises(InputError, match="cannot load a tokenizer from no-such-org"):
        load_tokenizer("no-such-org/no-such-model", local_files_only=True)


@pytest.mark.parametrize("kept", [0, 5, 200, -100])
def test_truncated_weights_are_named(saved: Checkpoint, kept: int) -> None:
    file = Path(saved.path) / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"llama/model\.safetensors is truncated or corrupt"):
        load_lm(saved)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make(CONFIGS["llama"]).save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}"):
        load_lm(Checkpoint(str(tmp_path), 0, 0))


def test_an_index_of_the_other_format_needs_no_shards(tmp_path: Path) -> None:
    make(CONFIGS["llama"]).save_pretrained(tmp_path, max_shard_size="8KB")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    (tmp_path / "pytorch_model.bin.index.json").write_text(index.replace(".safetensors", ".bin"))
    assert load_lm(Checkpoint(str(tmp_path), 0, 0)).config.model_type == "llama"
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"lacks .*\.bin, which pytorch_model\.bin\.index\.json names"):
        load_lm(Checkpoint(str(tmp_path), 0, 0))


def test_tied_weights_stay_tied_without_their_files(tmp_path: Path) -> None:
    make(LlamaConfig(**COMMON, tie_word_embeddings=True)).save_pretrained(tmp_path)
    kept: Any = load_lm(Checkpoint(str(tmp_path), 0, 0))
    model: Any = load_lm(Checkpoint(str(tmp_path), 0, 0), files_stay=False)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for name, tensor in kept.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_weights_that_do_not_belong(saved: Checkpoint) -> None:
    change(saved, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        load_lm(saved)


def test_unexpected_weight(saved: Checkpoint) -> None:
    change(saved, lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}))
    with pytest.raises(InputError, match=r"unexpected the weight model\.layers\.7"):
        load_lm(saved)


def test_recomputed_tables_are_tolerated(saved: Checkpoint) -> None:
    change(saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    load_lm(saved)


def test_mis_shaped_weight(saved: Checkpoint) -> None:
    change(saved, lambda t: t.update({"lm_head.weight": torch.zeros(49, 16)}))
    with pytest.raises(InputError, match=r"lm_head\.weight has shape \(49, 16\), config\.json says \(50, 16\)"):
        load_lm(saved)


def test_config_of_another_model(saved: Checkpoint) -> None:
    change_config(saved, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"lacks the weight model\.layers\.3\.\S+ and 8 others"):
        load_lm(saved)
    change_config(saved, model_type="no_such_architecture")
    with pytest.raises(InputError, match="no_such_architecture"):
        load_lm(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weight(saved: Checkpoint, value: float) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.q_proj.weight"][3, 4] = value

    change(saved, edit)
    with pytest.raises(InputError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight holds NaN or Inf"):
        load_lm(saved)


def test_fingerprint(saved: Checkpoint) -> None:
    first = fingerprint(saved)
    assert first == fingerprint(saved) and len(first) == 64
    change(saved, lambda t: t["lm_head.weight"].add_(1e-3))
    second = fingerprint(saved)
    change_config(saved, rope_theta=5.0)
    assert len({first, second, fingerprint(saved)}) == 3
    assert fingerprint(Checkpoint("org/model", 1, 1)) != fingerprint(Checkpoint("org/model", 1, 1, "step1"))


def test_shuffled_weights_keep_their_entries() -> None:
    model, again = make(CONFIGS["llama"]), make(CONFIGS["llama"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    shuffle_weights(model, 1)
    shuffle_weights(again, 1)
    for (name, parameter), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
        assert parameter.ndim == 1 or not torch.equal(parameter, before[name])


def test_choose_device() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device() in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="choose auto, cpu, cuda or mps"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda:1' is not available"):
            choose_device("cuda:1")
