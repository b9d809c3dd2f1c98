"""The `megatron:` section against the dataclasses of whichever megatron-core is installed."""

import dataclasses

import pytest

from megatron_skywork.config.megatron_fields import (
    DECIDED_ELSEWHERE,
    FIXED,
    NOT_HERE,
    annotation_words,
    is_free,
    megatron_enums,
    megatron_fields,
    megatron_problems,
    python_values,
)
from megatron_skywork.config.schema import Config


@pytest.mark.parametrize(("given", "expected"), [
    ({"window_sise": [1, 1]}, "megatron.window_sise=[1, 1]: megatron-core's TransformerConfig has no such field; did you mean megatron.window_size?"),
    ({"hidden_sise": 1}, "did you mean model.hidden_size?"),
    ({"qqqqqqqqqq": 1}, "its fields are listed in"),
    ({"hidden_size": 1}, "megatron.hidden_size=1: set model.hidden_size instead"),
    ({"expert_tensor_parallel_size": 2}, "set parallel.etp instead"),
    ({"bf16": True}, "set train.precision instead"),
    ({"normalization": "LayerNorm"}, "every model here has RMSNorm"),
    ({"calculate_per_token_loss": False}, "every model here has true (the loss"),
    ({"init_method": "x"}, "takes a Python object"),
    ({"softmax_scale": "x"}, 'megatron.softmax_scale="x": this must be a number or null'),
    ({"softmax_scale": True}, "this must be a number or null"),
    ({"softmax_scale": float("inf")}, "this must be a number or null"),
    ({"deterministic_mode": 1}, "this must be true or false"),
    ({"wgrad_deferral_limit": 1.5}, "this must be a whole number"),
    ({"softmax_type": "off"}, "this must be one of vanilla, off-by-one, learnable"),
    ({"window_size": [1]}, "this must be a list of 2, each item a whole number or null"),
    ({"attention_backend": "flsh"}, "this must be one of flash, fused, unfused, local, auto"),
    ({"_cpu_offloading_context": 1}, "no such field"),
])
def test_what_is_refused(given, expected):
    problems = list(megatron_problems(given))
    assert len(problems) == 1 and expected in problems[0], problems


def test_what_passes():
    fine = {"softmax_scale": 1, "window_size": [8, 0], "deterministic_mode": True, "softmax_type": "off-by-one", "attention_backend": "flash",
            "moe_router_num_groups": None, "cp_comm_type": ["p2p", "a2a"], "moe_input_jitter_eps": None, "wgrad_deferral_limit": 2, "no_rope_freq": 4}
    assert list(megatron_problems(fine)) == []


def test_values_get_the_types_of_the_dataclass():
    from megatron.core.transformer import enums

    given = {"attention_backend": "local", "window_size": [8, 0], "softmax_scale": None, "cp_comm_type": ["p2p", "a2a"], "no_rope_freq": [0, 1]}
    assert python_values(given, enums) == {
        "attention_backend": enums.AttnBackend.local, "window_size": (8, 0), "softmax_scale": None, "cp_comm_type": ["p2p", "a2a"], "no_rope_freq": [0, 1]}


def test_all_problems_at_once():
    assert len(list(megatron_problems({"hidden_size": 1, "nonsense_here": 2, "softmax_scale": "x", "window_size": None}))) == 3


def test_the_names_are_those_of_the_real_dataclass():
    """What was read from source text equals what Python sees after importing it."""
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    real = {field.name for field in dataclasses.fields(TransformerConfig) if not field.name.startswith("_")}
    assert set(megatron_fields()) == real
    assert megatron_enums()["AttnBackend"] == [member.name for member in AttnBackend]
    # The table of decided fields must follow both supported versions: an entry that exists in neither would be a typo here.
    assert len([name for name in {**DECIDED_ELSEWHERE, **FIXED} if name not in real]) <= 3
    gone, new = {"moe_use_legacy_grouped_gemm"}, {name for name in NOT_HERE if name.startswith(("moe_paged", "moe_ncclep", "moe_hybridep", "moe_flex"))}
    new |= {"moe_permute_fusion_into_hybridep", "moe_router_quantile_balancing_ema", "moe_expert_rank_capacity_factor"}
    new |= {"moe_pad_experts_for_cuda_graph_inference", "moe_single_grouped_weight", "moe_single_grouped_bias"}
    assert set(NOT_HERE) - real <= (gone if "moe_paged_stash" in real else new)
    assert not set(DECIDED_ELSEWHERE) & set(FIXED) and not set(NOT_HERE) & {*DECIDED_ELSEWHERE, *FIXED}


def test_every_field_about_experts_is_decided_refused_or_looked_at():
    """A field of a later megatron-core that nobody has judged shows here: each may be set, and then must go with this package's routing."""
    judged = {
        "moe_enable_routing_replay", "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor", "moe_router_score_function",
        "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_router_force_load_balancing", "moe_router_force_biased", "moe_input_jitter_eps",
        "moe_router_padding_for_quantization", "moe_router_padding_for_fp8", "moe_shared_expert_overlap", "moe_permute_fusion",
        "moe_router_fusion", "moe_apply_probs_on_input",
    }  # fmt: skip
    free = {name for name in megatron_fields() if name.startswith("moe_") and is_free(name) and annotation_words(megatron_fields()[name])}
    assert free <= judged


def test_what_is_named_instead_exists():
    for target in set(DECIDED_ELSEWHERE.values()):
        section, name = target.split(" ")[0].split("=")[0].split(".")
        annotation = Config.model_fields[section].annotation
        inner = getattr(annotation, "model_fields", None) or annotation.__args__[0].model_fields
        assert name in inner, target
