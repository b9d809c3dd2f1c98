"""Checkpoints that are damaged after they were written: files cut off, bits flipped, shards swapped, manifests mutated. What is damaged is never loaded; a
start takes the folder before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage_bodies import FLIPS
from fault import Fault, Outcome
from run_bodies import SETTINGS, in_memory, merged
from warm import warm


def of_training(body: str, world_size: int = 1) -> Callable[[Path, bool], Outcome]:
    """Damage in the newest of two checkpoints of a run."""

    def injected(folder: Path, short: bool) -> Outcome:
        with in_memory(folder) as place:
            settings = merged(SETTINGS, {"run_dir": str(place / "run"), "train": {"steps": 2}, "checkpoint": {"keep": 2}})
            job = (world_size, str(place / "meet"))
            children = [warm().start("damage_bodies:train_as_rank", settings, rank, *job, folder=place) for rank in range(world_size)]
            if [warm().ended(child) for child in children] != [0] * world_size:
                raise RuntimeError(f"no checkpoint to damage: {children[0].said.read_text()[-1000:]}")
            return _outcome(warm().run(f"damage_bodies:{body}", str(place / "run"), short, folder=place))

    return injected


def of_a_conversion(body: str) -> Callable[[Path, bool], Outcome]:
    """Damage in a converted folder, and what `convert_checkpoint.py verify` says of it."""

    def injected(folder: Path, short: bool) -> Outcome:
        with in_memory(folder) as place:
            warm().run("damage_bodies:make_converted", str(place), folder=place)
            return _outcome(warm().run(f"damage_bodies:{body}", str(place / "out"), short, folder=place))

    return injected


def _outcome(found: list[Any]) -> Outcome:
    tried, lost, note = found
    return Outcome(tried, tried - len(lost), lost, note)


FAULTS = [
    Fault("a file of a training checkpoint is cut off", of_training("truncations_of_a_run")),
    Fault(f"{FLIPS} bits flipped in a training checkpoint", of_training("flips_of_a_run")),
    Fault("shards of checkpoints and of ranks swapped", of_training("swaps_of_a_run", world_size=2)),
    Fault("manifest or marker of a training checkpoint mutated", of_training("mutations_of_a_run")),
    Fault("a file of a converted folder is cut off", of_a_conversion("truncations_of_a_conversion")),
    Fault(f"{FLIPS} bits flipped in a converted folder", of_a_conversion("flips_of_a_conversion")),
    Fault("files of a converted folder swapped", of_a_conversion("swaps_of_a_conversion")),
    Fault("manifest or marker of a converted folder mutated", of_a_conversion("mutations_of_a_conversion")),
    Fault("bits flipped before a reader that compares sizes", of_training("flips_before_a_naive_reader"), is_control=True),
    Fault("shards swapped before a reader that compares sizes", of_training("swaps_before_a_naive_reader", world_size=2), is_control=True),
]
