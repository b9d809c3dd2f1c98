"""Other families' models in the training model: transformers' weights, mapped by the table into megatron-core's GPTModel, give transformers' logits.

Models are made on the spot. Nothing here goes through files of ours: the table, the layouts and the sections read from config.json are what is tested,
and that the table has exactly the tensors, shapes and extra states that megatron-core's own `sharded_state_dict` names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories  # noqa: E402

from megatron_skywork import parallel  # noqa: E402
from megatron_skywork.checkpoint.content import LAYOUT_FREE  # noqa: E402
from megatron_skywork.config.schema import Config, Model, Moe  # noqa: E402
from megatron_skywork.convert import table  # noqa: E402
from megatron_skywork.convert.config_json import LLAMA3_ROPE, write_config  # noqa: E402
from megatron_skywork.convert.families import Description, choose_family, read_config, same_model  # noqa: E402
from megatron_skywork.model.build import build_chunks  # noqa: E402

REMOTE_CODE = Path(table.__file__).parent / "skywork_moe_hf"
TOKENS = torch.randint(0, 100, (24,), generator=torch.Generator().manual_seed(3))
# Long enough for positions to differ in the frequencies that Llama 3.1 scales.
MANY_TOKENS = torch.randint(0, 100, (500,), generator=torch.Generator().manual_seed(4))
BASE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "initializer_range": 0.2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 20}
SCALED = {"max_position_embeddings": 65536, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3_ROPE}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", {**SHARED, "norm_topk_prob": False}),
    "qwen2_moe mixed with dense layers": ("Qwen2MoeConfig", {**SHARED, "mlp_only_layers": [0], "num_experts_per_tok": 1}),
    "qwen2_moe renormalized, no bias": ("Qwen2MoeConfig", {**SHARED, "norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe every second layer": ("Qwen3MoeConfig", {**EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "llama 3.1": ("LlamaConfig", {"head_dim": 16, **SCALED}),
    "qwen2_moe scaled": ("Qwen2MoeConfig", {**SHARED, **SCALED}),
}
# What only the Skywork-MoE layout can hold: model, moe.
REMOTE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "normalized gate, plain probabilities, gated shared expert": (
        {}, {"topk": 3, "pre_softmax": True, "gate_norm_scale": 2.0, "shared_expert_ffn_hidden_size": 20, "shared_expert_gate": True}),
    "normalized gate, scaled positions, shared expert": (
        {"rope_scaling_factor": 8.0, "rope_theta": 500000.0, "max_position_embeddings": 65536, "qkv_bias": True, "tie_embeddings": True},
        {"topk": 2, "shared_expert_ffn_hidden_size": 20, "layers": [0, 2]}),
    "plain gate, plain probabilities": ({"qk_norm": True, "head_dim": 16}, {"topk": 2, "pre_softmax": True, "gate_norm": False, "ffn_hidden_size": 24}),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_rank", "remote_code_cache")


def training_model(described: Description, tensors: dict[str, torch.Tensor], length: int) -> Any:
    """GPTModel with these weights. Every tensor that it would save is filled from the table, and none of the table is left over."""
    settings = {"data": {"mock": True, "seq_length": length}, "train": {"steps": 1, "global_batch_size": 1, "precision": "fp32"}}
    parallel.seed_everything(1)
    (chunk,) = build_chunks(Config.model_validate({"model": described.model, "moe": described.moe, **settings}))
    weights = list(table.weights(described.model, described.moe, described.naming))
    ours = {weight.ours: weight.layout.forward([tensors[name] for name in weight.theirs]) for weight in weights}
    assert {name for weight in weights for name in weight.theirs} == set(tensors)
    content = chunk.sharded_state_dict(metadata=dict(LAYOUT_FREE))
    apply_factories(content)
    filled = set()
    for item in nested_values(content):
        if isinstance(item, ShardedTensor) and not item.key.endswith(table.OUR_STATE_SUFFIXES):
            assert tuple(item.global_shape) == ours[item.key].shape, item.key
            assert item.data is not None and item.data.dtype == torch.float32
            with torch.no_grad():
                item.data.copy_(ours[item.key][item.global_slice()].reshape(item.data.shape))
            filled.add(item.key)
    assert filled == set(ours)
    extra = {item.unique_key for item in nested_values(content) if isinstance(item, ShardedObject) and "_extra_state" in item.key}
    # Transformer Engine's attention has one as well, and its checkpoints and ours are to be the same.
    assert {key for key in table.extra_states(described.model, described.moe) if ".core_attention." not in key} == extra
    return chunk.eval()


def training_logits(described: Description, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    length = len(tokens)
    chunk = training_model(described, tensors, length)
    with torch.no_grad():
        return chunk(tokens[None], torch.arange(length)[None], None)[0, :, : described.model.vocab_size]


def their_logits(net: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(tokens[None]).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_the_training_model_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    torch.manual_seed(7)
    net = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**BASE, **changes})).to(torch.float32)
    for name, value in net.named_parameters():
        if "norm" in name or "bias" in name:  # at their initial values these would hide a mistake
            torch.nn.init.normal_(value, float("norm" in name), 0.3)
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    described = read_config(config)
    tokens = MANY_TOKENS if described.model.rope_scaling_factor else TOKENS
    expected = their_logits(net, tokens)
    torch.testing.assert_close(training_logits(described, load_file(tmp_path / "model.safetensors"), tokens), expected, atol=1e-4, rtol=0)

    # And out again: the config.json of our own making describes the same model to transformers.
    again = write_config(described.model, described.moe, choose_family(described.model, described.moe, described.family), "float32", described.token_ids)
    assert read_config(again).model == described.model and read_config(again).moe == described.moe and same_model(config, described.model, described.moe)
    (tmp_path / "config.json").write_text(json.dumps(again))
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(their_logits(reloaded, tokens), expected, atol=0, rtol=0)


@pytest.mark.parametrize("case", REMOTE)
def test_the_remote_code_computes_what_the_training_model_computes(case: str, tmp_path: Path) -> None:
    shape = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 100}
    model, moe = Model.model_validate({**shape, **REMOTE[case][0]}), Moe(num_experts=6, **REMOTE[case][1])
    described = Description("skywork_moe", model, moe)
    generator, tensors = torch.Generator().manual_seed(5), {}
    for weight in table.weights(model, moe):
        for name, size in zip(weight.theirs, weight.layout.parts, strict=True):
            tensors[name] = torch.randn(size, generator=generator) * 0.2 + float("norm" in name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = write_config(model, moe, "skywork_moe", "float32", {"bos_token_id": 1, "eos_token_id": 2})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in REMOTE_CODE.glob("*.py"):
        shutil.copyfile(file, tmp_path / file.name)
    net, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    tokens = MANY_TOKENS if model.rope_scaling_factor else TOKENS
    torch.testing.assert_close(training_logits(described, tensors, tokens), their_logits(net, tokens), atol=1e-4, rtol=0)

    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(*(net.generate(TOKENS[None], use_cache=use_cache, **words) for use_cache in (True, False)))
    net.save_pretrained(tmp_path / "saved")
    assert same_model(json.loads((tmp_path / "saved" / "config.json").read_text()), model, moe)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(tensors) and all(torch.equal(saved[name], tensors[name]) for name in saved)


def test_every_setting_of_the_cases_above_matters(tmp_path: Path) -> None:
    """Turned off in the training model, each changes the logits by far more than the tolerance: the comparisons above would see it."""
    for case, changes in (
        ("normalized gate, plain probabilities, gated shared expert", {"moe": {"pre_softmax": False}}),
        ("normalized gate, plain probabilities, gated shared expert", {"moe": {"shared_expert_gate": False}}),
        ("normalized gate, scaled positions, shared expert", {"model": {"rope_scaling_factor": None}}),
        ("normalized gate, scaled positions, shared expert", {"model": {"rope_scaling_factor": 32.0}}),
    ):
        shape = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 100}
        sections = [{**shape, **REMOTE[case][0]}, {"num_experts": 6, **REMOTE[case][1]}]
        logits = []
        for change in ({}, changes):
            model, moe = Model.model_validate({**sections[0], **change.get("model", {})}), Moe.model_validate({**sections[1], **change.get("moe", {})})
            tensors = {}
            for weight in table.weights(model, moe):
                for name, size in zip(weight.theirs, weight.layout.parts, strict=True):
                    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(name.encode()))
                    tensors[name] = torch.randn(size, generator=generator) * 0.2 + float("norm" in name)
            logits.append(training_logits(Description("skywork_moe", model, moe), tensors, MANY_TOKENS if "scaled" in case else TOKENS))
        assert float((logits[0] - logits[1]).abs().max()) > 1e-2, (case, changes)
