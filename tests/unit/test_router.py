"""SkyworkRouter on one rank: against a hand-written gate, against brute force, and against megatron-core's own router."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_skywork import device
from megatron_skywork.config.schema import Moe
from megatron_skywork.errors import ConfigError

device.prepare()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from megatron_skywork.moe.aux_loss import report_aux_loss, switch_aux_loss  # noqa: E402
from megatron_skywork.moe.router import WINDOW_SUMS, SkyworkRouter  # noqa: E402
from megatron_skywork.moe.router_state import find_routers, gather_router_metrics, observe, schedule_coefficients, update_coefficients  # noqa: E402
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig  # noqa: E402

HIDDEN, EXPERTS = 16, 8


pytestmark = pytest.mark.usefixtures("one_rank", "plain_loss_scale")


def _config(moe: Moe, **overrides) -> SkyworkTransformerConfig:
    settings = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "add_bias_linear": False,
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_token_drop_policy": moe.drop_policy,
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
        "skywork": moe,
    }
    return SkyworkTransformerConfig(**(settings | overrides))


def _router(layer: int = 1, seed: int = 0, overrides: dict | None = None, **moe) -> SkyworkRouter:
    torch.manual_seed(seed)
    moe.setdefault("router_init_std", 0.5)
    router = SkyworkRouter(_config(Moe(num_experts=EXPERTS, **moe), **(overrides or {})), get_default_pg_collection())
    router.set_layer_number(layer)
    return router


def _hidden(tokens: int = 24, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens // batch, batch, HIDDEN, generator=torch.Generator().manual_seed(seed))


def _window(router: SkyworkRouter, name: str) -> float:
    """A sum of the window; `aux_loss` is the main loss's."""
    return router.window[-len(router.losses) if name == "aux_loss" else 2 * EXPERTS + WINDOW_SUMS.index(name)].item()


def _full_gate(router: SkyworkRouter, hidden: torch.Tensor) -> torch.Tensor:
    """Section 4.1 of the report, step by step."""
    logits = hidden.reshape(-1, HIDDEN) @ router.weight.t()
    if router.moe.gate_norm:
        logits = router.moe.gate_norm_scale * (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)
    return torch.softmax(logits, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("topk", [2, 3])
@pytest.mark.parametrize("norm", [{"gate_norm": False}, {"gate_norm": True}, {"gate_norm": True, "gate_norm_scale": 2.0}])
def test_gate_is_the_reports(topk, norm):
    router = _router(topk=topk, aux_loss="none", gate_norm_epsilon=1e-12, **norm)
    hidden = _hidden()
    probs, routing_map = router(hidden)
    for token, gate in enumerate(_full_gate(router, hidden)):
        chosen = gate.argsort(descending=True)[:topk]
        weights = gate[chosen] / gate[chosen].sum()
        assert set(routing_map[token].nonzero().flatten().tolist()) == set(chosen.tolist())
        torch.testing.assert_close(probs[token, chosen], weights)
        assert probs[token].sum().item() == pytest.approx(1.0)
    assert probs.dtype == torch.float32 and routing_map.dtype == torch.bool


def test_top_1_keeps_the_probability_as_weight():
    # Renormalized, the one weight would be 1 and the gate would learn nothing: megatron-core asks for pre-softmax there.
    router = _router(topk=1, aux_loss="none", gate_norm_epsilon=1e-12, overrides={"moe_router_pre_softmax": True})
    hidden = _hidden()
    torch.testing.assert_close(router(hidden)[0].amax(-1), _full_gate(router, hidden).amax(-1))


def test_gate_norm_gradient_reaches_weight_and_input():
    router, hidden = _router(aux_loss="none", gate_norm_epsilon=1e-12), _hidden().requires_grad_()
    target = torch.randn(24, EXPERTS, generator=torch.Generator().manual_seed(2))
    probs, routing_map = router(hidden)
    ours = torch.autograd.grad((probs * target).sum(), [router.weight, hidden])
    gate = _full_gate(router, hidden) * routing_map
    reference = torch.autograd.grad((gate / gate.sum(-1, keepdim=True) * target).sum(), [router.weight, hidden])
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_bf16_activations_are_gated_in_fp32():
    router = _router(aux_loss="none")
    hidden = _hidden().bfloat16().requires_grad_()
    logits = router.gating(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ router.weight.t())
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * upstream).sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and router.weight.grad.dtype == torch.float32
    torch.testing.assert_close(router.weight.grad, torch.einsum("sbe,sbh->eh", upstream, hidden.detach().float()))
    torch.testing.assert_close(hidden.grad, (upstream @ router.weight.detach()).bfloat16())


# ---------------------------------------------------------------------------------------------------------------------------- dropping


def test_an_evaluation_drops_nothing():
    router, free = _router(capacity_factor=0.5), _router(aux_loss="none")
    padded = _router(capacity_factor=0.5, pad_to_capacity=True)
    assert router(_hidden())[1].sum() < free(_hidden())[1].sum()
    for one in (router, padded):
        one.eval()
        torch.testing.assert_close(one(_hidden()), free(_hidden()))


@pytest.mark.parametrize("pad", [False, True])
def test_an_evaluation_has_a_capacity_of_its_own(pad):
    router, other = _router(capacity_factor=3.9, eval_capacity_factor=0.5, pad_to_capacity=pad), _router(capacity_factor=0.5)
    expected = other(_hidden())
    assert expected[1].sum() < 48
    router.eval()
    torch.testing.assert_close(router(_hidden()), expected)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 3.9])
def test_drops_are_what_brute_force_counts(policy, pad, factor):
    router = _router(capacity_factor=factor, drop_policy=policy, pad_to_capacity=pad)
    hidden = _hidden(tokens=48)
    free_probs, free_map = _router(aux_loss="none")(hidden)
    probs, returned_map = router(hidden)

    capacity = math.ceil(48 * 2 / EXPERTS * factor)
    loads = [sum(bool(free_map[token, expert]) for token in range(48)) for expert in range(EXPERTS)]
    dropped = sum(max(0, load - capacity) for load in loads)
    assert _window(router, "dropped") == dropped
    assert router.window[:EXPERTS].tolist() == loads
    assert (dropped > 0) == (factor < 3)

    kept = free_map & returned_map
    torch.testing.assert_close(probs, torch.where(kept, free_probs, 0.0))
    if policy == "probs":
        for expert in range(EXPERTS):
            wanted = sorted((free_probs[token, expert].item() for token in range(48) if free_map[token, expert]), reverse=True)[:capacity]
            assert sorted(free_probs[kept[:, expert], expert].tolist(), reverse=True) == wanted


@pytest.mark.parametrize("pad", [False, True])
def test_a_kept_weight_of_zero_is_not_a_drop(pad):
    router = _router(capacity_factor=3.99, pad_to_capacity=pad, gate_norm=False)
    with torch.no_grad():
        router.weight.mul_(1e4)
    probs, _ = router(_hidden())
    assert (probs > 0).sum().item() < 2 * 24, "the test needs second weights that underflow"
    assert _window(router, "dropped") == 0


# ---------------------------------------------------------------------------------------------------------------------------- losses


def _aux_gradient(router: SkyworkRouter, hidden: torch.Tensor) -> torch.Tensor:
    """Gradient of the auxiliary loss alone: the probabilities' own gradient is made zero."""
    probs, _ = router(hidden)
    (gradient,) = torch.autograd.grad(probs, router.weight, torch.zeros_like(probs))
    return gradient


def _formula(router: SkyworkRouter, hidden: torch.Tensor) -> torch.Tensor:
    gate = _full_gate(router, hidden)
    if router.moe.aux_loss == "report":
        return report_aux_loss(gate)
    return switch_aux_loss(gate, torch.zeros_like(gate, dtype=torch.bool).scatter(1, gate.topk(2).indices, True), 2)


@pytest.mark.parametrize("kind", ["report", "switch"])
@pytest.mark.parametrize("gate_norm", [False, True])
@pytest.mark.parametrize("coefficient", [0.0, 0.01, 0.3])
def test_aux_loss_is_coefficient_times_formula(kind, gate_norm, coefficient):
    router = _router(aux_loss=kind, gate_norm=gate_norm, gate_norm_epsilon=1e-12, aux_coefficient=coefficient, capacity_factor=1.0)
    hidden = _hidden()
    ours = _aux_gradient(router, hidden)
    loss = _formula(router, hidden)
    (reference,) = torch.autograd.grad(loss, router.weight)
    torch.testing.assert_close(ours, coefficient * reference, rtol=1e-4, atol=1e-8)
    assert _window(router, "aux_loss") == pytest.approx(loss.item(), rel=1e-5)
    assert (ours.abs().max() > 0) == (coefficient > 0)


def test_the_current_coefficient_is_used():
    router, hidden = _router(aux_loss="report", aux_coefficient=0.01), _hidden()
    first = _aux_gradient(router, hidden)
    router.aux_coefficient.fill_(0.04)
    torch.testing.assert_close(_aux_gradient(router, hidden), 4 * first)


def test_loss_scale_of_the_schedule_applies():
    router, hidden = _router(aux_loss="switch"), _hidden()
    first = _aux_gradient(router, hidden)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.full((1,), 0.25)
    torch.testing.assert_close(_aux_gradient(router, hidden), 0.25 * first)


def test_switch_loss_equals_megatron_cores():
    ours = _router(aux_loss="switch", gate_norm=False, aux_coefficient=0.02)
    theirs = TopKRouter(_config(ours.moe, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.02), get_default_pg_collection())
    theirs.set_layer_number(1)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    hidden = _hidden()
    for one, other in zip(ours(hidden), theirs(hidden), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(_aux_gradient(ours, hidden), _aux_gradient(theirs, hidden))


def test_z_loss_acts_on_raw_logits():
    router, hidden = _router(aux_loss="none", z_loss_coefficient=0.05), _hidden()
    gradient = _aux_gradient(router, hidden)
    loss = torch.logsumexp(hidden.reshape(-1, HIDDEN) @ router.weight.t(), dim=-1).square().mean()
    torch.testing.assert_close(gradient, 0.05 * torch.autograd.grad(loss, router.weight)[0], rtol=1e-4, atol=1e-7)
    assert _window(router, "z_loss") == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["report", "switch"])
def test_per_token_loss_multiplies_by_the_tokens(kind):
    hidden = _hidden()
    mean = _aux_gradient(_router(aux_loss=kind, z_loss_coefficient=0.1), hidden)
    summed = _aux_gradient(_router(aux_loss=kind, z_loss_coefficient=0.1, overrides={"calculate_per_token_loss": True}), hidden)
    torch.testing.assert_close(summed, 24 * mean)


@pytest.mark.parametrize("kind", ["report", "switch"])
def test_padding_tokens_change_nothing(kind):
    settings = {"aux_loss": kind, "z_loss_coefficient": 0.1}
    hidden = _hidden(tokens=24)
    plain, masked = _router(**settings), _router(**settings)
    reference = _aux_gradient(plain, hidden[:9])
    mask = torch.zeros(12, 2, dtype=torch.bool)
    mask[9:] = True
    probs, _ = masked(hidden, padding_mask=mask)
    (gradient,) = torch.autograd.grad(probs, masked.weight, torch.zeros_like(probs))
    torch.testing.assert_close(gradient, reference)
    torch.testing.assert_close(masked.window, plain.window, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------- what is counted


def test_evaluation_is_not_counted():
    router = _router(capacity_factor=1.0)
    router.eval()
    router(_hidden())
    router.train()
    with torch.no_grad():
        router(_hidden())
    assert not router.window.any()


def test_a_recomputed_layer_counts_once():
    plain, recomputed = _router(capacity_factor=1.0), _router(capacity_factor=1.0)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    hidden = _hidden().requires_grad_()
    plain(hidden)[0].square().sum().backward()
    probs = tensor_parallel.checkpoint(lambda x: recomputed(x)[0], False, hidden)
    assert not recomputed.window.any()
    probs.square().sum().backward()
    assert plain.window.any()
    torch.testing.assert_close(recomputed.window, plain.window, rtol=0, atol=0)
    torch.testing.assert_close(recomputed.weight.grad, plain.weight.grad)


# ---------------------------------------------------------------------------------------------------------------------------- types and state


@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_conversion_leaves_the_router_alone(convert):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), _router(aux_coefficient=0.0123456789, adaptive={"enabled": True}, capacity_factor=1.0))
    router = model[1]
    weight = router.weight.detach().clone()
    router.window += 1 / 3
    convert(model)
    assert model[0].weight.dtype != torch.float32
    assert router.weight.dtype == router.aux_coefficient.dtype == torch.float32 and router.window.dtype == torch.float64
    assert torch.equal(router.weight, weight)
    assert router.aux_coefficient.item() == torch.tensor(0.0123456789).item()
    assert router.window[0].item() == 1 / 3


def test_fresh_weight_is_fp32_with_its_own_deviation():
    torch.manual_seed(0)
    config = _config(Moe(num_experts=64, router_init_std=0.03), hidden_size=256, bf16=True, params_dtype=torch.bfloat16)
    router = SkyworkRouter(config, get_default_pg_collection())
    assert router.weight.dtype == torch.float32 and router.weight.std().item() == pytest.approx(0.03, rel=0.03)
    assert not torch.equal(router.weight, router.weight.bfloat16().float()), "rounded to bf16 on the way"


def test_coefficient_is_saved_when_it_adapts():
    adaptive = _router(adaptive={"enabled": True}, capacity_factor=1.0)
    adaptive.aux_coefficient.fill_(0.003)
    assert set(adaptive.state_dict()) == {"weight", "aux_coefficient"}
    assert set(_router().state_dict()) == {"weight"}
    sharded = adaptive.sharded_state_dict(prefix="decoder.layers.0.mlp.router.")
    entry = sharded["decoder.layers.0.mlp.router.aux_coefficient"]
    assert entry.key == "decoder.layers.0.mlp.router.aux_coefficient" and entry.data.dtype == torch.float32 and entry.replica_id == (0, 0, 0)
    other = _router(adaptive={"enabled": True}, capacity_factor=1.0)
    other.load_state_dict(adaptive.state_dict())
    assert other.aux_coefficient.item() == adaptive.aux_coefficient.item()
    with pytest.raises(RuntimeError, match="aux_coefficient"):
        other.load_state_dict({"weight": other.weight.detach()})


# ---------------------------------------------------------------------------------------------------------------------------- once per step


def _two_layers(**moe) -> list[SkyworkRouter]:
    return [_router(layer=layer, seed=layer, **moe) for layer in (3, 5)]


def test_step_summary():
    routers = _two_layers(capacity_factor=1.0, aux_loss="report", z_loss_coefficient=0.1)
    batches = [_hidden(seed=1), _hidden(seed=2)]
    for router in routers:
        for hidden in batches:
            router(hidden)
    summary = update_coefficients(routers, None, skipped=False)
    assert summary.layers == [3, 5] and summary.load.shape == (2, EXPERTS)
    for row, router in enumerate(routers):
        gates = [_full_gate(router, hidden) for hidden in batches]
        tops = torch.cat([gate.topk(3).values for gate in gates])
        loads = [torch.zeros_like(gate).scatter(1, gate.topk(2).indices, 1.0).sum(0) for gate in gates]
        assert summary.drop_rate[row].item() == pytest.approx(sum((load - 6).clamp(min=0).sum().item() for load in loads) / 96)
        torch.testing.assert_close(summary.load[row], sum(loads) / 96)
        assert summary.aux_loss[row].item() == pytest.approx(sum(report_aux_loss(gate).item() for gate in gates) / 2, rel=1e-4)
        gate = torch.cat(gates)
        assert summary.entropy[row].item() == pytest.approx(-(gate * gate.log()).sum(-1).mean().item(), rel=1e-4)
        assert summary.max1_over_max2[row].item() == pytest.approx((tops[:, 0] / tops[:, 1]).mean().item(), rel=1e-4)
        assert summary.max2_over_max3[row].item() == pytest.approx((tops[:, 1] / tops[:, 2]).mean().item(), rel=1e-4)
        raw = torch.cat([hidden.reshape(-1, HIDDEN) @ router.weight.t() for hidden in batches])
        assert summary.z_loss[row].item() == pytest.approx(torch.logsumexp(raw, -1).square().mean().item(), rel=1e-4)
        assert not router.window.any()


def test_coefficients_move_by_the_report_rule():
    routers = _two_layers(capacity_factor=0.9, aux_coefficient=0.004, adaptive={"enabled": True, "momentum": 0.5, "maximum": 0.05})
    for router in routers:
        router(_hidden())
    summary = update_coefficients(routers, None, skipped=False)
    assert summary.coefficient.tolist() == pytest.approx([0.004, 0.004])
    assert (summary.drop_rate > 0).all() and summary.drop_rate[0] != summary.drop_rate[1]
    for router, rate in zip(routers, summary.drop_rate.tolist(), strict=True):
        assert router.aux_coefficient.item() == pytest.approx(0.5 * 0.004 + 0.5 * min(0.2 * rate, 0.05))
    for router in routers:
        router(_hidden())
    assert update_coefficients(routers, None, skipped=False).coefficient.tolist() != pytest.approx([0.004, 0.004])


@pytest.mark.parametrize("case", ["skipped", "fixed", "nothing routed"])
def test_coefficients_that_stay(case):
    router = _router(capacity_factor=0.9, aux_coefficient=0.004, adaptive={"enabled": case != "fixed"})
    if case != "nothing routed":
        router(_hidden())
    before = router.aux_coefficient.item()
    update_coefficients([router], None, skipped=case == "skipped")
    assert router.aux_coefficient.item() == before
    assert not router.window.any(), "a skipped step's window must not leak into the next"


def test_update_between_steps_leaves_autograd_intact():
    router = _router(capacity_factor=1.0, adaptive={"enabled": True})
    for _ in range(3):
        router.weight.grad = None
        router(_hidden())[0].sum().backward()
        update_coefficients([router], None, skipped=False)
        assert router.weight.grad is not None and router.weight.grad.isfinite().all()


class _HostWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, or a result whose shape depends on values."""

    waits = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.equal.default}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_nothing_waits_for_the_device(policy):
    for kind in ("report", "switch"):
        further = [{"loss": kind, "scope": "sequence", "coefficient": 0.1}, {"loss": kind, "scope": "global_batch", "coefficient": 0.1}]
        router = _router(capacity_factor=1.0, drop_policy=policy, aux_loss=kind, extra_aux_losses=further, z_loss_coefficient=0.1, adaptive={"enabled": True})
        mask = torch.zeros(12, 2, dtype=torch.bool)
        hidden = _hidden()
        with _HostWaits():
            router(hidden)[0].sum().backward()
            router(hidden, padding_mask=mask)[0].sum().backward()
            update_coefficients([router], None, skipped=False)
        with pytest.raises(AssertionError, match="waits for the device"), _HostWaits():
            router.window.sum().item()


def test_metrics_of_one_stage():
    routers = _two_layers()[::-1]
    for router in routers:
        router(_hidden())
    metrics = gather_router_metrics(update_coefficients(routers, None, skipped=False), None)
    assert metrics["layers"] == [3, 5]
    assert [sum(row) for row in metrics["load"]] == pytest.approx([1.0, 1.0])
    for name in ("drop_rate", "coefficient", "aux_loss", "z_loss", "entropy", "max1_over_max2", "max2_over_max3"):
        assert len(metrics[name]) == 2
    assert metrics["coefficient"] == pytest.approx([0.01, 0.01])


def test_a_stage_without_experts():
    summary = update_coefficients([], None, skipped=False)
    metrics = gather_router_metrics(summary, None)
    assert metrics["layers"] == metrics["load"] == metrics["drop_rate"] == []


def test_metrics_say_what_the_load_is_like():
    routers = _two_layers(aux_loss="report", extra_aux_losses=[{"loss": "switch", "scope": "sequence", "coefficient": 0.1}])
    for router in routers:
        router.weight.data[5] = -100.0 * torch.ones(HIDDEN)  # with positive inputs nobody chooses this expert
        router(_hidden().abs())
    metrics = gather_router_metrics(update_coefficients(routers, None, skipped=False), None)
    for row in range(2):
        load = torch.tensor(metrics["load"][row]) * EXPERTS
        assert metrics["dead_expert_ids"][row] == [expert for expert in range(EXPERTS) if load[expert] < 0.01] and 5 in metrics["dead_expert_ids"][row]
        assert metrics["dead_experts"][row] == len(metrics["dead_expert_ids"][row])
        assert metrics["load_max_over_mean"][row] == pytest.approx(load.max().item(), rel=1e-5)
        assert metrics["load_variation"][row] == pytest.approx(load.std(unbiased=False).item(), rel=1e-5)
        assert metrics["load_p90"][row] == pytest.approx(load.quantile(0.9).item(), rel=1e-5)
    assert len(metrics["extra_aux_losses"]["switch_sequence"]) == 2 and metrics["extra_aux_losses"]["switch_sequence"][0] > 1


# ---------------------------------------------------------------------------------------------------------------------------- coefficients and losses


@pytest.mark.parametrize("layers", [[5, 3], [3, 5]])
def test_every_moe_layer_has_its_own_fixed_coefficient(layers):
    """Of a model whose third and fifth layers are the MoE layers."""
    settings = {"aux_coefficient": [0.1, 0.2], "extra_aux_losses": [{"loss": "switch", "scope": "sequence", "coefficient": [3.0, 4.0]}]}
    for layer in layers:
        router = _router(layer=layer, overrides={"moe_layer_freq": [0, 0, 1, 0, 1, 0], "num_layers": 6}, **settings)
        assert router.aux_coefficient.item() == pytest.approx({3: 0.1, 5: 0.2}[layer])
        assert router.extra_coefficients == [{3: 3.0, 5: 4.0}[layer]]


def test_a_schedule_moves_fixed_coefficients():
    points = [{"step": 0, "factor": 1.0}, {"step": 10, "factor": 0.0}]
    routers = [_router(layer=1, aux_coefficient=[0.1], aux_schedule=points), _router(layer=2, aux_coefficient=[0.1], aux_schedule=points)]
    routers[1].first_coefficient = 0.4
    for step, expected in ((1, 0.9), (5, 0.5), (20, 0.0), (3, 0.7)):
        schedule_coefficients(routers, step)
        assert [router.aux_coefficient.item() for router in routers] == pytest.approx([0.1 * expected, 0.4 * expected])
    unscheduled = _router(aux_coefficient=0.3)
    schedule_coefficients([unscheduled], 5)
    assert unscheduled.aux_coefficient.item() == pytest.approx(0.3)


def test_a_loss_over_the_global_batch_follows_the_step_before():
    router, hidden = _router(aux_loss="report", aux_scope="global_batch", aux_coefficient=1.0), _hidden()
    assert not _aux_gradient(router, hidden).any(), "nothing is known before the first step"
    gates = [_full_gate(router, _hidden(seed=seed)).detach() for seed in (1, 2)]
    router(_hidden(seed=2))
    summary = update_coefficients([router], None, skipped=False)
    mean = torch.cat(gates).mean(dim=0)
    torch.testing.assert_close(router.batch_means[0], mean)
    torch.testing.assert_close(router.batch_means[1], summary.load[0])
    assert summary.aux_loss.item() == pytest.approx((1 / EXPERTS - mean).square().sum().item(), rel=1e-5)
    slopes = 2 * (mean - 1 / EXPERTS)
    surrogate = (slopes * _full_gate(router, hidden).mean(dim=0)).sum()
    torch.testing.assert_close(_aux_gradient(router, hidden), torch.autograd.grad(surrogate, router.weight)[0], rtol=1e-4, atol=1e-8)
    before = router.batch_means.clone()
    update_coefficients([router], None, skipped=True)
    assert torch.equal(router.batch_means, before) and "batch_means" in router.state_dict()
    assert "batch_means" not in _router().state_dict()


def test_what_is_not_looked_at_is_not_counted():
    for settings, expected in (({}, "nothing"), ({"aux_scope": "global_batch"}, "drops"), ({"adaptive": {"enabled": True}}, "drops")):
        router, watched = _router(capacity_factor=1.0, **settings), _router(capacity_factor=1.0, **settings)
        observe([router], health=False)
        observe([watched], health=True)
        assert (router.observes, watched.observes) == (expected, "health")
        torch.testing.assert_close(_aux_gradient(router, _hidden()), _aux_gradient(watched, _hidden()))
        assert _window(router, "entropy") == 0 < _window(watched, "entropy")
        assert _window(router, "dropped") == (_window(watched, "dropped") if expected == "drops" else 0)
        summaries = [update_coefficients([one], None, skipped=False) for one in (router, watched)]
        assert router.aux_coefficient == watched.aux_coefficient
        assert (summaries[0].drop_rate == summaries[1].drop_rate) == (expected == "drops")


def test_find_routers_sees_through_wrappers():
    routers = _two_layers()
    chunks = [torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(routers[0])), torch.nn.ModuleDict({"mlp": routers[1]})]
    assert find_routers(chunks) == routers
    assert find_routers(chunks[0]) == routers[:1]


# ---------------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("moe", "overrides", "message"),
    [
        ({}, {"moe_router_score_function": "sigmoid"}, "sigmoid.*gate_norm"),
        ({}, {"moe_router_pre_softmax": True}, "pre_softmax"),
        ({}, {"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
        ({}, {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}, "second auxiliary loss"),
        ({}, {"moe_z_loss_coeff": 0.1}, "second z-loss"),
        ({}, {"moe_router_topk": 3}, "contradict moe.num_experts"),
        ({"capacity_factor": 1.0, "adaptive": {"enabled": True}}, {"moe_expert_capacity_factor": None}, "nothing is dropped"),
        ({"capacity_factor": 4.0, "pad_to_capacity": True}, {}, "less than num_experts / topk = 4"),
    ],
)
def test_contradictions_are_refused(moe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        _router(overrides=overrides, **moe)


def test_sigmoid_gate_without_normalization_works():
    router = _router(gate_norm=False, overrides={"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True})
    probs, routing_map = router(_hidden())
    torch.testing.assert_close(probs.sum(-1), torch.ones(24))
    assert router.local_tokens_per_expert.tolist() == routing_map.sum(0).tolist()
    assert _window(router, "tokens") == 24


def test_group_limited_routing_works():
    router = _router(overrides={"moe_router_num_groups": 4, "moe_router_group_topk": 1})
    _, routing_map = router(_hidden())
    groups = routing_map.view(24, 4, 2).any(-1).sum(-1)
    assert (groups == 1).all()
