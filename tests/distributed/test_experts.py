"""Grouped experts and our dispatcher inside whole models, against megatron-core's SequentialMLP and dispatcher: the same weights from the same seed, the
same losses, checkpoints that fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, losses, merged, release, train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "dropping": (1, {"moe": {"capacity_factor": 1.0}}),
    "padded": (1, {"moe": {"capacity_factor": 1.0, "pad_to_capacity": True}}),
    "top 1": (1, {"moe": {"topk": 1}}),
    "ep2": (2, {"parallel": {"ep": 2}}),
    "ep2 dropping": (2, {"parallel": {"ep": 2}, "moe": {"capacity_factor": 1.0}}),
    "ep2 padded": (2, {"parallel": {"ep": 2}, "moe": {"capacity_factor": 1.0, "pad_to_capacity": True}}),
    "ep2 one expert each": (2, {"parallel": {"ep": 2}, "moe": {"num_experts": 2, "topk": 1, "gate_norm": False}}),
    "ep2 allgather": (2, {"parallel": {"ep": 2}, "moe": {"dispatcher": "allgather"}}),
    "etp2": (2, {"parallel": {"etp": 2}}),
    "tp2-etp2 padded": (2, {"parallel": {"tp": 2, "etp": 2}, "moe": {"capacity_factor": 1.0, "pad_to_capacity": True, "capacity_scope": "rank"}}),
    "ep2 shared expert beside the all-to-all": (
        2,
        {"parallel": {"ep": 2}, "moe": {"shared_expert_ffn_hidden_size": 24}, "megatron": {"moe_shared_expert_overlap": True}},
    ),
}


def train_with_megatron_cores_experts(settings: dict[str, Any]) -> None:
    """The same run, with the layer that megatron-core's own local spec has, but for our router."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend

    from megatron_skywork.model import layer_spec
    from megatron_skywork.moe.moe_layer import moe_submodules
    from megatron_skywork.moe.router import SkyworkRouter

    ours = layer_spec.SkyworkMoELayer
    theirs = get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=settings["moe"]["num_experts"])
    moe_submodules(theirs).router = SkyworkRouter
    layer_spec.SkyworkMoELayer = theirs  # type: ignore[misc]
    try:
        train(settings)
    finally:
        layer_spec.SkyworkMoELayer = ours  # type: ignore[misc]


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_seed_same_losses(ranks: RankPool, tmp_path: Path, name: str) -> None:
    world_size, more = LAYOUTS[name]
    settings = merged(BASE, {"train": {"steps": 4}, "checkpoint": {"save_at_end": False}}, more)
    ranks.run(world_size, train, {**settings, "run_dir": str(tmp_path / "ours")})
    ranks.run(world_size, train_with_megatron_cores_experts, {**settings, "run_dir": str(tmp_path / "theirs")})
    ours, theirs = losses(tmp_path / "ours"), losses(tmp_path / "theirs")
    assert len(ours) == 4 and ours[-1] != ours[0]
    assert ours == pytest.approx(theirs, rel=1e-6)


def compare_checkpoint_entries(parallel: dict[str, int]) -> dict[str, Any]:
    """What both classes of experts would save: every tensor's key and place, and whether its numbers are the same; then ours loaded from theirs."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories, apply_factory_merges
    from megatron.core.dist_checkpointing.utils import extract_sharded_base
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    from megatron_skywork.config.schema import Config
    from megatron_skywork.model.transformer_config import transformer_config
    from megatron_skywork.moe.experts import GroupedExperts
    from megatron_skywork.moe.moe_layer import moe_submodules
    from megatron_skywork.parallel import build_groups, seed_everything

    config = Config(**merged(BASE, {"parallel": parallel}))
    build_groups(config.parallel)
    transformer = transformer_config(config, "torch")
    experts = transformer.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()  # type: ignore[operator]
    spec = moe_submodules(get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=4)).experts
    groups = get_default_pg_collection()
    seed_everything(5)
    ours = GroupedExperts(experts, transformer, pg_collection=groups)
    seed_everything(5)
    build = build_module if isinstance(spec, ModuleSpec) else lambda spec, *args, **kwargs: spec(*args, **kwargs)
    theirs = build(spec, experts, transformer, pg_collection=groups)

    def entries(module: Any) -> dict[Any, Any]:
        content = module.sharded_state_dict("decoder.mlp.experts.", ((0, 1, 3),), {"singleton_local_shards": False})
        apply_factories(content)
        sharded, _ = extract_sharded_base(content)
        found: dict[Any, Any] = {}

        def walk(part: Any) -> None:
            for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else []:
                walk(value)
            if isinstance(part, ShardedObject):
                found[part.unique_key, part.replica_id] = part.data
            elif hasattr(part, "axis_fragmentations"):
                found[part.key, part.global_offset, part.global_shape, part.axis_fragmentations, part.local_shape, part.replica_id] = part.data

        walk(sharded)
        return found

    mine, others = entries(ours), entries(theirs)
    loaded = ours.sharded_state_dict("x.", (), {})
    whole = dict(loaded)
    apply_factories(loaded)
    parts = {name: [part.data.clone() for part in value] for name, value in loaded.items() if isinstance(value, list)}
    merged_back = apply_factory_merges(parts, {name: whole[name] for name in parts})
    merged_back = {name.removeprefix("x."): tensor for name, tensor in merged_back.items()}
    as_loaded = {**merged_back, **{name.removeprefix("x."): None for name in whole if name not in parts}}
    before = [weight.detach().clone() for weight in (ours.weight1, ours.weight2)]
    seed_everything(6)
    ours.reset_parameters()
    ours.load_state_dict(as_loaded, strict=True)
    tensors = {key for key in mine if len(key) > 2}
    return {
        "keys": sorted({key[0] for key in tensors}),
        "tensors": len(tensors),
        "empty states": len(mine) - len(tensors),
        "same places": set(mine) == set(others),
        "same numbers": all(torch.equal(mine[key], others[key]) for key in tensors & set(others)),
        "loaded": torch.equal(before[0], ours.weight1) and torch.equal(before[1], ours.weight2),
    }


@pytest.mark.parametrize(("world_size", "parallel", "count"), [(1, {}, 12), (2, {"ep": 2}, 6), (2, {"etp": 2}, 12)], ids=["one rank", "ep2", "etp2"])
def test_checkpoint_entries_are_those_of_sequential_experts(ranks: RankPool, world_size: int, parallel: dict[str, int], count: int) -> None:
    for answer in ranks.run(world_size, compare_checkpoint_entries, parallel):
        assert answer == {
            "keys": ["decoder.mlp.experts.experts.linear_fc1.weight", "decoder.mlp.experts.experts.linear_fc2.weight"],
            "tensors": count, "empty states": count * 2 // 3, "same places": True, "same numbers": True, "loaded": True,
        }  # fmt: skip


def kept_after_backward(settings: dict[str, Any]) -> list[str]:
    """What the dispatchers hold of the graph when a micro-batch is done: it would keep the activations of all layers below alive."""
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.evaluate import find_moe_layers
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    training.train_one_step()
    held = [vars(layer.token_dispatcher) for layer in find_moe_layers(training.chunks)]
    found = [name for attributes in held for name, value in attributes.items() if getattr(value, "requires_grad", False)]
    release(training)
    return found


def test_a_dispatcher_keeps_no_graph(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, kept_after_backward, merged(BASE, {"run_dir": str(tmp_path), "parallel": {"ep": 2}})) == [[], []]


def count_host_waits(settings: dict[str, Any]) -> int:
    """Host reads of device values in one forward and backward of the model, as operations on a CPU show them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.step import run_schedule
    from megatron_skywork.train.training import Training

    class Count(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.waits += any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select"))
            return func(*args, **(kwargs or {}))

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    batches = [next(training.train_loader)]
    with Count() as one:
        run_schedule(config, training.chunks, batches, forward_only=False)
    again = Training(config, training.place)
    with Count() as two:
        run_schedule(config, again.chunks, batches * 2, forward_only=False)
    release(training)
    release(again)
    torch.distributed.barrier()
    return two.waits - one.waits  # what a micro-batch adds, without what a step has once


@pytest.mark.parametrize(
    ("world_size", "more"),
    [(1, {}), (1, {"moe": {"capacity_factor": 1.0}}), (2, {"parallel": {"ep": 2}, "moe": {"capacity_factor": 1.0, "pad_to_capacity": True}})],
    ids=["dropless", "dropping", "ep2 padded"],
)
def test_a_micro_batch_makes_the_host_wait_for_nothing(ranks: RankPool, tmp_path: Path, world_size: int, more: dict[str, Any]) -> None:
    assert ranks.run(world_size, count_host_waits, merged(BASE, {"run_dir": str(tmp_path), "train": {"global_batch_size": 2}}, more)) == [0] * world_size
