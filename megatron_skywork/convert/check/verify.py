"""The step-0 gate of upcycling: the dense model and the mixture made from it, side by side on the same tokens, layer by layer.

Both are computed by `reference`, which knows neither the layouts nor the engines. An exact method (its manifest says so) must agree within the tolerance; an
inexact one is reported with its distance. A mixture whose experts come from several dense models has no single one to be equal to: its method is inexact, and
the distance is that from the model it is compared with.

Shape letters: T tokens, H hidden, C tokens of a chunk of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_skywork.convert.check.reference import Forward
from megatron_skywork.convert.check.reference_weights import HfLayers, Layers, OurLayers
from megatron_skywork.convert.check.sample_text import SAMPLE
from megatron_skywork.convert.check.text_tokens import encode, find_tokenizer, ids_tensor
from megatron_skywork.convert.compare_names import check_ours
from megatron_skywork.convert.files.checkpoint_folder import MANIFEST, check_plain, describe, is_ours
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.sources import open_source
from megatron_skywork.errors import CheckpointError

TOLERANCE = 1e-4
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
DEFAULT_TOKENS = 256
GIVEN, SAMPLED, RANDOM = "given", "sample", "random tokens"


@dataclass(frozen=True)
class Tokens:
    """Token ids of one sequence, and where they are from: `given`, `sample` (our text), `random tokens`."""

    ids: list[int]
    text: str


def tokens_for(folder: Path | str, vocab_size: int, text: str | None = None, count: int = DEFAULT_TOKENS, seed: int = 0) -> Tokens:
    """Token ids to compare on, at most `count`: of the text, of our own one where none is given, and random ones where the folder has no tokenizer.

    Args:
        folder: where tokenizer.json or tokenizer.model is, or is in its `hf/`.

    Raises:
        CheckpointError: a text was given and there is no tokenizer for it, or the tokenizer cannot be read.
    """
    if count < 1:
        raise CheckpointError(f"{count} tokens to compare on; at least one is needed")
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        if text is not None:
            raise CheckpointError(
                f"{folder}: has neither tokenizer.json nor tokenizer.model, so text cannot be made into tokens; leave the text out to compare on random tokens"
            )
        return Tokens(torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist(), RANDOM)
    ids = encode(tokenizer, [SAMPLE if text is None else text])[0][:count]
    if not ids:
        raise CheckpointError("the text to compare on gives no tokens")
    return Tokens(ids, SAMPLED if text is None else GIVEN)


def open_layers(folder: Path | str, dtype: torch.dtype) -> Layers:
    """A folder of either kind for the yardstick, after its names and shapes were checked.

    Raises:
        CheckpointError: incomplete, damaged, not what its config says, or trained with settings the yardstick does not know.
    """
    if not is_ours(folder):
        source = open_source(folder)
        described = source.description
        return HfLayers(source.reader, described.model, dtype, described.moe, described.naming)
    model, moe = describe(folder)
    check_plain(folder)
    reader = DistributedReader(folder)
    check_ours(reader, model, moe)
    return OurLayers(reader, model, moe, dtype)


def compare(
    dense: Path | str, other: Path | str, tokens: Tokens | Sequence[int] | None = None, progress: TextIO | None = None, precision: str = "auto"
) -> dict[str, Any]:
    """Distance between a dense model and the mixture made from it; each is a folder of ours or a Hugging Face one.

    Args:
        tokens: of one sequence; None takes `tokens_for(dense, ...)`.
        progress: where a line goes for every tenth of the layers.
        precision: fp32; fp64, in which rounding is far below the tolerance for models of any depth; or auto, which is fp32, and fp64 where an exact
            method is outside the tolerance in fp32: rounding grows with depth and with the size of the logits.

    Returns:
        largest_logit_difference, kl (mean over positions, KL(dense || other), nats), same_top_token (share of positions), largest_logit, layer_differences
        (per layer: the largest |difference| / |dense| of a token's residual stream), tokens, text (where they are from), tolerance, precision, exact (what the
        manifest says the method is; without one it is held to be), passed (None where the method is inexact and all logits are finite).

    Raises:
        CheckpointError: as `open_layers`; `dense` is a mixture; the two have other layers or tokens; tokens outside the vocabulary.
    """
    if precision != "auto":
        return _compare(dense, other, tokens, progress, precision)
    found = _compare(dense, other, tokens, progress, "fp32")
    if found["passed"] is not False or not math.isfinite(found["largest_logit_difference"]):
        return found
    if progress is not None:
        progress.write(f"verify: {found['largest_logit_difference']:.1e} in fp32, which may be rounding; once more in fp64\n")
        progress.flush()
    return _compare(dense, other, tokens, progress, "fp64")


@torch.no_grad()
def _compare(dense: Path | str, other: Path | str, tokens: Tokens | Sequence[int] | None, progress: TextIO | None, precision: str) -> dict[str, Any]:
    if precision not in PRECISIONS:
        raise CheckpointError(f"precision {precision!r}: use auto, {', '.join(PRECISIONS)}")
    left, right = open_layers(dense, PRECISIONS[precision]), open_layers(other, PRECISIONS[precision])
    _check_pair(dense, left, other, right)
    if tokens is None:
        tokens = tokens_for(dense, left.model.vocab_size)
    chosen = tokens if isinstance(tokens, Tokens) else Tokens(list(tokens), GIVEN)
    tokens_T = _checked(chosen, left.model.vocab_size)
    a, b = Forward(left, tokens_T), Forward(right, tokens_T)
    layer_differences = []
    for number, (dense_layer, other_layer) in enumerate(zip(left.layers(), right.layers(), strict=True), start=1):
        layer_differences.append(_relative(a.advance(dense_layer), b.advance(other_layer)))
        if progress is not None and (number % max(1, left.model.num_layers // 10) == 0 or number == left.model.num_layers):
            progress.write(f"verify: layer {number} of {left.model.num_layers}, largest relative difference {layer_differences[-1]:.1e}\n")
            progress.flush()
    distance = LogitDistance(len(tokens_T))
    for dense_TC, other_TC in zip(a.logits_TC(), b.logits_TC(), strict=True):
        distance.add(dense_TC, other_TC)
    found = distance.result()
    exact = _exact(Path(other))
    return {
        **found,
        "layer_differences": layer_differences,
        "tokens": len(tokens_T),
        "text": chosen.text,
        "tolerance": TOLERANCE,
        "precision": precision,
        "exact": exact,
        "passed": _passed(found["largest_logit_difference"], exact),
    }


def _passed(difference: float, exact: bool) -> bool | None:
    """Exact methods must be near; inexact ones must be a model: NaN and infinite logits are none."""
    return difference <= TOLERANCE if exact or not math.isfinite(difference) else None


def _check_pair(dense: Path | str, left: Layers, other: Path | str, right: Layers) -> None:
    if left.moe is not None:
        raise CheckpointError(f"{dense}: is a mixture of experts; the first folder must be the dense model")
    pairs = [(name, getattr(right.model, name), getattr(left.model, name)) for name in ("num_layers", "vocab_size", "hidden_size")]
    differing = [f"{name} {here} and {there}" for name, here, there in pairs if here != there]
    if differing:
        raise CheckpointError(f"{other} was not made from {dense}: {', '.join(differing)}")


def _checked(tokens: Tokens, vocab_size: int) -> torch.Tensor:
    if not tokens.ids:
        raise CheckpointError("no tokens to compare on")
    return ids_tensor(tokens.ids, vocab_size)


def _relative(dense_TH: torch.Tensor, other_TH: torch.Tensor) -> float:
    size_T = dense_TH.norm(dim=-1).clamp_min(torch.finfo(dense_TH.dtype).tiny)
    return float(((dense_TH - other_TH).norm(dim=-1) / size_T).max())


def _exact(folder: Path) -> bool:
    method = json_object(folder / MANIFEST).get("method") if (folder / MANIFEST).is_file() else None
    return bool(method.get("exact", True)) if isinstance(method, dict) else True


class LogitDistance:
    """Compares two models' logits chunk by chunk of the vocabulary, so that [T, V] is never whole.

    With p = softmax(a): KL = sum_v p_v (a_v - b_v) - (lse(a) - lse(b)), where the sum and both log-sum-exps are carried along from chunk to chunk,
    rescaled whenever a larger logit turns up. Sums are in fp64: the difference of two nearly equal log-sum-exps is what is wanted.
    """

    def __init__(self, count: int):
        lowest_T = torch.full((count,), float("-inf"), dtype=torch.float64)
        zeros_T = torch.zeros(count, dtype=torch.float64)
        self._top_a_T, self._top_b_T, self._sum_a_T, self._sum_b_T, self._weighted_T = lowest_T, lowest_T, zeros_T, zeros_T, zeros_T
        self._best_a_T = self._best_b_T = torch.zeros(count, dtype=torch.int64)
        self._difference = self._largest = torch.zeros((), dtype=torch.float64)
        self._start = 0

    def add(self, a_TC: torch.Tensor, b_TC: torch.Tensor) -> None:
        """The next chunk of both models."""
        a_TC, b_TC = a_TC.double(), b_TC.double()
        # torch.maximum keeps a NaN, which the built-in max would lose.
        self._difference = torch.maximum(self._difference, (a_TC - b_TC).abs().max())
        self._largest = torch.maximum(self._largest, a_TC.abs().max())
        top_a_T, at_a_T = a_TC.max(-1)
        top_b_T, at_b_T = b_TC.max(-1)
        self._best_a_T = torch.where(top_a_T > self._top_a_T, at_a_T + self._start, self._best_a_T)
        self._best_b_T = torch.where(top_b_T > self._top_b_T, at_b_T + self._start, self._best_b_T)
        top_a_T, top_b_T = torch.maximum(self._top_a_T, top_a_T), torch.maximum(self._top_b_T, top_b_T)
        share_a_TC, share_b_TC = (a_TC - top_a_T[:, None]).exp(), (b_TC - top_b_T[:, None]).exp()
        shrink_a_T, shrink_b_T = (self._top_a_T - top_a_T).exp(), (self._top_b_T - top_b_T).exp()
        self._sum_a_T = self._sum_a_T * shrink_a_T + share_a_TC.sum(-1)
        self._sum_b_T = self._sum_b_T * shrink_b_T + share_b_TC.sum(-1)
        self._weighted_T = self._weighted_T * shrink_a_T + (share_a_TC * (a_TC - b_TC)).sum(-1)
        self._top_a_T, self._top_b_T = top_a_T, top_b_T
        self._start += a_TC.shape[-1]

    def result(self) -> dict[str, float]:
        """largest_logit_difference, kl, same_top_token, largest_logit."""
        normalizers_T = (self._sum_a_T.log() + self._top_a_T) - (self._sum_b_T.log() + self._top_b_T)
        kl = float((self._weighted_T / self._sum_a_T - normalizers_T).mean())
        return {
            "largest_logit_difference": float(self._difference),
            "kl": kl if kl != kl else max(kl, 0.0),
            "same_top_token": float((self._best_a_T == self._best_b_T).double().mean()),
            "largest_logit": float(self._largest),
        }


def refuse_if_failed(result: dict[str, Any]) -> None:
    """Raise a CheckpointError for a result of an exact method that is outside the tolerance, and for one that is no model."""
    if not math.isfinite(result["largest_logit_difference"]):
        raise CheckpointError(
            f"the result computes NaN or infinite logits over {result['tokens']} tokens: the dense model is damaged, or a method's number too large"
        )
    if result["passed"] is False:
        first = next((number for number, value in enumerate(result["layer_differences"], start=1) if not value <= result["tolerance"]), None)
        where = f", the first layer to differ by more is number {first}" if first else ""
        raise CheckpointError(
            f"the result does not compute what the dense model computes: largest logit difference {result['largest_logit_difference']:.3g} "
            f"over {result['tokens']} tokens in {result['precision']}, {result['tolerance']:.0e} allowed (KL {result['kl']:.3g}{where})"
            + ("; if rounding is in doubt, compare in fp64 (--precision fp64)" if result["precision"] == "fp32" else "")
        )
