"""Wrong numbers: a NaN on one rank refuses that step on all and changes nothing; a spike is answered as the settings say; a copy that differs ends the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, losses, merged, records, release, train

from megatron_skywork.convert.check.item_digests import item_digests

SHORT = merged(BASE, {"model": {"num_layers": 2}, "metrics": {"router": False}, "checkpoint": {"save_at_end": False}})
ADAPTIVE = {"moe": {"capacity_factor": 1.0, "adaptive": {"enabled": True, "sensitivity": 0.01}}, "train": {"precision": "bf16"}}
BIASED = {"moe": {"aux_loss": "none", "gate_norm": False}, "megatron": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}}


def everything(training: Any) -> dict[str, str]:
    """A hash of every tensor this rank holds for the run: weights and router state, master weights, moments; and the optimizer's counters."""
    import hashlib

    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_skywork.model.build import unwrap

    found: dict[str, Any] = {}
    for number, chunk in enumerate(training.chunks):
        tensors = [*unwrap(chunk).named_parameters(), *unwrap(chunk).named_buffers()]
        found |= {f"chunk {number} {name}": tensor for name, tensor in tensors if "local_tokens_per_expert" not in name}
    for number, part in enumerate(getattr(training.optimizer, "chained_optimizers", [training.optimizer])):
        assert isinstance(part, DistributedOptimizer)
        for order, (master, state) in enumerate(part.optimizer.state.items()):
            found |= {f"part {number} {order} master": master, **{f"part {number} {order} {name}": tensor for name, tensor in state.items()}}
        for order, group in enumerate(part.param_groups):
            found[f"part {number} group {order} step"] = torch.tensor(group["step"])
    return {name: hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for name, tensor in found.items()}


@contextmanager
def poison(training: Any, kind: str, value: float) -> Iterator[None]:
    """Inside, this rank makes a number that is not finite, once per step."""
    from megatron_skywork.model.build import unwrap
    from megatron_skywork.train import step as train_step

    named = [(name, parameter) for chunk in training.chunks for name, parameter in unwrap(chunk).named_parameters()]
    transformer, masked_loss = training.chunks[0].config, train_step.masked_loss
    finalize, hook = transformer.finalize_model_grads_func, None
    if kind == "one expert":
        parameter = [parameter for name, parameter in named if name.endswith("experts.weight1")][-1]

        def spoiled(gradient: Any) -> Any:
            gradient = gradient.clone()
            gradient[1, 0, 0] = value
            return gradient

        hook = parameter.register_hook(spoiled)
    elif kind == "an activation":
        layer = unwrap(training.chunks[0]).decoder.layers[0]
        hook = layer.register_forward_hook(lambda module, inputs, output: (output[0] * value, *output[1:]))
    elif kind == "loss":
        train_step.masked_loss = lambda mask, values: masked_loss(mask, values.detach() * 0 + value + values - values.detach())  # gradients stay
    else:
        assert kind == "a reduced norm"

        def finalized(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            norm = next(parameter for name, parameter in named if name.endswith("layernorm.weight") or name.endswith("norm.weight"))
            norm.main_grad[0] = value

        transformer.finalize_model_grads_func = finalized
    try:
        yield
    finally:
        transformer.finalize_model_grads_func, train_step.masked_loss = finalize, masked_loss
        if hook is not None:
            hook.remove()


def steps_with_a_poison(settings: dict[str, Any], kind: str, value: float, poisoned_rank: int) -> dict[str, Any]:
    """Three steps; in the second one a rank makes a number that is not finite. Says which were applied, and what they changed."""
    from contextlib import nullcontext

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    training = Training(Config(**settings), parallel.start(Config(**settings)))
    answer: dict[str, Any] = {"applied": [], "changed": [], "rates": [], "refused": []}
    for step in (1, 2, 3):
        before = everything(training)
        with poison(training, kind, value) if step == 2 and training.place.rank == poisoned_rank else nullcontext():
            result = training.train_one_step()
        training.log(result)
        assert not training.answer(result)
        after = everything(training)
        answer["applied"].append(result.applied)
        answer["rates"].append(result.learning_rate)
        answer["refused"].append(result.verdict.nonfinite)
        answer["changed"].append(sorted(name for name in before if before[name] != after[name]))
    answer["all"] = len(before)
    release(training)
    return answer


NAN, INF = float("nan"), float("inf")
GRADIENT, BOTH = ["gradient norm"], ["loss", "gradient norm"]
POISONS: dict[str, tuple[int, dict[str, Any], str, float, int, list[str], list[int], list[str]]] = {
    # World size, settings, what, value, on which rank; then what the event is to say: which numbers, which ranks, the first parameters of the first of them.
    "an expert, ep2": (2, {"parallel": {"ep": 2}}, "one expert", NAN, 1, GRADIENT, [1], ["decoder.layers.1.mlp.experts.weight1 (expert 3)"]),
    "an expert, dp2": (2, {}, "one expert", INF, 0, GRADIENT, [0], ["decoder.layers.1.mlp.experts.weight1 (expert 1)"]),
    "an expert, tp2 ep2 dp2": (
        4, merged(ADAPTIVE, {"parallel": {"tp": 2, "ep": 2}}), "one expert", -INF, 3, GRADIENT, [3], ["decoder.layers.1.mlp.experts.weight1 (expert 3)"]),
    # Its gradient goes on to the stage before.
    "an activation, pp2": (
        2, merged(BIASED, {"parallel": {"pp": 2}}), "an activation", NAN, 1, BOTH, [1, 0],
        ["output_layer.weight", "decoder.final_layernorm.weight", "decoder.layers.1.mlp.experts.weight2 (experts 0, 1, 2, 3)"]),
    "the loss alone, pp2": (4, {"parallel": {"pp": 2}}, "loss", INF, 3, ["loss"], [3], []),
    "a copy that no norm counts, tp2": (2, {"parallel": {"tp": 2}}, "a reduced norm", NAN, 1, GRADIENT, [1], ["decoder.layers.0.input_layernorm.weight"]),
}


@pytest.mark.parametrize("name", POISONS)
def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(ranks: RankPool, tmp_path: Path, name: str) -> None:
    world_size, more, kind, value, rank, what, named, first = POISONS[name]
    settings = merged(SHORT, {"run_dir": str(tmp_path), "optim": {"warmup_steps": 10}}, more)
    answers = ranks.run(world_size, steps_with_a_poison, settings, kind, value, rank)
    for answer in answers:
        assert answer["applied"] == [True, False, True]
        assert answer["changed"][1] == [], "a refused step changes not a byte"
        assert all(len(changed) > answer["all"] // 2 for changed in (answer["changed"][0], answer["changed"][2]))
        assert answer["rates"] == pytest.approx([3e-4, 6e-4, 9e-4]), "the schedule follows the number of the step"
    assert len({str(answer["refused"]) for answer in answers}) == 1, "every rank decides alike"
    assert [record["skipped"] for record in records(tmp_path)] == [False, True, False]
    (event,) = [event for event in records(tmp_path, "event") if event["event"] == "nonfinite"]
    assert (event["step"], event["samples"], event["ranks"]) == (2, [8, 15], named)
    assert (event["what"], event["sources"][0]["loss"], event["sources"][0]["first"]) == (what, "loss" in what, first)


def three_refused(settings: dict[str, Any], from_step: int) -> tuple[str, dict[str, str], dict[str, str]]:
    """A run whose loss is NaN from some step on; returns how it ended, and what it held before that and at the end."""
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.errors import TrainingError
    from megatron_skywork.train.loop import train as loop
    from megatron_skywork.train.signals import StopRequest
    from megatron_skywork.train.training import Training

    training = Training(Config(**settings), parallel.start(Config(**settings)))
    one_step, good = training.train_one_step, {}

    def sometimes_poisoned() -> Any:
        if training.state.step + 1 < from_step:
            return one_step()
        if not good:
            good.update(everything(training))
        with poison(training, "loss", NAN):
            return one_step()

    training.train_one_step = sometimes_poisoned  # type: ignore[method-assign]
    try:
        loop(training, StopRequest())
    except TrainingError as stopped:
        answer = str(stopped), good, everything(training)
        release(training)
        return answer
    return "went on", {}, {}


def test_steps_in_a_row_that_are_not_finite_end_the_run_after_a_save(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, {"run_dir": str(tmp_path / "run"), "parallel": {"ep": 2}, "train": {"steps": 6, "max_nonfinite_steps": 2}})
    for text, good, end in ranks.run(2, three_refused, settings, 3):
        assert "2 steps in a row, up to step 4" in text and "saved as step 4" in text
        assert good == end
    found = records(tmp_path / "run")
    assert [record["skipped"] for record in found] == [False, False, True, True]
    assert [(event["event"], event["step"]) for event in records(tmp_path / "run", "event")] == [("nonfinite", 3), ("nonfinite", 4), ("save", 4)]

    # What was saved is the state after step 2, behind the data that failed; and the run goes on from it.
    clean = merged(settings, {"run_dir": str(tmp_path / "clean"), "train": {"stop_at_step": 2}, "checkpoint": {"save_at_end": True}})
    ranks.run(2, train, clean)
    saved, expected = (item_digests(tmp_path / run / "checkpoints" / step) for run, step in (("run", "step_00000004"), ("clean", "step_00000002")))
    assert {name: value for name, value in saved.items() if not name.startswith("rng")} == {name: value for name, value in expected.items() if not name.startswith("rng")}
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert (state["step"], state["samples"], state["extras"]["answers"]["refused_in_a_row"]) == (4, 32, 0)
    ranks.run(2, train, settings)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not any(record["skipped"] for record in records(tmp_path / "run")[4:])
