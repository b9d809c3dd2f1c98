"""A disk that is full, on a small file system in memory: a run goes on or stops as it was told, a conversion says what it needs, and what was
good stays good."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from convert_bodies import FILE_BYTES
from fault import CannotBeTried, Fault, Outcome
from run_bodies import SETTINGS, in_memory, merged
from warm import warm

_STEPS, _FULL_AT, _FREE_AT = 6, 3, 5
_SETTINGS = {"train": {"steps": _STEPS}, "checkpoint": {"keep": 1}}
_DISK = "8m"
_LEFT = (0, 4096, 200_000)  # bytes that are still free when a save begins


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of _DISK, mounted below `folder`."""
    mounted = folder / "disk"
    mounted.mkdir()
    answer = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(mounted)], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise CannotBeTried(f"a tmpfs cannot be mounted here ({answer.stderr.strip()}); run as root")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


# ----------------------------------------------------------------------------------------------------------------------------------- runs


def of_a_run(folder: Path, short: bool) -> Outcome:
    """The disk fills up before one save, or between its look at the free space and its first byte, and is emptied later."""
    outcome = Outcome()
    with in_memory(folder) as place:
        warm().run("run_bodies:undisturbed", merged(SETTINGS, _SETTINGS, {"run_dir": str(place / "whole")}), folder=place)
        whole = warm().run("run_bodies:looks", str(place / "whole"), folder=place)
        cases = list(product(("continue", "stop"), (False, True), (False, True), _LEFT))
        for policy, background, unseen, left in [cases[0], cases[10], cases[-1]] if short else cases:
            with small_disk(place) as disk:
                settings = merged(SETTINGS, _SETTINGS, {"run_dir": str(disk / "run"), "checkpoint": {"on_save_error": policy, "background": background}})
                lost = _lost(settings, unseen, left, disk, place, whole)
            (place / "disk").rmdir()
            outcome.add(lost and f"on_save_error={policy}, background={background}, {left} bytes left, {'after' if unseen else 'before'} the look: {lost}")
    return outcome


def _lost(settings: dict[str, Any], unseen: bool, left: int, disk: Path, place: Path, whole: Any) -> str | None:
    run_dir, policy = disk / "run", settings["checkpoint"]["on_save_error"]
    (place / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")
    filler = disk / "filler"
    child = warm().start("full_disk_bodies:run_on_a_disk_that_fills", str(place / "settings.yaml"), str(filler), left, _FULL_AT, _FREE_AT, unseen, folder=place)
    code, said = warm().ended(child), child.said.read_text()
    if "Traceback" in said or code != (0 if policy == "continue" else 3):
        return f"ended with {code}: {said[-400:].strip()}"
    if policy == "continue":
        name = child.said.with_suffix(".when-freed").read_text()
        if name != f"step_{_FULL_AT - 1:08d}":
            return f"while the disk was full a start would have taken {name}"
    else:
        name, _ = warm().run("run_bodies:looks", str(run_dir), folder=place)
        if name != f"step_{_FULL_AT - 1:08d}" or "could not be saved" not in said:
            return f"it stopped, and a start takes {name}: {said[-300:]}"
        filler.unlink()
        again = warm().start("run_bodies:run_command", str(place / "settings.yaml"), folder=place)
        if warm().ended(again) != 0:
            return f"it does not go on when there is room: {again.said.read_text()[-300:]}"
    if warm().run("run_bodies:looks", str(run_dir), folder=place) != whole:
        return "the end is not that of an undisturbed run"
    steps = [record["step"] for record in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if record["kind"] == "step"]
    return None if steps == list(range(1, _STEPS + 1)) else f"the record has the steps {steps}"


def of_a_naive_run(folder: Path, short: bool) -> Outcome:
    """The control: it saves in place, and takes the newest folder when there is room again."""
    outcome = Outcome()
    with in_memory(folder) as place:
        for left in _LEFT[:2]:
            with small_disk(place) as disk:
                run_dir, filler = disk / "run", disk / "filler"
                args = (str(run_dir), _STEPS, str(filler), left, _FULL_AT)
                warm().ended(warm().start("full_disk_bodies:naive_run_on_a_disk_that_fills", *args, folder=place))
                filler.unlink()
                again = warm().start("run_bodies:naive_run", str(run_dir), _STEPS, folder=place)
                outcome.add(None if warm().ended(again) == 0 else f"it cannot go on: {again.said.read_text().strip().splitlines()[-1]}")
            (place / "disk").rmdir()
    return outcome


def of_a_start(folder: Path, short: bool) -> Outcome:
    """A run whose checkpoints do not fit hears it before its first step."""
    outcome = Outcome()
    with in_memory(folder) as place, small_disk(place) as disk:
        settings = merged(SETTINGS, _SETTINGS, {"run_dir": str(disk / "run"), "checkpoint": {"on_save_error": "stop"}})
        (place / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")
        child = warm().start("full_disk_bodies:run_on_a_full_disk", str(place / "settings.yaml"), str(disk / "filler"), 500_000, folder=place)
        code, said = warm().ended(child), child.said.read_text()
        told = code == 3 and "are free on that disk" in said and "checkpoint.keep" in said
        outcome.add(None if told else f"ended with {code}: {said[-300:]}")
    return outcome


# ----------------------------------------------------------------------------------------------------------------------------- conversions


def of_a_conversion(folder: Path, short: bool) -> Outcome:
    """Too little room, as the conversion sees it or as it turns out later; the same command finishes it when there is room."""
    outcome = Outcome()
    with in_memory(folder) as place:
        warm().run("full_disk_bodies:make_source", str(place), folder=place)
        whole = warm().run("convert_bodies:convert_again", str(place), str(place / "whole"), folder=place)
        cases = list(product((False, True), (0, 4096, 2 * FILE_BYTES)))
        for unseen, left in [cases[0], cases[-1]] if short else cases:
            with small_disk(place) as disk:
                out, filler = disk / "out", disk / "filler"
                child = warm().start("full_disk_bodies:convert_on_a_full_disk", str(place), str(out), str(filler), left, unseen, folder=place)
                code, said = warm().ended(child), child.said.read_text()
                lost = None
                if code not in (1, 3) or "Traceback" in said or "error: " not in said:
                    lost = f"ended with {code}: {said[-300:].strip()}"
                elif not unseen and left and not ("needs" in said and "are free on that disk" in said and {path.name for path in disk.iterdir()} == {"filler"}):
                    lost = f"it does not say what it needs, or left something: {said[-300:]}"
                elif out.exists():
                    lost = "something counts"
                else:
                    filler.unlink()
                    made = warm().run("convert_bodies:convert_again", str(place), str(out), folder=place)
                    if made != whole or {path.name for path in disk.iterdir()} != {"out"}:
                        lost = "the same command does not finish it"
                outcome.add(lost and f"{left} bytes left, {'after' if unseen else 'before'} the look: {lost}")
            (place / "disk").rmdir()
    return outcome


FAULTS = [
    Fault("the disk is full at a save", of_a_run),
    Fault("the disk is too small for a run", of_a_start),
    Fault("the disk is full at a conversion", of_a_conversion),
    Fault("the disk is full at a save of a naive run", of_a_naive_run, is_control=True),
]
