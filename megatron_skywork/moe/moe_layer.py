"""`SkyworkMoELayer`: megatron-core's MoE layer made of our router, our experts and our all-to-all dispatcher, for the `torch` backend."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_skywork.moe.dispatcher import SkyworkTokenDispatcher
from megatron_skywork.moe.experts import GroupedExperts
from megatron_skywork.moe.router import SkyworkRouter
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig


class SkyworkMoELayer(MoELayer):
    """A mixture of experts. It knows its submodules, so a layer's spec names this class and nothing else.

    megatron-core builds the dispatcher inside its constructor, by name; it is exchanged afterwards. The allgather dispatcher stays megatron-core's.
    """

    def __init__(self, config: SkyworkTransformerConfig, *, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        assert config.num_moe_experts is not None
        submodules = moe_submodules(get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=config.num_moe_experts))
        submodules.router, submodules.experts = SkyworkRouter, GroupedExperts
        super().__init__(config, submodules, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher: Any
        if isinstance(self.token_dispatcher, MoEAlltoAllTokenDispatcher):
            self.token_dispatcher = SkyworkTokenDispatcher(self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection)
            if self.use_shared_expert and self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)


def moe_submodules(mlp: Any) -> MoESubmodules:
    """The submodules in megatron-core's spec of an MoE layer: a ModuleSpec's in 0.16, an argument of a partial in 0.19."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
