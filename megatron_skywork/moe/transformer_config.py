"""megatron-core's model configuration with room for what it does not know: our `moe` section, handed down to every router.

Layers of megatron-core receive one `TransformerConfig` and pass it on. A subclass carries the settings to `SkyworkRouter` without globals.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_skywork.config.schema import Moe


@dataclass
class SkyworkTransformerConfig(TransformerConfig):
    """A `TransformerConfig` whose routers follow `skywork`; None for a dense model.

    recompute_modules: also knows `router`, and `moe_act` without Transformer Engine's experts.
    """

    skywork: Moe | None = None
    recompute_modules: list[str] | None = None

    def __post_init__(self) -> None:
        asked = self.recompute_modules
        if asked is not None:
            # megatron-core would refuse what only modules of ours recompute.
            self.recompute_modules = [name for name in asked if name != "router" and (name != "moe_act" or self.moe_grouped_gemm)]
        super().__post_init__()
        self.recompute_modules = self.recompute_modules if asked is None else asked

    def recomputes(self, module: str) -> bool:
        """Whether this module of a layer is computed again in backward."""
        return self.recompute_granularity == "selective" and module in (self.recompute_modules or [])
