"""A conversion that is killed, or whose disk is full or broken, at every single call that it makes to the file system: the output is absent or whole, and the
same command finishes it, to the byte."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from convert_bodies import make_dense
from fault import Fault, Outcome
from injection import HOW, Ended
from run_bodies import in_memory
from save_faults import everywhere
from warm import warm

_SHORT = 3


def of_a_conversion(how: str, count: int | None, folder: Path) -> Outcome:
    with in_memory(folder) as place:
        template = place / "template"
        make_dense(template / "dense")
        whole = warm().run("convert_bodies:convert_again", str(template), str(place / "whole"), folder=place)

        def check(root: Path, how: str, ended: Ended, folder: Path) -> str | None:
            return _lost(root, whole, how, ended, folder)

        return everywhere(place, how, count, "convert_bodies:convert_traced", lambda root: [str(root)], check, template)


def _lost(root: Path, whole: dict[str, object], how: str, ended: Ended, folder: Path) -> str | None:
    out = root / "out"
    strangers = {path.name for path in root.iterdir()} - {"dense", "out", ".out.partial"}
    if strangers:
        return f"left beside the output: {sorted(strangers)}"
    if how == "SIGKILL" and ended.code != -signal.SIGKILL:
        return f"the process ended with {ended.code}"
    if how != "SIGKILL" and (problem := _wrong_end(out, ended)) is not None:
        return problem
    if out.exists():  # what has its name must be whole, before the command is given again
        found = warm().run("convert_bodies:looks", str(out), folder=folder)
        if found != whole:
            return f"the output is there and is not what was to be written: {found['problems']}"
        return None
    again = warm().run("convert_bodies:convert_again", str(root), str(out), folder=folder)
    if again != whole:
        return f"the same command does not finish it: {again}"
    left = {path.name for path in root.iterdir()} - {"dense", "out"}
    return f"left behind: {sorted(left)}" if left else None


def _wrong_end(out: Path, ended: Ended) -> str | None:
    if ended.code == 0:
        return None if out.exists() else "a success by its exit code, and there is nothing"
    if ended.code not in (1, 3) or "error: " not in ended.said or "Traceback" in ended.said:
        return f"ended with {ended.code}: {ended.said.strip()[-300:]}"
    return None


def of_a_naive_conversion(how: str, count: int | None, folder: Path) -> Outcome:
    """The control: tensors are saved under the output's own name, and an output that is there is taken for one."""
    with in_memory(folder) as place:
        template = place / "template"
        make_dense(template / "dense")
        whole = warm().run("convert_bodies:naive_again", str(template), str(place / "whole"), folder=place)

        def check(root: Path, how: str, ended: Ended, folder: Path) -> str | None:
            child = warm().start("convert_bodies:naive_again", str(root), str(root / "out"), folder=folder)
            if warm().ended(child) != 0:
                return f"it cannot go on: {child.said.read_text().strip().splitlines()[-1]}"
            return None if child.result == whole else "what is there is not what was to be written"

        return everywhere(place, how, count, "convert_bodies:naive_traced", lambda root: [str(root)], check, template)


def _fault(name: str, how: str, injected: Callable[[str, int | None, Path], Outcome], short: int, is_control: bool = False) -> Fault:
    return Fault(name, lambda folder, is_short: injected(how, short if is_short else None, folder), is_control, needs="strace")


FAULTS = [
    *(_fault(f"{how} at every file system call of a conversion", how, of_a_conversion, _SHORT) for how in HOW),
    *(_fault(f"{how} at calls of a naive conversion", how, of_a_naive_conversion, 9, is_control=True) for how in HOW),
]
