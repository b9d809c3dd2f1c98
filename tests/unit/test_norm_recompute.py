"""A norm that is computed again in backward: nothing keeps its output, whoever reads it, and gradients are the plain norm's."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch

from megatron_skywork.model.norm import RMSNorm
from megatron_skywork.model.norm_recompute import RecomputedRMSNorm

TOKENS, HIDDEN = 6, 16


def _norm(kind: type[RMSNorm]) -> Any:
    norm = kind(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), HIDDEN)  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, HIDDEN))
    return norm


def _readers() -> list[torch.nn.Linear]:
    torch.manual_seed(1)
    return [torch.nn.Linear(HIDDEN, 4), torch.nn.Linear(HIDDEN // 2, 4)]


def _read(output: torch.Tensor, readers: list[torch.nn.Linear]) -> torch.Tensor:
    """Two linear maps, of which the second reads a view of a part that begins further on."""
    return readers[0](output).square().sum() + readers[1](output[2:].reshape(-1, 2, HIDDEN // 2)[:, 1]).sum() + output.exp().sum()


def _hidden() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()


def _gradients(loss: torch.Tensor, *tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, tensors, **options)


def test_gradients() -> None:
    plain, norm, readers, hidden = _norm(RMSNorm), _norm(RecomputedRMSNorm), _readers(), _hidden()
    expected = _gradients(_read(plain(hidden), readers), hidden, plain.weight, readers[0].weight, readers[1].weight)
    with norm.output_recomputed():
        loss = _read(norm(hidden), readers)
    for last in (False, True):  # a graph that is kept can be gone through again
        found = _gradients(loss, hidden, norm.weight, readers[0].weight, readers[1].weight, retain_graph=not last)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_all_readers_share_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, compute = [], RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda norm, hidden: runs.append(norm) or compute(norm, hidden))
    norm, hidden = _norm(RecomputedRMSNorm), _hidden()
    with norm.output_recomputed():
        loss = _read(norm(hidden), _readers())
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2


def test_nobody_keeps_the_output() -> None:
    norm, reader, hidden = _norm(RecomputedRMSNorm), _readers()[0], _hidden()
    with norm.output_recomputed():
        output = norm(hidden)
        loss = reader(output).square().sum()
        storage = ref(output.untyped_storage())
        del output
    assert storage() is None
    loss.backward()
    assert hidden.grad is not None and norm.weight.grad is not None


def test_an_output_read_outside_is_kept_as_ever() -> None:
    plain, norm, readers, hidden = _norm(RMSNorm), _norm(RecomputedRMSNorm), _readers(), _hidden()
    with norm.output_recomputed():
        output = norm(hidden)
    other = torch.full((TOKENS, HIDDEN), 3.0).requires_grad_()
    (found,) = _gradients(_read(output, readers) + other.square().sum(), hidden)
    (expected,) = _gradients(_read(plain(hidden), readers), hidden)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_calls_do_not_mix(fails: bool) -> None:
    """Two micro-batches through the same norm, in backward the first one first; a forward that failed before leaves nothing behind."""
    plain, norm, readers = _norm(RMSNorm), _norm(RecomputedRMSNorm), _readers()
    if fails:
        with pytest.raises(KeyError), norm.output_recomputed():
            norm(_hidden())
            raise KeyError
    inputs = [_hidden(), (2 * _hidden()).detach().requires_grad_()]
    losses = []
    for hidden in inputs:
        with norm.output_recomputed():
            losses.append(_read(norm(hidden), readers))
    for hidden, loss in zip(inputs, losses, strict=True):
        torch.testing.assert_close(_gradients(loss, hidden)[0], _gradients(_read(plain(hidden), readers), hidden)[0])


def test_without_gradients_it_is_the_norm() -> None:
    plain, norm, hidden = _norm(RMSNorm), _norm(RecomputedRMSNorm), _hidden()
    with torch.no_grad(), norm.output_recomputed():
        assert torch.equal(norm(hidden), plain(hidden))


@pytest.mark.parametrize("kernel", [RMSNorm.forward, torch.nn.RMSNorm.forward], ids=["written out", "torch's, as on a GPU"])
def test_nothing_stays_when_a_micro_batch_is_done(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's norm saves an output of its own; a graph of it that is packed as it is and never gone through would stay for ever."""
    monkeypatch.setattr(RMSNorm, "forward", kernel)
    norm, readers, tokens = _norm(RecomputedRMSNorm), _readers(), 11  # a shape nothing else here has
    for _ in range(3):
        hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
        with norm.output_recomputed():
            loss = _read(norm(hidden * 2), readers)
        loss.backward()
    del hidden, loss
    gc.collect()
    assert [tensor for tensor in gc.get_objects() if torch.is_tensor(tensor) and tensor.shape == (tokens, HIDDEN)] == []
