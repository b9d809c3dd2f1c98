"""Attempts over one store: what a dead attempt left there must not reach the next one."""

from __future__ import annotations

import datetime
import threading

import pytest
from torch.distributed import TCPStore

from megatron_skywork import parallel
from megatron_skywork.errors import TrainingError

SECONDS = datetime.timedelta(seconds=60)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(name, value)
    return store


def _attempt(order: list[int], told: list[str]) -> list:
    """Ranks come in this order; the stores they get."""
    stores: list = [None] * len(order)
    threads = []
    for rank in order:

        def come(rank: int = rank) -> None:
            stores[rank] = parallel.rendezvous(rank, len(order), SECONDS, told.append if rank == 0 else lambda text: None)

        threads.append(threading.Thread(target=come))
        threads[-1].start()
        threads[-1].join(timeout=0.3)  # the next one comes later
    for thread in threads:
        thread.join(timeout=60)
    return stores


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_an_attempt_reads_nothing_of_the_one_before(agent: TCPStore, order: list[int]) -> None:
    told: list[str] = []
    first = _attempt([0, 1, 2], told)
    assert told[0] == "waits for ranks 1, 2" and told[-1] == "process groups"
    for store in first:
        store.set("address", "of a rank that is dead now")
    agent.set("knock/1", "a rank that died before it was answered")
    second = _attempt(order, [])
    assert not any(store.check(["address"]) for store in second)
    second[2].set("address", "of a rank that lives")
    assert [store.get("address") for store in second] == [b"of a rank that lives"] * 3


def test_a_rank_that_does_not_come_is_named(agent: TCPStore) -> None:
    with pytest.raises(TrainingError, match=r"ranks \[1\] of 2"):
        parallel.rendezvous(0, 2, datetime.timedelta(seconds=0.5))


def test_the_first_rank_is_waited_for_by_name(agent: TCPStore) -> None:
    told: list[str] = []
    waiting = threading.Thread(target=parallel.rendezvous, args=(1, 2, SECONDS, told.append))
    waiting.start()
    waiting.join(timeout=0.3)
    assert told == ["waits for ranks 0"]
    parallel.rendezvous(0, 2, SECONDS)
    waiting.join(timeout=60)
    assert told == ["waits for ranks 0", "process groups"]


def test_without_torchrun_s_store_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert parallel.rendezvous(0, 2, SECONDS) is None
