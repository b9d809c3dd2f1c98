"""What an evaluation says about routers and experts is the same under every layout, and an evaluation drops nothing and leaves training as it was."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, records, release, save_initial, train

# The auxiliary loss is taken over sequences: the layouts below split a step into different micro-batches.
EVERY_STEP = {
    "train": {"steps": 3, "eval_every": 1, "eval_at_end": True, "eval_at_start": True, "eval_samples": 6},
    "optim": {"lr": 1e-2}, "moe": {"aux_scope": "sequence"},
}  # fmt: skip
# (ranks, layout, rows of a micro-batch): on all data-parallel ranks together the probe is samples 0 and 1.
LAYOUTS = {
    "one rank": (1, {}, 2),
    "ep2": (2, {"ep": 2}, 1),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}, 2),
    "etp2": (2, {"etp": 2}, 1),
    "pp2": (2, {"pp": 2}, 2),
    "pp2 interleaved": (2, {"pp": 2, "vpp": 2}, 2),
    "dp2 overlapped": (2, {"overlap": True}, 1),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2}, 2),
    "tp2-etp2-ep2": (4, {"tp": 2, "etp": 2, "ep": 2}, 1),
}


def save_copied_experts(settings: dict[str, Any]) -> None:
    """Write a checkpoint of step 0 in which all experts of a layer are copies of its first, as after upcycling."""
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.save import save
    from megatron_skywork.config.schema import Config
    from megatron_skywork.moe.expert_similarity import local_experts
    from megatron_skywork.train.evaluate import find_moe_layers
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    with torch.no_grad():
        for layer in find_moe_layers(training.chunks):
            first, *others = local_experts(layer.experts)
            for expert in others:
                for tensor, source in zip(expert, first, strict=True):
                    tensor.copy_(source)
    save(config, training.state, training.chunks, training.optimizer)
    release(training)


@pytest.fixture(scope="module")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from: `copies`, whose experts are all alike, and `random`; and the run of one rank from the copies, in `one rank`."""
    folder = tmp_path_factory.mktemp("evaluation")
    ranks.run(1, save_copied_experts, merged(BASE, {"run_dir": str(folder / "copies")}))
    ranks.run(1, save_initial, merged(BASE, {"run_dir": str(folder / "random")}))
    _train(ranks, folder, "one rank")
    return folder


def _settings(start: Path, name: str, initial: str, parallel: dict, *more: dict) -> dict[str, Any]:
    weights = {"init_from": str(start / initial / "checkpoints" / "step_00000000"), "save_at_end": False}
    return merged(BASE, {"run_dir": str(start / name), "parallel": parallel, "checkpoint": weights}, *more)


def _train(ranks: RankPool, start: Path, name: str, *more: dict) -> None:
    world_size, parallel, rows = LAYOUTS[name]
    ranks.run(world_size, train, _settings(start, name, "copies", parallel, EVERY_STEP, {"train": {"micro_batch_size": rows}}, *more))


def test_copies_are_alike_and_training_tells_them_apart(start: Path) -> None:
    first, *later = [record["router"] for record in records(start / "one rank", "eval")]
    assert first["layers"] == [1, 2, 3, 4] and first["changed_experts"] == [None] * 4
    assert first["expert_similarity"] == pytest.approx([1.0] * 4, abs=1e-6)
    assert len(later) == 3
    for before, router in itertools.pairwise([first, *later]):
        assert all(now < then for now, then in zip(router["expert_similarity"], before["expert_similarity"], strict=True))
        assert all(0.0 <= share <= 1.0 and share * 32 == int(share * 32) for share in router["changed_experts"]), "the probe has 32 tokens"
    assert sum(sum(router["changed_experts"]) for router in later) > 0.5, "a test in which nobody changes experts says little"
    assert all(similarity < 0.999 for similarity in later[-1]["expert_similarity"])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_the_record_does_not_depend_on_the_layout(ranks: RankPool, start: Path, name: str) -> None:
    _train(ranks, start, name)
    found, expected = records(start / name, "eval"), records(start / "one rank", "eval")
    assert [record["step"] for record in found] == [0, 1, 2, 3]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert mine["router"]["layers"] == theirs["router"]["layers"]
        assert mine["router"]["changed_experts"] == theirs["router"]["changed_experts"]
        assert mine["router"]["expert_similarity"] == pytest.approx(theirs["router"]["expert_similarity"], abs=2e-6)


@pytest.mark.parametrize("more", [{"metrics": {"router": False}}, {"moe": None}])
def test_without_experts_or_without_interest_there_is_no_such_part(ranks: RankPool, start: Path, more: dict) -> None:
    name = "dense" if "moe" in more else "unobserved"
    settings = merged(BASE, {"run_dir": str(start / name), "checkpoint": {"save_at_end": False}}, more, {"train": {"steps": 1, "eval_at_end": True}})
    ranks.run(1, train, settings)
    (record,) = records(start / name, "eval")
    assert "router" not in record and record["losses"]["mock"] > 0


def evaluate_around_a_changed_gate(settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluate twice, change the second layer's gate, evaluate again. Gives the records and, for every evaluation, the probe's routing in every layer."""
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.evaluate import evaluate, find_moe_layers
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    layers = find_moe_layers(training.chunks)
    seen: list[list[Any]] = []
    hooks = [layer.router.register_forward_hook(lambda _, __, output, index=index: seen[index].append(output[1])) for index, layer in enumerate(layers)]
    found, maps = [], []
    for evaluation in range(3):
        if evaluation == 2:
            weight = layers[1].router.weight
            with torch.no_grad():
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        seen[:] = [[] for _ in layers]
        found.append(evaluate(config, training.chunks, training.valid_loaders)["router"])
        maps.append([of_layer[0].int().tolist() for of_layer in seen])
        assert all(len(of_layer) == 4 for of_layer in seen), "two sets of two micro-batches"
    for hook in hooks:
        hook.remove()
    release(training)
    return {"records": found, "maps": maps}


def test_changed_experts_are_counted_on_the_same_tokens_of_all_ranks(ranks: RankPool, start: Path) -> None:
    sets = {"data": {"valid": {"first": ["mock"], "second": ["mock"]}}, "train": {"eval_samples": 4, "micro_batch_size": 2}}
    results = ranks.run(2, evaluate_around_a_changed_gate, _settings(start, "changed gate", "random", {"tp": 2, "ep": 2}, sets))
    assert results[0]["records"] == results[1]["records"]
    first, same, changed = [record["changed_experts"] for record in results[0]["records"]]
    assert first == [None] * 4 and same == [0.0] * 4
    expected = []
    for layer in range(4):
        pairs = [pair for result in results for pair in zip(result["maps"][1][layer], result["maps"][2][layer], strict=True)]
        assert len(pairs) == 32
        expected.append(sum(before != after for before, after in pairs) / 32)
    assert changed == expected
    assert changed[0] == 0.0 and 0.0 < changed[1] < 1.0, "only what comes after the changed gate may change"


PADDED = {"moe": {"capacity_factor": 0.5, "pad_to_capacity": True}}


def train_around_evaluations(settings: dict[str, Any], evaluates: bool) -> dict[str, Any]:
    """Two steps, with evaluations around them or not. Gives losses, and how many tokens each expert of this rank got in every forward."""
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.evaluate import evaluate, evaluation_capacity, find_moe_layers
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    layers = find_moe_layers(training.chunks)
    dispatcher = layers[0].token_dispatcher
    tokens: dict[bool, list[list[int]]] = {True: [], False: []}
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda module, inputs: tokens[module.training].append(inputs[1].tolist()))

    def state() -> tuple[Any, ...]:
        return dispatcher.drop_and_pad, dispatcher.input_splits, dispatcher.cuda_sync_point, dispatcher.config.moe_expert_capacity_factor

    evaluations, trained = [], []
    for step in (0, 1, 2):
        if step:
            result = training.step(step, training.train_loader)
            trained.append(float(result.loss_sum) / float(result.num_tokens))
        if evaluates:
            before = state()
            evaluations.append(evaluate(config, training.chunks, training.valid_loaders)["losses"]["mock"])
            assert state() == before
    with pytest.raises(KeyError, match="interrupted"), evaluation_capacity(config, layers):
        assert not dispatcher.drop_and_pad
        raise KeyError("interrupted")
    padded = dispatcher.drop_and_pad
    release(training)
    return {"evaluations": evaluations, "trained": trained, "tokens": tokens, "padded": padded}


@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), (2, {"ep": 2})])
def test_an_evaluation_drops_nothing_and_training_pads_on(ranks: RankPool, start: Path, world_size: int, parallel: dict) -> None:
    def run(name: str, evaluates: bool, *more: dict) -> list[dict[str, Any]]:
        settings = _settings(start, f"{name}-{world_size}", "random", parallel, {"train": {"eval_samples": 8, "micro_batch_size": 2}}, *more)
        return ranks.run(world_size, train_around_evaluations, settings, evaluates)

    padded, alone, free = run("padded", True, PADDED), run("padded alone", False, PADDED), run("free", True)
    assert padded[0]["evaluations"][0] == pytest.approx(free[0]["evaluations"][0], rel=1e-6)
    assert padded[0]["trained"][0] != pytest.approx(free[0]["trained"][0], rel=1e-5), "training must have dropped something for this to say anything"
    assert [rank["trained"] for rank in padded] == [rank["trained"] for rank in alone], "an evaluation must leave no trace in training"

    # 32 tokens of a rank's micro-batch, 2 of 4 experts each, half the even share: 8 slots for each rank's tokens.
    for rank in padded:
        assert rank["padded"] and rank["tokens"][True]
        assert all(of_expert == 8 * world_size for of_forward in rank["tokens"][True] for of_expert in of_forward)
    by_forward = zip(*(rank["tokens"][False] for rank in padded), strict=True)
    assert all(sum(sum(of_rank) for of_rank in forward) == 64 * world_size for forward in by_forward)


def test_the_capacity_of_evaluations_is_their_own(ranks: RankPool, start: Path) -> None:
    """Also where training drops nothing, and megatron-core's dispatcher therefore counts on every token coming top-k times."""
    tight, found = {"moe": {"eval_capacity_factor": 0.5}}, {}
    for name, more in {"free": {}, "tight": tight, "tight and trained with it": merged(tight, PADDED)}.items():
        settings = _settings(start, f"capacity-{name}", "random", {"ep": 2}, {"train": {"steps": 1, "eval_at_start": True, "eval_samples": 8}}, more)
        ranks.run(2, train, settings)
        found[name] = records(start / f"capacity-{name}", "eval")[0]["losses"]["mock"]
    assert found["tight"] == pytest.approx(found["tight and trained with it"], rel=1e-6)
    assert found["tight"] != pytest.approx(found["free"], rel=1e-5)
