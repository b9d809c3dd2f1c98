"""Every setting of a run: its name, type, default, one sentence, and its rule beneath it.

Reading top to bottom is reading the manual: `launch/pretrain_moe.py --help` prints this file. Rules that need more than one section
(say, experts and the expert-parallel degree) stand in `validate.py` and `validate_routing.py`. This module imports no torch, so that a mistake is answered at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from megatron_skywork.config.launch import Launch
from megatron_skywork.config.section import NonNegative, NonNegativeFloat, Positive, Section, Share

# bf16 keeps 8 significant bits, so half the distance to a neighbour is at most 2^-8 of a value; derived in adamw.py.
LARGEST_BETA_BF16 = 1 - 2**-8

# What `resume.mode` may be beside a path.
RESUME_MODES = ("auto", "strict", "none")


class Model(Section):
    """Shape of the transformer (LLaMA type: RMSNorm, SwiGLU, rotary positions, no bias unless said)."""

    num_layers: Positive = Field(le=10_000, description="Transformer layers.")
    hidden_size: Positive = Field(description="Width of the residual stream.")
    ffn_hidden_size: Positive = Field(description="Inner width of a dense layer's SwiGLU feed-forward, and of an expert unless moe.ffn_hidden_size says otherwise.")
    num_attention_heads: Positive = Field(description="Query heads.")
    num_query_groups: Positive | None = Field(None, description="Key/value heads; unset means one per query head (MHA).")
    head_dim: Positive | None = Field(None, description="Width of one head; unset means hidden_size / num_attention_heads.")
    vocab_size: Positive = Field(description="Tokens the tokenizer knows, before padding.")
    vocab_divisible_by: Positive = Field(128, description="The embedding is padded to a multiple of this; it does not depend on the layout.")
    max_position_embeddings: Positive = Field(4096, description="Longest sequence the model is meant for.")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary position embedding.")
    rope_scaling_factor: float | None = Field(
        None, gt=1, description="Llama 3.1's scaling of the rotary frequencies by this factor (its other constants are fixed: low 1, high 4, 8192 original positions); unset means none.")
    norm_epsilon: float = Field(1e-6, gt=0, description="Epsilon of every RMSNorm.")
    tie_embeddings: bool = Field(False, description="Use the input embedding as the output layer.")
    qkv_bias: bool = Field(False, description="Bias on query, key and value projections (Qwen2).")
    qk_norm: bool = Field(False, description="RMSNorm on each head's query and key (Qwen3).")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    attention_dropout: Share = Field(0.0, description="Dropout on attention probabilities.")
    hidden_dropout: Share = Field(0.0, description="Dropout on the residual branches.")
    backend: Literal["auto", "torch", "te"] = Field("auto", description="torch: plain PyTorch modules, everywhere; te: Transformer Engine; auto: te when it is installed and a GPU is there.")
    compile: bool = Field(True, description="On a GPU, small functions (gate normalization, router health, rotary positions, activations, loss) become one compiled kernel each.")

    def rules(self) -> Iterator[tuple[tuple[str, ...], str]]:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            yield ("num_attention_heads", "hidden_size", "head_dim"), (
                f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}; set head_dim, or choose a divisor")
        if self.num_query_groups and heads % self.num_query_groups:
            yield ("num_query_groups", "num_attention_heads"), f"num_query_groups={self.num_query_groups} does not divide num_attention_heads={heads}"

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def resolved_query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_divisible_by) * self.vocab_divisible_by


class AdaptiveAux(Section):
    """Adaptive auxiliary-loss coefficients, one per MoE layer (Skywork-MoE report, section 4.2)."""

    enabled: bool = Field(False, description="Move each layer's coefficient towards min(sensitivity * drop rate, maximum) after every step.")
    sensitivity: float = Field(0.2, gt=0, description="xi of the report: coefficient per unit of drop rate.")
    maximum: float = Field(0.01, gt=0, description="alpha_max of the report: cap of the coefficient.")
    momentum: float = Field(0.99, ge=0, lt=1, description="beta of the report: share of the old coefficient that is kept each step.")


AuxLossKind = Literal["switch", "report"]
AuxLossScope = Literal["sequence", "micro_batch", "global_batch"]
Coefficients = NonNegativeFloat | list[NonNegativeFloat]


class AuxSchedulePoint(Section):
    """A corner of the auxiliary loss's schedule; between corners the factor is interpolated, outside it stays."""

    step: NonNegative = Field(description="Optimizer step.")
    factor: float = Field(ge=0, description="What the coefficients are multiplied by in that step.")


class ExtraAuxLoss(Section):
    """A second auxiliary loss beside the main one; its coefficient is fixed."""

    loss: AuxLossKind = Field(description="switch or report, as for moe.aux_loss.")
    scope: AuxLossScope = Field("micro_batch", description="As for moe.aux_scope.")
    coefficient: Coefficients = Field(description="Weight; one number, or one per MoE layer.")


class Moe(Section):
    """Experts, gate and routing. Leave the section out for a dense model."""

    num_experts: Annotated[int, Field(ge=2, le=65_536)] = Field(description="Routed experts in every MoE layer.")
    topk: Positive = Field(2, description="Experts a token is sent to.")
    ffn_hidden_size: Positive | None = Field(None, description="Inner width of one expert; unset means model.ffn_hidden_size.")
    layers: list[NonNegative] | None = Field(None, description="Indices (from 0) of the MoE layers; unset means all. The others are dense.")
    shared_expert_ffn_hidden_size: Positive | None = Field(None, description="Inner width of an expert that sees every token; unset means none.")
    shared_expert_gate: bool = Field(False, description="Multiply the shared expert's output by the sigmoid of a learned projection of the token (Qwen2-MoE).")
    pre_softmax: bool = Field(False, description="Softmax over all experts before the top-k, the chosen probabilities left as they are (Qwen2-MoE); off: they are made to sum to 1.")
    gate_norm: bool = Field(True, description="Gate-logit normalization (report, section 4.1).")
    gate_norm_scale: float = Field(1.0, gt=0, description="lambda of the report: standard deviation of the normalized logits.")
    gate_norm_epsilon: float = Field(1e-6, gt=0, description="Added to the variance under the root, so that equal logits give a uniform gate instead of NaN.")
    gate_norm_unbiased: bool = Field(True, description="Divide by the unbiased standard deviation (ddof 1), as the released model does.")
    capacity_factor: float | None = Field(None, gt=0, description="Slots per expert over the even share; in training, assignments above that are dropped. Unset: nothing is dropped.")
    capacity_scope: Literal["rank", "micro_batch"] = Field(
        "micro_batch", description="Whose tokens compete for an expert's slots: one micro-batch's, the same under every layout, or one rank's after the sequence is split, as in megatron-core.")
    eval_capacity_factor: float | None = Field(None, gt=0, description="The same in evaluations. Unset: an evaluation drops nothing.")
    pad_to_capacity: bool = Field(False, description="Pad every expert's input to its capacity, so that shapes never change in training.")
    drop_policy: Literal["probs", "position"] = Field("probs", description="Which tokens an overfull expert keeps: the most probable, or the first.")
    aux_loss: Literal["none", "switch", "report"] = Field("switch", description="Load-balancing loss: Switch Transformer's n * sum f_j P_j, or equation 4 of the Skywork-MoE report.")
    aux_scope: AuxLossScope = Field(
        "micro_batch", description="What its means are taken over: each sequence, a micro-batch, or the global batch (with the slopes of the step before, see moe/aux_loss.py).")
    aux_coefficient: Coefficients = Field(0.01, description="Weight of the auxiliary loss: one number, or one per MoE layer; the first value where it adapts.")
    aux_schedule: list[AuxSchedulePoint] = Field(default_factory=list, description="Factor on aux_coefficient over the steps, linear between the points {step, factor}; none means constant.")
    extra_aux_losses: list[ExtraAuxLoss] = Field(default_factory=list, description="Further auxiliary losses, each {loss, scope, coefficient}.")
    adaptive: AdaptiveAux = Field(default_factory=AdaptiveAux, description="Adaptive coefficients.")
    z_loss_coefficient: float = Field(0.0, ge=0, description="Weight of the router z-loss, taken on the raw logits.")
    router_init_std: float = Field(0.01, ge=0, description="Standard deviation of a fresh router's weights.")
    dispatcher: Literal["alltoall", "allgather"] = Field("alltoall", description="How tokens travel to their experts.")

    def rules(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.topk > self.num_experts:
            yield ("topk", "num_experts"), f"topk={self.topk} is above num_experts={self.num_experts}; use topk <= {self.num_experts}"
        if self.shared_expert_gate and self.shared_expert_ffn_hidden_size is None:
            yield ("shared_expert_gate", "shared_expert_ffn_hidden_size"), (
                "shared_expert_gate=true gates a shared expert, and there is none; set shared_expert_ffn_hidden_size, or shared_expert_gate=false")
        if self.adaptive.enabled and self.capacity_factor is None:
            yield ("adaptive", "capacity_factor"), (
                "adaptive.enabled=true follows the drop rate, and without capacity_factor nothing is dropped; set capacity_factor (1.1 is a start) or adaptive.enabled=false")
        if self.adaptive.enabled and self.aux_loss == "none":
            yield ("adaptive", "aux_loss"), "adaptive.enabled=true steers the auxiliary loss, and aux_loss is none; set aux_loss to report or switch"
        if self.adaptive.enabled and self.aux_schedule:
            yield ("adaptive", "aux_schedule"), "adaptive.enabled=true and aux_schedule both move the coefficient; leave out aux_schedule, or set adaptive.enabled=false"
        if self.aux_loss == "none" and self.aux_schedule:
            yield ("aux_schedule", "aux_loss"), "aux_schedule moves the coefficient of the auxiliary loss, and aux_loss is none; leave it out, or set aux_loss to report or switch"
        if self.aux_loss == "none" and self.extra_aux_losses:
            yield ("extra_aux_losses", "aux_loss"), (
                "extra_aux_losses come beside a main one, and aux_loss is none; make the first of them aux_loss, aux_scope and aux_coefficient")
        steps = [point.step for point in self.aux_schedule]
        if steps != sorted(set(steps)):
            yield ("aux_schedule",), f"aux_schedule names steps {steps}; each must be after the one before"
        losses = [(self.aux_loss, self.aux_scope), *((extra.loss, extra.scope) for extra in self.extra_aux_losses)]
        twice = sorted({f"{loss} over {scope}" for loss, scope in losses if losses.count((loss, scope)) > 1})
        if twice:
            yield ("extra_aux_losses", "aux_loss", "aux_scope"), (
                f"extra_aux_losses names {' and '.join(twice)} more than once (aux_loss counts); add up the coefficients in one of them")
        if self.pad_to_capacity and self.capacity_factor is None:
            yield ("pad_to_capacity", "capacity_factor"), (
                "pad_to_capacity=true needs capacity_factor; set it (1.1 is a start), or pad_to_capacity=false")
        if self.pad_to_capacity and self.dispatcher != "alltoall":
            yield ("pad_to_capacity", "dispatcher"), f"pad_to_capacity=true needs dispatcher=alltoall, not {self.dispatcher}; set one of them back"


class Parallel(Section):
    """How the model is split over ranks. Data parallelism is what is left of the world size."""

    tp: Positive = Field(1, description="Tensor parallel degree; above 1 the sequence is split too (sequence parallel).")
    pp: Positive = Field(1, description="Pipeline stages.")
    vpp: Positive = Field(1, description="Model chunks per pipeline stage (interleaved schedule).")
    ep: Positive = Field(1, description="Expert parallel degree: ranks that share the experts of a layer.")
    etp: Positive = Field(1, description="Tensor parallel degree inside an expert. The default is 1, never tp.")
    cp: Positive = Field(1, description="Context parallel degree; needs model.backend=te.")
    layers_per_stage: list[Positive] | None = Field(None, description="Layers of each stage (pp * vpp numbers, virtual stages in model order); unset means an even split.")
    recompute: Literal["none", "full", "selective"] = Field("none", description="Activations computed again in backward: none, whole layers, or the modules listed.")
    recompute_layers: NonNegative | list[NonNegative] | None = Field(
        None, description="With recompute=full: the first layers of each stage that are recomputed, one number for all or a list like layers_per_stage; unset means all.")
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "router", "shared_experts"]] = Field(
        ["core_attn"], description="With recompute=selective: the modules. The torch backend recomputes moe_act in any case.")
    overlap: bool = Field(False, description="Overlap gradient reduction and parameter gathering with compute.")
    gpus_per_node: Positive = Field(8, description="Ranks per node, used to tell which groups cross nodes.")


class Source(Section):
    """One indexed dataset of a blend."""

    path: str = Field(description="Prefix of the .bin and .idx files.")
    weight: float = Field(1.0, gt=0, description="Share of samples drawn from it, relative to the others.")


def _as_sources(value: Any) -> Any:
    """A lone path, or a list with lone paths in it, means weight 1."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


class Data(Section):
    """Where tokens come from."""

    train: list[Source] = Field(default_factory=list, description="Training blend: a path, or a list of paths or {path, weight}.")
    valid: dict[str, list[Source]] = Field(default_factory=dict, description="Named validation sets, each a path or a blend.")
    tokenizer: str | None = Field(None, description="Folder with tokenizer.json, that file, or a sentencepiece .model; checked against the dataset.")
    seq_length: Positive = Field(2048, description="Tokens per sample.")
    mock: bool = Field(False, description="Deterministic synthetic tokens instead of files.")
    eod_mask_loss: bool = Field(False, description="No loss on end-of-document tokens.")
    reset_position_ids: bool = Field(False, description="Position ids start again after each document. Rotary positions are relative, so this alone separates nothing: it goes with reset_attention_mask.")
    reset_attention_mask: bool = Field(False, description="A token sees only its own document.")
    num_workers: NonNegative = Field(1, description="Loader processes per rank.")
    cache_dir: str | None = Field(None, description="Where sample indices are kept; unset means beside the run.")

    @field_validator("train", mode="before")
    @classmethod
    def _train(cls, value: Any) -> Any:
        return _as_sources(value)

    @field_validator("valid", mode="before")
    @classmethod
    def _valid(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: _as_sources(sources) for name, sources in value.items()}
        return value


class Optim(Section):
    """AdamW and the learning-rate schedule."""

    lr: float = Field(3e-4, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field("cosine", description="Shape after warm-up; wsd holds the peak and decays linearly over the last decay_steps.")
    warmup_steps: NonNegative = Field(0, description="Steps of linear warm-up from 0.")
    decay_steps: Positive | None = Field(None, description="cosine, linear: step at which min_lr is reached (unset: train.steps). wsd: length of the final decay (unset: a tenth of train.steps).")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay; not applied to norms and biases.")
    beta1: Share = Field(0.9, description="Decay of the first moment.")
    beta2: Share = Field(0.95, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 means no clipping.")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="What AdamW keeps its two moments in: fp32 takes 8 bytes a parameter, bf16 4; updates are computed in fp32.")

    def rules(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.min_lr > self.lr:
            yield ("min_lr", "lr"), f"min_lr={self.min_lr} is above lr={self.lr}"
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if self.moments == "bf16" and beta > LARGEST_BETA_BF16:
                yield ("moments", name), (
                    f"moments=bf16 cannot follow {name}={beta}: a moment shrinks by 1 - {name} of itself in a step, and bf16 rounds away "
                    f"what is below 2^-8 of it; use {name} up to {LARGEST_BETA_BF16}, or moments=fp32")


class Train(Section):
    """Length, batch, precision and seed."""

    steps: Positive = Field(description="Optimizer steps of the whole run; the schedule is laid out over it.")
    global_batch_size: Positive = Field(description="Sequences per optimizer step, over all ranks.")
    micro_batch_size: Positive = Field(1, description="Sequences per forward pass on one rank.")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Compute precision; master weights and gradient reduction are fp32.")
    keep_logits: bool = Field(
        True, description="In bf16 and fp16, keep logits for backward: 2 bytes per token and vocabulary entry of a rank; off, and always in fp32, they are computed again.")
    seed: NonNegative = Field(1234, le=2**31 - 1, description="Seed of weights, dropout and data order.")
    max_nonfinite_steps: Positive = Field(3, description="Steps in a row with a loss or gradient that is not finite: each is skipped, and after so many the run saves and stops.")
    check_replicas: NonNegative = Field(
        0, description="Steps between comparisons of the parameters that several ranks hold, by hash; a copy that differs ends the run and names the rank. 0 means never.")
    stop_at_step: Positive | None = Field(None, description="Save and stop after this step, without changing the schedule.")
    time_limit_seconds: float | None = Field(None, gt=0, description="Save and stop when the process has run this long.")
    grace_seconds: float | None = Field(None, gt=0, description="What a stop signal leaves until the process is killed; a save that takes more than half of it is warned of. Unset: the variable TORCH_ELASTIC_SHUTDOWN_TIMEOUT, or 30, as torchrun and SLURM have it.")
    eval_every: NonNegative = Field(0, description="Steps between evaluations; 0 means only where asked at start and end.")
    eval_samples: Positive = Field(64, description="Sequences of each validation set that are evaluated.")
    eval_at_start: bool = Field(False, description="Evaluate before the first step.")
    eval_at_end: bool = Field(False, description="Evaluate after the last step.")


class Spikes(Section):
    """What is done about a step whose loss stands out above those before it."""

    policy: Literal["off", "log", "skip", "rewind"] = Field(
        "log", description="log: record it; skip: also leave the step's update out; rewind: go back to the newest checkpoint and pass over the data up to the spike.")
    window: Positive = Field(128, description="Steps before it that a loss is compared with.")
    threshold: float = Field(6.0, gt=0, description="Robust standard deviations above the window's median that make a spike (1.4826 times the median absolute deviation each).")
    minimum_steps: Positive = Field(32, description="Nothing is a spike before the window holds so many losses.")
    max_rewinds: NonNegative = Field(3, description="How often a run may go back; spikes after that are recorded only.")

    def rules(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.minimum_steps > self.window:
            yield ("minimum_steps", "window"), f"minimum_steps={self.minimum_steps} is above window={self.window}, which then never holds enough; raise window, or lower it"


class Checkpoint(Section):
    """What is loaded and what is kept."""

    init_from: str | None = Field(None, description="Folder whose weights (not optimizer or step) start a new run; ignored when the run resumes.")
    every: NonNegative = Field(0, description="Steps between saves; 0 means only at the end and on a stop.")
    keep: Positive = Field(2, description="Newest complete checkpoints that are kept.")
    save_at_end: bool = Field(True, description="Save after the last step.")
    background: bool = Field(True, description="Training goes on while a thread writes; needs host memory for a copy of what each rank saves. false: it waits until all is written.")
    on_save_error: Literal["continue", "stop"] = Field("stop", description="After a save that failed: end the run, or go on and try again at the next one. The save at an end or a stop must succeed.")


class Resume(Section):
    """How a run goes on from what was saved."""

    mode: str = Field("auto", description="auto: go on from the newest checkpoint of the run folder that verifies, start where there never was one; strict: there must be one; none: refuse a folder that has one; a path: go on from exactly this checkpoint, also of another run.")
    allow_change: list[str] = Field(default_factory=list, description="Settings that may differ from the checkpoint's although results then differ too: [optim.lr], or ['optim.*'].")

    @field_validator("allow_change", mode="before")
    @classmethod
    def _allow_change(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def rules(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.mode not in RESUME_MODES and "/" not in self.mode:
            yield ("mode",), f"mode={self.mode} is neither {', '.join(RESUME_MODES)} nor the path of a checkpoint folder (a path has a / in it: ./{self.mode})"


class Metrics(Section):
    """What is written about the run."""

    every: Positive = Field(1, description="Steps between metric records.")
    router: bool = Field(True, description="Record each router's load, drop rate, coefficient, entropy and sharpness.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events.")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Also write to Weights & Biases; it never stops a run.")
    wandb_project: str = Field("megatron_skywork", description="Project name there.")
    peak_tflops: float | None = Field(None, gt=0, description="Peak of one device for MFU; unset means looked up by the device's name, and no MFU where it is not known.")


class Watchdog(Section):
    """How long one rank may keep the job waiting before all ranks end, with a word on which one it was and where, and the stacks of all of them."""

    enabled: bool = Field(True, description="Watch for ranks that hang. Turn it off to debug: a breakpoint looks like a hang. A rank that dies or fails still ends the job.")
    start_seconds: float = Field(1800.0, gt=0, description="From the start of the process to the first step; and the first step, which may have to compile, if step_seconds is less.")
    step_seconds: float = Field(900.0, gt=0, description="One step, with its record.")
    evaluation_seconds: float = Field(3600.0, gt=0, description="One evaluation.")
    save_seconds: float = Field(1800.0, gt=0, description="One save; also the end of the run, from its last save or evaluation on.")


class Config(Section):
    """A whole run."""

    run_dir: str = Field("runs/default", description="Folder of this run: config, metrics, checkpoints, report.")
    model: Model = Field(description="Shape of the transformer.")
    moe: Moe | None = Field(None, description="Experts and routing; leave out for a dense model.")
    parallel: Parallel = Field(default_factory=Parallel, description="Split over ranks.")
    launch: Launch = Field(default_factory=Launch, description="Under SLURM.")
    data: Data = Field(default_factory=Data, description="Tokens.")
    optim: Optim = Field(default_factory=Optim, description="Optimizer and schedule.")
    train: Train = Field(description="Length, batch, precision, seed.")
    spikes: Spikes = Field(default_factory=Spikes, description="Loss spikes.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Loading and keeping.")
    resume: Resume = Field(default_factory=Resume, description="Going on from what was saved.")
    metrics: Metrics = Field(default_factory=Metrics, description="Records.")
    watchdog: Watchdog = Field(default_factory=Watchdog, description="Limits for ranks that hang.")
    megatron: dict[str, Any] = Field(default_factory=dict, description="Any field of megatron-core's TransformerConfig, passed through by name.")

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the MoE layers, in order; empty for a dense model."""
        if self.moe is None:
            return []
        return sorted(self.moe.layers) if self.moe.layers is not None else list(range(self.model.num_layers))
