"""megatron-core's model configuration with room for what it does not know: our `moe` section, handed down to every router.

Layers of megatron-core receive one `TransformerConfig` and pass it on. A subclass carries the settings to `SkyworkRouter` without globals.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_skywork.config.schema import Moe


@dataclass
class SkyworkTransformerConfig(TransformerConfig):
    """A `TransformerConfig` whose routers follow `skywork`; None for a dense model."""

    skywork: Moe | None = None
