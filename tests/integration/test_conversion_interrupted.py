"""Whole commands that are killed, interrupted, refused or shared by ranks: the output is absent or complete, and the same command finishes it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint  # noqa: E402
import upcycle_dense  # noqa: E402
from megatron_skywork.config.schema import Model  # noqa: E402
from megatron_skywork.convert.config_json import write_config  # noqa: E402
from megatron_skywork.convert.export_hf import export_hf  # noqa: E402
from megatron_skywork.convert.import_hf import import_hf  # noqa: E402
from megatron_skywork.convert.streaming.run import Options  # noqa: E402
from megatron_skywork.convert.table import weights  # noqa: E402

MODEL = Model(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=50, vocab_divisible_by=32)
FILE_GIB = "2e-6"  # about 2 KiB: some twenty files
NOISY = ["--num-experts", "4", "--noise", "0.1", "--file-gib", FILE_GIB]
GRANULAR = ["--num-experts", "8", "--topk", "4", "--granularity", "2", "--shared-expert-ffn", "8", "--file-gib", FILE_GIB]
# A child runs a command as a user does, after it has changed something: a finish that waits makes the moment of a kill certain.
# A shell starts what runs in its background deaf to SIGINT, and everything below inherits that; a command at a terminal hears it.
CHILD = """
import os, signal, sys, time, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
sys.path.insert(0, "tools")
import upcycle_dense, convert_checkpoint
from megatron_skywork.convert import export_hf, import_hf
from megatron_skywork.convert.files import output_folder
from megatron_skywork.convert.streaming import file_writer, mcore_target, run, staged
plain_record, lock, count = staged.Staged.record, threading.Lock(), [0]
def after(number, action):
    def record(self, name, made):
        if not name.startswith("source/"):
            with lock:
                if count[0] == number:
                    action()
                count[0] += 1
        plain_record(self, name, made)
    staged.Staged.record = record
def wait():
    print("waiting", flush=True)
    time.sleep(60)
def die():
    os._exit(77)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "dense"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    shapes = {name: shape for weight in weights(MODEL, None) for name, shape in zip(weight.theirs, weight.layout.parts, strict=True)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(MODEL, None, "llama", "float32")))
    return folder


def words(dense: Path, out: Path, *more: str) -> list[str]:
    return ["--dense", str(dense), "--out", str(out), *(more or NOISY)]


@contextlib.contextmanager
def child(change: str, tool: str, arguments: list[str]) -> Iterator[subprocess.Popen]:
    """A command in a process of its own, with a change to it."""
    code = f"{CHILD}\n{change}\nsys.exit({tool}.main(sys.argv[1:]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code, and what was said."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def until_it_waits(process: subprocess.Popen) -> None:
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def finished(out: Path) -> dict[str, int]:
    """Weight files that the journal has, and when they were written."""
    partial = out.parent / f".{out.name}.partial"
    entries = [name for name in names(partial / "done") if not name.startswith("source%") and not name.endswith(".new")]
    return {name: (partial / "content" / name).stat().st_mtime_ns for name in entries}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_goes_on(command: Callable[[Path], int], out: Path, whole: Path, kept: dict[str, int]) -> None:
    """The same command finishes, writes nothing twice, and the result is that of one that was never disturbed."""
    assert command(out) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert content(out) == content(whole)
    assert not [name for name in names(out.parent) if name.startswith(".")]


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert upcycle_dense.main(words(dense, out)) == 0
    assert len(list(out.glob("*.distcp"))) > 12
    return out


# ------------------------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("moment", ["none", "one", "half", "all but one"])
def test_an_upcycling_that_is_killed_goes_on(moment: str, dense: Path, whole: Path, tmp_path: Path):
    total, out = len(list(whole.glob("*.distcp"))), tmp_path / "out"
    number = {"none": 0, "one": 1, "half": total // 2, "all but one": total - 1}[moment]
    with child(f"after({number}, wait)", "upcycle_dense", words(dense, out, *NOISY, "--workers", "1")) as process:
        until_it_waits(process)
        process.send_signal(signal.SIGKILL)
        assert ended(process)[0] == -signal.SIGKILL
    assert names(tmp_path) == [".out.partial"]
    kept = finished(out)
    assert len(kept) == number
    assert_goes_on(lambda out: upcycle_dense.main(words(dense, out)), out, whole, kept)


def test_a_kill_at_any_moment(dense: Path, whole: Path, tmp_path: Path):
    """Without a hand inside: the journal is watched from outside, and whatever the process is at is cut off."""
    out, killed = tmp_path / "out", 0
    for number in (2, 7):
        slowly = "plain = file_writer.FileWriter.finish\nfile_writer.FileWriter.finish = lambda self: time.sleep(0.1) or plain(self)"
        with child(slowly, "upcycle_dense", words(dense, out)) as process:
            done = tmp_path / ".out.partial" / "done"
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline and not (done.is_dir() and len(names(done)) >= number):
                time.sleep(0.001)
            process.kill()
            killed += ended(process)[0] == -signal.SIGKILL
        if out.exists():
            break
    assert killed, "it was always faster"
    kept = finished(out)
    assert_goes_on(lambda out: upcycle_dense.main(words(dense, out)), out, whole, kept)


DURING = {
    "the comparison": "upcycle_dense.gate = lambda arguments: lambda folder: die()",
    "the manifest": "import_hf.write_marker = lambda folder: die()",
    "the index": "mcore_target.McoreTarget.finish = lambda self, folder: (folder.joinpath('.metadata').write_bytes(b'half'), die())",
    "the rename": "staged.Staged.commit = lambda self: die()",
}


@pytest.mark.parametrize("moment", DURING)
def test_a_kill_behind_the_last_file(moment: str, dense: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    with child(DURING[moment], "upcycle_dense", words(dense, out, *NOISY, "--verify", "--verify-tokens", "8")) as process:
        assert ended(process)[0] == 77
    assert names(tmp_path) == [".out.partial"]
    kept = finished(out)
    assert len(kept) == len(list(whole.glob("*.distcp")))
    assert_goes_on(lambda out: upcycle_dense.main(words(dense, out, *NOISY, "--verify", "--verify-tokens", "8")), out, whole, kept)
    assert convert_checkpoint.main(["verify", str(out), "--source", str(dense), "--finite"]) == 0


@pytest.mark.parametrize("direction", ["import", "export"])
def test_imports_and_exports_that_are_killed_go_on(direction: str, dense: Path, whole: Path, tmp_path: Path):
    out, base = tmp_path / "out", tmp_path / "whole"
    small = "import_hf.import_hf.__defaults__ = (import_hf._PLAIN, 2000)\nexport_hf.export_hf.__defaults__ = (*export_hf.export_hf.__defaults__[:-1], 2000)"
    source = dense if direction == "import" else whole
    option = "--hf" if direction == "import" else "--checkpoint"

    def again(out: Path) -> int:
        if direction == "import":
            return 0 * import_hf(source, out, Options(), 2000)["bytes"]
        return 0 * export_hf(source, out, options=Options(), shard_bytes=2000)["bytes"]

    again(base / "out")
    with child(f"{small}\nafter(5, die)", "convert_checkpoint", [direction, option, str(source), "--out", str(out), "--workers", "1"]) as process:
        assert ended(process)[0] == 77
    assert names(tmp_path) == [".out.partial", "whole"]
    kept = finished(out)
    assert len(kept) == 5
    assert_goes_on(again, out, base / "out", kept)


# -------------------------------------------------------------------------------------------------- signals, refusals and two at a time


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_at_once_and_the_same_command_goes_on(number: int, code: int, dense: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    # Every file takes its time, so that the signal finds one being written and many waiting.
    slowly = "plain = file_writer.FileWriter.finish\nfile_writer.FileWriter.finish = lambda self: time.sleep(0.2) or plain(self)\n"
    announce = "plain_wait = run.wait\nrun.wait = lambda *a, **k: (print('waiting', flush=True), plain_wait(*a, **k))[1]"
    with child(slowly + announce, "upcycle_dense", words(dense, out)) as process:
        until_it_waits(process)
        process.send_signal(number)
        found, said = ended(process)
    assert found == code and "Traceback" not in said
    if number == signal.SIGINT:
        assert "interrupted; the same command goes on where this one stopped" in said
    assert names(tmp_path) == [".out.partial"]
    kept = finished(out)
    assert len(kept) < len(list(whole.glob("*.distcp")))
    assert_goes_on(lambda out: upcycle_dense.main(words(dense, out)), out, whole, kept)


def test_a_second_process_is_refused_while_the_first_writes(dense: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    with child("after(3, wait)", "upcycle_dense", words(dense, out, *NOISY, "--workers", "1")) as process:
        until_it_waits(process)
        kept = finished(out)
        for other in (words(dense, out), words(dense, out, *NOISY, "--seed", "5"), words(dense, out, *NOISY, "--overwrite")):
            assert upcycle_dense.main(other) == 3
            assert "another process is writing it now" in capsys.readouterr().err
        assert process.poll() is None and finished(out) == kept
        process.kill()
        ended(process)
    assert_goes_on(lambda out: upcycle_dense.main(words(dense, out)), out, whole, kept)


def test_a_disk_that_takes_no_more_is_one_sentence(dense: Path, whole: Path, tmp_path: Path):
    """A limit on the size of a file stands in for a full disk: it is the kernel that refuses the write."""
    out, arguments = tmp_path / "out", words(dense, tmp_path / "out", "--num-experts", "4", "--noise", "0.1", "--file-gib", "2e-5")
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nafter(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))"
    with child(limit, "upcycle_dense", [*arguments, "--workers", "1"]) as process:
        code, said = ended(process)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and "Traceback" not in said and len(errors) == 1
    assert ".distcp: File too large; the same command goes on where this one stopped" in errors[0]
    assert len(finished(out)) == 3 and not out.exists()
    assert upcycle_dense.main(arguments) == 0
    assert upcycle_dense.main(words(dense, tmp_path / "whole", *arguments[4:])) == 0
    assert content(out) == content(tmp_path / "whole") and names(tmp_path) == ["out", "whole"]


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(dense: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    assert upcycle_dense.main(words(dense, out, "--num-experts", "2")) == 0
    old = content(out)
    with child("staged.Staged.commit = lambda self: die()", "upcycle_dense", words(dense, out, *NOISY, "--overwrite")) as process:
        assert ended(process)[0] == 77
    assert content(out) == old and names(tmp_path) == [".out.partial", "out"]
    assert upcycle_dense.main(words(dense, out)) == 3 and "--overwrite" in capsys.readouterr().err
    kept = finished(out)
    assert_goes_on(lambda out: upcycle_dense.main(words(dense, out, *NOISY, "--overwrite")), out, whole, kept)


# ------------------------------------------------------------------------------------------------------------------------------- ranks

RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, "tools")
import upcycle_dense
from megatron_skywork.convert.streaming import ranks
dense, base = sys.argv[1], Path(sys.argv[2])
ranks.Ranks.close = lambda self: None  # one group serves all commands
kinds = {"noise": ["--num-experts", "4", "--noise", "0.1"], "drop": ["--num-experts", "4", "--drop-ratio", "0.5"]}
kinds["granular"] = ["--num-experts", "8", "--topk", "4", "--granularity", "2", "--shared-expert-ffn", "8"]
for form in ("mcore", "hf"):
    for name, words in kinds.items():
        words = [*words, "--format", form, "--file-gib", "2e-6", "--workers", "1" if name == "drop" else "3"]
        if upcycle_dense.main(["--dense", dense, "--out", str(base / form / name), *words]):
            sys.exit(1)
"""
FAILING = """
import sys
sys.path.insert(0, "tools")
import upcycle_dense
from megatron_skywork.convert.files.hf_files import HfReader
from megatron_skywork.convert.streaming import ranks
plain = HfReader.read
def read(self, name):
    if ranks.Ranks.from_environment().rank == 1 and "layers.1" in name:
        raise OSError(28, "No space left on device", "disk of rank 1")
    return plain(self, name)
HfReader.read = read
sys.exit(upcycle_dense.main(sys.argv[1:]))
"""


def torchrun(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(launcher, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_ranks_write_the_same_bytes(dense: Path, tmp_path: Path):
    (tmp_path / "ranks.py").write_text(RANKS)
    found = torchrun(tmp_path / "ranks.py", str(dense), str(tmp_path / "ranks"))
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("of them mixtures") == 6, "one rank answers"
    kinds: dict[str, list[str]] = {"noise": NOISY, "drop": ["--num-experts", "4", "--drop-ratio", "0.5", "--file-gib", FILE_GIB], "granular": GRANULAR}
    for form in ("mcore", "hf"):
        for name, options in kinds.items():
            assert upcycle_dense.main(words(dense, tmp_path / "one" / form / name, *options, "--format", form)) == 0
        assert names(tmp_path / "ranks" / form) == sorted(kinds)
    assert content(tmp_path / "ranks") == content(tmp_path / "one")


def test_a_rank_that_fails_ends_the_job(dense: Path, whole: Path, tmp_path: Path):
    (tmp_path / "failing.py").write_text(FAILING)
    out = tmp_path / "base" / "out"
    found = torchrun(tmp_path / "failing.py", *words(dense, out))
    assert found.returncode != 0 and names(tmp_path / "base") == [".out.partial"]
    assert "error: disk of rank 1: No space left on device; the same command goes on" in found.stderr
    assert "[rank" not in found.stderr, "no rank shows a traceback"
    kept = finished(out)
    assert_goes_on(lambda out: upcycle_dense.main(words(dense, out)), out, whole, kept)


# ------------------------------------------------------------------------------------------------------------------------- wrong arguments

WRONG: list[tuple[int, list[str]]] = [
    (2, ["--file-gib", "inf"]), (2, ["--file-gib", "nan"]), (2, ["--file-gib", "0"]), (2, ["--file-gib", "1e-12"]), (2, ["--workers", "0"]),
    (2, ["--noise", "nan"]), (2, ["--noise", "-1"]), (2, ["--noise", "0.1", "--drop-ratio", "0.5"]), (2, ["--drop-ratio", "2"]),
    (2, ["--topk", "0"]), (2, ["--topk", "9"]), (2, ["--num-experts", "-4"]), (2, ["--granularity", "0"]), (2, ["--granularity", "7"]),
    (2, ["--shared-expert-ffn", "0"]), (2, ["--shared-expert-ffn", "1000"]), (2, ["--shared-expert-gate"]), (2, ["--gate-norm-scale", "inf"]),
    (2, ["--moe-layers", "2"]), (2, ["--trunk", "mean"]), (2, ["--router-init", "text"]), (2, ["--router-init-std", "nan"]),
    (2, ["--router-text", "nowhere"]), (3, ["--experts-from", "nowhere=0"]), (2, ["--num-experts", "1" + "0" * 30]),
    (3, ["--format", "hf", "--hf-family", "mixtral"]), (3, ["--dense", "nowhere"]), (3, ["--dense", "README.md"]), (3, ["--verify", "--verify-tokens", "0"]),
    (3, ["--out", "README.md"]), (3, ["--out", "README.md/out"]), (3, ["--out", "x" * 300]), (3, ["--out", "/"]), (3, ["--out", "/proc/nothing/here"]),
    (3, ["--dense", ""]), (3, ["--dense", "configs/skywork_13b.yaml"]), (3, ["--out", "README.md", "--dry-run"]), (3, ["--verify", "--verify-text", ""]),
    (3, ["--dense", "README.md", "--dry-run"]), (3, ["--dense", "nowhere.yaml", "--dry-run"]), (3, ["--dense", "docs/report.png", "--dry-run"]),
]  # fmt: skip
UNREADABLE = [["--moe-layers", "x"], ["--moe-layers", "3-1"], ["--moe-layers", "²"], ["--experts-from", "x"], ["--experts-from", "x="], ["--topk", "two"],
              ["--nonsense"], ["--format", "gguf"], ["--seed", "1.5"], ["--hf-family", "nonsense"], ["--moe-layers", "0-99999999999"]]  # fmt: skip


@pytest.mark.parametrize(("code", "arguments"), WRONG, ids=[" ".join(arguments)[:30] for _, arguments in WRONG])
def test_a_wrong_argument_is_a_sentence(
    code: int, arguments: list[str], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    assert upcycle_dense.main(words(dense, tmp_path / "out", "--num-experts", "4", *arguments)) == code
    said = capsys.readouterr().err
    assert "error: " in said and len(said.splitlines()) < 12
    assert names(tmp_path) == []


@pytest.mark.parametrize("arguments", UNREADABLE, ids=" ".join)
def test_an_argument_that_cannot_be_read_is_a_usage(arguments: list[str], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as refusal:
        upcycle_dense.main(words(dense, tmp_path / "out", "--num-experts", "4", *arguments))
    assert refusal.value.code == 2 and "error: " in capsys.readouterr().err and names(tmp_path) == []


def test_what_only_reads_does_not_say_that_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megatron_skywork.convert.check.inspect_folder.inspect_folder", fail)
    assert convert_checkpoint.main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: Input/output error\n"
