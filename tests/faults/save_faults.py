"""A save that is killed, or whose disk is full or broken, at every single call that it makes to the file system: what was good stays, what counts is whole.

After each injection the disk is looked at as a start would, and the run is started again and brought to its end, which must be that of an undisturbed run.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fault import Fault, Outcome
from injection import HOW, Call, Ended, calls_of, inject, sample
from run_bodies import SETTINGS, STEPS, in_memory, merged
from warm import warm

BEFORE, DURING, AT_END = (f"step_{step:08d}" for step in (1, 2, STEPS))
_SHORT = 3
_WORKERS = 2
Check = Callable[[Path, str, Ended, Path], str | None]


def everywhere(
    folder: Path, how: str, count: int | None, body: str, args: Callable[[Path], list[Any]], check: Check, template: Path, about: str = ""
) -> Outcome:
    """Do one of HOW at every call of `body`, each time in a fresh copy of `template`.

    Args:
        count: of calls, spread evenly; None for all of them.
        args: what `body` is given, for a folder.
        check: what was lost, given the folder, how, and how the process ended.
        about: only calls about paths that begin so, relative to the folder.
    """
    outcome, missed = Outcome(), 0

    def fresh(number: int) -> Path:
        root = folder / f"run-{number}"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root, symlinks=True)
        return root

    root = fresh(0)
    calls = calls_of(warm(), body, *args(root), root=root, folder=folder)
    calls = [call for call in calls if call.path.startswith(about)]
    chosen = calls if count is None else sample(calls, count)

    def once(job: tuple[int, Call]) -> tuple[bool, str | None]:
        root = fresh(job[0])
        ended = inject(warm(), body, *args(root), call=job[1], how=how, root=root, folder=folder)
        lost = check(root, how, ended, folder) if ended.hit else None
        shutil.rmtree(root, ignore_errors=True)
        return ended.hit, None if lost is None else f"{how} at {job[1]}: {lost}"

    with ThreadPoolExecutor(_WORKERS) as pool:
        for hit, lost in pool.map(once, enumerate(chosen, start=1)):
            missed += not hit
            if hit:
                outcome.add(lost)
    outcome.note = f"{len(chosen)} of {len(calls)} calls" + (f", {missed} were not come to again" if missed else "")
    if missed > len(chosen) // 10:
        outcome.lost.append(f"only {len(chosen) - missed} of {len(chosen)} calls were met again")
    return outcome


def of_our_save(background: bool) -> Callable[[str, int | None, Path], Outcome]:
    def injected(how: str, count: int | None, folder: Path) -> Outcome:
        with in_memory(folder) as place:
            settings = merged(SETTINGS, {"checkpoint": {"background": background}})
            whole = warm().run("run_bodies:undisturbed", merged(settings, {"run_dir": str(place / "whole"), "checkpoint": {"keep": 9}}), folder=place)
            template = place / "template"
            warm().run("run_bodies:undisturbed", merged(settings, {"run_dir": str(template), "train": {"stop_at_step": 1}}), folder=place)

            def check(root: Path, how: str, ended: Ended, folder: Path) -> str | None:
                return _lost(merged(settings, {"run_dir": str(root)}), whole, how, ended, folder)

            def args(root: Path) -> list[Any]:
                return [merged(settings, {"run_dir": str(root)})]

            return everywhere(place, how, count, "run_bodies:one_more_save", args, check, template, "checkpoints")

    return injected


def _lost(settings: dict[str, Any], whole: dict[str, dict[str, str]], how: str, ended: Ended, folder: Path) -> str | None:
    """What an injection into a save has cost beyond that save."""
    name, holds = warm().run("run_bodies:looks", settings["run_dir"], folder=folder)
    if name not in (BEFORE, DURING) or holds != whole[name]:
        return f"a start takes {name}, which is not as it was written"
    if how == "SIGKILL" and ended.code != -signal.SIGKILL:
        return f"the process ended with {ended.code}"
    if how != "SIGKILL" and (problem := _wrong_end(name, ended)) is not None:
        return problem
    after = warm().run("run_bodies:go_on", settings, folder=folder)
    if f"step_{after['resumed']:08d}" != name:
        return f"the next start went on from {after['resumed']}, not from {name}"
    if after["holds"].get(AT_END) != whole[AT_END]:
        return "the run that went on did not come to the end of an undisturbed one"
    strangers = set(after["lies"]) - {"latest", BEFORE, DURING, AT_END}
    return f"left behind: {sorted(strangers)}" if strangers else None


def _wrong_end(name: str, ended: Ended) -> str | None:
    """A save that failed says so and ends the run with 3 (checkpoint.on_save_error=stop); one that succeeded is there."""
    if ended.code == 0:
        return None if name == DURING else f"the save was a success by its exit code, and a start takes {name}"
    if ended.code != 3 or "Traceback" in ended.said:
        return f"ended with {ended.code}: {ended.said.strip()[-300:]}"
    return None if "could not be saved" in ended.said else f"it does not say that the save failed: {ended.said.strip()[-300:]}"


def of_a_naive_save(how: str, count: int | None, folder: Path) -> Outcome:
    """The control: the folder is written under its own name, and the newest one is taken."""
    with in_memory(folder) as place:
        template = place / "template"
        warm().run("run_bodies:naive_run", str(template), 1, folder=place)

        def check(root: Path, how: str, ended: Ended, folder: Path) -> str | None:
            child = warm().start("run_bodies:naive_run", str(root), STEPS, folder=folder)
            return None if warm().ended(child) == 0 else f"it cannot go on: {child.said.read_text().strip().splitlines()[-1]}"

        return everywhere(place, how, count, "run_bodies:naive_one_more_save", lambda root: [str(root)], check, template)


def _fault(name: str, how: str, injected: Callable[[str, int | None, Path], Outcome], count: int | None, short: int, is_control: bool = False) -> Fault:
    return Fault(name, lambda folder, is_short: injected(how, short if is_short else count, folder), is_control, needs="strace")


FAULTS = [
    *(_fault(f"{how} at every file system call of a save", how, of_our_save(False), None, _SHORT) for how in HOW),
    *(_fault(f"{how} at calls of a save in the background", how, of_our_save(True), 24, 2) for how in HOW),
    *(_fault(f"{how} at calls of a naive save", how, of_a_naive_save, None, 9, is_control=True) for how in HOW),
]
