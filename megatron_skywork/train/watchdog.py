"""Ends the job everywhere when one rank dies, hangs or fails, and says which one, where, and what every rank was doing.

A collective that waits for a lost rank never returns, so nothing here needs one, nor the main thread:

* A thread of each rank compares the age of its phase (phases.py) with the limit of that phase, and asks the ring (ring.py) about other ranks.
* Who finds something writes a verdict into the store; every rank reads it within a second, writes its Python stacks to a file in `stacks`, in the
  run's folder, and ends with the verdict's exit code. A rank that fails by an exception, or is stopped before its first step, gives a verdict the same way.
* Where the main thread holds the interpreter's lock in C, no thread of ours can run. So a timer of faulthandler, in C, is set anew each half second to a
  moment after the limit; if nobody sets it back, it writes the stacks and ends the process. The other ranks of its host help: they wake one that was stopped
  (SIGSTOP), have one that does not answer write its stacks (STACKS_SIGNAL, a handler in C as well), and kill it.

The limits are settings of `watchdog`. A breakpoint looks like a hang: debug with watchdog.enabled=false, which leaves failures, deaths and signals to be heard.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from megatron_skywork import lifeline
from megatron_skywork.config.schema import Watchdog as Settings
from megatron_skywork.errors import EXIT_OTHER, EXIT_REQUEUE, UserError
from megatron_skywork.train import phases as names
from megatron_skywork.train.phases import Phases
from megatron_skywork.train.ring import BEAT_SECONDS, Beat, Ring, culprits
from megatron_skywork.train.signals import STOP_SIGNALS
from megatron_skywork.train.status import Status, exit_code

TICK_SECONDS = 0.5
STACKS_SIGNAL = signal.SIGRTMIN + 8
LAST_RESORT_SECONDS = 1.5  # from the limit to faulthandler's timer, which nothing must need where a thread of ours still runs
LATEST_SECONDS = 8.0  # the same timer, once the end has begun
PARTING_SECONDS = 2.5  # for the main thread to end by itself
LEAVING_SECONDS = 20.0  # for a rank that failed to say so and to close its records; W&B may take 15
WAKING_SECONDS = 1.2  # for a rank that was stopped to read the verdict
MOST_NAMED = 8


def limits(settings: Settings) -> dict[str, float]:
    """Seconds each phase may take."""
    return {
        names.START: settings.start_seconds,
        names.FIRST_STEP: max(settings.start_seconds, settings.step_seconds),
        names.STEP: settings.step_seconds,
        names.EVALUATION: settings.evaluation_seconds,
        names.SAVE: settings.save_seconds,
        names.LOAD: settings.start_seconds,
        names.END: settings.save_seconds,
    }


class Watchdog:
    """Watches this rank, and through the ring all others.

    Args:
        settings: limits.
        run_dir: gets the stacks.
        phases: what the main thread says it does.
        status: gets the verdict.
    """

    def __init__(self, settings: Settings, run_dir: Path, phases: Phases, status: Status, environment: Mapping[str, str]):
        self._limits = limits(settings) if settings.enabled else None
        self._phases, self._status = phases, status
        self._stacks = run_dir / "stacks" / f"rank_{environment.get('RANK', '0')}_process_{os.getpid()}.txt"
        self._file: Any = None
        self._host, self._process, self._born = socket.gethostname(), os.getpid(), lifeline.birth(os.getpid())
        self._main = threading.main_thread()
        self._says_it = environment.get("LOCAL_RANK", "0") == "0"
        self._final: tuple[int, float] | None = None  # the exit code that is certain, and since when
        self._has_left = self._has_joined = False
        self._received: set[int] = set()
        self._closed = threading.Event()
        self._ring = Ring(self._beat, environment)
        self._woken, self._signals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # ----------------------------------------------------------------------------------------------------------------- the main thread

    def start(self) -> None:
        """Begin; to be called by the main thread, before it takes signals over.

        Raises:
            OSError: the run's folder cannot be written.
        """
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._stacks, "w", encoding="utf-8")  # noqa: SIM115  faulthandler writes to it, to the end
        # The kernel's part of a signal writes its number here, also while Python's waits for the main thread to come back from C.
        signal.set_wakeup_fd(self._signals, warn_on_full_buffer=False)
        faulthandler.register(STACKS_SIGNAL, self._file, all_threads=True)
        self._thread.start()

    def join(self) -> None:
        """Begin to hear of other ranks and to tell them; to be called when torch has been imported (two threads must not), before the rendezvous."""
        self._ring.start()
        self._has_joined = True
        os.write(self._signals, b"\0")  # a signal that came before this is answered now

    def settle(self, code: int) -> None:
        """How the run ended is written down: what breaks or hangs from here on does not change it."""
        self._final = (code, time.monotonic())
        self._phases.end()

    def failed(self, failure: BaseException) -> tuple[int, str]:
        """The main thread ends by an exception: tell all ranks, unless it only suffers from what happened to another one.

        Returns:
            exit code and reason of the job. Does not return where the job has another verdict.
        """
        if _is_of_a_collective(failure):
            # Its peer is gone; whoever sees that best will say so.
            deadline = time.monotonic() + 2 * PARTING_SECONDS
            while self._ring.is_open and self._ring.verdict is None and time.monotonic() < deadline:
                time.sleep(TICK_SECONDS / 5)
        is_known = isinstance(failure, UserError)
        code, text = failure.exit_code if isinstance(failure, UserError) else EXIT_OTHER, str(failure) or type(failure).__name__
        beat = {**self._beat(), "where": _place(frame.f_code for frame, _ in reversed(list(traceback.walk_tb(failure.__traceback__))))}
        own = self._verdict(self._ring.rank, beat, f"failed with {type(failure).__name__}", code=code, error=text)
        own["reason"] = text if is_known or self._ring.world_size == 1 else own["reason"]
        if self._ring.judge(own) != own and not is_known:
            self._closed.wait(2 * PARTING_SECONDS)  # the other thread is about to end the process
        self._final = (code, time.monotonic())
        self._ring.linger()
        self._ring.close()
        self._remove_unused()
        return code, own["reason"]

    def close(self) -> None:
        """The run is over and this rank may leave; not called where it failed, so that a hang on the way out still ends."""
        self._has_left = True
        self._ring.close()
        self._closed.set()
        signal.set_wakeup_fd(-1)
        self._thread.join(timeout=2 * TICK_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        self._remove_unused()

    # ------------------------------------------------------------------------------------------------------------------- its own thread

    def _run(self) -> None:
        while not self._closed.is_set():
            readable, _, _ = select.select([self._woken], [], [], TICK_SECONDS)
            self._received |= set(os.read(self._woken, 512)) & set(STOP_SIGNALS) if readable else set()
            if self._received and self._has_joined and not self._phases.has_stepped and self._final is None:
                self._stop_before_the_first_step(signal.Signals(min(self._received)).name)
            left = self._seconds_left()
            if left is not None:
                faulthandler.dump_traceback_later(max(left, 0.0) + LAST_RESORT_SECONDS, exit=True, file=self._file)
            if self._final is not None:
                self._leave_when_late(left)
            elif self._ring.verdict is not None:
                self._obey(self._ring.verdict)
            elif self._ring.lost is not None:
                rank, beat, why = self._ring.lost
                self._obey(self._ring.judge(self._verdict(rank, beat, why)))
            elif self._ring.is_unreachable and self._phases.now.phase != names.END:
                self._obey(self._verdict(self._ring.rank, self._beat(), "cannot reach the store of the rendezvous: the process that held it has died"))
            elif left is not None and left < 0:
                self._extend_last_resort()
                if self._ring.rank and not self._ring.is_open:
                    time.sleep(2 * TICK_SECONDS)  # before the rendezvous the first rank knows best who is missing
                self._obey(self._ring.judge(self._hung([self._ring.rank], {self._ring.rank: self._beat()}), self._find))

    def _seconds_left(self) -> float | None:
        now = self._phases.now
        return None if self._limits is None else self._limits[now.phase] - (time.monotonic() - now.since)

    def _beat(self) -> Beat:
        now = self._phases.now
        stack = [frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames().get(self._main.ident or 0))]
        waiting = any(code.co_filename.endswith("distributed_c10d.py") for code in stack)
        return {
            "host": self._host, "process": self._process, "born": self._born, "left": self._has_left,
            "phase": now.phase, "part": now.part, "step": now.step, "changes": now.changes, "where": _place(stack), "waiting": waiting,
            "seconds": round(time.monotonic() - now.since, 1), "seconds_left": self._seconds_left(),
        }  # fmt: skip

    def _verdict(self, rank: int, beat: Beat, why: str, *, code: int = EXIT_OTHER, error: str = "", others: str = "") -> dict[str, Any]:
        step = "no step was done" if beat["step"] is None else f"last step {beat['step']}"
        place = f"phase {beat['phase']}" + (f" ({beat['part']})" if beat["part"] else "") + f", {step}" + (f", in {beat['where']}" if beat["where"] else "")
        reason = f"rank {rank} on {beat['host']} (process {beat['process']}) {why}; {place}{others}" + (f": {error}" if error else "")
        keys = ("host", "process", "born", "phase", "part", "step")
        known = {key: beat[key] for key in keys}
        return {"status": "failed", "exit_code": code, "reason": reason, "error": error, "rank": rank, "by": self._ring.rank, **known}

    def _hung(self, ranks: list[int], beats: Mapping[int, Beat]) -> dict[str, Any]:
        rank = ranks[0]
        others = f"; so are ranks {', '.join(map(str, ranks[1:MOST_NAMED]))}{' and others' if len(ranks) > MOST_NAMED else ''}" if ranks[1:] else ""
        own, limit = self._beat(), (self._limits or {}).get(self._phases.now.phase)
        verb = "keeps the job waiting" if self._ring.is_open or self._ring.world_size == 1 else "waits for ranks that have not come to the rendezvous"
        why = f"{verb}, {own['seconds']:.0f} s in phase {own['phase']} with a limit of {limit:g} s"
        return self._verdict(rank, beats[rank], why, others=others)

    def _find(self, beats: list[Beat | None]) -> dict[str, Any]:
        ranks = culprits(beats)
        found = {rank: beat for rank, beat in enumerate(beats) if beat is not None}
        if ranks and ranks[0] in found:
            return self._hung(ranks, found)
        if not ranks:
            return self._hung([self._ring.rank], {self._ring.rank: self._beat()})
        verdict = self._verdict(self._ring.rank, self._beat(), f"waits for ranks that never came up: {', '.join(map(str, ranks[:MOST_NAMED]))}")
        return {**verdict, "rank": ranks[0], "host": "", "process": 0}

    def _stop_before_the_first_step(self, name: str) -> None:
        # torchrun ends all ranks of a host when one of them has failed, with SIGTERM too; then there is another verdict in a moment.
        deadline = time.monotonic() + 2 * BEAT_SECONDS
        while self._ring.is_open and self._ring.verdict is None and self._ring.lost is None and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS / 5)
        if self._ring.lost is not None or self._ring.verdict is not None or self._phases.has_stepped:
            return  # the loop stops after a step that has begun
        verdict = self._verdict(self._ring.rank, self._beat(), f"was stopped by {name} before the first step; nothing was lost, and nothing had to be saved")
        self._obey(self._ring.judge({**verdict, "status": "stopped", "exit_code": EXIT_REQUEUE, "error": name}))

    # ---------------------------------------------------------------------------------------------------------------------- the end

    def _obey(self, verdict: dict[str, Any]) -> None:
        """End this process as the verdict says."""
        stopped = verdict["status"] == "stopped"
        if verdict["by"] == self._ring.rank and verdict["error"] and not stopped:
            return  # the main thread, which gave it, is on its way out with its own words
        self._extend_last_resort()
        if verdict["exit_code"] == EXIT_OTHER:
            self._dump(verdict["reason"])
        if self._says_it or verdict["by"] == self._ring.rank:
            print(f"{'stopped' if stopped else 'error'}: the job ends: {verdict['reason']}", file=sys.stderr, flush=True)
        fields = {key: verdict[key] for key in ("exit_code", "rank", "phase", "step")}
        reason = verdict["error"] if stopped else verdict["reason"]
        if verdict["by"] == self._ring.rank or self._status.is_writer:
            self._status.write(verdict["status"], reason=reason, **fields, for_all=True)
        if verdict["host"] == self._host and verdict["rank"] != self._ring.rank and not verdict["error"]:
            _wake_or_kill(verdict["process"], verdict["born"])
        self._remove_unused()
        self._ring.linger()
        sys.stdout.flush()
        os._exit(exit_code(verdict["exit_code"]))

    def _leave_when_late(self, left: float | None) -> None:
        """The end is certain and written down; a main thread that does not come to it is not waited for."""
        assert self._final is not None
        code, since = self._final
        if time.monotonic() - since > LEAVING_SECONDS if code not in (0, EXIT_REQUEUE) else left is not None and left < 0:
            self._dump("the run has ended, but the main thread does not come back")
            os._exit(exit_code(code))

    def _extend_last_resort(self) -> None:
        faulthandler.dump_traceback_later(LATEST_SECONDS, exit=True, file=self._file)

    def _remove_unused(self) -> None:
        with contextlib.suppress(OSError):  # others still use the folder, or the disk is gone
            if self._file.tell() == 0:
                self._stacks.unlink(missing_ok=True)
                self._stacks.parent.rmdir()

    def _dump(self, why: str) -> None:
        now = self._phases.now
        with contextlib.suppress(OSError):
            self._file.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._ring.rank} on {self._host}, process {self._process}, {now}\n== {why}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)


def _place(stack: Iterable[CodeType]) -> str:
    """The innermost function of ours, given the innermost code first."""
    for code in stack:
        if f"{os.sep}megatron_skywork{os.sep}" in code.co_filename:
            return f"{Path(code.co_filename).name}, {code.co_name}"
    return ""


def _is_of_a_collective(failure: BaseException) -> bool:
    """Whether an exception came out of torch.distributed: its cause may be in another rank."""
    frames = traceback.walk_tb(failure.__traceback__)
    return not isinstance(failure, UserError) and any(f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename for frame, _ in frames)


def _wake_or_kill(process: int, born: int | None) -> None:
    """End a rank of this host that does not end by itself: one that was stopped wakes and reads the verdict; else it writes its stacks and is killed."""
    for number, seconds in ((signal.SIGCONT, WAKING_SECONDS), (STACKS_SIGNAL, 0.5), (signal.SIGKILL, 0.0)):
        deadline = time.monotonic() + seconds
        if born is None or lifeline.birth(process) != born:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        while time.monotonic() < deadline and lifeline.birth(process) == born:
            time.sleep(0.05)
