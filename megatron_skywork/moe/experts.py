"""`GroupedExperts`: the experts of one MoE layer and rank, for the `torch` backend.

Takes the place of megatron-core's SequentialMLP. All experts of a rank lie in two parameters, as the grouped product wants them, and are drawn expert by
expert as SequentialMLP draws them, so the same seed gives the same model. In a checkpoint every expert is a tensor of its own under the key that
SequentialMLP and Transformer Engine's grouped experts use, so checkpoints, optimizer state included, go from one to the other.

With expert tensor parallelism a rank holds rows of W1 (its part of the gate and of the up projection) and columns of W2; the dispatcher gathers the tokens
before and sums the parts afterwards.

Shapes: R rows sorted by expert, E experts of this rank, H hidden, F inner width on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from megatron_skywork import device
from megatron_skywork.moe.grouped_mlp import grouped_mlp

FC1_KEY, FC2_KEY = "linear_fc1.weight", "linear_fc2.weight"
_EXTRA = "extra_state_of_expert_"


class GroupedExperts(MegatronModule):
    """SwiGLU experts of this rank, without biases.

    Parameters:
        weight1: [E, 2 F, H], gate rows before up rows.
        weight2: [E, H, F].

    Args:
        num_local_experts: E.
        config: widths, dtype and initialization.
        pg_collection: ep, expt_tp and expt_dp are used.
        kwargs: whatever else this version of megatron-core gives its experts.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        assert config.moe_ffn_hidden_size is not None
        width, hidden = config.moe_ffn_hidden_size // self.tp_group.size(), config.hidden_size
        make = {"dtype": config.params_dtype, "device": device.current()}
        self.weight1 = torch.nn.Parameter(torch.empty(num_local_experts, 2 * width, hidden, **make))
        self.weight2 = torch.nn.Parameter(torch.empty(num_local_experts, hidden, width, **make))
        set_tensor_model_parallel_attributes(self.weight1, is_parallel=True, dim=1, stride=2)
        set_tensor_model_parallel_attributes(self.weight2, is_parallel=True, dim=2, stride=1)
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion
        if config.perform_initialization:
            self.reset_parameters()
        self.register_load_state_dict_pre_hook(_leave_out_extra_states)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights, from the generator that expert-parallel ranks have each for themselves."""
        for expert in range(self.num_local_experts):
            for weight, initialize in ((self.weight1, self.config.init_method), (self.weight2, self.config.output_layer_init_method)):
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    initialize(weight[expert])

    def forward(self, rows_RH: Tensor, tokens_per_expert: Tensor, probs_R: Tensor) -> tuple[Tensor, None]:
        """Weighted outputs [R, H], and no bias.

        Args:
            rows_RH: rows sorted by expert; more than the sum of `tokens_per_expert` are allowed, and then the last are not computed.
            tokens_per_expert: int64 [E].
            probs_R: routing weights.
        """
        ends_E = tokens_per_expert.cumsum(0).to(device=rows_RH.device, dtype=torch.int32)
        # A CPU's grouped product is faster than one product after the other that saves the sum.
        accumulates = self.gradient_accumulation_fusion and device.has_gpu()
        return grouped_mlp(rows_RH, probs_R.float(), self.weight1, self.weight2, ends_E, accumulates), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Both weights, each as a factory that makes one sharded tensor for every expert and half, and the empty states beside them."""
        sharded: dict[str, Any] = {}
        for name, key, parts, axis in (("weight1", FC1_KEY, 2, 0), ("weight2", FC2_KEY, 1, 1)):
            sharded[f"{prefix}{name}"] = ShardedTensorFactory(
                f"{prefix}experts.{key}",
                getattr(self, name),
                self._split(sharded_offsets, parts, axis),
                _merge(parts),
                replica_id=(0, 0, self.dp_group.rank()),
            )
            sharded.update(self._extra_states(f"{prefix}{{}}experts.{key.removesuffix('weight')}_extra_state", sharded_offsets))
        return sharded

    def _extra_states(self, name: str, sharded_offsets: tuple[Any, ...]) -> dict[str, Any]:
        """The empty states beside each expert's matrix that other classes of experts ask a checkpoint for."""
        first, total = self.ep_group.rank() * self.num_local_experts, self.ep_group.size() * self.num_local_experts
        return {
            name.format(f"{_EXTRA}{expert}."): make_sharded_object_for_checkpoint(
                None, name.format(""), (*sharded_offsets, (len(sharded_offsets), first + expert, total)), (0, self.tp_group.rank(), self.dp_group.rank())
            )
            for expert in range(self.num_local_experts)
        }

    def _split(self, sharded_offsets: tuple[Any, ...], parts: int, axis: int) -> Any:
        """What makes sharded tensors of a weight: `parts` halves of each expert's matrix, cut over expert-tensor-parallel ranks along `axis`."""
        axes, first, total = len(sharded_offsets), self.ep_group.rank() * self.num_local_experts, self.ep_group.size() * self.num_local_experts
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        @torch.no_grad()
        def split(key: str, weight: Tensor, replica_id: Any, flattened_range: slice | None) -> list[Any]:
            assert flattened_range is None, "optimizer state is saved in the shape of the weights (fully_reshardable)"
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    *sharded_offsets,
                    (axes, first + expert, total),
                    (axes + 1 + axis, part * tp_size + tp_rank, parts * tp_size),
                    replica_id=replica_id,
                    prepend_axis_num=axes + 1,
                )
                for expert, matrix in enumerate(weight)
                for part, half in enumerate(matrix.chunk(parts, dim=axis))
            ]

        return split


def _leave_out_extra_states(module: GroupedExperts, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """What came with a checkpoint for other classes of experts; nothing is in it."""
    for key in [key for key in state if key.startswith(prefix + _EXTRA)]:
        del state[key]


def _merge(parts: int) -> Any:
    """The inverse of `GroupedExperts._split` for loaded tensors."""

    @torch.no_grad()
    def merge(halves: list[Tensor]) -> Tensor:
        return torch.stack([torch.cat(halves[first : first + parts]) for first in range(0, len(halves), parts)])

    return merge
