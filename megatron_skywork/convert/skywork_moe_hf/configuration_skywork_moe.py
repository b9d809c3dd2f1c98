"""Configuration of a Skywork-MoE model: LLaMA's, with the keys of the released Skywork-MoE-Base and the few a general model needs."""

from transformers.models.llama.configuration_llama import LlamaConfig


class SkyworkMoeConfig(LlamaConfig):
    """
    Args:
        num_experts: experts per MoE layer, as a list with one number (the released form) or a number.
        num_experts_per_tok: experts a token is sent to.
        moe_layer_indices: layers (from 0) that are mixtures; None for all.
        moe_intermediate_size: inner width of an expert; None for intermediate_size.
        shared_expert_intermediate_size: inner width of an expert that sees every token; None for no such expert.
        shared_expert_gate: multiply that expert's output by the sigmoid of a projection of the token (a mixture made from Qwen2-MoE).
        moe_pre_softmax: weigh the chosen experts by their probabilities among all, instead of making these sum to 1.
        moe_use_logits_norm: gate-logit normalization.
        moe_gate_norm_std: standard deviation the logits are brought to (lambda of the report).
        moe_gate_norm_eps: added to the variance; the released model has none, which is NaN for equal logits.
        moe_gate_norm_unbiased: variance with ddof 1, as the released model has it.
        qkv_bias: bias on the query, key and value projections (a mixture made from Qwen2).
        qk_norm: RMSNorm on each head's query and key (made from Qwen3).
        model_init_std: initial standard deviation of everything but the router, whose own is initializer_range.

    moe_expert_interval, moe_use_skywork_gating, moe_2layer_gate and moe_feature_no_mul_topk are the released model's; only its values are implemented.
    """

    model_type = "skywork_moe"

    def __init__(
        self,
        num_experts=(16,),
        num_experts_per_tok=2,
        moe_layer_indices=None,
        moe_intermediate_size=None,
        shared_expert_intermediate_size=None,
        shared_expert_gate=False,
        moe_pre_softmax=False,
        moe_use_logits_norm=True,
        moe_gate_norm_std=1.0,
        moe_gate_norm_eps=1e-6,
        moe_gate_norm_unbiased=True,
        moe_expert_interval=1,
        moe_use_skywork_gating=False,
        moe_2layer_gate=False,
        moe_feature_no_mul_topk=True,
        qkv_bias=False,
        qk_norm=False,
        model_init_std=0.02,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if moe_expert_interval != 1 or moe_use_skywork_gating or moe_2layer_gate or not moe_feature_no_mul_topk:
            raise ValueError("only moe_expert_interval=1, moe_use_skywork_gating=false, moe_2layer_gate=false and moe_feature_no_mul_topk=true are implemented")
        self.num_experts = [num_experts] if isinstance(num_experts, int) else list(num_experts)
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_layer_indices = moe_layer_indices
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.moe_pre_softmax = moe_pre_softmax
        self.moe_use_logits_norm = moe_use_logits_norm
        self.moe_gate_norm_std = moe_gate_norm_std
        self.moe_gate_norm_eps = moe_gate_norm_eps
        self.moe_gate_norm_unbiased = moe_gate_norm_unbiased
        self.moe_expert_interval = moe_expert_interval
        self.moe_use_skywork_gating = moe_use_skywork_gating
        self.moe_2layer_gate = moe_2layer_gate
        self.moe_feature_no_mul_topk = moe_feature_no_mul_topk
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.sliding_window = None
        self.layer_types = ["full_attention"] * self.num_hidden_layers
        self.model_init_std = model_init_std
