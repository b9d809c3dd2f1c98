"""A checkpoint of ours -> the same weights in a weights-only folder, cut for a layout: optimizer state stays behind, and every rank of that layout reads the
bytes it needs and no others.

A distributed checkpoint loads under any layout as it is. Its boxes decide how much is read for that: a tensor-parallel rank that wants some rows reads every
box they lie in. Layers and experts have boxes of their own anyway, so pipeline and expert parallelism need no cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_skywork.convert.as_they_are import AsTheyAre
from megatron_skywork.convert.export_hf import cast_to
from megatron_skywork.convert.files.checkpoint_folder import count_parameters, layout_summary, step_of
from megatron_skywork.convert.files.output_folder import check_outside
from megatron_skywork.convert.import_hf import our_folder
from megatron_skywork.convert.sources import open_ours
from megatron_skywork.convert.streaming.mcore_target import FILE_BYTES, Cut, McoreTarget
from megatron_skywork.convert.streaming.run import Job, Options, run
from megatron_skywork.convert.streaming.units import units_of
from megatron_skywork.convert.table import Weight, extra_states, weights
from megatron_skywork.errors import ConfigError

_PLAIN = Options()
# The axis that tensor parallelism cuts, by the kind of weight; what is not here lies whole on every rank.
_ROWS, _COLUMNS = ("vocab", "qkv", "qkv_bias", "fc1", "shared_fc1"), ("proj", "fc2", "shared_fc2")
_EXPERT_AXES = {"expert_fc1": 1, "expert_fc2": 2}


def reshard(
    folder: Path | str, out: Path | str, tp: int = 1, etp: int = 1, dtype: str = "auto", options: Options = _PLAIN, file_bytes: int = FILE_BYTES
) -> dict[str, Any]:  # fmt: skip
    """Write a weights-only folder from any checkpoint of ours.

    Args:
        tp, etp: tensor parallel degrees, outside and inside experts, for which boxes are cut.
        dtype: as for `export_hf`.

    Returns:
        layout, parameters, step, cut (tp and etp), and what `streaming.run.Outcome` tells.

    Raises:
        ConfigError: degrees below 1, or that do not divide the model.
        CheckpointError: an incomplete or damaged checkpoint, `out` exists, or the disk is too small.
    """
    source = open_ours(folder)
    check_outside(out, source.folder)
    model, moe = source.model, source.moe
    naming = source.description.naming
    problems = [f"--{name}={degree}: must be 1 or more" for name, degree in (("tp", tp), ("etp", etp)) if degree < 1]
    if moe is None and etp > 1:
        problems.append(f"--etp={etp}: cuts experts, and the model is dense; leave it out")
    if not problems:
        problems = [line for weight in weights(model, moe, naming) if (line := _indivisible(weight, tp, etp))][:1]
    if problems:
        raise ConfigError(problems)
    recipe = AsTheyAre(cast_to(dtype, source.dtype_of))
    target = McoreTarget(units_of(weights(model, moe, naming), recipe), extra_states(model, moe), file_bytes, _cut(tp, etp))
    method = {"name": "reshard", "tp": tp, "etp": etp, "dtype": dtype, "step": step_of(Path(folder))}
    job = Job(
        label="reshard", recipe=recipe, target=target, read=lambda ref: source.reader.read(ref[1]), decides={"method": method}, source_files=source.files,
        complete=our_folder(source, model, moe, method),
    )  # fmt: skip
    outcome = run(job, out, options)
    return {
        "out": str(out), "layout": layout_summary(model, moe), "parameters": count_parameters(model, moe), "step": method["step"],
        "cut": {"tp": tp, "etp": etp}, **outcome.as_dict(),
    }  # fmt: skip


def _axis(weight: Weight, tp: int, etp: int) -> tuple[int, int] | None:
    if weight.kind in _EXPERT_AXES:
        return _EXPERT_AXES[weight.kind], etp
    return (0, tp) if weight.kind in _ROWS else (1, tp) if weight.kind in _COLUMNS else None


def _cut(tp: int, etp: int) -> Cut:
    def cut(weight: Weight) -> tuple[int, int] | None:
        # The rows of a vocabulary and its padding are two boxes, and a rank's rows end in the middle of one: they are left as they are.
        return None if weight.kind == "vocab" else _axis(weight, tp, etp)

    return cut


def _indivisible(weight: Weight, tp: int, etp: int) -> str | None:
    """Why a weight cannot be cut, or None."""
    found = _axis(weight, tp, etp)
    if found is None:
        return None
    axis, count = found
    lengths = {piece.shape[axis] for piece in weight.layout.pieces} if weight.kind != "vocab" else {weight.layout.whole[0]}
    wrong = sorted(length for length in lengths if length % count)
    return f"--{'etp' if weight.kind in _EXPERT_AXES else 'tp'}={count}: does not divide {wrong[0]} ({weight.ours})" if wrong else None
