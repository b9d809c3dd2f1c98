"""The step-0 gate of upcycling: the dense model and the mixture made from it, side by side on the same tokens, layer by layer.

Both are computed by `reference`, which knows neither the layouts nor the engines. An exact method must agree within the tolerance; an inexact one
(copy with noise) is reported with its distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_skywork.convert.checkpoint_folder import MANIFEST, check_plain, describe
from megatron_skywork.convert.compare_names import check_ours
from megatron_skywork.convert.hf_files import read_json
from megatron_skywork.convert.import_hf import open_source
from megatron_skywork.convert.mcore_files import DistributedReader
from megatron_skywork.convert.reference import Forward, HfLayers, OurLayers
from megatron_skywork.errors import CheckpointError

TOLERANCE = 1e-4
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
DEFAULT_TOKENS = 256


def tokens_for(folder: Path | str, vocab_size: int, text: str | None = None, count: int = DEFAULT_TOKENS, seed: int = 0) -> list[int]:
    """Token ids to compare on: of a text, cut to `count`, where the folder has a tokenizer.json; else random ones.

    Raises:
        CheckpointError: a text was given and there is no tokenizer for it.
    """
    if text is None:
        return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so text cannot be made into tokens; leave the text out to compare on random tokens")
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(path)).encode(text).ids[:count]
    if not ids:
        raise CheckpointError("the text to compare on gives no tokens")
    return ids


@torch.no_grad()
def compare(dense: Path | str, moe_folder: Path | str, tokens: Sequence[int], progress: TextIO | None = None, precision: str = "fp32") -> dict[str, Any]:
    """Distance between a dense Hugging Face folder and a folder of ours.

    Args:
        tokens: token ids of one sequence.
        precision: fp32, or fp64, in which rounding is far below the tolerance for models of any depth.

    Returns:
        largest_logit_difference, kl (mean over positions, KL(dense || ours), nats), same_top_token (share of positions), tokens, largest_logit,
        tolerance, precision, exact (what the manifest says the method is), passed.
    """
    source = open_source(dense)
    model, moe = describe(moe_folder)
    check_plain(moe_folder)
    reader = DistributedReader(moe_folder)
    check_ours(reader, model, moe)
    if model.num_layers != source.description.model.num_layers or model.vocab_size != source.description.model.vocab_size:
        raise CheckpointError(
            f"{moe_folder}: has {model.num_layers} layers and {model.vocab_size} tokens, "
            f"{dense} has {source.description.model.num_layers} and {source.description.model.vocab_size}"
        )
    tokens_T = torch.tensor(list(tokens))
    if int(tokens_T.min()) < 0 or int(tokens_T.max()) >= model.vocab_size:
        raise CheckpointError(f"token ids lie between {int(tokens_T.min())} and {int(tokens_T.max())}, and the model knows 0 to {model.vocab_size - 1}")
    dtype = PRECISIONS[precision]
    left, right = HfLayers(source.reader, source.description.model, dtype), OurLayers(reader, model, moe, dtype)
    a, b = Forward(left, tokens_T), Forward(right, tokens_T)
    for number, (dense_layer, our_layer) in enumerate(zip(left.layers(), right.layers(), strict=True)):
        a.advance(dense_layer)
        b.advance(our_layer)
        if progress is not None and (number + 1) % max(1, model.num_layers // 10) == 0:
            progress.write(f"verify: layer {number + 1} of {model.num_layers}\n")
            progress.flush()
    return {**_distance(a.logits_TV(), b.logits_TV(), len(tokens_T), _exact(Path(moe_folder))), "precision": precision}


def _exact(folder: Path) -> bool:
    path = folder / MANIFEST
    return bool(read_json(path).get("method", {}).get("exact", True)) if path.is_file() else True


def _distance(dense_TV: torch.Tensor, ours_TV: torch.Tensor, count: int, exact: bool) -> dict[str, Any]:
    difference = float((dense_TV - ours_TV).abs().max())
    log_dense_TV, log_ours_TV = dense_TV.log_softmax(-1), ours_TV.log_softmax(-1)
    kl = float((log_dense_TV.exp() * (log_dense_TV - log_ours_TV)).sum(-1).mean())
    same = float((dense_TV.argmax(-1) == ours_TV.argmax(-1)).float().mean())
    return {
        "largest_logit_difference": difference,
        "kl": max(kl, 0.0),
        "same_top_token": same,
        "largest_logit": float(dense_TV.abs().max()),
        "tokens": count,
        "tolerance": TOLERANCE,
        "exact": exact,
        # `not (x <= y)` would let NaN pass; this does not.
        "passed": (difference <= TOLERANCE) if exact else None,
    }


def refuse_if_failed(result: dict[str, Any]) -> None:
    """Raise a CheckpointError for a result of an exact method that is outside the tolerance."""
    if result["passed"] is False:
        raise CheckpointError(
            f"the result does not compute what the dense model computes: largest logit difference {result['largest_logit_difference']:.3g} "
            f"over {result['tokens']} tokens, {result['tolerance']:.0e} allowed (KL {result['kl']:.3g}); "
            "if rounding is in doubt, compare in fp64 (--precision fp64)"
        )
