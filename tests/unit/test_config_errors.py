"""Wrong configurations: every message names the key, the value and what to type instead, and all of them come at once."""

import re

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.config.manual import section_names, settings
from megatron_skywork.errors import ConfigError

BASE = """\
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, vocab_size: 500, max_position_embeddings: 256}
moe: {num_experts: 4}
data: {mock: true, seq_length: 64}
train: {steps: 10, global_batch_size: 8}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text(BASE)
    return str(path)


def problems_of(paths, overrides=(), world_size=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, list(overrides), world_size)
    assert caught.value.exit_code == 2
    text = "\n".join(caught.value.problems)
    assert "pydantic" not in text and "http" not in text and "[type=" not in text and "Traceback" not in text
    return caught.value.problems


BIASED = "moe.gate_norm=false megatron.moe_router_score_function=sigmoid megatron.moe_router_enable_expert_bias=true "
# Routing that is unusual and fine.
RIGHT = [
    "moe.gate_norm=false moe.num_experts=2",
    "moe.capacity_scope=rank",
    "moe.eval_capacity_factor=1.0",
    "moe.pad_to_capacity=true moe.capacity_factor=1.999",
    "moe.pad_to_capacity=true moe.capacity_factor=1.1 moe.capacity_scope=rank parallel.tp=2",
    "moe.aux_coefficient=[0.1,0.2] moe.layers=[3,1] moe.extra_aux_losses=[{loss: report, coefficient: [1.0,2.0]}]",
    "moe.aux_schedule=[{step: 0, factor: 1.0},{step: 10, factor: 0.0}]",
    "megatron.moe_router_score_function=softmax",
    BIASED + "megatron.moe_router_bias_update_rate=0.01",
    "megatron.moe_router_num_groups=2 megatron.moe_router_group_topk=1",
    "megatron.moe_router_num_groups=4 megatron.moe_router_group_topk=2",
    "megatron.moe_router_num_groups=2 megatron.moe_router_group_topk=2 moe.topk=3",
    "megatron.moe_router_num_groups=null",
    "megatron.moe_input_jitter_eps=0.01 megatron.moe_router_topk_scaling_factor=2.5",
    "megatron.moe_router_fusion=true model.backend=te",
    "megatron.moe_enable_routing_replay=true",
    "megatron.moe_router_force_load_balancing=true",
    "megatron.moe_apply_probs_on_input=true moe.topk=1 model.backend=te",
    "moe.shared_expert_gate=true megatron.moe_shared_expert_overlap=true moe.shared_expert_ffn_hidden_size=32",
    "moe.pre_softmax=true",
    "moe.pre_softmax=true moe.topk=1",
    "moe.pre_softmax=true moe.gate_norm=false megatron.moe_router_num_groups=2 megatron.moe_router_group_topk=1",
    "moe.pre_softmax=true megatron.moe_router_num_groups=2 megatron.moe_router_group_topk=2",
]


@pytest.mark.parametrize("overrides", RIGHT)
def test_unusual_routing_that_is_fine(base, overrides):
    load_config([base], re.split(r" (?=[a-z0-9_.]+=)", overrides))


# overrides, world size, what the one problem starts with, what else it must say
WRONG = [
    # unknown names
    ("model.num_layer=3", None, "model.num_layer=3", "did you mean model.num_layers?"),
    ("trian.steps=3", None, "trian={", "did you mean train?"),
    ("seed=3", None, "seed=3", "did you mean train.seed?"),
    ("model.topk=1", None, "model.topk=1", "did you mean moe.topk?"),
    ("moe.adaptive.momentun=0.9", None, "moe.adaptive.momentun=0.9", "did you mean moe.adaptive.momentum?"),
    ("optim.zzzzzz=1", None, "optim.zzzzzz=1", "optim has lr, min_lr"),
    ("data.train=[{path: a, wieght: 2}] data.mock=false", None, "data.train.0.wieght=2", "did you mean data.train.0.weight?"),
    # wrong types and values
    ("train.steps=ten", None, 'train.steps="ten"', "this must be a whole number above 0, not text"),
    ("train.steps=true", None, "train.steps=true", "not true/false"),
    ("train.steps=10.0", None, "train.steps=10.0", "a whole number above 0, not a number"),
    ("train.steps=1e3", None, "train.steps=1000.0", "a whole number above 0"),
    ("train.steps=0", None, "train.steps=0", "a whole number above 0"),
    ("train.steps=null", None, "train.steps=null", "not nothing"),
    ("train.steps=010", None, "command line: train.steps=010", "write 10"),
    ("train.time_limit_seconds=12:30:00", None, "command line: train.time_limit_seconds=12:30:00", "seconds as one number"),
    ("train.steps=99999999999999999999", None, "command line: train.steps=99999999999999999999", "64 bits"),
    ("model.num_layers=20000", None, "model.num_layers=20000", "up to 10000"),
    ("train.steps=[1]", None, "train.steps=[1]", "not a list"),
    ("train.seed=-1", None, "train.seed=-1", "from 0 up"),
    ("optim.lr=.inf", None, "optim.lr=Infinity", "a finite number"),
    ("optim.lr=-1", None, "optim.lr=-1", "a number above 0"),
    ("optim.beta2=1.0", None, "optim.beta2=1.0", "below 1"),
    ("moe.gate_norm=yes", None, 'moe.gate_norm="yes"', "write true"),
    ("moe.gate_norm=1", None, "moe.gate_norm=1", "true or false, not a whole number"),
    ("moe.num_experts=1", None, "moe.num_experts=1", "from 2 up"),
    ("model.backend=tee", None, 'model.backend="tee"', "did you mean te?"),
    ("optim.schedule=cosin", None, 'optim.schedule="cosin"', "did you mean cosine?"),
    ("parallel.recompute=selective parallel.recompute_modules=[attention]", None, 'parallel.recompute_modules.0="attention"', "core_attn"),
    ("model=3", None, "model=3", "a section with num_layers"),
    ("moe.adaptive=true", None, "moe.adaptive=true", "a section with enabled"),
    ("data.train=5 data.mock=false", None, "data.train=5", "a path, or a list of paths"),
    ("data.valid=held_out", None, 'data.valid="held_out"', "names, each with"),
    ("data.valid.a=5", None, "data.valid.a=5", "a path, or a list of paths"),
    ("data.train=[{weight: 2}] data.mock=false", None, "data.train.0.path is not set", "text"),
    ("run_dir=5", None, "run_dir=5", "this must be text"),
    ("megatron=3", None, "megatron=3", "names, each with"),
    # rules inside a section
    ("moe.topk=5", None, "moe.topk=5", "topk <= 4"),
    ("moe.adaptive.enabled=true", None, "moe.adaptive.enabled=true", "set capacity_factor"),
    ("model.num_attention_heads=5", None, "model.num_attention_heads=5", "set head_dim"),
    ("optim.min_lr=1.0", None, "optim.min_lr=1.0", "above lr"),
    ("spikes.minimum_steps=200", None, "spikes.minimum_steps=200", "above window=128"),
    ("spikes.policy=rewnd", None, 'spikes.policy="rewnd"', "did you mean rewind?"),
    ("train.check_replicas=10", 1, "train.check_replicas=10", "no parameter has a second copy"),
    ("train.check_replicas=10 parallel.pp=4", 4, "train.check_replicas=10", "no parameter has a second copy"),
    ("moe.pad_to_capacity=true moe.capacity_factor=1.0 moe.dispatcher=allgather", None, "moe.pad_to_capacity=true", "dispatcher=alltoall"),
    ("moe.pad_to_capacity=true", None, "moe.pad_to_capacity=true needs capacity_factor", "set it (1.1 is a start)"),
    ("moe.capacity_factor=0", None, "moe.capacity_factor=0", "a number above 0"),
    ("moe.capacity_factor=-1.0", None, "moe.capacity_factor=-1.0", "a number above 0"),
    ("moe.eval_capacity_factor=0.0", None, "moe.eval_capacity_factor=0.0", "a number above 0"),
    ("moe.capacity_scope=layer", None, 'moe.capacity_scope="layer"', "rank, micro_batch"),
    ("moe.gate_norm_scale=0", None, "moe.gate_norm_scale=0", "a number above 0"),
    ("moe.gate_norm_epsilon=0.0", None, "moe.gate_norm_epsilon=0.0", "a number above 0"),
    ("moe.aux_scope=global", None, 'moe.aux_scope="global"', "did you mean global_batch?"),
    ("moe.aux_coefficient=-0.1", None, "moe.aux_coefficient=-0.1", "a number from 0 up or a list"),
    ("moe.aux_coefficient=much", None, 'moe.aux_coefficient="much"', "a number from 0 up or a list, each item a number from 0 up, not text"),
    ("moe.aux_coefficient=[0.1,0.1,-0.1,0.1]", None, "moe.aux_coefficient.2=-0.1", "this must be a number from 0 up"),
    ("moe.extra_aux_losses=[{loss: report, coefficient: x}]", None, 'moe.extra_aux_losses.0.coefficient="x"', "a number from 0 up or a list"),
    ("moe.z_loss_coefficient=-0.1", None, "moe.z_loss_coefficient=-0.1", "from 0 up"),
    ("moe.adaptive.momentum=1.0 moe.capacity_factor=1.1", None, "moe.adaptive.momentum=1.0", "below 1"),
    ("moe.adaptive.enabled=true moe.capacity_factor=1.1 moe.aux_loss=none", None, "moe.adaptive.enabled=true", "set aux_loss to report or switch"),
    ("moe.adaptive.enabled=true moe.capacity_factor=1.1 moe.aux_schedule=[{step: 1, factor: 1.0}]", None, "moe.adaptive.enabled=true and", "leave out"),
    ("moe.aux_loss=none moe.aux_schedule=[{step: 1, factor: 1.0}]", None, "moe.aux_schedule moves the coefficient", "leave it out"),
    ("moe.aux_schedule=[{step: 3, factor: 1.0},{step: 3, factor: 0.5}]", None, "moe.aux_schedule names steps [3, 3]", "after the one before"),
    ("moe.aux_schedule=[{step: 3, factor: -1.0}]", None, "moe.aux_schedule.0.factor=-1.0", "from 0 up"),
    ("moe.aux_loss=none moe.extra_aux_losses=[{loss: switch, coefficient: 0.1}]", None, "moe.extra_aux_losses come beside", "make the first of them"),
    ("moe.extra_aux_losses=[{loss: switch, coefficient: 0.1}]", None, "moe.extra_aux_losses names switch over micro_batch", "add up the coefficients"),
    # the world
    ("parallel.tp=4", 6, "world size 6 is not a multiple of parallel.tp=4", "use 4 or 8 ranks, or a product out of 1, 2, 3 or 6"),
    ("parallel.ep=4 parallel.pp=2", 4, "world size 4 is not a multiple of parallel.ep=4 * parallel.etp=1 * parallel.pp=2 = 8", "use 8 ranks"),
    ("parallel.etp=2 parallel.ep=2", 2, "world size 2 is not a multiple of parallel.ep=2 * parallel.etp=2", "use 4 ranks"),
    ("train.seed=1", 0, "world size 0", "1 or more"),
    ("train.global_batch_size=6", 4, "train.global_batch_size=6 is not a multiple", "use 4 or 8"),
    ("train.micro_batch_size=3", 1, "train.global_batch_size=8 is not a multiple of train.micro_batch_size=3", "use 6 or 9"),
    ("parallel.pp=2 parallel.vpp=2 train.global_batch_size=3", 2, "parallel.vpp=2 needs a number of micro-batches", "train.global_batch_size=2 or 4"),
    # what is split
    ("parallel.tp=8 data.seq_length=64", 8, "model.num_attention_heads=4", "use tp = 1, 2 or 4"),
    ("model.num_query_groups=3 model.num_attention_heads=6 model.head_dim=8 parallel.tp=2", None, "model.num_query_groups=3", "use tp = 1 or 3"),
    ("model.ffn_hidden_size=129 moe=null parallel.tp=2", None, "model.ffn_hidden_size=129", "use 128 or 130"),
    ("moe.shared_expert_ffn_hidden_size=33 parallel.tp=2", None, "moe.shared_expert_ffn_hidden_size=33", "use 32 or 34"),
    ("moe.ffn_hidden_size=33 parallel.etp=2", None, "moe.ffn_hidden_size=33", "use 32 or 34"),
    ("model.ffn_hidden_size=33 parallel.etp=2", None, "model.ffn_hidden_size=33 (an expert's width)", "use 32 or 34"),
    ("model.vocab_divisible_by=1 model.vocab_size=501 parallel.tp=2", None, "model.vocab_divisible_by=1", "use model.vocab_divisible_by=2"),
    ("model.head_dim=15", None, "model.head_dim=15", "use 14 or 16"),
    ("parallel.pp=3", None, "model.num_layers=4 is not a multiple of parallel.pp=3", "for instance [1, 2, 1]"),
    ("parallel.pp=8", None, "model.num_layers=4 is less than the number of stages", "at most 4"),
    ("parallel.pp=3 parallel.layers_per_stage=[2,2]", None, "parallel.layers_per_stage has 2 numbers, and there are 3 stages", "[1, 2, 1]"),
    ("parallel.pp=3 parallel.layers_per_stage=[1,1,1]", None, "parallel.layers_per_stage=[1, 1, 1] adds up to 3", "1 layer(s) missing"),
    ("parallel.pp=3 parallel.layers_per_stage=[2,0,2]", None, "parallel.layers_per_stage.1=0", "a whole number above 0"),
    ("parallel.vpp=2", None, "parallel.vpp=2", "set vpp=1, or pp=2"),
    ("data.seq_length=63 parallel.tp=2", None, "data.seq_length=63 is not a multiple of parallel.tp=2", "use 62 or 64"),
    ("data.seq_length=512", None, "data.seq_length=512 is above model.max_position_embeddings=256", "use seq_length up to 256"),
    ("parallel.cp=2", 2, "parallel.cp=2", "set model.backend=te"),
    ("parallel.cp=2 model.backend=torch", 2, "parallel.cp=2", "it is torch"),
    ("parallel.cp=2 model.backend=te data.seq_length=66", 2, "data.seq_length=66", "use 64 or 68"),
    ("parallel.cp=2 model.backend=te data.reset_attention_mask=true", 2, "data.reset_attention_mask=true", "parallel.cp=2"),
    # experts
    ("parallel.ep=3", None, "moe.num_experts=4 is not a multiple of parallel.ep=3", "use ep = 1, 2 or 4"),
    ("moe=null parallel.ep=2", None, "parallel.ep=2", "there is no moe section"),
    ("moe=null parallel.etp=2", None, "parallel.etp=2", "there is no moe section"),
    ("moe.layers=[]", None, "moe.layers=[]", "leave it out"),
    ("moe.layers=[1,4]", None, "moe.layers names 4", "from 0 to 3"),
    ("moe.layers=[1,1,2]", None, "moe.layers names 1 more than once", "once"),
    ("moe.layers=[-1]", None, "moe.layers.0=-1", "from 0 up"),
    # routing: the gate
    ("moe.num_experts=2", None, "moe.gate_norm=true with moe.num_experts=2", "set moe.gate_norm=false"),
    ("megatron.moe_router_score_function=sigmoid", None, "megatron.moe_router_score_function=sigmoid judges", "set moe.gate_norm=false"),
    ("megatron.moe_router_enable_expert_bias=true", None, "megatron.moe_router_enable_expert_bias=true", "sigmoid and moe.gate_norm=false"),
    ("megatron.moe_router_enable_expert_bias=true moe.gate_norm=false", None, "megatron.moe_router_enable_expert_bias=true", "score_function=sigmoid"),
    ("megatron.moe_router_bias_update_rate=0.01", None, "megatron.moe_router_bias_update_rate=0.01", "without megatron.moe_router_enable_expert_bias=true"),
    (BIASED + "megatron.moe_router_bias_update_rate=-0.01", None, "megatron.moe_router_bias_update_rate=-0.01", "above 0"),
    ("megatron.moe_router_pre_softmax=true", None, "megatron.moe_router_pre_softmax=true", "set moe.pre_softmax"),
    ("moe.pre_softmax=true moe.gate_norm=false megatron.moe_router_score_function=sigmoid", None, "moe.pre_softmax=true is about a softmax", "sigmoid"),
    ("moe.pre_softmax=true megatron.moe_router_num_groups=2 megatron.moe_router_group_topk=1", None, "moe.pre_softmax=true judges", "group_topk=2"),
    ("megatron.moe_router_dtype=fp64", None, 'megatron.moe_router_dtype="fp64"', "every model here has fp32"),
    ("megatron.moe_router_num_groups=3 megatron.moe_router_group_topk=1", None, "megatron.moe_router_num_groups=3 does not divide", "use 1, 2 or 4"),
    ("megatron.moe_router_num_groups=0 megatron.moe_router_group_topk=1", None, "megatron.moe_router_num_groups=0 does not divide", "use 1, 2 or 4"),
    ("megatron.moe_router_num_groups=2", None, "megatron.moe_router_num_groups=2 limits nothing", "set it (1 to 2)"),
    ("megatron.moe_router_group_topk=2", None, "megatron.moe_router_group_topk=2", "set megatron.moe_router_num_groups too (1, 2 or 4)"),
    ("megatron.moe_router_num_groups=2 megatron.moe_router_group_topk=0", None, "megatron.moe_router_group_topk=0", "use 1 to 2"),
    ("megatron.moe_router_num_groups=2 megatron.moe_router_group_topk=3 moe.topk=3", None, "megatron.moe_router_group_topk=3", "use 1 to 2"),
    ("megatron.moe_router_num_groups=4 megatron.moe_router_group_topk=3", None, "megatron.moe_router_group_topk=3", "(moe.topk=2), out of"),
    ("megatron.moe_router_num_groups=4 megatron.moe_router_group_topk=1", None, "megatron.moe_router_group_topk=1", "use 2 groups or more, or topk up to 1"),
    ("megatron.moe_input_jitter_eps=0.0", None, "megatron.moe_input_jitter_eps=0.0", "above 0 and below 1"),
    ("megatron.moe_input_jitter_eps=1", None, "megatron.moe_input_jitter_eps=1", "above 0 and below 1"),
    ("megatron.moe_input_jitter_eps=-0.1", None, "megatron.moe_input_jitter_eps=-0.1", "above 0 and below 1"),
    ("megatron.moe_router_topk_scaling_factor=0.0", None, "megatron.moe_router_topk_scaling_factor=0.0", "a number above 0"),
    ("megatron.moe_apply_probs_on_input=true", None, "megatron.moe_apply_probs_on_input=true", "set moe.topk=1 (it is 2)"),
    ("megatron.moe_apply_probs_on_input=true moe.topk=1", None, "megatron.moe_apply_probs_on_input=true", "set model.backend=te (it is auto)"),
    ("megatron.window_size=[8,0]", None, "megatron.window_size=[8, 0]", "set model.backend=te (it is auto)"),
    ("megatron.cuda_graph_impl=local", None, "megatron.cuda_graph_impl=local", "set model.backend=te (it is auto)"),
    ("megatron.defer_embedding_wgrad_compute=true", None, "megatron.defer_embedding_wgrad_compute=True", "set model.backend=te (it is auto)"),
    ("megatron.moe_router_fusion=true model.backend=torch", None, "megatron.moe_router_fusion=true", "set model.backend=te"),
    ("megatron.moe_router_fusion=true megatron.moe_enable_routing_replay=true", None, "megatron.moe_router_fusion=true", "leave one of them out"),
    # routing: capacity and auxiliary losses
    ("moe.pad_to_capacity=true moe.capacity_factor=2.1", None, "moe.capacity_factor=2.1", "for instance 1.999"),
    ("moe.pad_to_capacity=true moe.capacity_factor=1.1 parallel.tp=2", None, "moe.capacity_scope=micro_batch lets", "parallel.tp=2 ranks"),
    ("moe.pad_to_capacity=true moe.capacity_factor=1.1 parallel.cp=2 model.backend=te", 2, "moe.capacity_scope=micro_batch", "parallel.cp=2 ranks"),
    ("moe.aux_coefficient=[0.1,0.2]", None, "moe.aux_coefficient=[0.1, 0.2] has 2 numbers, and there are 4 MoE layers", "a single number for all"),
    ("moe.aux_coefficient=[0.1,0.2,0.3] moe.layers=[1,3]", None, "moe.aux_coefficient=[0.1, 0.2, 0.3] has 3", "there are 2 MoE layers"),
    ("moe.aux_coefficient=[]", None, "moe.aux_coefficient=[] has 0 numbers", "one per MoE layer"),
    ("moe.extra_aux_losses=[{loss: report, coefficient: [1.0]}]", None, "moe.extra_aux_losses.0.coefficient=[1.0] has 1 numbers", "one per MoE layer"),
    ("moe.aux_schedule=[{step: 0, factor: 1.0},{step: 11, factor: 0.0}]", None, "moe.aux_schedule names step 11", "train.steps=10; use steps up to 10"),
    # routing: fields of megatron-core that would go round it
    ("megatron.moe_router_load_balancing_type=sinkhorn", None, "megatron.moe_router_load_balancing_type=", "set moe.aux_loss"),
    ("megatron.moe_router_load_balancing_type=quantile_balancing", None, "megatron.moe_router_load_balancing_type=", "set moe.aux_loss"),
    ("megatron.moe_aux_loss_coeff=0.1", None, "megatron.moe_aux_loss_coeff=0.1", "set moe.aux_coefficient"),
    ("megatron.moe_z_loss_coeff=0.1", None, "megatron.moe_z_loss_coeff=0.1", "set moe.z_loss_coefficient"),
    ("megatron.moe_token_dropping=true", None, "megatron.moe_token_dropping=true", "set moe.capacity_factor"),
    ("megatron.moe_token_dispatcher_type=flex", None, 'megatron.moe_token_dispatcher_type="flex"', "set moe.dispatcher"),
    ("megatron.moe_enable_deepep=true", None, "megatron.moe_enable_deepep=true", "moe.dispatcher offers alltoall and allgather"),
    ("megatron.moe_flex_dispatcher_backend=hybridep", None, "megatron.moe_flex_dispatcher_backend=", "moe.dispatcher offers alltoall and allgather"),
    ("megatron.moe_router_topk_limited_devices=2", None, "megatron.moe_router_topk_limited_devices=2", "set megatron.moe_router_num_groups"),
    ("megatron.moe_per_layer_logging=true", None, "megatron.moe_per_layer_logging=true", "metrics.router=true"),
    ("megatron.moe_latent_size=16", None, "megatron.moe_latent_size=16", "the whole hidden state"),
    ("megatron.fp8_param=true megatron.fp8=hybrid model.backend=te", None, "megatron.fp8_param=true", "leave it out"),
    ("optim.moments=bf16 optim.beta2=0.999", None, "optim.moments=bf16 cannot follow beta2=0.999", "use beta2 up to 0.99609375, or moments=fp32"),
    ("megatron.overlap_moe_expert_parallel_comm=true", None, "megatron.overlap_moe_expert_parallel_comm=true", "leave it out"),
    ("megatron.moe_shared_expert_gate=true", None, "megatron.moe_shared_expert_gate=true", "set moe.shared_expert_gate"),
    ("moe.shared_expert_gate=true", None, "moe.shared_expert_gate=true gates a shared expert", "set shared_expert_ffn_hidden_size"),
    ("megatron.moe_shared_expert_overlap=true", None, "megatron.moe_shared_expert_overlap=true", "set moe.shared_expert_ffn_hidden_size"),
    ("megatron.moe_shared_expert_overlap=true moe.shared_expert_ffn_hidden_size=32 moe.dispatcher=allgather", None, "megatron.moe_shared", "alltoall"),
    ("megatron.moe_router_padding_for_quantization=true", None, "megatron.moe_router_padding_for_quantization=true", "set megatron.fp8"),
    ("megatron.moe_router_padding_for_fp8=true megatron.fp8=hybrid model.backend=te moe.dispatcher=allgather", None, "megatron.moe_router", "alltoall"),
    ("megatron.moe_input_jitter_eps=0.1 moe=null", None, "megatron.moe_input_jitter_eps=0.1 is about experts", "there is no moe section"),
    # recomputation, precision, schedule, data
    ("parallel.recompute_layers=1", None, "parallel.recompute_layers=1", "set recompute=full"),
    ("parallel.recompute=full parallel.recompute_layers=5", None, "parallel.recompute_layers=5", "use 1 to 4"),
    ("parallel.recompute=full parallel.recompute_modules=[mlp]", None, "parallel.recompute_modules=['mlp']", "set recompute=selective"),
    ("parallel.recompute=selective parallel.recompute_modules=[]", None, "parallel.recompute_modules=[]", "recompute=none"),
    ("parallel.recompute=selective parallel.recompute_modules=[moe,moe]", None, "parallel.recompute_modules=['moe', 'moe']", "twice"),
    ("parallel.recompute=selective parallel.recompute_modules=[moe] moe=null", None, "parallel.recompute_modules names moe", "no moe section"),
    ("parallel.recompute=selective parallel.recompute_modules=[layernorm] moe.shared_expert_ffn_hidden_size=64 megatron.moe_shared_expert_overlap=true", None,
     "parallel.recompute_modules names layernorm", "leave one of the two out"),
    ("parallel.recompute=selective parallel.recompute_modules=[shared_experts]", None, "parallel.recompute_modules names shared", "moe.shared_expert_ffn"),
    ("parallel.recompute=selective parallel.recompute_modules=[router] moe=null", None, "parallel.recompute_modules names router", "no moe section"),
    ("parallel.recompute=selective parallel.recompute_modules=[moe,router]", None, "parallel.recompute_modules names moe", "covers router"),
    ("parallel.recompute=selective parallel.recompute_modules=[mlp]", None, "parallel.recompute_modules names mlp", "every layer has experts"),
    ("parallel.recompute=selective parallel.recompute_layers=[1]", None, "parallel.recompute_layers=[1]", "set recompute=full"),
    ("parallel.recompute=full parallel.recompute_layers=0", None, "parallel.recompute_layers=0", "set parallel.recompute=none"),
    ("parallel.recompute=full parallel.recompute_layers=[0,0] parallel.pp=2", None, "parallel.recompute_layers=[0, 0]", "set parallel.recompute=none"),
    ("parallel.recompute=full parallel.recompute_layers=-1", None, "parallel.recompute_layers=-1", "a whole number from 0 up or a list"),
    ("parallel.recompute=full parallel.recompute_layers=[1,-1] parallel.pp=2", None, "parallel.recompute_layers.1=-1", "a whole number from 0 up"),
    ("parallel.recompute=full parallel.recompute_layers=[1,1]", None, "parallel.recompute_layers has 2 numbers for 1 stage(s)", "instance [4]"),
    ("parallel.recompute=full parallel.recompute_layers=[1,1] parallel.pp=2 parallel.vpp=2", None, "parallel.recompute_layers has 2", "parallel.vpp=2 = 4"),
    ("parallel.recompute=full parallel.recompute_layers=[2,3] parallel.pp=2 parallel.layers_per_stage=[1,3]", None,
     "parallel.recompute_layers=[2, 3] is more than the stages hold, which is [1, 3]", "instance [1, 3]"),
    ("megatron.fp8=hybrid", None, "megatron.fp8=hybrid", "set model.backend=te"),
    ("megatron.fp8=hybrid model.backend=te train.precision=fp32", None, "megatron.fp8=hybrid", "set train.precision=bf16"),
    ("optim.warmup_steps=10", None, "optim.warmup_steps=10", "use 0 to 9"),
    ("optim.schedule=constant optim.decay_steps=5", None, "optim.decay_steps=5", "does not decay"),
    ("optim.schedule=wsd optim.decay_steps=8 optim.warmup_steps=4", None, "optim.decay_steps=8", "up to 6"),
    ("optim.decay_steps=4 optim.warmup_steps=4", None, "optim.decay_steps=4", "use 5 or more"),
    ("train.stop_at_step=11", None, "train.stop_at_step=11", "up to 10"),
    ("data.mock=false", None, "data.train is empty", "data.mock=true"),
    ("data.train=x", None, "data.mock=true", "data.train=[]"),
    ("data.valid={a: []}", None, "data.valid.a names no dataset", "leave it out"),
    ("data.mock=false data.train=x train.eval_every=5", None, "train.eval_every=5", "data.valid.held_out"),
    # overrides themselves
    ("model.num_layers", None, "model.num_layers: an override is section.field=value", ""),
    ("=3", None, "=3: an override is section.field=value", ""),
    ("model.num_layers=", None, "model.num_layers=: there is no value", "model.num_layers=null"),
    ("train.steps.x=3", None, "train.steps.x=3: train.steps is a whole number (10), not a section", "set train.steps as a whole"),
    ("moe.layers=[1,", None, "command line: not readable as YAML", "moe.layers=[1,"),
]


@pytest.mark.parametrize(("overrides", "world_size", "start", "advice"), WRONG, ids=[case[0] for case in WRONG])
def test_wrong_setting(base, overrides, world_size, start, advice):
    parts = re.split(r" (?=[a-z0-9_.]+=)", overrides)
    problems = problems_of([base], parts, world_size)
    assert len(problems) == 1, problems
    assert problems[0].startswith(start) and advice in problems[0], problems


WRONG_FILES = [
    (b"", "the file is empty"),
    (b"# only a comment\n", "the file is empty"),
    (b"- a\n- b\n", "the file holds a list, not sections"),
    (b"hello\n", "the file holds text"),
    (b"model: {num_layers: \xff}\n", "not a text file in UTF-8 (byte 20 is 0xff)"),
    (b"model: {num_layers: 4\ntrain: 3\n", "not readable as YAML"),
    (b"model: {num_layers: 4, num_layers: 5}\n", "1: model.num_layers is set twice"),
    (BASE.replace("steps: 10", "steps: 010").encode(), "4: train.steps=010"),
    (BASE.replace("steps: 10", "stepz: 10").encode(), "4): there is no such setting; did you mean train.steps?"),
    (b"model.num_layers: 4\n" + BASE.encode(), "in a file a section is nested; write model: and below it, indented, num_layers:"),
    (BASE.replace("train: {steps: 10, global_batch_size: 8}", "").encode(), "train is not set, and it is required: a section with at least steps, global"),
    (BASE.replace("hidden_size: 64, ", "").encode(), "model.hidden_size is not set, and it is required: a whole number above 0"),
]


@pytest.mark.parametrize(("content", "expected"), WRONG_FILES)
def test_wrong_file(tmp_path, content, expected):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    problems = problems_of([str(path)])
    assert any(expected in problem and ("x.yaml" in problem or "required" in problem) for problem in problems), problems


def test_missing_file_and_folder(tmp_path, base):
    (tmp_path / "tiny.yaml").write_text(BASE)
    assert f"did you mean {tmp_path / 'tiny.yaml'}?" in problems_of([str(tmp_path / "tyni.yaml")])[0]
    assert "this is a folder" in problems_of([str(tmp_path)])[0]
    assert "at least one --config" in problems_of([])[0]
    both = problems_of([str(tmp_path / "a"), base, str(tmp_path / "b")], ["c"])
    assert [problem.split(":")[0] for problem in both] == [str(tmp_path / "a"), str(tmp_path / "b"), "c"]


def test_all_problems_are_reported_at_once(base):
    """Names, types, rules inside a section, rules between sections and passed-through fields, in one go."""
    wrong = ["model.num_layer=3", "optim.lr=abc", "optim.warmup_steps=10", "parallel.tp=8", "moe.layers=[9]", "data.seq_length=1000",
             "megatron.nonsense_field=1", "train.stop_at_step=99", "checkpoint.keep=0"]
    keys = ["model.num_layer=", "optim.lr=", "optim.warmup_steps=", "world size 6", "model.num_attention_heads=4", "moe.layers names 9",
            "data.seq_length=1000", "megatron.nonsense_field=1", "train.stop_at_step=99", "checkpoint.keep=0"]
    text = "\n".join(problems_of([base], wrong, 6))
    assert [key for key in keys if key not in text] == ["moe.layers names 9"]  # it is compared with num_layers, which may be the mistyped num_layer


def test_all_problems_of_routing_are_reported_at_once(base):
    """Of one section: a value wrong by itself, rules inside the section, rules with other sections, and passed-through fields."""
    wrong = [
        "moe.topk=9", "moe.z_loss_coefficient=-1", "moe.pad_to_capacity=true", "moe.dispatcher=allgather", "moe.adaptive.enabled=true",
        "moe.aux_coefficient=[1.0]", "moe.aux_schedule=[{step: 99, factor: 1.0}]",
        "megatron.moe_router_score_function=sigmoid", "megatron.moe_input_jitter_eps=2.0", "parallel.ep=3",
    ]  # fmt: skip
    starts = [
        "moe.z_loss_coefficient=-1", "moe.topk=9 is above", "moe.adaptive.enabled=true follows", "moe.adaptive.enabled=true and aux_schedule",
        "moe.pad_to_capacity=true needs capacity_factor", "moe.pad_to_capacity=true needs dispatcher", "moe.aux_coefficient=[1.0] has 1",
        "moe.aux_schedule names step 99", "megatron.moe_router_score_function=sigmoid", "megatron.moe_input_jitter_eps=2.0",
        "moe.num_experts=4 is not a multiple",
    ]  # fmt: skip
    # A value that is wrong by itself keeps the schema from coming to its rules; they must be reported all the same.
    for left_out in ([], ["moe.z_loss_coefficient=-1"]):
        problems = problems_of([base], [override for override in wrong if override not in left_out])
        wanted = [start for start in starts if start not in left_out]
        assert len(problems) == len(wanted) and all(sum(problem.startswith(start) for problem in problems) == 1 for start in wanted), problems


def test_one_mistake_is_one_line(base):
    """A rule is not applied to a value that already has a problem: tp=four does not make the batch size wrong as well."""
    assert len(problems_of([base], ["parallel.tp=four", "train.global_batch_size=3"], 4)) == 1
    assert len(problems_of([base], ["moe.num_experts=four", "moe.topk=9", "parallel.ep=3"])) == 1
    assert len(problems_of([base], ["train.step=0"])) == 1
    assert len(problems_of([base], ["parallel=3", "train.global_batch_size=3"], 4)) == 1


def test_where_a_value_was_set_is_said(base, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("# a comment\noptim:\n  lr: fast\ntrain:\n  steps: 0\n")
    problems = problems_of([base, str(other)], ["train.seed=x"])
    assert [problem.split("(")[1].split(")")[0] for problem in problems] == [f"{other}:3", f"{other}:5", "command line"]


ODD_VALUES = ["null", "true", "-1", "0", "1.5", "some text", "[]", "[1, {a: b}]", "{}", "{a: {b: 1}}", "9999999999999999"]


@pytest.mark.parametrize("name", [*(setting.name for setting in settings()), *section_names()])
def test_no_value_of_any_setting_causes_anything_but_a_configuration_error(base, name):
    refused = 0
    for value in ODD_VALUES:
        try:
            load_config([base], [f"{name}={value}"], 4)
        except ConfigError as error:
            refused += 1
            assert error.problems and all(len(problem) < 700 and "pydantic" not in problem for problem in error.problems)
    assert refused >= 4
