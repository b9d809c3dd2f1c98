"""Where every random number of an upcycling comes from: a generator of its own for every tensor.

The seed of a generator is the SHA-256 of (seed, names), so what is drawn for one expert's matrix depends on nothing that was drawn before it. Any number of
workers, in any order, writes the same bytes. torch's CPU generator keeps 32 bits of a seed: of n tensors, about n^2 / 2^33 pairs share their numbers, which is
no pair at all for the 2500 expert matrices of a 146B model. torch promises equal normal numbers for one torch version on one kind of processor only.
"""

from __future__ import annotations

import hashlib
import json

import torch


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for what `names` say is drawn: strings, numbers, or tuples of them, such as ("noise", "model.layers.3.mlp.up_proj.weight", expert).

    Raises:
        TypeError: a name that has no fixed spelling.
    """
    # JSON keeps 1 apart from "1", and ("a", "b") apart from ("a/b",).
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
