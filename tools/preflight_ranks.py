"""One rank of a preflight's all-reduce: first with the ranks of its node, then with all; every part that is done is a line of JSON on stdout.

What a rank has said when it hangs or dies tells where the trouble lies: before `ready` and in `node` it is the node's own, in `all` it may be anybody's.
Started by preflight_node.py, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE as under torchrun.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_skywork import device  # noqa: E402

REPEATS = 5
BYTES_ON_GPU, BYTES_ON_CPU = 1 << 28, 1 << 22
PR_SET_PDEATHSIG = 1


def say(part: str, **facts: Any) -> None:
    print(json.dumps({"part": part, **facts}), flush=True)


def expected_sum(numbers: torch.Tensor, world_size: int) -> torch.Tensor:
    """What the all-reduce of `numbers + rank` is. Whole numbers far below 2^24 add up exactly in fp32, in any order."""
    return numbers * world_size + world_size * (world_size - 1) // 2


def reduce_and_time(num_bytes: int) -> dict[str, Any]:
    """All-reduces over the default group.

    Returns:
        correct: whether every element of every result is right; gb_per_second: bus bandwidth of the fastest, 2 (n - 1) / n bytes of each rank over its time.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numbers = (torch.arange(num_bytes // 4, device=device.current()) % 251).float()
    correct, best = True, float("inf")
    for _ in range(REPEATS):
        values = numbers + rank
        dist.barrier()
        device.synchronize()
        started = time.perf_counter()
        dist.all_reduce(values)
        device.synchronize()
        best = min(best, time.perf_counter() - started)
        correct &= torch.equal(values, expected_sum(numbers, world_size))
    return {"correct": correct, "gb_per_second": 2 * (world_size - 1) / world_size * num_bytes / best / 1e9}


def clock_offset(local_world_size: int) -> float:
    """Seconds this rank's clock is ahead of the median of the nodes' clocks, as of the barrier that let all ranks go closest together."""
    offsets = []
    for _ in range(REPEATS):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=device.current())
        everyone = [torch.zeros_like(now) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, now)
        times = [value.item() for value in everyone][::local_world_size]
        offsets.append((max(times) - min(times), now.item() - statistics.median_low(times)))
    return min(offsets)[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--node-port", type=int, required=True, help="where the ranks of this node meet, on 127.0.0.1")
    parser.add_argument("--meet", required=True, metavar="HOST:PORT", help="where all ranks meet")
    parser.add_argument("--timeout", type=float, required=True, metavar="SECONDS", help="how long each part may wait for others")
    args = parser.parse_args(argv)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device.has_gpu() and device.count() < local_world_size:
        say("refused", why=f"torch sees {device.count()} GPUs, {local_world_size} are needed")
        return 1
    device.select(local_rank)
    num_bytes = BYTES_ON_GPU if device.has_gpu() else BYTES_ON_CPU
    torch.zeros(num_bytes // 4, device=device.current()).sum().item()
    timeout = datetime.timedelta(seconds=args.timeout)
    say("ready", backend=device.backend(), device=device.name())
    for part, meet, number, count in (("node", f"127.0.0.1:{args.node_port}", local_rank, local_world_size), ("all", args.meet, rank, world_size)):
        if part == "node" and count == 1:
            continue
        dist.init_process_group(device.backend(), init_method=f"tcp://{meet}", rank=number, world_size=count, timeout=timeout)
        facts = reduce_and_time(num_bytes)
        if part == "all":
            facts["clock_offset_seconds"] = clock_offset(local_world_size)
        say(part, **facts)
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
