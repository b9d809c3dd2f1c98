"""The optimizer's step against megatron-core's own, moments in bf16 through checkpoints and layouts, and what overlaps with what."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from torch.distributed.checkpoint import FileSystemReader
from training_bodies import BASE, losses, merged, records, release, train

from megatron_skywork.convert.check.item_digests import item_digests

SHORT = merged(BASE, {"model": {"num_layers": 2}, "train": {"steps": 4}, "optim": {"clip_grad": 0.5}, "metrics": {"router": False}})
BF16_MOMENTS = {"optim": {"moments": "bf16"}}


def steps_of_both(settings: dict[str, Any]) -> dict[str, Any]:
    """Norms and all tensors after each of three steps: ours, then those of megatron-core's own step over the same AdamW."""
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.model.build import unwrap
    from megatron_skywork.train.training import Training

    found: dict[str, Any] = {}
    config = Config(**settings)
    place = parallel.start(config)
    for whose in ("ours", "megatron-core's"):
        parallel.seed_everything(config.train.seed)
        training = Training(config, place)
        if whose != "ours":
            optimizer = training.optimizer

            def theirs(numbers: torch.Tensor, accepts: Any, optimizer: Any = optimizer) -> tuple[bool, float]:
                applied, norm, _ = optimizer.step()
                accepts(norm, numbers.tolist())
                optimizer.zero_grad()
                return bool(applied), norm

            training.step._update = theirs
        norms = [training.train_one_step().grad_norm for _ in range(3)]
        weights = [tensor for chunk in training.chunks for tensor in unwrap(chunk).state_dict().values() if isinstance(tensor, torch.Tensor)]
        states = [tensor for part in training.optimizer.chained_optimizers for state in part.optimizer.state.values() for tensor in state.values()]
        found[whose] = (norms, [tensor.detach().clone() for tensor in [*weights, *states]])
        release(training)
    ours, theirs_ = found["ours"], found["megatron-core's"]
    equal = len(ours[1]) == len(theirs_[1]) and all(torch.equal(a, b) for a, b in zip(ours[1], theirs_[1], strict=True))
    return {"ours": ours[0], "theirs": theirs_[0], "equal": equal}


@pytest.mark.parametrize(("precision", "moments"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")])
def test_a_step_is_megatron_core_s_to_the_last_bit(ranks: RankPool, tmp_path: Path, precision: str, moments: str) -> None:
    more = {"run_dir": str(tmp_path), "parallel": {"tp": 2, "ep": 2}, "train": {"precision": precision}, "optim": {"moments": moments}}
    for answer in ranks.run(4, steps_of_both, merged(SHORT, more)):
        assert answer["ours"] == answer["theirs"] and all(norm > 0.5 for norm in answer["ours"]), "clipping must have something to do"
        assert answer["equal"]


def scales_after_an_overflow(settings: dict[str, Any]) -> list[float]:
    """fp16's loss scales after steps in which the gradient of an expert alone overflows."""
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.model.build import unwrap
    from megatron_skywork.train.training import Training

    training = Training(Config(**settings), parallel.start(Config(**settings)))
    expert = next(parameter for name, parameter in unwrap(training.chunks[0]).named_parameters() if ".experts." in name)
    expert.register_hook(lambda gradient: gradient * float("inf"))
    applied = [training.train_one_step().applied for _ in range(3)]
    assert not any(applied)
    scales = [float(part.grad_scaler.scale) for part in training.optimizer.chained_optimizers]
    release(training)
    return scales


def test_loss_scales_of_all_parts_move_together(ranks: RankPool, tmp_path: Path) -> None:
    (scales,) = ranks.run(1, scales_after_an_overflow, merged(SHORT, {"run_dir": str(tmp_path), "train": {"precision": "fp16"}}))
    assert len(scales) == 2 and scales[0] == scales[1] < 2.0**8


def test_bf16_moments_resume_exactly_and_change_type_on_the_way(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, {"train": {"precision": "bf16"}}, BF16_MOMENTS)
    ranks.run(2, train, merged(settings, {"run_dir": str(tmp_path / "whole")}))
    halves = merged(settings, {"run_dir": str(tmp_path / "halves")})
    ranks.run(2, train, merged(halves, {"train": {"stop_at_step": 2}}))
    for name in ("wider", "one"):
        shutil.copytree(tmp_path / "halves", tmp_path / name)
    folder = tmp_path / "halves" / "checkpoints" / "step_00000002"
    types = {name: entry.properties.dtype for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items() if "exp_avg" in name}
    assert types and set(types.values()) == {torch.float32}
    before = item_digests(folder)
    ranks.run(2, train, halves)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert item_digests(tmp_path / "halves" / "checkpoints" / "step_00000004") == item_digests(tmp_path / "whole" / "checkpoints" / "step_00000004")

    # Read as bf16 or fp32, by two ranks or by one: the state that is saved again is the state that was saved, except for what was saved finer.
    for name, world_size, moments in (("wider", 2, "fp32"), ("one", 1, "bf16")):
        more = {"run_dir": str(tmp_path / name), "optim": {"moments": moments}, "resume": {"allow_change": ["optim.moments"]}}
        found = ranks.run(world_size, saved_again, merged(settings, more))
        again = item_digests(Path(found[0]))
        assert {key: value for key, value in again.items() if "optimizer" in key} == {key: value for key, value in before.items() if "optimizer" in key}


def saved_again(settings: dict[str, Any]) -> str:
    """Load the newest checkpoint and save it as that of another step."""
    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.save import save
    from megatron_skywork.checkpoint.state import TrainState
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    moments = {tensor.dtype for part in training.optimizer.chained_optimizers for state in part.optimizer.state.values() for tensor in state.values()}
    assert moments == {torch.bfloat16 if config.optim.moments == "bf16" else torch.float32}
    folder = save(config, TrainState(3, 24, 24 * 16), training.chunks, training.optimizer)
    release(training)
    return str(folder)


def test_bf16_moments_follow_fp32_and_do_not_depend_on_the_layout(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, {"train": {"steps": 12}, "checkpoint": {"save_at_end": False}})
    for name, world_size, more in (("fp32", 1, {}), ("bf16", 1, BF16_MOMENTS), ("bf16-dp2", 2, BF16_MOMENTS)):
        ranks.run(world_size, train, merged(settings, more, {"run_dir": str(tmp_path / name)}))
    assert losses(tmp_path / "bf16-dp2") == pytest.approx(losses(tmp_path / "bf16"), rel=1e-4)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=3e-3)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


def overlapping_run(settings: dict[str, Any]) -> list[str]:
    """What one rank does, in order: collectives of buckets as they start, and the ends of each chunk's forward and backward."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train import step as train_step
    from megatron_skywork.train.training import Training

    calls: list[str] = []
    config = Config(**settings)
    training = Training(config, parallel.start(config))
    groups = [group for chunk in training.chunks for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]]
    assert all(bucket.grad_data.dtype == torch.float32 for group in groups for bucket in group.buckets)
    group_class = buffers._ParamAndGradBucketGroup
    originals = {name: getattr(group_class, name) for name in ("start_grad_sync", "start_param_sync")}
    run_schedule, update = train_step.run_schedule, training.step._update

    def traced(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](self, *args, **kwargs)

        return call

    def schedule(*args: Any, **kwargs: Any) -> Any:
        calls.append("schedule")
        return run_schedule(*args, **kwargs)

    def updated(*args: Any) -> tuple[bool, float]:
        calls.append("update")
        outcome = update(*args)
        calls.append("updated")
        return outcome

    first = next(parameter for parameter in training.chunks[-1].module.parameters() if parameter.requires_grad)
    first.register_hook(lambda gradient: calls.append("gradient of the first weight"))
    last = [module for module in training.chunks[-1].modules() if type(module).__name__ == "SkyworkRouter"][-1]
    last.register_forward_pre_hook(lambda *_: calls.append("forward of the last router"))
    for name in originals:
        setattr(group_class, name, traced(name))
    train_step.run_schedule, training.step._update = schedule, updated
    try:
        for _ in range(2):
            training.log(training.train_one_step())
    finally:
        train_step.run_schedule = run_schedule
        for name, original in originals.items():
            setattr(group_class, name, original)
    training.save_last(in_a_hurry=False)
    release(training)
    return calls


def test_overlap_starts_early_and_changes_no_bit(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, {"train": {"precision": "bf16", "global_batch_size": 4}})
    calls = {}
    for name, overlap in (("off", False), ("on", True)):
        calls[name] = ranks.run(2, overlapping_run, merged(settings, {"run_dir": str(tmp_path / name), "parallel": {"overlap": overlap}}))[0]
    on, off = calls["on"], calls["off"]
    assert "start_param_sync" not in on[on.index("update") : on.index("updated")], "gathered when forward comes by"
    second = on[on.index("updated") + 1 : len(on) - on[::-1].index("update")]
    assert second.index("schedule") < second.index("start_param_sync") < second.index("forward of the last router")
    # The gradient of the first weight is computed last: what starts before it starts during backward. (In its first step megatron-core learns the order.)
    assert second.index("start_grad_sync") < len(second) - 1 - second[::-1].index("gradient of the first weight")
    # Without overlap: every bucket once, after backward and after the update.
    last_gradient = off.index("update") - 1 - off[: off.index("update")][::-1].index("gradient of the first weight")
    reduced = off[last_gradient : off.index("update")].count("start_grad_sync")
    assert reduced == off[: off.index("update")].count("start_grad_sync") > 1
    assert off[off.index("update") : off.index("updated")].count("start_param_sync") == reduced
    assert item_digests(tmp_path / "on" / "checkpoints" / "step_00000002") == item_digests(tmp_path / "off" / "checkpoints" / "step_00000002")
    for a, b in zip(records(tmp_path / "on"), records(tmp_path / "off"), strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
