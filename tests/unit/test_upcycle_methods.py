"""Upcycling methods on one matrix: what is drawn, from what statistics, and what is left alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from megatron_skywork.convert.upcycling.methods import blend, drop, granular, router_init, row_chunks, shared
from megatron_skywork.convert.upcycling.methods.moments import moments
from megatron_skywork.convert.upcycling.methods.noise import with_noise
from megatron_skywork.convert.upcycling.methods.row_chunks import scaled
from megatron_skywork.convert.upcycling.methods.seeds import generator
from megatron_skywork.errors import CheckpointError, ConfigError

STORED = [torch.bfloat16, torch.float16, torch.float32]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, std: float = 0.02, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns)).mul_(std).add_(mean).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, signs of zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture()
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, with a shorter last one, on matrices that cost nothing."""
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(blend, "CHUNK_ELEMENTS", 1000)


# seeds


def test_a_generator_depends_on_the_seed_and_every_name() -> None:
    names = [(1,), (2,), (1, "a"), (1, "b"), (1, "a", "b"), (1, "a/b"), (1, "b", "a"), (1, "a", 1), (1, "a", "1"), (1, ("a", 1)), (11,), ("1", 1)]
    drawn = [tuple(torch.rand(4, generator=generator(*each)).tolist()) for each in names]  # type: ignore[arg-type]
    assert len(set(drawn)) == len(names)
    assert drawn == [tuple(torch.rand(4, generator=generator(*each)).tolist()) for each in names]  # type: ignore[arg-type]


def test_the_seed_of_a_name_stays_what_it_is() -> None:
    """A folder written by an earlier version can be made again."""
    assert generator(1234, "model.layers.0", 3).initial_seed() == 701462264


def test_a_name_without_a_fixed_spelling_is_refused() -> None:
    with pytest.raises(TypeError):
        generator(1, object())


# moments


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("mean", [0.0, 40.0])
def test_moments_are_those_of_the_whole(dtype: torch.dtype, mean: float, small_chunks: None) -> None:
    whole = matrix(37, 101, dtype, mean=mean)
    found = moments(row_chunks.row_chunks(whole))
    assert found == pytest.approx((whole.double().mean().item(), whole.double().std().item()), rel=1e-9)


def test_what_is_fp64_already_is_not_changed_in_place() -> None:
    source = matrix(3, 4).double()
    before = source.clone()
    moments([source])
    blend.mean([source, source + 1])
    assert same(source, before)


def test_moments_of_a_constant_are_exact() -> None:
    assert moments([torch.full((3, 70), 7.3)]) == (torch.tensor(7.3).item(), 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moments_refuse_what_is_not_finite(bad: float) -> None:
    damaged = matrix(4, 5)
    damaged[2, 3] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        moments([damaged])


# noise


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_noise_has_the_asked_share_of_the_deviation(dtype: torch.dtype) -> None:
    source = matrix(300, 200, dtype)
    before = source.clone()
    noisy = with_noise(source, 0.5, generator(1, "up"))
    assert noisy.dtype == dtype and same(source, before)
    added = noisy.double() - source.double()
    assert added.std().item() == pytest.approx(0.5 * source.double().std().item(), rel=0.02)
    assert abs(added.mean().item()) < 4 * added.std().item() / math.sqrt(added.numel())
    assert abs(torch.corrcoef(torch.stack([added.flatten(), source.double().flatten()]))[0, 1].item()) < 0.02


def test_noise_is_another_for_another_expert_and_the_same_for_the_same(small_chunks: None) -> None:
    source = matrix(30, 101)
    noisy = [with_noise(source, 0.1, generator(1, "up", expert)) for expert in (0, 1, 0)]
    assert same(noisy[0], noisy[2])
    added = torch.stack([(each - source).flatten() for each in noisy[:2]])
    assert abs(torch.corrcoef(added)[0, 1].item()) < 0.1
    # Each chunk has numbers of its own.
    rows = added[0].view(30, 101)
    assert abs(torch.corrcoef(torch.stack([rows[:9].flatten(), rows[9:18].flatten()]))[0, 1].item()) < 0.15


def test_a_known_deviation_saves_the_pass_and_changes_nothing() -> None:
    source = matrix(30, 20, torch.bfloat16)
    std = moments(row_chunks.row_chunks(source))[1]
    assert same(with_noise(source, 0.1, generator(1)), with_noise(source, 0.1, generator(1), std=std))
    assert not same(with_noise(source, 0.1, generator(1)), with_noise(source, 0.1, generator(1), std=2 * std))


def test_no_noise_is_a_copy_and_less_than_none_is_refused() -> None:
    source = matrix(3, 4, torch.bfloat16)
    source[0, 0] = -0.0
    assert same(with_noise(source, 0.0, generator(1)), source)
    with pytest.raises(ConfigError, match="--noise=-0.1"):
        with_noise(source, -0.1, generator(1))


# drop


@pytest.mark.parametrize(("ffn", "ratio", "count"), [(12, 0.5, 6), (13, 0.5, 6), (100, 0.29, 29), (7, 1.0, 7), (10, 0.1, 1)])
def test_dropped_columns_are_floor_of_the_ratio(ffn: int, ratio: float, count: int) -> None:
    columns = drop.dropped_columns(ffn, ratio, generator(1))
    assert columns.dtype == torch.int64 and len(columns) == count
    assert columns.tolist() == sorted(set(columns.tolist())) and columns[0] >= 0 and columns[-1] < ffn


def test_every_column_is_as_likely_as_another() -> None:
    times = torch.zeros(40)
    for expert in range(400):
        times[drop.dropped_columns(40, 0.25, generator(1, expert))] += 1
    assert times.min() > 60 and times.max() < 140


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.1, 0.01, math.nan])
def test_a_ratio_that_drops_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=f"--drop-ratio={ratio}"):
        drop.dropped_columns(10, ratio, generator(1))


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("ffn_axis", [0, 1])
def test_dropped_columns_get_the_statistics_of_their_own_part_and_the_rest_stays(dtype: torch.dtype, ffn_axis: int, small_chunks: None) -> None:
    ffn, hidden = 200, 300
    columns = drop.dropped_columns(ffn, 0.5, generator(3))
    gate = matrix(ffn, hidden, torch.float32)
    # The part that is dropped has another mean and another deviation than the rest, so statistics of the whole would show.
    gate[columns] = gate[columns] * 5 + 0.3
    source = (gate if ffn_axis == 0 else gate.T).to(dtype)
    before = source.clone()
    out = drop.reinitialize(source, columns, ffn_axis, generator(3, "gate"))
    assert same(source, before) and out.dtype == dtype and out.is_contiguous()
    rest = torch.tensor(sorted(set(range(ffn)) - set(columns.tolist())))
    assert same(out.index_select(ffn_axis, rest), source.index_select(ffn_axis, rest))
    new, old = (each.index_select(ffn_axis, columns).double() for each in (out, source))
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.02)
    assert new.mean().item() == pytest.approx(old.mean().item(), abs=4 * old.std().item() / math.sqrt(old.numel()))
    assert (new == old).double().mean() < 0.01
    assert abs(torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1].item()) < 0.03
    # No two of the new columns share their numbers.
    assert torch.corrcoef(new if ffn_axis == 0 else new.T).fill_diagonal_(0).abs().max() < 0.35


def test_the_columns_do_not_depend_on_the_matrix() -> None:
    """gate and up come as [F, H], down as [H, F], each alone: one generator's names give all three one set."""
    ffn, hidden = 20, 6
    changed = []
    for name, shape, axis in (("gate", (ffn, hidden), 0), ("up", (ffn, hidden), 0), ("down", (hidden, ffn), 1)):
        source = matrix(*shape)
        out = drop.reinitialize(source, drop.dropped_columns(ffn, 0.3, generator(1, 0, "columns")), axis, generator(1, 0, name))
        changed.append((out != source).any(1 - axis).nonzero()[:, 0].tolist())
    assert changed[0] == changed[1] == changed[2] and len(changed[0]) == 6


# scaling, pieces, parts


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_scaling_by_a_power_of_two_keeps_every_mantissa(dtype: torch.dtype, small_chunks: None) -> None:
    source = matrix(37, 101, dtype)
    assert torch.equal(scaled(source, 4.0).double(), source.double() * 4)
    assert same(scaled(scaled(source, 4.0), 0.25), source)
    assert scaled(source, 1.0) is source


def test_scaling_beyond_the_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match="40000 times 2 does not fit float16"):
        scaled(torch.tensor([[1.0, 40000.0]], dtype=torch.float16), 2.0)


@pytest.mark.parametrize("ffn_axis", [0, 1])
def test_pieces_put_together_are_the_matrix(ffn_axis: int) -> None:
    source = matrix(12, 12, torch.bfloat16)
    pieces = [granular.piece(source, index, 4, ffn_axis) for index in range(4)]
    assert all(each.is_contiguous() and each.shape[ffn_axis] == 3 for each in pieces)
    assert same(torch.cat(pieces, dim=ffn_axis), source)


def test_a_width_that_does_not_divide_is_refused_with_the_numbers_that_do() -> None:
    with pytest.raises(ConfigError, match=r"--granularity=5: .* 12 .*: 2, 3, 4, 6, 12$"):
        granular.piece(matrix(12, 4), 0, 5, 0)
    assert granular.width_problem(12, 3) is None and granular.width_problem(12, 0)
    assert granular.routing_problem(16, 4, 4) is None
    assert granular.routing_problem(18, 4, 4) and granular.routing_problem(16, 6, 4) and granular.routing_problem(16, 4, 0)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 64, 3, 6, 12.5])
def test_the_product_of_the_scales_is_the_factor(factor: float) -> None:
    up, down = granular.scales(factor)
    assert up * down == pytest.approx(factor, rel=1e-15)
    assert granular.exact_scales(factor) == (factor in (1, 2, 4, 8, 64))
    if granular.exact_scales(factor):
        assert up * down == factor and math.frexp(up)[0] == math.frexp(down)[0] == 0.5 and 1 <= down / up <= 2


def test_virtual_groups_number_experts_by_copy_then_piece() -> None:
    rows_CH = matrix(3, 5)
    rows_EH = granular.virtual_groups(rows_CH, 4)
    assert rows_EH.shape == (12, 5)
    assert all(torch.equal(rows_EH[copy * 4 + index], rows_CH[copy]) for copy, index in itertools.product(range(3), range(4)))


@pytest.mark.parametrize("ffn_axis", [0, 1])
@pytest.mark.parametrize("shared_ffn", [1, 5, 11])
def test_shared_and_routed_part_put_together_are_the_matrix(ffn_axis: int, shared_ffn: int) -> None:
    source = matrix(12, 12, torch.bfloat16)
    parts = [shared.shared_part(source, shared_ffn, ffn_axis), shared.routed_part(source, shared_ffn, ffn_axis)]
    assert all(each.is_contiguous() for each in parts) and parts[1].shape[ffn_axis] == shared.routed_width(12, shared_ffn) == 12 - shared_ffn
    assert same(torch.cat(parts, dim=ffn_axis), source)


def test_a_shared_expert_that_is_the_whole_leaves_routed_experts_that_add_nothing() -> None:
    up, down = matrix(12, 4, torch.bfloat16), matrix(4, 12, torch.bfloat16)
    assert shared.routed_width(12, 12) == 12
    assert same(shared.shared_part(up, 12, 0), up) and same(shared.shared_part(down, 12, 1), down)
    assert same(shared.routed_part(up, 12, 0), up) and same(shared.routed_part(down, 12, 1), torch.zeros(4, 12, dtype=torch.bfloat16))


@pytest.mark.parametrize("shared_ffn", [0, -1, 13])
def test_a_shared_expert_wider_than_the_feed_forward_is_refused(shared_ffn: int) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: shared.shared_part(matrix(12, 4), shared_ffn, 0), lambda: shared.routed_part(matrix(12, 4), shared_ffn, 0),
        lambda: shared.routed_width(12, shared_ffn),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(ConfigError, match=f"--shared-expert-ffn={shared_ffn}: .* 12"):
            attempt()


# blend


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("shape", [(37, 101), (11,)])
def test_the_mean_is_the_mean(dtype: torch.dtype, shape: tuple[int, ...], small_chunks: None) -> None:
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=draw).to(dtype) for _ in range(3)]
    before = [each.clone() for each in tensors]
    found = blend.mean(tensors)
    assert same(found, torch.stack(tensors).double().mean(0).to(dtype))
    assert same(blend.mean(tensors[::-1]), found) and all(map(same, tensors, before))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_mean_of_equals_is_the_tensor(count: int) -> None:
    tensor = matrix(50, 60)
    assert same(blend.mean([tensor.clone() for _ in range(count)]), tensor)


@pytest.mark.parametrize("other", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.bfloat16)], ids=["shape", "dtype"])
def test_models_that_differ_in_shape_have_no_mean(other: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"float32\[3, 4\]"):
        blend.mean([torch.zeros(3, 4), other])


# threads


def everything() -> list[torch.Tensor]:
    """One result of each method that computes, on sizes at which torch uses its threads."""
    source, wide = matrix(700, 900, torch.bfloat16), matrix(2, 70000)
    columns = drop.dropped_columns(700, 0.5, generator(1))
    tokens_TH = matrix(1500, 96, std=1.0)
    return [
        torch.tensor(moments(row_chunks.row_chunks(source)) + moments(row_chunks.row_chunks(wide)) + moments([wide[:1]]), dtype=torch.float64),
        with_noise(source.float(), 0.3, generator(1, "noise")),
        drop.reinitialize(source.float(), columns, 0, generator(1, "drop")),
        drop.reinitialize(source.T, columns, 1, generator(1, "drop")),
        scaled(source.float(), math.sqrt(3)),
        blend.mean([source.float(), source.float().flip(0), source.float().flip(1)]),
        router_init.normal(64, 700, 0.01, generator(1)),
        router_init.orthogonal(96, 600, 0.01, generator(1)),
        router_init.from_hidden(tokens_TH, 8, 0.01, generator(1)),
        router_init.from_texts(list(tokens_TH.split(400)), 0.01),
    ]  # fmt: skip


def test_nothing_depends_on_the_number_of_threads_or_on_what_was_computed_before() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(4)
        torch.rand(17)
        four = everything()
    finally:
        torch.set_num_threads(before)
    assert [same(a, b) for a, b in zip(one, four, strict=True)] == [True] * len(one)
