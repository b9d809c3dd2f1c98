"""Build this rank's model chunks: megatron-core's GPTModel for every pipeline stage, in half precision where asked, wrapped for data parallelism."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_skywork import device
from megatron_skywork.config.schema import Config
from megatron_skywork.model.gpt_model import SkyworkGPTModel
from megatron_skywork.model.layer_spec import block_spec
from megatron_skywork.model.transformer_config import choose_backend, recomputing_first, transformer_config
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig
from megatron_skywork.plan.stages import recomputed_layers
from megatron_skywork.weight_gradients import accumulate_in


def build_chunks(config: Config, transformer: SkyworkTransformerConfig | None = None) -> list[GPTModel]:
    """This rank's GPTModels, one per virtual stage, on this rank's device, with fresh weights.

    Args:
        transformer: built already; otherwise made from `config`.
    """
    device.compile_fused(config.model.compile)
    backend = choose_backend(config)
    transformer = transformer or transformer_config(config, backend)
    return [_chunk(config, _of_chunk(config, transformer, stage), backend, stage) for stage in _virtual_stages(config)]


def _virtual_stages(config: Config) -> Iterator[int | None]:
    yield from range(config.parallel.vpp) if config.parallel.vpp > 1 else [None]


def _of_chunk(config: Config, transformer: SkyworkTransformerConfig, vp_stage: int | None) -> SkyworkTransformerConfig:
    """The configuration that this rank's chunk follows. Schedules and data parallelism read that of the first chunk."""
    if config.parallel.recompute_layers is None:
        return transformer
    piece = (vp_stage or 0) * config.parallel.pp + parallel_state.get_pipeline_model_parallel_rank()
    return recomputing_first(transformer, recomputed_layers(config)[piece])


def _chunk(config: Config, transformer: SkyworkTransformerConfig, backend: str, vp_stage: int | None) -> GPTModel:
    pp_rank, pp_size = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()
    is_first = pp_rank == 0 and vp_stage in (None, 0)
    is_last = pp_rank == pp_size - 1 and vp_stage in (None, config.parallel.vpp - 1)
    with warnings.catch_warnings():
        # megatron-core 0.19 announces a successor of GPTModel; this file and gpt_model.py are the only ones that would change.
        warnings.simplefilter("ignore", DeprecationWarning)
        chunk = SkyworkGPTModel(
            transformer,
            block_spec(transformer, backend, config.moe_layers, vp_stage, pp_rank),
            vocab_size=config.model.padded_vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,
            rope_scaling=config.model.rope_scaling_factor is not None,
            rope_scaling_factor=config.model.rope_scaling_factor or 1.0,
            vp_stage=vp_stage,
            keep_logits=config.train.keep_logits,
        )
    _mark_experts(chunk)
    return chunk.to(device.current())


def _mark_experts(chunk: GPTModel) -> None:
    """Have the gradients of every expert reduced over the ranks that hold it.

    megatron-core marks experts as such only when they are spread (ep > 1) and otherwise reduces them over the attention's data-parallel ranks, which are
    others as soon as the tensor-parallel degrees of attention and experts differ.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]


def wrap_for_training(config: Config, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Half precision and data parallelism around each chunk. Gradients are kept and reduced in fp32."""
    transformer = chunks[0].config
    data_parallel = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap,
        overlap_param_gather=config.parallel.overlap,
    )
    wrapped = []
    for chunk in chunks:
        if config.megatron.get("gradient_accumulation_fusion", True):
            accumulate_in(chunk, transformer.params_dtype)
        module: torch.nn.Module = Float16Module(transformer, chunk) if config.train.precision != "fp32" else chunk
        # Bucketing stays on for every chunk. Turned off, megatron-core coalesces bf16 weights and fp32 routers into one collective, and gloo mixes them up.
        wrapped.append(DistributedDataParallel(transformer, data_parallel, module))
    for chunk in wrapped:
        chunk.broadcast_params()
        _reduce_nothing_alone(chunk)
    return wrapped


def _reduce_nothing_alone(chunk: DistributedDataParallel) -> None:
    """Leave out the reduction of gradients that no other rank has; gloo would copy all of them twice to find that out."""
    for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        # Overlapped, megatron-core waits for the handle of a reduction that it has started.
        is_alone = group.intra_distributed_optimizer_instance_size == 1 and not chunk.ddp_config.overlap_grad_reduce
        if is_alone and all(bucket.gradient_scaling_factor == 1.0 for bucket in group.buckets):
            group.start_grad_sync = _nothing_to_reduce


def _nothing_to_reduce(force_all_reduce: bool | None = False) -> None:
    """Takes the place of a bucket group's `start_grad_sync`."""


@contextlib.contextmanager
def parameters_gathered(chunks: list[Any]) -> Iterator[None]:
    """Inside, weights are those of the last update, on every rank. With overlap they are gathered only when the next training forward comes by."""
    lazy = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in lazy:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in lazy:
            chunk.enable_forward_pre_hook()


def unwrap(chunk: Any) -> GPTModel:
    """The GPTModel inside its wrappers. Checkpoint keys are taken here: one level higher every key would begin with `module.`."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
