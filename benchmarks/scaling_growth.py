"""What grows with the number of ranks besides training itself, and what does not: `benchmarks/scaling.py --growth`.

One rank of many is enough to see what a rank does for the others: torch's fake backend takes its collectives, which are counted and timed as if the
world were there. Checkpoints, whose plan is gathered from all, and data indices, which one rank cuts for all, are measured on real ranks.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling_ranks import as_if_in, groups, on_ranks, save, start_step_log, write_dataset

from megatron_skywork.config.load import check_config
from megatron_skywork.config.schema import Config
from megatron_skywork.plan.describe import plan_text


def growth_config(world_size: int, run_dir: str, data: dict[str, Any] | None = None) -> Config:
    """A tiny mixture whose experts are shared by two ranks; everything else is data parallel."""
    config = Config.model_validate(
        {
            "run_dir": run_dir,
            "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128, "backend": "torch"},
            "moe": {"num_experts": 4, "topk": 2, "aux_loss": "report", "capacity_factor": 1.1, "adaptive": {"enabled": True}},
            "parallel": {"ep": 2},
            "data": {"seq_length": 32, "num_workers": 0, **(data or {"mock": True})},
            "train": {"steps": 100, "global_batch_size": world_size, "precision": "fp32"},
        }
    )
    check_config(config, world_size)
    return config


def growth(worlds: Sequence[int], real_worlds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Every size, as records of the two tables."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        mocked = [_mocked(world, str(Path(folder) / str(world))) for world in worlds]
        return {"mocked": mocked, "real": [_real(world, Path(folder) / f"real-{world}") for world in real_worlds]}


def _mocked(world: int, run_dir: str) -> dict[str, Any]:
    print(f"rank 0 of {world}", file=sys.stderr, flush=True)
    config = growth_config(world, run_dir)
    started = time.perf_counter()
    plan_text(config, world)
    plan_seconds = time.perf_counter() - started
    return {"ranks": world, "plan_seconds": plan_seconds, "groups": as_if_in(world, groups, config), **as_if_in(world, start_step_log, config)}


def _real(world: int, folder: Path) -> dict[str, Any]:
    print(f"{world} real ranks", file=sys.stderr, flush=True)
    folder.mkdir()
    prefix = str(folder / "data")
    write_dataset(prefix, vocab_size=128)
    answers = on_ranks(world, save, growth_config(world, str(folder / "run"), {"train": [prefix]}))
    others = answers[1:]
    return {
        "ranks": world, "indices_cut": sum(answer["indices_cut"] for answer in answers), "save_seconds": max(answer["seconds"] for answer in answers),
        "save_calls": max(answer["calls"] for answer in answers), "first_rank_bytes": answers[0]["num_bytes"],
        "other_rank_bytes": max(answer["num_bytes"] for answer in others), "num_files": answers[0]["num_files"],
        "checkpoint_bytes": answers[0]["checkpoint_bytes"],
    }  # fmt: skip


def growth_tables(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Both tables as a person reads them."""
    yield "one rank of many (fake backend): process groups; text of the dry run; collectives of a start, a step and its record, and the record's bytes"
    yield f"  {'ranks':>6}{'groups made':>13}{'member of':>11}{'seconds':>9}{'plan s':>9}{'start':>7}{'step':>6}{'record':>8}{'bytes':>7}"
    for r in found["mocked"]:
        yield (f"  {r['ranks']:6}{r['groups']['made']:13}{r['groups']['member']:11}{r['groups']['seconds']:9.4f}{r['plan_seconds']:9.4f}"
               f"{r['start_calls']:7}{r['step_calls']:6}{r['log_calls']:8}{r['log_bytes']:7,.0f}")  # fmt: skip
    yield ""
    yield "real ranks (they share this machine's cores): sample indices cut by all of them; a checkpoint: collectives of a rank, bytes it sends, files, size"
    yield f"  {'ranks':>6}{'cut':>5}{'save s':>9}{'collectives':>13}{'rank 0 bytes':>14}{'others bytes':>14}{'files':>7}{'bytes on disk':>15}"
    for r in found["real"]:
        yield (f"  {r['ranks']:6}{r['indices_cut']:5}{r['save_seconds']:9.2f}{r['save_calls']:13}{r['first_rank_bytes']:14,.0f}"
               f"{r['other_rank_bytes']:14,.0f}{r['num_files']:7}{r['checkpoint_bytes']:15,}")  # fmt: skip
