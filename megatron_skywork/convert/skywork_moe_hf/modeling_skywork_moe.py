"""Skywork-MoE for transformers: a LLaMA whose feed-forwards are mixtures of experts behind a normalized gate (arXiv 2406.06563, section 4.1).

Per token with gate logits z over the experts:

    z~ = lambda * (z - mean(z)) / sqrt(var(z) + eps)        where moe_use_logits_norm is true, else z~ = z
    y  = sum over the top-k experts of softmax(z~ over those k) * w2(silu(w1 x) * (w3 x))

which is the softmax over all experts, renormalized over the chosen ones; with top-1, or moe_pre_softmax, the experts keep their probabilities among all.
The shared expert, where there is one, is added to y, times sigmoid(g x) where shared_expert_gate is true.
Attention, rotary positions (Llama 3.1's scaling included), norms, cache and generation are transformers' own.
Shapes: T tokens, H hidden, E experts, K top-k.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import __version__
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_skywork_moe import SkyworkMoeConfig


class SkyworkExpert(nn.Module):
    """SwiGLU feed-forward with the released names: w1 gates, w3 goes up, w2 comes down."""

    def __init__(self, hidden, ffn):
        super().__init__()
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SkyworkSparseMoe(nn.Module):
    """Gate, experts and, if there is one, the shared expert."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        ffn = config.moe_intermediate_size or config.intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts[0], bias=False)
        self.experts = nn.ModuleList(SkyworkExpert(config.hidden_size, ffn) for _ in range(config.num_experts[0]))
        if config.shared_expert_intermediate_size:
            self.shared_expert = SkyworkExpert(config.hidden_size, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def route(self, x_TH):
        """Weights and numbers of the chosen experts, [T, K] each; computed in fp32."""
        config = self.config
        logits_TE = F.linear(x_TH.float(), self.gate.weight.float())
        if config.moe_use_logits_norm:
            # Without the first logit taken off, rounding of equal logits would be magnified by 1 / sqrt(eps).
            centred_TE = logits_TE - logits_TE[:, :1]
            centred_TE = centred_TE - centred_TE.mean(dim=-1, keepdim=True)
            variance_T1 = centred_TE.square().sum(dim=-1, keepdim=True) / (centred_TE.shape[-1] - int(config.moe_gate_norm_unbiased))
            logits_TE = config.moe_gate_norm_std * centred_TE * torch.rsqrt(variance_T1 + config.moe_gate_norm_eps)
        top_TK, chosen_TK = logits_TE.topk(config.num_experts_per_tok, dim=-1)
        if config.moe_pre_softmax or config.num_experts_per_tok == 1:
            return logits_TE.softmax(dim=-1).gather(-1, chosen_TK), chosen_TK
        return top_TK.softmax(dim=-1), chosen_TK

    def forward(self, hidden_states):
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TK, chosen_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        for expert in chosen_TK.unique().tolist():
            token, slot = torch.where(chosen_TK == expert)
            y_TH.index_add_(0, token, (self.experts[expert](x_TH[token]) * weights_TK[token, slot, None]).to(y_TH.dtype))
        if self.config.shared_expert_intermediate_size:
            shared_TH = self.shared_expert(x_TH)
            if self.config.shared_expert_gate:
                shared_TH = torch.sigmoid(self.shared_expert_gate(x_TH)) * shared_TH
            y_TH = y_TH + shared_TH
        return y_TH.view_as(hidden_states)


class SkyworkDecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer; where it is a mixture, the parent's `self.mlp` is found under the released name."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if config.qk_norm:
            self.self_attn = Qwen3Attention(config, layer_idx)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                plain = getattr(self.self_attn, name)
                setattr(self.self_attn, name, nn.Linear(plain.in_features, plain.out_features, bias=True))
        if config.moe_layer_indices is None or layer_idx in config.moe_layer_indices:
            del self.mlp
            self.block_sparse_moe = SkyworkSparseMoe(config)

    def __getattr__(self, name):
        return super().__getattr__("block_sparse_moe" if name == "mlp" and "mlp" not in self._modules else name)


class SkyworkPreTrainedModel(LlamaPreTrainedModel):
    config_class = SkyworkMoeConfig
    _no_split_modules = ["SkyworkDecoderLayer"]
    # The gate decides between experts; in half precision near-ties fall differently. transformers 4 asks for a module's own name, 5 for a part of its path.
    _keep_in_fp32_modules_strict = ["gate" if __version__.startswith("4.") else "block_sparse_moe.gate"]
    complete = False

    def post_init(self):
        """Called once all modules are in place. LLaMA's constructors call it before that, while dense layers stand where mixtures will be."""
        if self.complete:
            super().post_init()


class SkyworkModel(SkyworkPreTrainedModel, LlamaModel):
    def __init__(self, config):
        LlamaModel.__init__(self, config)
        self.layers = nn.ModuleList(SkyworkDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.complete = True
        self.post_init()


class SkyworkForCausalLM(SkyworkPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config):
        LlamaForCausalLM.__init__(self, config)
        self.model = SkyworkModel(config)
        self.complete = True
        self.post_init()
