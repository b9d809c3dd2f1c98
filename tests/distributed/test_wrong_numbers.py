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
        # Before the reduction, whatever way the gradient came into its buffer.
        def finalized(*args: Any, **kwargs: Any) -> None:
            [parameter for name, parameter in named if name.endswith("experts.weight1")][-1].main_grad[1, 0, 0] = value
            finalize(*args, **kwargs)

        transformer.finalize_model_grads_func = finalized
    elif kind == "an activation":
        layer = unwrap(training.chunks[0]).decoder.layers[0]
        hook = layer.register_forward_hook(lambda module, inputs, output: (output[0] * value, *output[1:]))
    elif kind == "loss":
        train_step.masked_loss = lambda mask, values: masked_loss(mask, values.detach() * 0 + value + values - values.detach())  # gradients stay
    else:
        assert kind == "a reduced norm"

        def finalized(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            next(parameter for name, parameter in named if name.endswith("norm.weight")).main_grad[0] = value

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
    folders = (tmp_path / "run" / "checkpoints" / "step_00000004", tmp_path / "clean" / "checkpoints" / "step_00000002")
    saved, expected = ({name: value for name, value in item_digests(folder).items() if not name.startswith("rng")} for folder in folders)
    assert saved == expected and any("exp_avg_sq" in name for name in saved)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert (state["step"], state["samples"], state["extras"]["answers"]["refused_in_a_row"]) == (4, 32, 0)
    ranks.run(2, train, settings)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not any(record["skipped"] for record in records(tmp_path / "run")[4:])


def overflowing_run(settings: dict[str, Any]) -> tuple[str, int]:
    """A run in which an expert's gradient overflows at every step; how it ended, and after how many steps."""
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.errors import TrainingError
    from megatron_skywork.train.loop import train as loop
    from megatron_skywork.train.signals import StopRequest
    from megatron_skywork.train.training import Training

    training = Training(Config(**settings), parallel.start(Config(**settings)))
    try:
        with poison(training, "one expert", INF):
            loop(training, StopRequest())
        text = "went on"
    except TrainingError as stopped:
        text = str(stopped)
    step = training.state.step
    release(training)
    return text, step


def test_fp16_may_look_for_its_loss_scale_but_not_for_ever(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, {"run_dir": str(tmp_path), "train": {"precision": "fp16", "steps": 30, "max_nonfinite_steps": 3}})
    ((text, step),) = ranks.run(1, overflowing_run, settings)
    # From 2^8 to 1, where megatron-core's scale ends; the first overflow is forgiven, and the last three count.
    assert "3 steps in a row" in text and step == 1 + 8 + 2


# ------------------------------------------------------------------------------------------------------------------------------ spikes

SPIKES = {"window": 8, "minimum_steps": 4, "threshold": 20.0}


def run_with_spikes(settings: dict[str, Any], at_samples: list[int], from_samples: int | None = None) -> list[list[str]]:
    """Train to the end. The loss of a step that begins with one of these samples is 5 more than it should be; its gradient is right.

    Args:
        from_samples: where in the data to go on from, instead of where the checkpoint says.

    Returns:
        what each step changed.
    """
    from dataclasses import replace

    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.load import check_config
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train import step as train_step
    from megatron_skywork.train.loop import train as loop
    from megatron_skywork.train.signals import StopRequest
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    check_config(config, torch.distributed.get_world_size())
    training = Training(config, parallel.start(config))
    if from_samples is not None:
        training.state = replace(training.state, samples=from_samples, tokens=from_samples * config.data.seq_length)
        training.train_loader = training._open_loader()
    one_step, masked_loss, changed = training.train_one_step, train_step.masked_loss, []

    def watched() -> Any:
        if training.state.samples in at_samples:
            train_step.masked_loss = lambda mask, values: masked_loss(mask, values + 5.0)
        before = everything(training)
        result = one_step()
        changed.append([name for name, value in everything(training).items() if before[name] != value])
        train_step.masked_loss = masked_loss
        return result

    training.train_one_step = watched  # type: ignore[method-assign]
    loop(training, StopRequest())
    release(training)
    return changed


def events(run_dir: Path, *names: str) -> list[dict[str, Any]]:
    return [event for event in records(run_dir, "event") if event["event"] in names]


def test_a_spike_is_recorded_or_its_update_left_out_and_the_window_survives_a_resume(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, {"train": {"steps": 7}, "parallel": {"pp": 2}})
    found, changed = {}, {}
    for policy in ("log", "skip"):
        run = merged(settings, {"run_dir": str(tmp_path / policy), "spikes": {**SPIKES, "policy": policy}})
        changed[policy] = ranks.run(2, run_with_spikes, run, [40])[1]
        found[policy] = events(tmp_path / policy, "spike")
    (spike,) = found["log"]
    whole = losses(tmp_path / "log")
    median = sorted(whole[:5])[2]
    assert (spike["step"], spike["samples"], spike["answer"]) == (6, [40, 47], "recorded")
    assert (spike["loss"], spike["median"]) == pytest.approx((whole[5], median), rel=1e-6)
    assert spike["score"] == pytest.approx((whole[5] - median) / (1.4826 * sorted(abs(loss - median) for loss in whole[:5])[2]), rel=1e-4)
    assert all(changed["log"]) and whole[:6] == losses(tmp_path / "skip")[:6], "what is recorded changes nothing"
    assert [bool(names) for names in changed["skip"]] == [True] * 5 + [False, True]
    assert [record["skipped"] for record in records(tmp_path / "skip")] == [False] * 5 + [True, False]

    halves = merged(settings, {"run_dir": str(tmp_path / "halves"), "spikes": {**SPIKES, "policy": "skip"}})
    ranks.run(2, run_with_spikes, merged(halves, {"train": {"stop_at_step": 5}}), [40])
    ranks.run(2, run_with_spikes, halves, [40])
    resumed = events(tmp_path / "halves", "spike")
    assert [{**event, "time": 0} for event in resumed] == [{**event, "time": 0} for event in found["skip"]]
    assert losses(tmp_path / "halves") == losses(tmp_path / "skip")


def test_a_rewind_is_a_start_from_the_checkpoint_behind_the_spike(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, ADAPTIVE, {"train": {"steps": 8}, "parallel": {"ep": 2, "overlap": True}, "checkpoint": {"every": 4, "keep": 9}})
    rewinding = merged(settings, {"run_dir": str(tmp_path / "rewound"), "spikes": {**SPIKES, "policy": "rewind", "max_rewinds": 1}})
    # The second one, in the first step after the rewind, finds none left.
    ranks.run(2, run_with_spikes, rewinding, [40, 48])
    found = events(tmp_path / "rewound", "spike", "rewind", "save")
    assert [(event["event"], event["step"]) for event in found] == [("save", 4), ("rewind", 4), ("spike", 5), ("save", 8)]
    assert (found[1]["passed_over"], found[1]["spike"]["step"], found[1]["spike"]["samples"]) == ([32, 47], 6, [40, 47])
    assert found[2]["answer"] == "recorded; no rewind, spikes.max_rewinds=1 is reached"
    assert [record["step"] for record in records(tmp_path / "rewound")] == list(range(1, 9))
    assert [record["samples"] for record in records(tmp_path / "rewound")] == [8, 16, 24, 32, 56, 64, 72, 80]

    # Another process, from the same checkpoint, put behind the spike by hand.
    shutil.copytree(tmp_path / "rewound", tmp_path / "by hand")
    shutil.rmtree(tmp_path / "by hand" / "checkpoints" / "step_00000008")
    ranks.run(2, run_with_spikes, merged(settings, {"run_dir": str(tmp_path / "by hand"), "spikes": {**SPIKES, "policy": "log"}}), [40, 48], 48)
    assert losses(tmp_path / "by hand") == losses(tmp_path / "rewound")
    by_hand, rewound = (item_digests(tmp_path / name / "checkpoints" / "step_00000008") for name in ("by hand", "rewound"))
    assert by_hand == rewound


def test_a_rewind_without_a_checkpoint_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(SHORT, {"run_dir": str(tmp_path), "train": {"steps": 6}, "spikes": {**SPIKES, "policy": "rewind"}})
    ranks.run(1, run_with_spikes, settings, [40])
    (spike,) = events(tmp_path, "spike")
    assert spike["answer"] == "recorded; no rewind, there is no checkpoint to go back to" and len(losses(tmp_path)) == 6


# ---------------------------------------------------------------------------------------------------------------------------- replicas

Flip = tuple[str, int, list[int], bool]
FULL = {"model": {"qk_norm": True}, "moe": {"shared_expert_ffn_hidden_size": 16, "shared_expert_gate": True}}
LAYOUTS: dict[str, tuple[dict[str, Any], list[Flip]]] = {
    # Settings of four ranks; flips: the tensor, on which rank, who is to be named, and whether by a majority.
    "dp4": (
        {"train": {"precision": "fp32"}},
        [("linear_qkv.weight", 2, [2], True), ("experts.weight2", 0, [0], True), ("final_layernorm.weight", 3, [3], True), ("router.weight", 1, [1], True)],
    ),
    "tp2 ep2": (
        merged(ADAPTIVE, FULL, {"parallel": {"tp": 2, "ep": 2}}),
        [
            ("q_layernorm.weight", 2, [2], True), ("mlp.router.weight", 0, [0], True), ("shared_experts.gate_weight", 1, [1], True),
            ("aux_coefficient", 3, [3], True), ("linear_proj.weight", 1, [1, 3], False), ("experts.weight1", 0, [0, 2], False),
        ],
    ),
    "pp2, overlapping": (
        merged(ADAPTIVE, {"parallel": {"pp": 2, "overlap": True}}),
        [("experts.weight1", 3, [2, 3], False), ("word_embeddings.weight", 0, [0, 1], False)],
    ),
}


def clean_steps_then_flips(settings: dict[str, Any], flips: list[Flip]) -> list[tuple[str, bool]]:
    """Ten steps that compare and find nothing; then for each flip of one bit a step: how it ended, and whether it changed anything."""
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.errors import TrainingError
    from megatron_skywork.model.build import parameters_gathered, unwrap
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    for _ in range(10):
        result = training.train_one_step()
        assert result.applied and not training.answer(result)
    training.save()  # in the background; what is found next must not take it away
    answers, transformer = [], training.chunks[0].config
    finalize = transformer.finalize_model_grads_func
    for number, (ending, rank, _, _) in enumerate(flips):
        named = [pair for chunk in training.chunks for pair in [*unwrap(chunk).named_parameters(), *unwrap(chunk).named_buffers()] if pair[0].endswith(ending)]

        def flip(*, named: Any = named, rank: int = rank, number: int = number) -> None:
            if training.place.rank == rank:
                tensor = named[-1][1].detach().view(-1)
                tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)[tensor.numel() // 2] ^= 1 << number  # another bit each time

        def finalized(*args: Any, flip: Any = flip, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            flip()

        transformer.finalize_model_grads_func = finalized
        with parameters_gathered(training.chunks):
            before, text = everything(training), ""
        try:
            training.answer(training.train_one_step())
        except TrainingError as found:
            text = str(found)
        flip()
        transformer.finalize_model_grads_func = finalize
        answers.append((text, everything(training) != before))
    result = training.train_one_step()
    assert result.applied and not training.answer(result), "with the bits put back it goes on"

    # A save compares too, after it has gathered what an overlapping run gathers later.
    norm = unwrap(training.chunks[-1]).decoder.layers[-1].input_layernorm.weight
    if training.place.rank == 3:
        norm.detach().view(-1)[0] += 1
    if config.parallel.overlap:
        release(training)
        return answers
    with pytest.raises(TrainingError, match="copies of parameters differ"):
        training.save()
    release(training)
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_bit_in_one_copy_is_found_and_named(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    more, flips = LAYOUTS[layout]
    settings = merged(SHORT, {"parallel": {}}, more, {"run_dir": str(tmp_path), "train": {"check_replicas": 1}})
    answers = ranks.run(4, clean_steps_then_flips, settings, flips)
    assert all(answer == answers[0] for answer in answers), "every rank ends alike, and none has applied the step"
    for (ending, _, named, by_majority), (text, changed), event in zip(flips, answers[0], events(tmp_path, "replicas"), strict=False):
        assert not changed
        outvoted = [suspect for suspect in event["suspects"] if suspect["outvoted"]]
        assert [suspect["rank"] for suspect in outvoted or event["suspects"]] == named and bool(outvoted) == by_majority
        assert all(suspect["num_tensors"] == 1 and ending.removesuffix(".weight").split(".")[0] in suspect["first"][0] for suspect in event["suspects"])
        assert ("differs from the majority" in text) == by_majority and f"{named[0]} on " in text
    assert len(events(tmp_path, "replicas")) == len(flips) + (not settings["parallel"].get("overlap"))
    assert [event["event"] for event in events(tmp_path, "save", "replicas")][:3] == ["replicas", "save", "replicas"]
    assert [folder.name for folder in (tmp_path / "checkpoints").glob("*step_*")] == ["step_00000010"], "nothing is saved over it"
