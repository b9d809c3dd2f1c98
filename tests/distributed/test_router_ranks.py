"""What routers do together, on 4 gloo ranks in one launch: losses that do not depend on the layout, one all-reduce per step, metrics across
pipeline stages, an fp32 gate among bf16 weights under the distributed optimizer, and the coefficient's way through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_skywork import device
from megatron_skywork.config.schema import Moe

device.prepare()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.module import Float16Module, MegatronModule  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection  # noqa: E402

from megatron_skywork.moe.aux_loss import report_aux_loss, switch_aux_loss  # noqa: E402
from megatron_skywork.moe.gating_norm import normalize_logits  # noqa: E402
from megatron_skywork.moe.router import SkyworkRouter  # noqa: E402
from megatron_skywork.moe.router_state import RouterSummary, gather_router_metrics, update_coefficients  # noqa: E402
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig  # noqa: E402
from megatron_skywork.parallel import sequence_part  # noqa: E402

WORLD, HIDDEN, EXPERTS, SEQUENCE = 4, 16, 8, 32


def _config(moe: Moe, tp: int = 1, **overrides) -> SkyworkTransformerConfig:
    settings = {
        "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 4, "add_bias_linear": False, "num_moe_experts": EXPERTS, "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none", "moe_router_dtype": "fp32", "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": moe.capacity_factor, "tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "skywork": moe,
    }  # fmt: skip
    return SkyworkTransformerConfig(**(settings | overrides))


def _router(config: SkyworkTransformerConfig, layer: int = 1) -> SkyworkRouter:
    torch.manual_seed(layer)
    router = SkyworkRouter(config, get_default_pg_collection())
    router.set_layer_number(layer)
    return router


def _groups(tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)


def _my_part(sequences_SN: torch.Tensor, tp: int, cp: int) -> torch.Tensor:
    """This rank's part of sequences whose first axis is the position: a zigzag over context-parallel ranks, then a slice over tensor-parallel ones."""
    part = sequence_part(sequences_SN.transpose(0, 1), parallel_state.get_context_parallel_rank(), cp).transpose(0, 1)
    local = SEQUENCE // tp // cp
    return part[parallel_state.get_tensor_model_parallel_rank() * local :][:local]


def _micro_batches() -> torch.Tensor:
    """[WORLD, SEQUENCE, 1, HIDDEN]: one sequence for each of four micro-batches."""
    return torch.randn(WORLD, SEQUENCE, 1, HIDDEN, generator=torch.Generator().manual_seed(5))


# (tensor, context) parallel degrees of 4 ranks, and every number of sequences per micro-batch that the layout allows with 4 sequences.
SPLITS = {(1, 1): [1], (2, 1): [1, 2], (1, 2): [1], (4, 1): [1, 2, 4], (2, 2): [1, 4], (1, 4): [1]}
LOSSES = {
    **{f"{kind} {scope}": {"aux_loss": kind, "aux_scope": scope} for kind in ("report", "switch") for scope in ("sequence", "micro_batch", "global_batch")},
    "all at once": {
        "aux_loss": "report", "aux_scope": "global_batch", "z_loss_coefficient": 0.1,
        "extra_aux_losses": [{"loss": "switch", "scope": "sequence", "coefficient": 0.3}, {"loss": "switch", "scope": "global_batch", "coefficient": 0.2}]},
}  # fmt: skip


def _router_gradient(moe: Moe, tp: int, cp: int, sequences: int, per_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's gradient of the second of two steps on the same four sequences, as training would have it, and what the step says."""
    dp, dp_rank = WORLD // tp // cp, parallel_state.get_data_parallel_rank()
    router = _router(_config(moe, tp, calculate_per_token_loss=per_token))
    num_micro_batches = WORLD // dp // sequences
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.full((1,), 1.0 if per_token else cp / num_micro_batches)
    mine = _my_part(_micro_batches()[dp_rank::dp].squeeze(2).transpose(0, 1), tp, cp)
    for _ in range(2):
        router.weight.grad = None
        for hidden in mine.split(sequences, dim=1):
            probs, _ = router(hidden)
            (probs * 0).sum().backward()
        summary = update_coefficients([router], parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True), skipped=False)
    # As megatron-core does: summed over tensor-parallel ranks, then averaged over data- and context-parallel ones, or divided by the batch's tokens.
    gradient = router.weight.grad.clone()
    torch.distributed.all_reduce(gradient)
    said = [summary.aux_loss, summary.z_loss, summary.entropy, summary.max1_over_max2, summary.load[0], *summary.extra_aux_losses.values()]
    return gradient / (WORLD * SEQUENCE if per_token else dp * cp), torch.cat(said)


def _whole_batch_gradient(moe: Moe) -> torch.Tensor:
    """The same by autograd from the formulas, on the four sequences at once."""
    weight = _router(_config(moe)).weight.detach().clone().requires_grad_()
    logits = torch.einsum("nsh,eh->nse", _micro_batches().squeeze(2), weight)
    gate = torch.softmax(normalize_logits(logits.flatten(0, 1)), dim=-1).view(WORLD, SEQUENCE, EXPERTS)
    routed = torch.zeros_like(gate, dtype=torch.bool).scatter(2, gate.topk(2, dim=-1).indices, True)

    def loss(kind: str, scope: str) -> torch.Tensor:
        parts = [(gate.flatten(0, 1), routed.flatten(0, 1))] if scope == "global_batch" else list(zip(gate, routed, strict=True))
        return torch.stack([report_aux_loss(probs) if kind == "report" else switch_aux_loss(probs, chosen, 2) for probs, chosen in parts]).mean()

    total = moe.aux_coefficient * loss(moe.aux_loss, moe.aux_scope) + moe.z_loss_coefficient * torch.logsumexp(logits, dim=-1).square().mean()
    for extra in moe.extra_aux_losses:
        total = total + extra.coefficient * loss(extra.loss, extra.scope)
    return torch.autograd.grad(total, weight)[0]


def check_router_gradient_does_not_depend_on_layout_or_split(rank: int, folder: Path) -> None:
    _groups()
    moes = {name: Moe(num_experts=EXPERTS, router_init_std=0.5, aux_coefficient=0.5, **settings) for name, settings in LOSSES.items()}
    expected = {name: _whole_batch_gradient(moe) for name, moe in moes.items()}
    logged: dict[str, torch.Tensor] = {}
    for (tp, cp), splits in SPLITS.items():
        _groups(tp=tp, cp=cp)
        for name, moe in moes.items():
            # Means over a micro-batch are another loss when it holds more sequences; the layout alone must not matter.
            for sequences in splits[:1] if moe.aux_scope == "micro_batch" else splits:
                for per_token in (False, True):
                    gradient, values = _router_gradient(moe, tp, cp, sequences, per_token)
                    difference = (gradient - expected[name]).abs().max() / expected[name].abs().max()
                    assert expected[name].abs().max() > 1e-4 and difference < 1e-6, (name, tp, cp, sequences, per_token, difference.item())
                    torch.testing.assert_close(values, logged.setdefault(name, values), rtol=1e-5, atol=1e-7)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def check_the_same_assignments_are_dropped_under_every_layout(rank: int, folder: Path) -> None:
    """Two micro-batches of two sequences; data-parallel ranks beyond two repeat them."""
    whole = _micro_batches().squeeze(2).transpose(0, 1)
    positions = torch.arange(SEQUENCE * 2).reshape(SEQUENCE, 2)
    for policy in ("probs", "position"):
        moe = Moe(num_experts=EXPERTS, router_init_std=0.5, capacity_factor=0.8, drop_policy=policy)
        dropped_at: dict[int, set[int]] = {}
        for tp, cp, ep in ((1, 1, 1), (1, 1, 4), (2, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 2), (1, 4, 2)):
            _groups(tp=tp, cp=cp, ep=ep)
            router = _router(_config(moe, tp, expert_model_parallel_size=ep))
            number = parallel_state.get_data_parallel_rank() % 2
            micro_batch = whole[:, 2 * number : 2 * number + 2]
            hidden, mine = _my_part(micro_batch, tp, cp), _my_part(positions, tp, cp).flatten()
            _, kept = router(hidden)
            chosen = torch.zeros_like(kept).scatter(1, router.gating(hidden).flatten(0, 1).topk(2).indices, True)
            lost = chosen & ~kept
            assert not (kept & ~chosen).any()
            mine_lost = {int(mine[token]) * EXPERTS + int(expert) for token, expert in lost.nonzero()}
            everyone: list = [None] * WORLD
            torch.distributed.all_gather_object(everyone, (number, mine_lost))
            for which in {place for place, _ in everyone}:
                found = set().union(*(entries for place, entries in everyone if place == which))
                assert found and found == dropped_at.setdefault(which, found), (policy, tp, cp, ep)
        assert sorted(dropped_at) == [0, 1]


def check_one_reduction_gives_every_rank_the_same_coefficients(rank: int, folder: Path) -> None:
    _groups(tp=2)
    moe = Moe(num_experts=EXPERTS, router_init_std=0.5, capacity_factor=0.8, adaptive={"enabled": True, "momentum": 0.5})
    routers = [_router(_config(moe, tp=2), layer) for layer in (1, 2, 3)]
    for index, router in enumerate(routers):
        router(torch.randn(8, 1, HIDDEN, generator=torch.Generator().manual_seed(10 * rank + index)))
    windows: list = [None] * WORLD
    torch.distributed.all_gather_object(windows, torch.stack([router.window for router in routers]))
    calls = []
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs)
    try:
        summary = update_coefficients(routers, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True), skipped=False)
    finally:
        torch.distributed.all_reduce = reduce
    assert len(calls) == 1
    total = sum(windows)
    assert total[:, :EXPERTS].sum().item() == 3 * WORLD * 8 * 2
    rates = total[:, 2 * EXPERTS] / (WORLD * 8 * 2)  # the first of WINDOW_SUMS
    assert (rates > 0).all()
    torch.testing.assert_close(summary.drop_rate, rates.float())
    expected = 0.5 * 0.01 + 0.5 * (0.2 * rates).clamp(max=0.01).float()
    mine = torch.stack([router.aux_coefficient for router in routers])
    torch.testing.assert_close(mine, expected)
    everyone: list = [None] * WORLD
    torch.distributed.all_gather_object(everyone, mine)
    assert all(torch.equal(mine, other) for other in everyone)


def check_metrics_of_uneven_stages_are_sorted_everywhere(rank: int, folder: Path) -> None:
    _groups(pp=4)
    layers = [[1, 6], [], [3, 2, 7], [5]][rank]
    column = torch.tensor(layers, dtype=torch.float32)
    summary = RouterSummary(
        layers=layers, load=column.unsqueeze(1).expand(len(layers), EXPERTS) / 100 if layers else torch.zeros(0, 0), drop_rate=column / 10,
        coefficient=column, aux_loss=column, z_loss=column, entropy=column, max1_over_max2=column, max2_over_max3=column)  # fmt: skip
    metrics = gather_router_metrics(summary, parallel_state.get_pipeline_model_parallel_group())
    assert metrics["layers"] == [1, 2, 3, 5, 6, 7]
    assert metrics["drop_rate"] == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.6, 0.7])
    assert [len(row) for row in metrics["load"]] == [EXPERTS] * 6
    assert [row[0] for row in metrics["load"]] == pytest.approx([0.01, 0.02, 0.03, 0.05, 0.06, 0.07])


class _GateOnly(MegatronModule):
    """A bf16 linear layer, then an fp32 gate: the two kinds of parameters an MoE layer has."""

    def __init__(self, config: SkyworkTransformerConfig):
        super().__init__(config)
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.router = _router(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.router(self.linear(hidden))[0]


def _train(model, config, hidden_per_step, weights, optimizer=None):
    """Three AdamW steps on a loss that pulls the routing weights; returns the gate's weight."""
    plain = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0) if optimizer is None else None
    for hidden in hidden_per_step:
        (plain or optimizer).zero_grad()
        if optimizer is not None:
            model.zero_grad_buffer()
        (model(hidden) * weights).sum(-1).mean().backward()
        if optimizer is None:
            plain.step()
        else:
            finalize_model_grads([model])
            assert optimizer.step()[0]


def check_fp32_gate_trains_among_bf16_weights(rank: int, folder: Path) -> None:
    _groups()
    moe = Moe(num_experts=EXPERTS, router_init_std=0.5, aux_loss="none")
    steps = [torch.randn(WORLD, 16, 1, HIDDEN, generator=torch.Generator().manual_seed(40 + step)).bfloat16() for step in range(3)]
    weights = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(50))
    for distributed_optimizer in (False, True):
        config = _config(moe, bf16=True, params_dtype=torch.bfloat16)
        wrapped = Float16Module(config, _GateOnly(config))
        wrapped.module.router.weight.data.add_(1e-5)
        start = wrapped.module.router.weight.detach().clone()
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True)
        model = DistributedDataParallel(config, ddp_config, wrapped)
        router = wrapped.module.router
        settings = OptimizerConfig(optimizer="adam", lr=0.01, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, clip_grad=0.0, bf16=True,
                                   params_dtype=torch.bfloat16, use_distributed_optimizer=distributed_optimizer)  # fmt: skip
        optimizer = get_megatron_optimizer(settings, [model])
        _train(model, config, [hidden[rank] for hidden in steps], weights, optimizer)
        assert router.weight.dtype == torch.float32 and wrapped.module.linear.weight.dtype == torch.bfloat16
        trained = router.weight.detach().clone()
        everyone: list = [None] * WORLD
        torch.distributed.all_gather_object(everyone, trained)
        assert all(torch.equal(trained, other) for other in everyone)
        assert not torch.equal(trained, trained.bfloat16().float()), "rounded to bf16"
        # The same on one rank with all the data and a plain optimizer, the linear layer kept in bf16 there too.
        reference = _GateOnly(config).bfloat16()
        with torch.no_grad():
            reference.router.weight.copy_(start)
        _train(reference, config, [torch.cat(list(hidden)) for hidden in steps], weights)
        moved, expected = trained - start, reference.router.weight.detach() - start
        assert moved.abs().max() > 0.02
        # The linear layer's bf16 rounding differs (there the optimizer has no fp32 copy), so the path is close, not equal.
        assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.98
        torch.testing.assert_close(moved.norm(), expected.norm(), rtol=0.03, atol=0)


def check_coefficient_goes_through_a_checkpoint_and_another_layout(rank: int, folder: Path) -> None:
    moe = Moe(num_experts=EXPERTS, capacity_factor=1.0, adaptive={"enabled": True})
    prefix = "decoder.layers.0.mlp.router."
    _groups(tp=2)
    saved = _router(_config(moe, tp=2))
    saved.bfloat16().aux_coefficient.fill_(0.0012345678)
    if rank == 0:
        (folder / "step").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(saved.sharded_state_dict(prefix=prefix), str(folder / "step"))
    _groups(tp=1)
    loaded = _router(_config(moe))
    with torch.no_grad():
        loaded.weight.zero_()
    state = dist_checkpointing.load(loaded.sharded_state_dict(prefix=prefix), str(folder / "step"))
    assert set(state) == {prefix + "weight", prefix + "aux_coefficient"}
    loaded.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    assert torch.equal(loaded.aux_coefficient, saved.aux_coefficient) and torch.equal(loaded.weight, saved.weight)


CHECKS = [
    check_router_gradient_does_not_depend_on_layout_or_split,
    check_the_same_assignments_are_dropped_under_every_layout,
    check_one_reduction_gives_every_rank_the_same_coefficients,
    check_metrics_of_uneven_stages_are_sorted_everywhere,
    check_fp32_gate_trains_among_bf16_weights,
    check_coefficient_goes_through_a_checkpoint_and_another_layout,
]


def _on_every_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for check in CHECKS:
        check(rank, Path(folder))
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_routers_on_four_ranks(tmp_path):
    torch.multiprocessing.spawn(_on_every_rank, args=(str(tmp_path),), nprocs=WORLD)
