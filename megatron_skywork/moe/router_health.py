"""Numbers that say whether a router is well: is the gate sharp or flat, is the work shared, is an expert dead.

* Entropy of the gate in nats, mean over tokens: log(E) is a gate that has no opinion, 0 one that is always certain.
* Max1/Max2, the largest over the second largest gate probability, mean over tokens (report, section 4.1: near 1 means that the choice between
  experts has become a coin toss; without normalization it falls to 1.005). Max2/Max3 likewise.
* Load, from each expert's share of the routed assignments: largest over mean, coefficient of variation, percentiles, and experts that get
  almost nothing.

What is counted in every forward pass works on the device and waits for nothing; `summarize_load` is for records. Shapes: T tokens, E experts, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_skywork import device

# A gate whose second probability underflows would make one token's ratio infinite and the mean with it.
LARGEST_RATIO = 1e6
PERCENTILES = (0.1, 0.5, 0.9)


@device.fused
def gate_entropy(probs_TE: Tensor) -> Tensor:
    """Entropy of each token's gate in nats, [T], from 0 to log(E)."""
    return torch.special.entr(probs_TE).sum(dim=-1)


@device.fused
def gate_ratios(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Max1/Max2 and Max2/Max3 of each token's gate, [T] each, at least 1 and capped at `LARGEST_RATIO`. With two experts the second ratio is 1."""
    largest = probs_TE.topk(min(3, probs_TE.shape[-1]), dim=-1).values
    smallest = torch.finfo(largest.dtype).tiny
    ratios = (largest[..., :-1].clamp(min=smallest) / largest[..., 1:].clamp(min=smallest)).clamp(max=LARGEST_RATIO)
    return ratios[..., 0], ratios[..., 1] if ratios.shape[-1] > 1 else torch.ones_like(ratios[..., 0])


@dataclass(frozen=True)
class LoadSummary:
    """How unevenly a layer's experts are used; tensors of the load's leading shape."""

    max_over_mean: Tensor
    """1 for an even load, E when one expert gets everything."""
    variation: Tensor
    """Standard deviation over mean of the shares (over all experts, so biased): 0 for an even load."""
    percentiles: Tensor
    """[3, ...]: the 10th, 50th and 90th percentile over experts of load / even share."""
    is_dead: Tensor
    """[..., E] bool: experts below `dead_below` of the even share."""


def summarize_load(load_LE: Tensor, dead_below: float = 0.01) -> LoadSummary:
    """Summary of each row of `load_LE`.

    Args:
        load_LE: shares or counts per expert along the last axis.
        dead_below: an expert is dead when it gets less than this part of the even share.
    """
    relative_LE = load_LE / load_LE.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(load_LE.dtype).tiny)
    return LoadSummary(
        max_over_mean=relative_LE.amax(dim=-1),
        variation=relative_LE.std(dim=-1, unbiased=False),
        percentiles=torch.quantile(relative_LE, torch.tensor(PERCENTILES, dtype=load_LE.dtype, device=load_LE.device), dim=-1),
        is_dead=relative_LE < dead_below,
    )
