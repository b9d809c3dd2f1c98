"""How much memory a rank may take for a copy of what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_skywork.checkpoint import host_memory


def test_the_tighter_of_machine_and_group_is_shared_by_the_ranks_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "group").mkdir()
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path / "group")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host_memory.available_bytes() == 4000 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory.available_bytes() == 1000 * 1024
    if host_memory._of_group() is None and any(line.startswith("0::") for line in Path("/proc/self/cgroup").read_text().splitlines()):
        for name, text in (("max", "1000000"), ("current", "700000"), ("stat", "anon 600000\ninactive_file 100000\n")):
            (tmp_path / "group" / f"memory.{name}").write_text(text)
        assert host_memory.available_bytes() == 400_000 // 4
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "nothing")
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path / "nothing")
    assert host_memory.available_bytes() is None
