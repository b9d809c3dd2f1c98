"""megatron-core's GPTModel whose losses never go through whole logits; without labels it gives logits as before.

The loss is computed inside the output layer's forward and not beside it, because data parallelism with overlapped parameter gathering waits for a
module's weights in a hook before that module's forward.

Shapes: S sequence, B batch, H hidden, T tokens = S * B. Labels and losses are [B, S] outside and [S, B] inside, as in megatron-core.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_skywork.model.output_loss import output_losses


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, which gives losses instead of logits where it is given labels."""

    keep_logits: bool

    def forward(
        self, input_SBH: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None, labels_SB: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [S, B, V] or losses [S, B], and no bias.

        Args:
            input_SBH: hidden states; with sequence parallelism this rank's part of the sequence.
            weight: the embedding's, where it is shared.
            runtime_gather_output: for logits, whether every rank gets the whole vocabulary.
            labels_SB: of the whole sequence.
        """
        if labels_SB is None:
            return super().forward(input_SBH, weight, runtime_gather_output)
        # Both sum the gradient over ranks on the way back: one scatters it along the sequence, the other leaves it whole.
        whole_sequence = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        hidden_SBH = whole_sequence(input_SBH, group=self.tp_group)
        loss_T = output_losses(
            hidden_SBH.flatten(0, 1),
            self.weight if weight is None else weight,
            labels_SB.flatten(),
            first_entry=self.tp_group.rank() * self.output_size_per_partition,
            tp_group=self.tp_group,
            keep_logits=self.keep_logits,
            accumulates=self.gradient_accumulation_fusion,
        )
        return loss_T.view_as(labels_SB), None


class SkyworkGPTModel(GPTModel):
    """GPTModel with `OutputLayer`.

    Args:
        keep_logits: whether 16-bit logits wait for backward.
        args, kwargs: GPTModel's.
    """

    def __init__(self, *args: Any, keep_logits: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._losses_from_blocks = self.post_process and type(self.output_layer) is ColumnParallelLinear and not _wants_logits(self.config)
        if self._losses_from_blocks:
            # GPTModel names the class of its output layer itself, and a second layer would draw its weights from another place of the random stream.
            self.output_layer.__class__ = OutputLayer
            self.output_layer.keep_logits = keep_logits

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if labels is None or not self._losses_from_blocks:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        loss_SB, _ = self.output_layer(hidden_states, weight=weight, labels_SB=labels.t().contiguous())
        return loss_SB.t().contiguous()


def _wants_logits(config: TransformerConfig) -> bool:
    """Whether the `megatron:` section asks for something of megatron-core's that works on whole logits, among them its own fused losses."""
    names = ("cross_entropy_loss_fusion", "defer_embedding_wgrad_compute", "mtp_num_layers", "use_mup")  # use_mup: since 0.19
    return any(getattr(config, name, None) for name in names)
