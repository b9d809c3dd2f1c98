"""What a node reports: problems from GPUs, disk and what its ranks have said; and one whole check of this machine with two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import preflight  # noqa: E402
import preflight_node  # noqa: E402
from megatron_skywork.config.load import load_config  # noqa: E402
from preflight_node import check_disk, gpu_problems, judge, list_gpus  # noqa: E402

TINY = str(ROOT / "configs" / "tiny.yaml")
GOOD = {"ready": {}, "node": {"correct": True, "gb_per_second": 9.0}, "all": {"correct": True, "gb_per_second": 2.0, "clock_offset_seconds": 0.01}}


def config(*overrides: str):
    return load_config([TINY], overrides)


def answer(*missing: str, late: bool = False, **changed: dict) -> dict:
    """What a rank that got so far has said."""
    parts = {name: {**facts, **changed.get(name, {})} for name, facts in GOOD.items() if name not in missing}
    return {"parts": parts, "late": late, "code": 0 if len(parts) == 3 else 1, "said": "why"}


def test_ranks_that_did_everything_are_fine():
    report = judge([answer(), answer(all={"gb_per_second": 1.5, "clock_offset_seconds": -0.2})], config())
    assert (report["problems"], report["link_problems"]) == ([], [])
    assert (report["gb_per_second"], report["node_gb_per_second"], report["clock_offset_seconds"]) == (1.5, 9.0, -0.2)


@pytest.mark.parametrize(("second", "own", "link"), [
    (answer("ready", "node", "all"), "rank 1 of the node does not start (exit code 1: why)", ""),
    (answer("node", "all", late=True), "rank 1 of the node fails in an all-reduce inside the node (no end within", ""),
    (answer(node={"correct": False}), "rank 1 of the node gets a wrong sum", ""),
    (answer("all", late=True), "", "an all-reduce between the nodes fails (no end within launch.preflight.timeout_seconds=180)"),
    (answer(all={"correct": False}), "", "an all-reduce between the nodes gives a wrong sum"),
    (answer(all={"gb_per_second": 0.5}), "", "0.50 GB/s in an all-reduce, and launch.preflight.min_bandwidth_gb_per_second is 1"),
    (answer(all={"clock_offset_seconds": -9.0}), "its clock is 9.0 s behind the others'", ""),
    ({"parts": {"refused": {"why": "torch sees 1 GPUs, 2 are needed"}}, "late": False, "code": 1, "said": ""}, "torch sees 1 GPUs", ""),
])
def test_what_a_rank_could_not_do_says_whose_fault_it_is(second: dict, own: str, link: str):
    report = judge([answer(), second], config("launch.preflight.min_bandwidth_gb_per_second=1.0"))
    for problems, expected in ((report["problems"], own), (report["link_problems"], link)):
        assert len(problems) == bool(expected) and expected in "".join(problems), problems


def test_gpus_are_counted_and_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smi = tmp_path / "nvidia-smi"
    cards = ["NVIDIA H100, 81559, 80000, 570.1, 0", "NVIDIA H100, 81559, 512, 570.1, 3", "NVIDIA GB10, [N/A], [N/A], 570.1, [N/A]"]
    smi.write_text("\n".join(["#!/bin/sh", *(f"echo '{card}'" for card in cards)]))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpus = list_gpus()
    assert [gpu["name"] for gpu in gpus] == ["NVIDIA H100", "NVIDIA H100", "NVIDIA GB10"]
    assert gpu_problems(gpus, 4, 1.0) == ["3 GPUs, and parallel.gpus_per_node is 4"]
    assert gpu_problems([], 4, 1.0) == ["0 GPUs, and parallel.gpus_per_node is 4; to train on CPUs set launch.request_gpus=false"]
    busy, broken = gpu_problems(gpus[:2], 2, 1.0)
    assert "GPU 1 has 0.5 GiB free" in busy and "GPU 1 counts 3 memory errors" in broken


def test_a_disk_that_is_full_or_read_only_or_forgets_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free, problems = check_disk(tmp_path / "run", 0.0, "n1")
    assert free > 0 and problems == [] and list((tmp_path / "run").iterdir()) == []
    assert "GiB are free in" in check_disk(tmp_path / "run", 1e9, "n1")[1][0]
    (tmp_path / "file").write_text("")
    assert "cannot be written" in check_disk(tmp_path / "file", 0.0, "n1")[1][0]
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    assert "reads back other than it was written" in check_disk(tmp_path / "run", 0.0, "n1")[1][0]


def test_this_machine_passes_with_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"run_dir={tmp_path}", "parallel.gpus_per_node=2", "launch.request_gpus=false", "launch.preflight.min_disk_gib=0.01"]
    assert preflight.main(["here", "--config", TINY, *words, "--json", "--port", str(free_port())]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["gb_per_second"] > 0 and report["node_gb_per_second"] > 0 and abs(report["clock_offset_seconds"]) < 5
    assert {"Python", "torch", "megatron-core", "the code of megatron_skywork"} <= set(report["versions"])


def free_port() -> int:
    with preflight_node.socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_round_is_announced_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["next", "--config", TINY, "--out", str(tmp_path), "--nodes", "n1,n2,n3", "--want", "2"]
    facts = {"problems": [], "versions": {}, "gpus": [], "free_memory_gib": 1.0, "free_disk_gib": 1.0, "free_gpu_memory_gib": None}
    for node in ("n1", "n2"):
        preflight.leave(tmp_path / "node", node, {"node": node, **facts})
    assert preflight.main(words) == 0 and capsys.readouterr().out == "run all-0 n1,n2\n"
    for node in ("n1", "n2"):
        preflight.leave(tmp_path / "all-0", node, {"node": node, **judge([answer("node")], config())})
    assert preflight.main(words) == 0
    output = capsys.readouterr()
    assert output.out == "use n1,n2\n" and "node n3 is left out: gave no answer" in output.err
    (tmp_path / "all-0" / "n2.json").unlink()
    assert preflight.main(words) == 1
    assert "2 nodes are needed, and 1 passed" in capsys.readouterr().err
