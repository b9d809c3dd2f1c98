"""Who takes part in benchmarks/train_step.py: this framework, plain megatron-core, and transformers' Mixtral, each built as its users build it.

All train the same model: RMSNorm, SwiGLU experts, rotary positions, no bias, no dropout, untied output layer, AdamW with clipping at 1.0, fp32 master
weights and gradients in fp32 where the precision is bf16 (transformers: autocast over fp32 weights, as its Trainer does with bf16=True). All read the same
token ids, from the host, and read their loss back at the end of a step, as a training loop that logs does.

* skywork-on, skywork-off: train/step.py with the plain torch backend; with everything of the report and the router's record, and without.
* skywork-te: as skywork-on, with Transformer Engine.
* core-local: megatron-core's GPTModel with `get_gpt_layer_local_spec`, its router, schedule, DDP, distributed optimizer and the Adam it falls back to without
  extras; every switch that is about speed as it comes.
* core-te: megatron-core with its Transformer Engine spec, grouped GEMM and the fusions that come with it.
* hf: MixtralForCausalLM with its default experts and scaled_dot_product_attention, torch's fused AdamW. Its grouped GEMM takes the type of the weights, so
  under autocast its experts compute in fp32. hf-eager: the same with experts one by one, which autocast brings to bf16. hf-pure: weights and moments in bf16.

A contender imports what it needs when it is built: each has a process of its own, and its memory is not charged with another's libraries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from train_step_parts import replace_call
from train_step_workload import LEARNING_RATE, Workload, make_config

from megatron_skywork import device
from megatron_skywork.errors import UserError

# As the defaults of this framework's `optim` section.
BETAS, EPSILON, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
NUM_BATCHES = 8
# Above any difference of a fresh router's logits, and exact in bf16.
_CHOSEN = 16.0
Batch = dict[str, Tensor]


def make_batches(work: Workload) -> list[list[Batch]]:
    """The micro-batches of `NUM_BATCHES` steps. Token ids follow Zipf's law, as words do: frequent tokens make a real router's load uneven."""
    shape = work.shape
    generator = torch.Generator().manual_seed(work.seed)
    weights = 1.0 / torch.arange(2, shape.vocab + 2, dtype=torch.float64)
    position_ids = torch.arange(shape.seq_length).repeat(shape.micro_batch, 1)

    def micro_batch() -> Batch:
        text = torch.multinomial(weights, shape.micro_batch * (shape.seq_length + 1), replacement=True, generator=generator)
        text = text.view(shape.micro_batch, shape.seq_length + 1)
        ones = torch.ones(shape.micro_batch, shape.seq_length)
        return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(), "loss_mask": ones, "position_ids": position_ids}

    return [[micro_batch() for _ in range(shape.micro_batches)] for _ in range(NUM_BATCHES)]


class Contender(ABC):
    """A model that is ready to take steps.

    Attributes:
        model: for the parts to be found in.
        calls: methods that are a part of their own: part -> (owner, name).
    """

    model: torch.nn.Module
    calls: dict[str, Sequence[tuple[Any, str]]]

    def __init__(self, work: Workload):
        self.work, self.batches, self._done = work, make_batches(work), 0

    def step(self) -> float:
        """One optimizer step on the next batch; its loss."""
        self._done += 1
        return self.train(self.batches[(self._done - 1) % NUM_BATCHES])

    @abstractmethod
    def train(self, micro_batches: list[Batch]) -> float:
        """One optimizer step on these; its loss."""

    @contextlib.contextmanager
    def balanced(self, wanted: bool) -> Iterator[None]:
        """Inside, and if wanted, every router spreads its tokens evenly."""
        if wanted:
            raise UserError(f"{type(self).__name__} has no force-balanced router")
        yield


class _OnMegatronCore(Contender):
    """What the contenders on megatron-core share: its groups, and a router that can be told to spread tokens evenly."""

    def _start(self) -> None:
        device.prepare()
        from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

        from megatron_skywork import parallel

        config = make_config(self.work, features=False)
        place = parallel.start(config)
        init_num_microbatches_calculator(place.rank, None, config.train.global_batch_size, config.train.micro_batch_size, place.dp_size)

    @contextlib.contextmanager
    def balanced(self, wanted: bool) -> Iterator[None]:
        from megatron.core.transformer.moe.router import Router

        routers = [module for module in self.model.modules() if isinstance(module, Router)] if wanted else []
        undo = [replace_call(router, "gating", evenly(router.gating, self.work.shape.topk)) for router in routers]
        try:
            yield
        finally:
            for back in undo:
                back()


def evenly(gating: Any, topk: int) -> Any:
    """A gate that computes its logits and then prefers experts t K .. t K + K - 1 (mod E) for token t: the same work, and every expert gets the same."""

    @functools.lru_cache(maxsize=1)
    def preference(tokens: int, experts: int) -> Tensor:
        chosen = (torch.arange(tokens * topk, device=device.current()) % experts).view(tokens, topk)
        return torch.zeros(tokens, experts, device=device.current()).scatter_(1, chosen, _CHOSEN)

    def gate(*args: Any, **kwargs: Any) -> Tensor:
        logits = gating(*args, **kwargs)
        experts = logits.shape[-1]
        return logits + preference(logits.numel() // experts, experts).view(logits.shape).to(logits.dtype)

    return gate


class Skywork(_OnMegatronCore):
    """This framework's own training step."""

    def __init__(self, work: Workload, features: bool, backend: str):
        super().__init__(work)
        self._start()
        from megatron_skywork.metrics.throughput import PhaseTimer
        from megatron_skywork.model.build import build_chunks, wrap_for_training
        from megatron_skywork.optim.build import build_optimizer
        from megatron_skywork.train.step import TrainStep

        self._config = make_config(work, features=features, backend=backend)
        chunks = wrap_for_training(self._config, build_chunks(self._config))
        optimizer = build_optimizer(self._config, chunks)
        self.model = chunks[0]
        self._step = TrainStep(self._config, chunks, optimizer, work.shape.micro_batches, PhaseTimer())
        self.calls = {
            "optimizer": [(self._step, "_update"), (chunks[0], "zero_grad_buffer")],
            "communication": [(chunks[0].config, "finalize_model_grads_func")],
        }

    def train(self, micro_batches: list[Batch]) -> float:
        from megatron_skywork.moe.router_state import gather_router_metrics

        result = self._step(self._done, iter(micro_batches))
        if self._config.metrics.router:
            json.dumps(gather_router_metrics(result.routers, None))
        assert result.loss_sum is not None and result.num_tokens is not None
        return float(result.loss_sum / result.num_tokens)


class MegatronCore(_OnMegatronCore):
    """megatron-core without this framework, driven as its own example drives it."""

    def __init__(self, work: Workload, transformer_engine: bool):
        super().__init__(work)
        self._start()
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.transformer_config import TransformerConfig

        shape, half = work.shape, work.precision == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        fusions = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "moe_permute_fusion", "moe_grouped_gemm", "cross_entropy_loss_fusion")
        config = TransformerConfig(
            num_layers=shape.layers, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn, num_attention_heads=shape.heads,
            num_moe_experts=shape.experts, moe_router_topk=shape.topk, normalization="RMSNorm", gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0,
            bf16=half, params_dtype=dtype, pipeline_dtype=dtype, **dict.fromkeys(fusions, True) if transformer_engine else {},
        )  # fmt: skip
        if transformer_engine:
            spec = get_gpt_layer_with_transformer_engine_spec(num_experts=shape.experts, moe_grouped_gemm=True)
        else:
            spec = get_gpt_layer_local_spec(num_experts=shape.experts, normalization="RMSNorm")
        model: Any = GPTModel(
            config, spec, vocab_size=make_config(work, features=False).model.padded_vocab_size, max_sequence_length=shape.seq_length,
            position_embedding_type="rope", share_embeddings_and_output_weights=False,
        ).to(device.current())  # fmt: skip
        model = Float16Module(config, model) if half else model
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = self._chunk = DistributedDataParallel(config, settings, model)
        adam = OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_eps=EPSILON, clip_grad=CLIP,
            bf16=half, params_dtype=dtype, use_distributed_optimizer=True,
        )  # fmt: skip
        self._optimizer = get_megatron_optimizer(adam, [self._chunk], use_gloo_process_groups=False)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self._optimizer.scale_loss
        config.no_sync_func = self._chunk.no_sync
        self.calls = {
            "optimizer": [(self._optimizer, "step"), (self._optimizer, "zero_grad"), (self._chunk, "zero_grad_buffer")],
            "communication": [(config, "finalize_model_grads_func")],
        }

    def train(self, micro_batches: list[Batch]) -> float:
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        shape = self.work.shape
        self._chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step, data_iterator=iter(micro_batches), model=[self._chunk], num_microbatches=shape.micro_batches,
            seq_length=shape.seq_length, micro_batch_size=shape.micro_batch, forward_only=False,
        )  # fmt: skip
        self._optimizer.step()
        return float(torch.stack([loss["loss"] for loss in losses]).mean())


def _forward_step(batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
    batch = {name: tensor.to(device.current(), non_blocking=True) for name, tensor in next(batches).items()}
    return chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), functools.partial(_mean_loss, batch["loss_mask"])


def _mean_loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (losses_BS.float() * loss_mask_BS).sum() / loss_mask_BS.sum()
    return loss, {"loss": loss.detach()}


class Mixtral(Contender):
    """transformers' Mixtral in a plain PyTorch loop."""

    def __init__(self, work: Workload, experts: str | None = None, pure: bool = False):
        super().__init__(work)
        from transformers import MixtralConfig, MixtralForCausalLM

        if pure and work.precision != "bf16":
            raise UserError(f"bf16 weights are another precision than {work.precision}")
        shape = work.shape
        chosen = {} if experts is None else {"experts_implementation": experts}
        config = MixtralConfig(
            vocab_size=make_config(work, features=False).model.padded_vocab_size, hidden_size=shape.hidden, intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads, num_local_experts=shape.experts,
            num_experts_per_tok=shape.topk, max_position_embeddings=shape.seq_length, output_router_logits=True, router_aux_loss_coef=0.01,
            sliding_window=None, use_cache=False, tie_word_embeddings=False, attn_implementation="sdpa",
            **chosen,
        )  # fmt: skip
        torch.manual_seed(work.seed)
        with device.current():
            self.model = MixtralForCausalLM(config).to(torch.bfloat16 if pure else torch.float32).train()
        self._autocast = work.precision == "bf16" and not pure
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True)
        self.calls = {"optimizer": [(self, "update")]}

    def train(self, micro_batches: list[Batch]) -> float:
        total: Tensor | float = 0.0
        for batch in micro_batches:
            tokens_BS, labels_BS = (batch[name].to(device.current(), non_blocking=True) for name in ("tokens", "labels"))
            with torch.autocast(device.current().type, torch.bfloat16, enabled=self._autocast):
                loss = self.model(input_ids=tokens_BS, labels=labels_BS, shift_labels=labels_BS).loss / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
        self.update()
        return float(total)

    def update(self) -> None:
        """Clip, step, forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()


def require_installed(name: str) -> None:
    """Answer before anything is built.

    Raises:
        UserError: the contender `name` needs what is not here.
    """
    if name.startswith("hf") and importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed")
    if not name.endswith("-te"):
        return
    if not device.has_gpu():
        raise UserError("Transformer Engine needs a GPU")
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError("Transformer Engine is not installed")


CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    "skywork-on": functools.partial(Skywork, features=True, backend="torch"),
    "skywork-off": functools.partial(Skywork, features=False, backend="torch"),
    "skywork-te": functools.partial(Skywork, features=True, backend="te"),
    "core-local": functools.partial(MegatronCore, transformer_engine=False),
    "core-te": functools.partial(MegatronCore, transformer_engine=True),
    "hf": Mixtral,
    "hf-eager": functools.partial(Mixtral, experts="eager"),
    "hf-pure": functools.partial(Mixtral, pure=True),
}
