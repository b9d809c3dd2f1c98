"""Folders that strangers damage, and what it means that a reader withstands them: a plugin of the tests `test_convert_hostile*`."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_folders import MODEL, MOE, ours_of, random_tensors, write_hf, write_ours

from megatron_skywork.convert.check.inspect_folder import inspect_folder
from megatron_skywork.convert.check.reference import logits_of
from megatron_skywork.convert.check.verify import open_layers
from megatron_skywork.convert.check.verify_manifest import verify_folder
from megatron_skywork.errors import CheckpointError

SECONDS = 20
MEGABYTES = 400
RESERVED_BYTES = 8 << 30


def peak_megabytes() -> float:
    """The most memory that this process had resident since `forget_peak`."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def forget_peak() -> None:
    """Without this one test's peak would hide those of all that follow."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def bounded() -> Iterator[None]:
    """What takes long is interrupted, what touched much memory fails, and what reserves very much is refused it before the machine suffers."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    forget_peak()
    before, limits = peak_megabytes(), resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        reserved = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (reserved + RESERVED_BYTES, limits[1]))
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    touched = peak_megabytes() - before
    assert touched < MEGABYTES, f"touched {touched:.0f} MB"


@pytest.fixture
def no_hang_and_no_flood() -> Iterator[None]:
    """The bounds around a whole test."""
    with bounded():
        yield


def use(folder: Path) -> torch.Tensor:
    """All that is ever done with a folder: describe it, and compute with every weight of it."""
    inspect_folder(folder)
    return logits_of(open_layers(folder, torch.float32), torch.arange(20))


def refused(folder: Path) -> str:
    """The sentence that a folder is refused with."""
    with pytest.raises(CheckpointError) as refusal:
        use(folder)
    text = str(refusal.value)
    assert text and len(text) < 5000 and "Traceback" not in text
    assert verify_folder(folder)["problems"]
    return text


def make_originals(at: Path) -> dict[str, Path]:
    """A folder of each kind, whole and read once."""
    tensors = random_tensors(MODEL, MOE)
    dense = random_tensors(MODEL, None)
    folders = {
        "hf": write_hf(at / "hf", dense, MODEL, None, "llama"),
        "sharded": write_hf(at / "sharded", tensors, MODEL, MOE, "skywork_moe", shards=2),
        "ours": write_ours(at / "ours", ours_of(tensors, MODEL, MOE), MODEL, MOE, {"decoder.layers.0.x._extra_state/shard_0_1": [None]}),
        "bin": at / "bin",
    }
    shutil.copytree(folders["hf"], folders["bin"])
    (folders["bin"] / "model.safetensors").unlink()
    torch.save(dense, folders["bin"] / "pytorch_model.bin")
    for folder in folders.values():
        use(folder)
    return folders


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def copies(originals: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {kind: Path(shutil.copytree(folder, tmp_path / kind)) for kind, folder in originals.items()}


class Attack:
    """Unpickling this writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return (os.system, (f"echo hacked > {self.target}",))


def archive(value: object, changes: dict[str, bytes | int] | None = None, packing: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes, with records replaced (by the end of their names; a number stands for as many zeros) or packed."""
    buffer, out = io.BytesIO(), io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w", packing) as new:
        for record in old.infolist():
            content = next((content for end, content in (changes or {}).items() if record.filename.endswith(end)), old.read(record.filename))
            with new.open(record.filename, "w") as file:
                for _ in range(content >> 20 if isinstance(content, int) else 0):
                    file.write(b"\0" * (1 << 20))
                file.write(content if isinstance(content, bytes) else b"")
    return out.getvalue()
