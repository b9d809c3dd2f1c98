"""config.json of every family: read into our sections and written back; what our model cannot honour is refused, all of it at once."""

from __future__ import annotations

import pytest

from megatron_skywork.config.schema import Moe
from megatron_skywork.convert.families import choose_family, read_config, write_config
from megatron_skywork.errors import CheckpointError

BASE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SKYWORK_MOE = {
    **BASE, "model_type": "skywork", "num_experts": [16], "moe_expert_interval": 1, "moe_use_skywork_gating": False, "moe_2layer_gate": False,
    "moe_use_logits_norm": True, "moe_gate_norm_std": 0.5, "moe_feature_no_mul_topk": True, "initializer_range": 0.01, "sliding_window": None,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_dense_round_trip(family: str):
    first = read_config({**BASE, "model_type": family})
    assert first.moe is None and (first.model.qkv_bias, first.model.qk_norm) == (family == "qwen2", family == "qwen3")
    again = read_config(write_config(first.model, None, choose_family(first.model, None, family), "bfloat16", first.token_ids))
    assert again.model.model_dump() == first.model.model_dump() and again.token_ids == {"bos_token_id": 1, "eos_token_id": 2}


def test_skywork_13b_is_a_llama_by_another_name():
    described = read_config({**BASE, "model_type": "skywork"})
    assert described.family == "skywork" and described.moe is None and choose_family(described.model, None) == "llama"


@pytest.mark.parametrize(
    "config", [SKYWORK_MOE, {**SKYWORK_MOE, "model_type": "skywork_moe"}, {**SKYWORK_MOE, "num_experts": 16, "moe_use_logits_norm": False}]
)
def test_skywork_moe_round_trip(config: dict):
    first = read_config(config)
    assert first.moe is not None and (first.moe.num_experts, first.moe.topk) == (16, 2)
    assert first.moe.gate_norm == config["moe_use_logits_norm"] and (not first.moe.gate_norm or first.moe.gate_norm_scale == 0.5)
    written = write_config(first.model, first.moe, choose_family(first.model, first.moe), "bfloat16")
    assert written["num_experts"] == [16] and written["architectures"] == ["SkyworkForCausalLM"] and written["initializer_range"] == 0.01
    again = read_config(written)
    assert again.model.model_dump() == first.model.model_dump()
    dump = first.moe.model_dump(), again.moe.model_dump()
    assert dump[0] == dump[1]


def test_mixed_layers_and_shared_expert_survive():
    described = read_config(SKYWORK_MOE)
    moe = Moe(num_experts=4, layers=[0, 2], shared_expert_ffn_hidden_size=32, ffn_hidden_size=48, gate_norm_unbiased=False)
    again = read_config(write_config(described.model, moe, "skywork_moe", "float32")).moe
    assert again is not None and again.model_dump() == moe.model_dump()


def test_mixtral_round_trip_and_its_limits():
    config = {**BASE, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    first = read_config(config)
    assert first.moe == Moe(num_experts=8, topk=2, gate_norm=False)
    again = read_config(write_config(first.model, first.moe, choose_family(first.model, first.moe, "mixtral"), "float32"))
    assert again.moe == first.moe and again.model.model_dump() == first.model.model_dump()
    with pytest.raises(CheckpointError) as refusal:
        choose_family(first.model, Moe(num_experts=8, layers=[0], shared_expert_ffn_hidden_size=8), "mixtral")
    assert all(word in str(refusal.value) for word in ("gate_norm", "dense", "shared"))
    with pytest.raises(CheckpointError, match="num_experts_per_tok"):
        read_config({**config, "num_experts_per_tok": 1})


def test_transformers_5_and_4_say_rope_differently():
    new = {key: value for key, value in BASE.items() if key != "rope_theta"} | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert read_config({**new, "model_type": "llama"}).model.rope_theta == 7.0
    assert read_config({**BASE, "rope_scaling": None, "model_type": "llama"}).model.rope_theta == 5000.0


def test_everything_that_cannot_be_honoured_is_listed():
    wrong = {
        "rope_scaling": {"rope_type": "llama3", "factor": 8},
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "quantization_config": {"bits": 4},
    }
    config = {**BASE, "model_type": "llama", **wrong}
    with pytest.raises(CheckpointError) as refusal:
        read_config(config)
    assert all(word in str(refusal.value) for word in ("llama3", "attention_bias", "mlp_bias", "hidden_act", "quantization_config"))
    with pytest.raises(CheckpointError) as refusal:
        read_config({**SKYWORK_MOE, "moe_use_skywork_gating": True, "moe_2layer_gate": True, "num_experts": [1, 16], "moe_expert_interval": 2})
    assert all(word in str(refusal.value) for word in ("moe_use_skywork_gating", "moe_2layer_gate", "num_experts", "moe_expert_interval"))


def test_missing_keys_and_unknown_types_are_named():
    with pytest.raises(CheckpointError) as refusal:
        read_config({"model_type": "mistral", "hidden_size": 64})
    assert all(key in str(refusal.value) for key in ("num_hidden_layers", "vocab_size", "num_key_value_heads", "rms_norm_eps", "rope_theta"))
    with pytest.raises(CheckpointError, match="gpt2.*supported are llama"):
        read_config({"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        read_config({**BASE, "model_type": "llama", "num_attention_heads": 5, "num_key_value_heads": 5})


def test_a_sliding_window_shortens_the_context_and_says_so():
    described = read_config({**BASE, "model_type": "mistral", "sliding_window": 128})
    assert described.model.max_position_embeddings == 128 and "sliding_window=128" in described.notes[0]
    unused = read_config({**BASE, "model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False})
    assert unused.model.max_position_embeddings == 512 and not unused.notes
