"""Gate normalization beside every routing option of megatron-core that makes sense, each against a gate written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_skywork import device
from megatron_skywork.config.schema import Moe
from megatron_skywork.errors import ConfigError

device.prepare()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, topk_routing_with_score_function  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction  # noqa: E402

from megatron_skywork.moe.router import SkyworkRouter  # noqa: E402
from megatron_skywork.moe.router_state import update_coefficients  # noqa: E402
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig  # noqa: E402

HIDDEN, EXPERTS, TOKENS, BATCH = 16, 8, 24, 2
BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01}


pytestmark = pytest.mark.usefixtures("one_rank", "plain_loss_scale")


@pytest.fixture(autouse=True)
def _no_replays():
    yield
    RouterReplay.clear_global_router_replay_instances()


def _router(seed: int = 0, overrides: dict | None = None, **moe) -> SkyworkRouter:
    torch.manual_seed(seed)
    moe.setdefault("router_init_std", 0.5)
    moe.setdefault("gate_norm_epsilon", 1e-12)
    skywork = Moe(num_experts=EXPERTS, **moe)
    settings = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "add_bias_linear": False,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": skywork.topk,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_router_pre_softmax": skywork.pre_softmax or skywork.topk == 1,
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": skywork.capacity_factor,
        "moe_token_drop_policy": skywork.drop_policy,
        "moe_pad_expert_input_to_capacity": skywork.pad_to_capacity,
        "skywork": skywork,
    }
    router = SkyworkRouter(SkyworkTransformerConfig(**(settings | (overrides or {}))), get_default_pg_collection())
    router.set_layer_number(1)
    return router


def _hidden(seed: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens // BATCH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def _raw(router: SkyworkRouter, hidden: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(-1, HIDDEN) @ router.weight.t()


def _normalized(router: SkyworkRouter, raw: torch.Tensor) -> torch.Tensor:
    if not router.moe.gate_norm:
        return raw
    return router.moe.gate_norm_scale * (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True)


def _expected_weights(logits: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor:
    """Softmax over the chosen experts, 0 elsewhere."""
    return torch.softmax(logits.masked_fill(~routing_map, -math.inf), dim=-1)


def _weight_gradient(router: SkyworkRouter, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient of the losses that the router adds, alone."""
    probs, _ = router(hidden, padding_mask=mask)
    (gradient,) = torch.autograd.grad(probs, router.weight, torch.zeros_like(probs))
    return gradient


# ---------------------------------------------------------------------------------------------------------------------------- z-loss


@pytest.mark.parametrize("norm", [{"gate_norm": False}, {}, {"gate_norm_scale": 0.5}, {"gate_norm_scale": 2.0, "gate_norm_unbiased": False}])
def test_z_loss_gradient_is_the_raw_logits(norm):
    """d/dz mean_i (log sum_j exp z_ij)^2 = 2 lse_i softmax(z_i) / T, and dz/dW = x: the same whatever normalization does afterwards."""
    router, hidden = _router(aux_loss="none", z_loss_coefficient=0.05, **norm), _hidden()
    raw = _raw(router, hidden).detach()
    by_hand = 2 * torch.logsumexp(raw, -1, keepdim=True) * torch.softmax(raw, -1) / TOKENS
    torch.testing.assert_close(_weight_gradient(router, hidden), 0.05 * by_hand.t() @ hidden.reshape(-1, HIDDEN), rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------------- input jitter


def test_jitter_comes_before_normalization():
    router, hidden = _router(aux_loss="none", overrides={"moe_input_jitter_eps": 0.1}), _hidden()
    noise = 1 + 0.1 * (2 * torch.rand(hidden.shape, generator=torch.Generator().manual_seed(3)) - 1)
    router.input_jitter = lambda shape: noise
    probs, routing_map = router(hidden)
    logits = _normalized(router, _raw(router, hidden * noise))
    torch.testing.assert_close(probs, _expected_weights(logits, routing_map))
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, logits.topk(2).indices, True))


def test_jitter_is_noise_in_training():
    router, plain = _router(overrides={"moe_input_jitter_eps": 0.3}), _router()
    torch.manual_seed(5)
    first, second = router(_hidden())[0], router(_hidden())[0]
    assert not torch.equal(first, second) and not torch.equal(first, plain(_hidden())[0])
    torch.manual_seed(5)
    torch.testing.assert_close(router(_hidden())[0], first, rtol=0, atol=0)


def test_an_evaluation_has_no_jitter():
    router, plain = _router(overrides={"moe_input_jitter_eps": 0.3}), _router()
    router.eval()
    torch.testing.assert_close(router(_hidden())[0], plain(_hidden())[0])


# ---------------------------------------------------------------------------------------------------------------------------- groups


def _choose_by_groups(values: torch.Tensor, topk: int, num_groups: int, group_topk: int) -> list[set[int]]:
    """Best groups by the sum of their best topk // group_topk experts, then the best experts of these."""
    size, judged, chosen = EXPERTS // num_groups, topk // group_topk, []
    for row in values.tolist():
        scores = [sum(sorted(row[group * size : (group + 1) * size], reverse=True)[:judged]) for group in range(num_groups)]
        best = sorted(range(num_groups), key=lambda group: -scores[group])[:group_topk]
        allowed = [expert for group in best for expert in range(group * size, (group + 1) * size)]
        chosen.append(set(sorted(allowed, key=lambda expert: -row[expert])[:topk]))
    return chosen


@pytest.mark.parametrize(("topk", "num_groups", "group_topk"), [(2, 4, 1), (2, 4, 2), (3, 4, 2), (4, 4, 2), (4, 2, 1), (4, 2, 2), (1, 4, 1)])
@pytest.mark.parametrize("norm", [{"gate_norm": False}, {}, {"gate_norm_scale": 0.25}])
def test_normalization_does_not_change_which_groups_are_chosen(topk, num_groups, group_topk, norm):
    """Groups are compared by sums of equally many logits. Normalization is z -> a z + b per token with a > 0, which takes such a sum s to a s + m b and
    keeps their order; for one expert the score is the softmax, and its best group is the best expert's. So all choose as the raw logits do."""
    overrides = {"moe_router_num_groups": num_groups, "moe_router_group_topk": group_topk}
    router, hidden = _router(topk=topk, overrides=overrides, **norm), _hidden(tokens=96)
    probs, routing_map = router(hidden)
    raw = _raw(router, hidden).detach()
    assert [set(row.nonzero().flatten().tolist()) for row in routing_map] == _choose_by_groups(raw, topk, num_groups, group_topk)
    logits = _normalized(router, raw)
    torch.testing.assert_close(probs.detach(), torch.softmax(logits, -1) * routing_map if topk == 1 else _expected_weights(logits, routing_map))
    free = _router(topk=topk, **norm)(hidden)[1]
    assert torch.equal(routing_map, free) == (group_topk in (num_groups, topk)), "groups judged by their best expert alone hold the best experts"


def test_why_groups_of_plain_probabilities_are_refused_with_normalization():
    """Sums of softmax scores do not keep their order when logits are scaled: the groups would depend on lambda."""
    logits = torch.tensor([[2.0, 0.0, 1.2, 1.1]])
    maps = [topk_routing_with_score_function(scale * logits, 2, use_pre_softmax=True, num_groups=2, group_topk=1)[1][0].tolist() for scale in (1.0, 0.1)]
    assert maps == [[True, True, False, False], [False, False, True, True]]
    with pytest.raises(ConfigError, match="group_topk.*pre_softmax.*gate_norm"):
        _router(topk=2, pre_softmax=True, overrides={"moe_router_num_groups": 2, "moe_router_group_topk": 1})
    _router(topk=2, pre_softmax=True, gate_norm=False, overrides={"moe_router_num_groups": 2, "moe_router_group_topk": 1})
    _router(topk=2, pre_softmax=True, overrides={"moe_router_num_groups": 2, "moe_router_group_topk": 2})


# ---------------------------------------------------------------------------------------------------------------------------- probabilities as they are

NORMS = [{"gate_norm": False}, {}, {"gate_norm_scale": 0.5, "gate_norm_unbiased": False, "gate_norm_epsilon": 0.25}]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("topk", [1, 2, 4, EXPERTS])
def test_pre_softmax_keeps_the_chosen_probabilities(topk, norm):
    router, hidden = _router(topk=topk, pre_softmax=True, aux_loss="none", **norm), _hidden().requires_grad_()
    probs, routing_map = router(hidden)
    raw = _raw(router, hidden)
    if router.moe.gate_norm:
        deviation = (raw.var(-1, keepdim=True, unbiased=router.moe.gate_norm_unbiased) + router.moe.gate_norm_epsilon).sqrt()
        raw = router.moe.gate_norm_scale * (raw - raw.mean(-1, keepdim=True)) / deviation
    gate = torch.softmax(raw, -1)
    expected = gate * torch.zeros_like(gate).scatter(1, gate.topk(topk).indices, 1.0)
    torch.testing.assert_close(probs, expected)
    assert torch.equal(routing_map, expected > 0) and (topk == EXPERTS or bool((probs.sum(-1) < 1 - 1e-4).all()))
    target = torch.randn(probs.shape, generator=torch.Generator().manual_seed(4))
    ours, by_hand = (torch.autograd.grad((weights * target).sum(), [router.weight, hidden], retain_graph=True) for weights in (probs, expected))
    for one, other in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.parametrize("loss", ["switch", "report"])
def test_losses_and_statistics_do_not_ask_how_weights_are_scaled(loss, norm):
    """They look at the softmax over all experts and at the choice, which are the same; so is the number of dropped assignments, and with it the coefficient."""
    adaptive = {"enabled": True, "momentum": 0.5, "maximum": 1.0}
    settings = {"aux_loss": loss, "z_loss_coefficient": 0.01, "capacity_factor": 0.75, "adaptive": adaptive, **norm}
    routers = [_router(pre_softmax=pre_softmax, **settings) for pre_softmax in (True, False)]
    gradients = [_weight_gradient(router, _hidden()) for router in routers]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*(router.window for router in routers))
    assert float(gradients[0].abs().max()) > 0
    summaries = [update_coefficients([router], None, skipped=False) for router in routers]
    assert summaries[0].drop_rate == summaries[1].drop_rate and summaries[0].drop_rate[0] > 0
    assert routers[0].aux_coefficient == routers[1].aux_coefficient != routers[0].first_coefficient


def test_an_overfull_expert_keeps_its_most_probable_tokens():
    """Compared as probabilities among all experts, not as shares of the two chosen ones."""
    router, hidden = _router(pre_softmax=True, capacity_factor=0.5, aux_loss="none"), _hidden()
    probs, kept = router(hidden)
    gate = torch.softmax(_normalized(router, _raw(router, hidden)), -1)
    chosen = torch.zeros_like(gate).scatter(1, gate.topk(2).indices, 1.0).bool()
    slots = math.ceil(0.5 * 2 * TOKENS / EXPERTS)
    for expert in range(EXPERTS):
        wanting = gate[:, expert].masked_fill(~chosen[:, expert], 0.0)
        best = set(wanting.topk(slots).indices.tolist()) & set(chosen[:, expert].nonzero().flatten().tolist())
        assert set(kept[:, expert].nonzero().flatten().tolist()) == best
    torch.testing.assert_close(probs, gate * kept)


def test_what_contradicts_pre_softmax_is_refused():
    with pytest.raises(ConfigError, match="moe_router_pre_softmax=True contradicts moe.pre_softmax=False"):
        _router(overrides={"moe_router_pre_softmax": True})
    with pytest.raises(ConfigError, match="sigmoid.*moe.pre_softmax"):
        _router(pre_softmax=True, gate_norm=False, overrides={"moe_router_score_function": "sigmoid"})


# ---------------------------------------------------------------------------------------------------------------------------- sigmoid, expert bias


def test_sigmoid_is_refused_with_normalization():
    for overrides in ({"moe_router_score_function": "sigmoid"}, BIASED):
        with pytest.raises(ConfigError, match="sigmoid judges every expert by itself, and moe.gate_norm=true .* use softmax or moe.gate_norm=false"):
            _router(overrides=overrides)


def test_expert_bias_chooses_and_does_not_weigh():
    router, hidden = _router(gate_norm=False, overrides=BIASED), _hidden()
    router.expert_bias.copy_(torch.linspace(-0.5, 0.5, EXPERTS))
    probs, routing_map = router(hidden)
    scores = torch.sigmoid(_raw(router, hidden))
    chosen = (scores + router.expert_bias).topk(2).indices
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, chosen, True))
    assert not torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, scores.topk(2).indices, True))
    weights = scores * routing_map
    torch.testing.assert_close(probs, weights / weights.sum(-1, keepdim=True))


def test_expert_bias_follows_the_counts():
    router = _router(gate_norm=False, overrides=BIASED)
    maps = [router(_hidden(seed=seed))[1] for seed in (1, 2)]
    counts = sum(routing_map.sum(0) for routing_map in maps).float()
    assert torch.equal(router.local_tokens_per_expert, counts)
    with torch.no_grad():
        router(_hidden(seed=3))
    assert torch.equal(router.local_tokens_per_expert, counts), "a forward without gradients was counted"
    _update_bias(router)
    torch.testing.assert_close(router.expert_bias, 0.01 * torch.sign(counts.mean() - counts))
    assert not router.local_tokens_per_expert.any()


def test_expert_bias_balances():
    router, hidden = _router(gate_norm=False, overrides=BIASED), _hidden(tokens=192)
    peaks = []
    for _ in range(40):
        peaks.append(router(hidden)[1].sum(0).max().item())
        _update_bias(router)
    assert peaks[-1] - 48 < 0.5 * (peaks[0] - 48), peaks


def _update_bias(router: SkyworkRouter) -> None:
    """As finalize_model_grads does once per step."""
    module = __import__(finalize_model_grads.__module__, fromlist=["_update_router_expert_bias"])
    module._update_router_expert_bias([router], router.config)
    module.reset_model_temporary_tensors(router.config, [router])


def test_expert_bias_counts_neither_padding_tokens_nor_padded_slots():
    hidden, mask = _hidden(), _mask()
    free = _router(gate_norm=False, overrides=BIASED)
    wanted = (free(hidden)[1] & ~mask.reshape(-1, 1)).sum(0).float()
    for settings in ({}, {"capacity_factor": 1.0}, {"capacity_factor": 1.0, "pad_to_capacity": True}):
        router = _router(gate_norm=False, overrides=BIASED, **settings)
        router(hidden, padding_mask=mask)
        # Counted after dropping an overfull expert would look full at most, and with padding to capacity every expert would look the same.
        torch.testing.assert_close(router.local_tokens_per_expert, wanted)


def test_expert_bias_stays_fp32_and_is_saved():
    router = _router(gate_norm=False, overrides=BIASED)
    router.expert_bias.fill_(1 / 3)
    router.bfloat16()
    assert router.expert_bias.dtype == torch.float32 and router.expert_bias[0].item() == torch.tensor(1 / 3).item()
    assert "expert_bias" in router.state_dict() and "local_tokens_per_expert" not in router.state_dict()


# ---------------------------------------------------------------------------------------------------------------------------- fusion


def test_a_fused_router_gets_normalized_logits(monkeypatch):
    given = []

    def fused(logits, **settings):
        given.append((logits.detach(), settings))
        return topk_routing_with_score_function(logits, **settings)

    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    monkeypatch.setattr(moe_utils, "fused_topk_with_score_function", fused, raising=False)
    router, plain, hidden = _router(overrides={"moe_router_fusion": True}, gate_norm_scale=2.0), _router(gate_norm_scale=2.0), _hidden()
    for one, other in zip(router(hidden), plain(hidden), strict=True):
        torch.testing.assert_close(one, other)
    ((logits, settings),) = given
    torch.testing.assert_close(logits, _normalized(plain, _raw(plain, hidden)).detach())
    assert logits.dtype == torch.float32 and settings["topk"] == 2 and settings["score_function"] == "softmax" and not settings["use_pre_softmax"]
    torch.testing.assert_close(router.window, plain.window)
    torch.testing.assert_close(_weight_gradient(router, hidden), _weight_gradient(plain, hidden))


def test_a_fused_router_without_transformer_engine_is_refused(monkeypatch):
    monkeypatch.setattr(moe_utils, "fused_topk_with_score_function", None, raising=False)
    with pytest.raises(ConfigError, match="moe_router_fusion=true needs .* Transformer Engine"):
        _router(overrides={"moe_router_fusion": True})


# ---------------------------------------------------------------------------------------------------------------------------- padding tokens


def _mask() -> torch.Tensor:
    """[S, B], true for padding: sequences of 9 and 5 out of 12 tokens."""
    return torch.arange(TOKENS // BATCH).unsqueeze(1) >= torch.tensor([9, 5])


def _balance(kind: str, gate: torch.Tensor) -> torch.Tensor:
    load = torch.zeros_like(gate).scatter(1, gate.topk(2).indices, 1.0).mean(0) / 2
    return (1 / EXPERTS - gate.mean(0)).square().sum() if kind == "report" else EXPERTS * (load * gate.mean(0)).sum()


def _loss_by_hand(kind: str, scope: str, router: SkyworkRouter, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    gate_SBE = torch.softmax(_normalized(router, _raw(router, hidden)), -1).reshape(-1, BATCH, EXPERTS)
    valid = gate_SBE[~mask]
    if scope == "micro_batch":
        return _balance(kind, valid)
    if scope == "sequence":
        sequences = [gate_SBE[~mask[:, index], index] for index in range(BATCH)]
        return sum(len(sequence) * _balance(kind, sequence) for sequence in sequences) / len(valid)
    mean, load = router.batch_means
    slopes = 2 * (mean - 1 / EXPERTS) if kind == "report" else EXPERTS * load
    return (slopes * valid.mean(0)).sum()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
@pytest.mark.parametrize("kind", ["report", "switch"])
def test_padding_tokens_enter_no_loss(kind, scope, per_token):
    router = _router(aux_loss=kind, aux_scope=scope, aux_coefficient=0.3, overrides={"calculate_per_token_loss": per_token})
    if scope == "global_batch":
        router.batch_means.copy_(torch.softmax(torch.linspace(-1, 1, 2 * EXPERTS).reshape(2, EXPERTS), -1))
    hidden, mask = _hidden(), _mask()
    (by_hand,) = torch.autograd.grad(_loss_by_hand(kind, scope, router, hidden, mask), router.weight)
    factor = 0.3 * (14 if per_token else 1)
    torch.testing.assert_close(_weight_gradient(router, hidden, mask), factor * by_hand, rtol=1e-4, atol=1e-7)
    garbage = hidden.masked_fill(mask.unsqueeze(-1), 100.0)
    torch.testing.assert_close(_weight_gradient(router, garbage, mask), factor * by_hand, rtol=1e-4, atol=1e-7)


def test_several_losses_over_padded_sequences_add_up():
    extra = [{"loss": "switch", "scope": "sequence", "coefficient": 0.2}, {"loss": "report", "scope": "sequence", "coefficient": 0.5}]
    router, hidden, mask = _router(aux_loss="report", aux_coefficient=0.3, extra_aux_losses=extra, z_loss_coefficient=0.1), _hidden(), _mask()
    z_loss = torch.logsumexp(_raw(router, hidden)[~mask.reshape(-1)], -1).square().mean()
    total = 0.3 * _loss_by_hand("report", "micro_batch", router, hidden, mask) + 0.1 * z_loss
    total = total + 0.2 * _loss_by_hand("switch", "sequence", router, hidden, mask) + 0.5 * _loss_by_hand("report", "sequence", router, hidden, mask)
    (by_hand,) = torch.autograd.grad(total, router.weight)
    torch.testing.assert_close(_weight_gradient(router, hidden, mask), by_hand, rtol=1e-4, atol=1e-7)
    summary = update_coefficients([router], None, skipped=False)
    assert summary.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-5)
    for name, kind in (("switch_sequence", "switch"), ("report_sequence", "report")):
        assert summary.extra_aux_losses[name].item() == pytest.approx(_loss_by_hand(kind, "sequence", router, hidden, mask).item(), rel=1e-4)


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("pad", [False, True])
def test_padding_tokens_are_not_counted_and_take_no_slots(policy, pad):
    settings = {"capacity_factor": 0.5, "drop_policy": policy, "pad_to_capacity": pad}
    router, hidden, mask = _router(**settings), _hidden(), _mask()
    # Padding stands before real tokens too: it must not take a slot by its position.
    hidden, mask = hidden.flip(0), mask.flip(0)
    valid = ~mask.reshape(-1)
    free_map = _router(aux_loss="none")(hidden)[1]
    probs, kept = router(hidden, padding_mask=mask)
    capacity = math.ceil(TOKENS * 2 / EXPERTS * 0.5)
    loads = (free_map & valid.unsqueeze(1)).sum(0)
    dropped = (loads - capacity).clamp(min=0).sum().item()
    summary = update_coefficients([router], None, skipped=False)
    assert dropped > 0 and (free_map & kept & valid.unsqueeze(1)).sum(0).tolist() == loads.clamp(max=capacity).tolist()
    assert summary.drop_rate.item() == pytest.approx(dropped / loads.sum().item())
    torch.testing.assert_close(summary.load[0], loads / loads.sum())
    gate = torch.softmax(_normalized(router, _raw(router, hidden)), -1)[valid]
    assert summary.entropy.item() == pytest.approx(-(gate * gate.log()).sum(-1).mean().item(), rel=1e-4)
    assert summary.max1_over_max2.item() == pytest.approx((gate.topk(2).values[:, 0] / gate.topk(2).values[:, 1]).mean().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_replayed_routing_goes_where_it_went(scale):
    router, hidden = _router(gate_norm_scale=scale, overrides={"moe_enable_routing_replay": True}, capacity_factor=1.0), _hidden()
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    first_probs, first_map = router(hidden)
    recorded = RouterReplay.get_recorded_data()
    assert len(recorded) == 1 and recorded[0].shape == (TOKENS, 2)
    RouterReplay.set_replay_data(recorded)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    for one, other in zip(router(hidden), (first_probs, first_map), strict=True):
        torch.testing.assert_close(one, other)

    torch.nn.init.normal_(router.weight, std=0.5)  # a router that would choose others
    router.window.zero_()
    probs, kept = router(hidden)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, recorded[0], True)
    logits = _normalized(router, _raw(router, hidden))
    assert not torch.equal(chosen, torch.zeros_like(chosen).scatter(1, logits.topk(2).indices, True)), "the test needs another choice"
    expected = _expected_weights(logits, chosen) * kept
    torch.testing.assert_close(probs, expected)
    assert router.window[:EXPERTS].tolist() == chosen.sum(0).tolist() and not (kept & ~chosen).any()
    target = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    router.aux_coefficient.zero_()
    gradients = [torch.autograd.grad((value * target).sum(), router.weight)[0] for value in (router(hidden)[0], expected)]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_recomputed_layer_replays_what_its_forward_took():
    router, hidden = _router(overrides={"moe_enable_routing_replay": True}), _hidden()
    other = torch.zeros(TOKENS, 2, dtype=torch.long) + torch.tensor([3, 6])
    RouterReplay.set_replay_data([other])
    for action in (RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD):
        RouterReplay.set_global_router_replay_action(action)
        _, routing_map = router(hidden)
        assert routing_map.sum(0).tolist() == [0, 0, 0, TOKENS, 0, 0, TOKENS, 0]


# ---------------------------------------------------------------------------------------------------------------------------- weights of the chosen


def test_scaled_weights():
    """The factor multiplies the weights of the chosen; who is chosen, dropped and counted, and the losses, are as without it."""
    settings = {"capacity_factor": 0.5, "z_loss_coefficient": 0.1}
    router, plain, hidden = _router(overrides={"moe_router_topk_scaling_factor": 2.5}, **settings), _router(**settings), _hidden()
    probs, kept = router(hidden)
    plain_probs, plain_kept = plain(hidden)
    torch.testing.assert_close(probs, 2.5 * plain_probs)
    assert torch.equal(kept, plain_kept) and torch.equal(router.window, plain.window)
    torch.testing.assert_close(_weight_gradient(router, hidden), _weight_gradient(plain, hidden))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_top_1_learns_through_its_probability(scale):
    router, hidden = _router(topk=1, aux_loss="none", gate_norm_scale=scale), _hidden()
    probs, routing_map = router(hidden)
    gate = torch.softmax(_normalized(router, _raw(router, hidden)), -1)
    torch.testing.assert_close(probs, gate * routing_map)
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, gate.argmax(-1, keepdim=True), True))
    target = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    gradients = [torch.autograd.grad((value * target).sum(), router.weight)[0] for value in (probs, gate * routing_map)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_of_two_logits_normalization_leaves_the_sign():
    """Why config/validate_routing.py refuses it: no gradient reaches a gate of two experts."""
    from megatron_skywork.moe.gating_norm import normalize_logits

    logits = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    normalized = normalize_logits(logits)
    clear = (logits[:, 0] - logits[:, 1]).abs() > 0.1
    torch.testing.assert_close(normalized[clear].abs(), torch.full_like(normalized[clear], 0.5**0.5), rtol=1e-3, atol=0)
    (normalized * torch.randn(64, 2, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert logits.grad[clear].abs().max() < 1e-2


# ---------------------------------------------------------------------------------------------------------------------------- recomputation, benchmarks


@pytest.mark.parametrize("settings", [{}, {"aux_scope": "sequence", "z_loss_coefficient": 0.1}, {"aux_scope": "global_batch", "capacity_factor": 0.9}])
def test_a_recomputed_layer_counts_once(settings):
    plain, recomputed = _router(**settings), _router(**settings)
    hidden, target = _hidden().requires_grad_(), torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    for _ in range(2):
        (plain(hidden)[0] * target).sum().backward()
        (checkpoint(lambda x: recomputed(x)[0], hidden, use_reentrant=True) * target).sum().backward()
    assert plain.window.any() and torch.equal(recomputed.window, plain.window)
    torch.testing.assert_close(recomputed.weight.grad, plain.weight.grad)


def test_forced_balance_for_benchmarks():
    """Random logits instead of the gate's: an even load whatever the gate says, with normalization and statistics as ever."""
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    router = _router(overrides={"moe_router_force_load_balancing": True})
    with torch.no_grad():
        router.weight[0] = 100.0
    probs, routing_map = router(_hidden(tokens=4096))
    load = routing_map.sum(0) / 1024
    assert load.min() > 0.9 and load.max() < 1.1
    torch.testing.assert_close(probs.sum(-1), torch.ones(4096))
    probs[:, 0].sum().backward()
    assert router.weight.grad.isfinite().all() and router.window[:EXPERTS].sum() == 2 * 4096
