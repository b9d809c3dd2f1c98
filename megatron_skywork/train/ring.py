"""What ranks tell each other while their collectives hang: that they live, where they stand, and that the job is over.

Each rank puts a beat (its place in the run) into the store of the rendezvous and looks at the beats of two others: the next rank, and the next one on its
host. Whatever ranks are lost, the one before them notices, so nobody has to watch them all: a rank costs the store a few short requests each interval,
at any world size. The end of the job is one key, the verdict. The first to write it is right; all read it, and end (watchdog.py).

The store is asked over a connection and from a thread of its own, because the main thread may wait in the store, and the store may not answer.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from megatron_skywork import lifeline

Beat = dict[str, Any]
T = TypeVar("T")

BEAT_SECONDS = 1.0
RANKS_PER_SECOND = 5000  # a store answers some 20,000 short requests a second, and a beat takes four; above this many ranks beats are further apart
ANSWER_SECONDS = 5.0


def culprits(beats: Sequence[Beat | None]) -> list[int]:
    """Ranks the others are waiting for, by their beats: those that never came up, else those furthest behind, and of these the ones that wait for nobody.

    All ranks do the same phases in the same order, so a rank with fewer changes behind it is behind. One that is inside a collective waits itself.
    """
    missing = [rank for rank, beat in enumerate(beats) if beat is None]
    if missing:
        return missing
    here = {rank: beat for rank, beat in enumerate(beats) if beat is not None and not beat["left"]}
    least = min((beat["changes"] for beat in here.values()), default=0)
    behind = [rank for rank, beat in here.items() if beat["changes"] == least]
    return [rank for rank in behind if not here[rank]["waiting"]] or behind


class Ring:
    """This rank's thread of beats. A job of one rank has none, and judges by itself.

    Args:
        beat: makes the beat of this rank: host, process, born, phase, part, step, changes, waiting, left, and seconds_left (None: no limit) of its phase.
        environment: torchrun's variables, or SLURM's: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, TORCHELASTIC_USE_AGENT_STORE.
    """

    def __init__(self, beat: Callable[[], Beat], environment: Mapping[str, str]):
        self.rank, self.world_size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        self.verdict: dict[str, Any] | None = None
        self.lost: tuple[int, Beat, str] | None = None
        self.is_unreachable = self.is_open = False
        self._beat = beat
        self._watched = {rank: (-1, time.monotonic()) for rank in self._neighbours(environment)}
        self._seen: dict[int, Beat] = {}
        self._ticks = 0
        # torchrun's agent holds the store. Without it the first rank does.
        self._holds_store = self.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._interval = BEAT_SECONDS * max(1.0, self.world_size / RANKS_PER_SECOND)
        self._tasks: queue.Queue[Callable[[], None]] = queue.Queue()
        self._closed = threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None

    def _neighbours(self, environment: Mapping[str, str]) -> set[int]:
        local_rank, local_size = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
        return {(self.rank + 1) % self.world_size, self.rank - local_rank + (local_rank + 1) % local_size} - {self.rank}

    def start(self) -> None:
        """Begin to beat, as soon as the rendezvous has been."""
        if self.world_size > 1:
            self._thread = threading.Thread(target=self._run, name="watchdog ring", daemon=True)
            self._thread.start()

    def judge(self, own: dict[str, Any], find: Callable[[list[Beat | None]], dict[str, Any]] | None = None) -> dict[str, Any]:
        """The job's verdict: the one that is there already, or this rank's.

        Args:
            own: what to say when nobody else has, and when the store does not answer.
            find: makes a better one out of the beats of all ranks; one rank of the job does it.
        """
        answer = self._ask(lambda: self._judged(own, find), seconds=2 * BEAT_SECONDS)
        self.verdict = self.verdict or answer or own
        return self.verdict

    def linger(self) -> None:
        """Where this process holds the store, leave the others the time to read the verdict: it goes with the process."""
        if self.is_open and self._holds_store:
            time.sleep(2 * BEAT_SECONDS)

    def close(self) -> None:
        """Say that this rank has left in order."""
        self._ask(self._say_farewell, seconds=BEAT_SECONDS)
        self._closed.set()

    # ----------------------------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        from torch.distributed import DistError, is_initialized

        while not is_initialized() and not self._closed.wait(0.05):
            pass
        self.is_open = True
        while not self._closed.is_set():
            self._look_at_processes()
            try:
                if self._store is None:
                    self._store = self._connect()
                self._tell()
                self._look()
                self.is_unreachable = False
            except (DistError, RuntimeError, OSError, ValueError):
                # A connection that breaks is made anew once; a store that cannot be reached at all has died with the process that held it.
                self.is_unreachable = self._store is None and bool(self._seen)
                self._store = None
                if self._ticks == 0:
                    time.sleep(BEAT_SECONDS / 2)
                continue
            try:
                self._tasks.get(timeout=self._interval)()
            except queue.Empty:
                continue

    def _ask(self, question: Callable[[], T], seconds: float) -> T | None:
        """Have the thread ask the store; None when it has no answer in time."""
        if not self.is_open:
            return None
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(question())
            except Exception as failure:  # the thread lives on; whoever asked is told
                future.set_exception(failure)

        self._tasks.put(task)
        try:
            return future.result(timeout=seconds)
        except Exception:  # no store, no answer, no common verdict: the rank ends by its own
            return None

    def _connect(self) -> Any:
        import datetime

        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        default: Any = _get_default_store()
        store = default.clone()
        store.set_timeout(datetime.timedelta(seconds=ANSWER_SECONDS))
        return PrefixStore("watchdog", store)

    def _tell(self) -> None:
        self._ticks += 1
        self._store.set(f"beat/{self.rank}", json.dumps({"tick": self._ticks, **self._beat()}))

    def _say_farewell(self) -> None:
        self._closed.set()
        self._tell()

    def _look(self) -> None:
        if self.verdict is None and self._store.check(["verdict"]):
            self.verdict = json.loads(self._store.get("verdict"))
        for rank, (tick, since) in self._watched.items():
            if rank not in self._seen and not self._store.check([f"beat/{rank}"]):
                continue
            beat = self._seen[rank] = json.loads(self._store.get(f"beat/{rank}"))
            if beat["tick"] != tick:
                self._watched[rank] = (beat["tick"], time.monotonic())
                since = time.monotonic()
            silent = time.monotonic() - since
            if not beat["left"] and beat["seconds_left"] is not None and silent > max(beat["seconds_left"], 0.0) + 2 * self._interval:
                self.lost = self.lost or (rank, beat, f"has given no sign of life for {silent:.0f} s")

    def _look_at_processes(self) -> None:
        """A rank of this host that has died is found without the store, which may have died with it."""
        for rank, beat in self._seen.items():
            if not beat["left"] and beat["host"] == socket.gethostname() and lifeline.birth(beat["process"]) != beat["born"]:
                self.lost = self.lost or (rank, beat, "has died")

    def _judged(self, own: dict[str, Any], find: Callable[[list[Beat | None]], dict[str, Any]] | None) -> dict[str, Any]:
        if find is not None and int(self._store.compare_set("judge", "", str(self.rank))) == self.rank:
            own = find(self._beats())
        elif find is not None:
            # All ranks of a hung job come here within a moment; one of them reads the beats of all.
            deadline = time.monotonic() + BEAT_SECONDS
            while not self._store.check(["verdict"]) and time.monotonic() < deadline:
                time.sleep(0.05)
        return json.loads(self._store.compare_set("verdict", "", json.dumps(own)))

    def _beats(self) -> list[Beat | None]:
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        if self._store.check(keys):
            return [json.loads(text) for text in self._store.multi_get(keys)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]

