"""The search against every layout foreseen one by one, and its plans against the trainer's own rules."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.config.validate import find_problems
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.estimate import estimate
from megatron_skywork.plan.expert_layouts import expert_layouts
from megatron_skywork.plan.hardware import load_cluster
from megatron_skywork.plan.layout_costs import held_bytes, least_bytes, pipeline_of, with_split
from megatron_skywork.plan.layouts import Layout, layout_of, layouts, least_ends_seconds, least_seconds
from megatron_skywork.plan.memory import RESERVE_BYTES, room_bytes, stage_memory
from megatron_skywork.plan.pipeline import held
from megatron_skywork.plan.search import plan_of, plan_yaml, search
from megatron_skywork.plan.splits import best_split

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NODE = load_cluster("dgx_h100:1")


def model(**sections) -> Config:
    values = {
        "model": {"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 1000},
        "moe": {"num_experts": 4}, "data": {"mock": True, "seq_length": 256}, "train": {"steps": 2, "global_batch_size": 32},
    }  # fmt: skip
    return Config.model_validate({**values, **sections})


def small_gpu(config: Config, share: float):
    """The node with GPUs of which the configuration needs more or less than `share` says."""
    need = max(memory.total for memory in stage_memory(config, 8)) * share + RESERVE_BYTES
    return replace(NODE, gpu=replace(NODE.gpu, memory_bytes=int(need)))


@pytest.fixture(scope="module")
def dense():
    return model(moe=None)


def every_plan(config, cluster):
    room = room_bytes(cluster)
    plans = [plan_of(layout, config, cluster, room) for layout in layouts(config, 8, frozenset())]
    return sorted((plan for plan in plans if plan is not None), key=lambda plan: plan.estimate.step_seconds)


@pytest.mark.parametrize("share", [1.5, 0.6])
def test_the_best_are_those_of_all_layouts_foreseen_one_by_one(dense, share):
    cluster = small_gpu(dense, share)
    result, everything = search(dense, cluster, limit=4, most_seconds=600), every_plan(dense, cluster)
    assert result.counts.left == 0
    assert [plan.estimate.step_seconds for plan in result.plans] == pytest.approx([plan.estimate.step_seconds for plan in everything[:4]], rel=0.02)
    assert result.plans[0].estimate.step_seconds == pytest.approx(everything[0].estimate.step_seconds, rel=1e-9)
    counts = result.counts
    assert counts.enumerated == counts.refused_by_memory + counts.pruned_by_bound + counts.evaluated and counts.pruned_by_bound > 0
    assert result.bound_seconds >= result.plans[-1].estimate.step_seconds


@pytest.mark.parametrize("seed_config", ["dense", "moe"])
def test_no_layout_takes_less_than_its_bound_and_none_that_fits_is_refused(seed_config):
    config = model(moe=None) if seed_config == "dense" else model()
    cluster = small_gpu(config, 0.6)
    room, checked = room_bytes(cluster), 0
    for number, layout in enumerate(layouts(config, 8, frozenset())):
        if number % 7:
            continue
        applied = layout.applied(config)
        pipeline, least = pipeline_of(applied, cluster, room), least_bytes(applied, 8)
        split, bound = best_split(pipeline, limit=30), least_seconds(pipeline, least)
        if split is not None:
            checked += 1
            whole = with_split(applied, split.layers, split.recomputed)
            ends = estimate(whole, cluster).step_seconds - split.seconds
            assert least_ends_seconds(applied, cluster, pipeline) <= ends + 1e-9, layout
            assert least_seconds(pipeline) <= bound * 1.0002 and bound <= split.seconds * (1 + 1e-9), layout
            totals = [memory.total for memory in stage_memory(applied, 8)]
            between_steps = [memory.held for memory in stage_memory(applied, 8)]
            assert held_bytes(applied, 8) / layout.pp <= sum(between_steps) / layout.pp
            sizes = applied.parallel.layers_per_stage
            for stage in range(layout.pp):
                of_stage = sizes[stage :: layout.pp]
                assert least.stage(stage, of_stage, [0] * len(of_stage)) <= totals[stage], layout
    assert checked >= 5


@pytest.mark.parametrize(("pp", "vpp", "global_batch"), [(2, 1, 8), (4, 1, 8), (4, 1, 2), (2, 3, 8), (3, 2, 12)])
def test_the_least_micro_batches_in_flight_are_held_together(pp, vpp, global_batch):
    """Some moment of the executed order holds as many of every chunk; with one chunk that is the most there are."""
    world, micro_batches = pp, global_batch
    config = Layout(1, 1, pp, vpp, 1, 1, 1, None, "bf16", "fp32").applied(model(train={"steps": 2, "global_batch_size": global_batch}))
    least = least_bytes(config, world)
    for stage in range(pp):
        states = held("interleaved" if vpp > 1 else "1f1b", pp, vpp, micro_batches, stage)
        assert any(all(few <= many for few, many in zip(least.in_flight[stage], state, strict=True)) for state in states)
        assert vpp > 1 or least.in_flight[stage] == states[-1]


@pytest.mark.parametrize("layout", [Layout(1, 1, 2, 1, 4, 1, 1, None, "bf16", "fp32"), Layout(2, 1, 2, 3, 2, 1, 2, None, "bf16", "fp32")])
def test_a_stage_s_bytes_are_those_of_the_whole_configuration(layout):
    """`_StageBytes` asks for a model whose stages are all alike; the real one must give each stage the same bytes."""
    config = model(moe={"num_experts": 4, "layers": [1, 2, 4, 5]})
    applied = layout.applied(config)
    pipeline, totals = pipeline_of(applied, NODE, math.inf), [memory.total for memory in stage_memory(applied, 8)]
    sizes = applied.parallel.layers_per_stage
    for stage in range(layout.pp):
        ranges = tuple((sum(sizes[:piece]), sizes[piece]) for piece in range(stage, len(sizes), layout.pp))
        assert pipeline.memory(stage, ranges, (0,) * len(ranges)) == totals[stage]


def test_the_pipeline_that_is_cut_is_the_one_that_is_foreseen():
    for layout in (Layout(2, 1, 2, 1, 2, 1, 1, None, "bf16", "fp32"), Layout(1, 1, 2, 3, 4, 1, 2, None, "bf16", "fp32")):
        plan = plan_of(layout, model(), NODE, room_bytes(NODE))
        assert plan.split.seconds == pytest.approx(plan.estimate.timeline.seconds, rel=1e-9)


def test_splits_are_timed_with_what_training_sustains():
    cluster = load_cluster(str(CONFIGS / "clusters" / "a800_192x8.yaml"))
    config = load_config([CONFIGS / "skywork_moe_146b.yaml"], [], cluster.world_size)
    plan = plan_of(layout_of(config), config, cluster, room_bytes(cluster, RESERVE_BYTES))
    assert cluster.sustained.kernels < 1 and plan.split.seconds == pytest.approx(plan.estimate.timeline.seconds)
    assert sum(plan.split.layers) == 52 and len(plan.split.layers) == 12 and plan.estimate.step_seconds <= estimate(config, cluster).step_seconds


def test_plans_are_valid_fit_and_load_again(tmp_path):
    config = model()
    cluster = small_gpu(config, 0.7)
    result = search(config, cluster, limit=5, most_seconds=20)
    assert result.plans and len({plan.layout for plan in result.plans}) == len(result.plans)
    for plan in result.plans:
        assert not find_problems(plan.config, 8, set())
        assert max(memory.total for memory in stage_memory(plan.config, 8)) <= result.room_bytes
        path = tmp_path / "plan.yaml"
        path.write_text(plan_yaml(plan))
        assert load_config([path], [], 8) == plan.config
        assert layout_of(plan.config) == plan.layout and plan.reason
        assert plan.config.train.global_batch_size == config.train.global_batch_size and plan.config.model == config.model


def test_all_layouts_are_valid_and_none_that_is_valid_is_left_out():
    """Against every product of small degrees, tried one by one."""
    config = model(train={"steps": 2, "global_batch_size": 8})
    found = {layout for layout in layouts(config, 8, frozenset()) if layout.vpp == 1}
    degrees, expected = (1, 2, 3, 4, 5, 6, 8), set()
    for tp in degrees:
        for pp in degrees:
            for ep in degrees:
                for etp in degrees:
                    for micro in (1, 2, 3, 4, 8):
                        if 8 % (tp * pp) or 8 % (ep * etp * pp):
                            continue  # the rules of the world size, which other tests hold
                        layout = Layout(tp, 1, pp, 1, ep, etp, micro, None, "bf16", "fp32")
                        if pp <= 6 and not find_problems(layout.applied(config), 8, set()):
                            expected.add(layout)
    assert found == expected and len(found) > 20
    assert all(not find_problems(layout.applied(config), 8, set()) for layout in layouts(config, 8, frozenset()))


def test_capacity_and_precision_vary_only_if_asked():
    config = model(moe={"num_experts": 4, "capacity_factor": 1.1})
    assert {(one.capacity_factor, one.precision, one.moments) for one in layouts(config, 8, frozenset())} == {(1.1, "bf16", "fp32")}
    varied = {(one.capacity_factor, one.moments) for one in layouts(config, 8, frozenset({"capacity", "precision"}))}
    assert varied == {(capacity, moments) for capacity in (1.0, 1.1, 1.25, 1.5) for moments in ("fp32", "bf16")}
    with pytest.raises(ConfigError, match="vary=colour"):
        search(config, NODE, vary={"colour"})


def test_the_own_layout_is_placed(dense):
    own = model(moe=None, parallel={"tp": 8}, train={"steps": 2, "global_batch_size": 32})
    result = search(own, NODE, limit=3, most_seconds=20)
    assert result.own.estimate.step_seconds == estimate(own, NODE).step_seconds
    assert 1 < result.own.rank_at_least <= result.own.rank_at_most and "slower" in result.own.why
    fastest = search(result.plans[0].config, NODE, limit=3, most_seconds=20)
    assert fastest.own.rank_at_least == 1 and "no slower than the best" in fastest.own.why


def test_an_own_layout_that_does_not_fit_is_told_by_how_much():
    own = model(train={"steps": 2, "global_batch_size": 32, "micro_batch_size": 4})
    result = search(own, small_gpu(own, 0.8), limit=2, most_seconds=20)
    assert result.own.estimate is None and "stage 1 needs" in result.own.why


def test_nothing_fits_is_an_error():
    config = load_config([str(CONFIGS / "skywork_moe_146b.yaml")], ["parallel.pp=1", "parallel.layers_per_stage=null", "train.global_batch_size=16"], 8)
    with pytest.raises(ConfigError, match="none of"):
        search(config, NODE)


def test_expert_layouts_of_the_report():
    """Appendix B: on 1536 A800, exchanging inside the attention's ranks costs less than over data parallelism, whose ranks lie on other nodes."""
    config = load_config([str(CONFIGS / "skywork_moe_146b.yaml")], [], 1536)
    inside, split, over, whole = expert_layouts(config, load_cluster(str(CONFIGS / "clusters" / "a800_192x8.yaml")))
    assert [(one.ep, one.etp, one.crosses_nodes) for one in (inside, split, over, whole)] == [(4, 1, False), (1, 4, False), (4, 4, True), (16, 1, True)]
    assert inside.name.endswith("as given") and inside.exchange_seconds < split.exchange_seconds and inside.exchange_seconds < over.exchange_seconds
    assert inside.estimate.step_seconds == estimate(config, load_cluster(str(CONFIGS / "clusters" / "a800_192x8.yaml"))).step_seconds


def test_expert_layouts_that_a_rule_forbids_say_so():
    split = next(one for one in expert_layouts(model(moe={"num_experts": 4, "ffn_hidden_size": 129}, parallel={"tp": 2}), NODE) if one.name == "expert TP")
    assert split.estimate is None and "129" in split.problem
    with pytest.raises(ConfigError, match="moe"):
        expert_layouts(model(moe=None), NODE)
