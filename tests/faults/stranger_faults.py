"""Checkpoints from strangers: pickles, safetensors and indexes that were made to harm. Nothing in them runs, nothing is written beside them, nothing floods
the memory or hangs, and each is refused with a sentence.

The builders are those of the unit tests; what a pickle could call is a list of its own here. Every one is seen to work by the control, `pickle.load`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault import Fault, Outcome

ROOT = Path(__file__).resolve().parents[2]


def lying_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


class Trial:
    """One fault's folder: copies of whole checkpoints, a canary that any code in a file would leave, and a list of all that lies there.

    Args:
        folder: the fault's.
    """

    def __init__(self, folder: Path):
        from megatron_skywork import device

        device.prepare()
        from hostile_folders import make_originals

        self.folder, self.canary = folder, folder / "canary"
        self.originals = make_originals(folder / "originals")

    def copy(self, kind: str) -> Path:
        to = self.folder / "copy" / kind
        shutil.rmtree(to, ignore_errors=True)
        return Path(shutil.copytree(self.originals[kind], to))

    def failure(self, folder: Path, what: str, may_be_used: bool = False) -> str | None:
        """Give a folder to every reader; what was lost, or None.

        Args:
            may_be_used: it may also turn out to be harmless.
        """
        from hostile_folders import bounded, use

        from megatron_skywork.convert.check.verify_manifest import verify_folder
        from megatron_skywork.convert.import_hf import import_hf
        from megatron_skywork.errors import CheckpointError, ConfigError

        out = self.folder / "out"
        readers: dict[str, Callable[[], object]] = {"use": lambda: use(folder), "verify": lambda: verify_folder(folder)["problems"]}
        if (folder / "config.json").is_file():
            readers["import"] = lambda: import_hf(folder, out)
        if (folder / ".metadata").exists():
            readers["start a run"] = lambda: _start_from(folder)
        before = lying_in(self.folder)
        for name, reader in readers.items():
            try:
                with bounded():
                    answer = reader()
                refused = bool(answer) if name == "verify" else False
            except (CheckpointError, ConfigError) as refusal:
                refused = True
                if not str(refusal) or len(str(refusal)) > 20_000 or "Traceback" in str(refusal):
                    return f"{what}: {name} says {str(refusal)[:200]!r}"
            except BaseException as failure:
                return f"{what}: {name} fell over it: {type(failure).__name__}: {str(failure)[:200]}"
            if self.canary.exists():
                self.canary.unlink()
                return f"{what}: {name} ran what is in the file"
            if not refused and not may_be_used:
                return f"{what}: {name} took it"
            if name == "import":
                shutil.rmtree(out, ignore_errors=True)
        made = lying_in(self.folder) - before
        return f"{what}: left {sorted(map(str, made))}" if made else None


def _start_from(folder: Path) -> None:
    """What stands before megatron-core's loads: a run's own checkpoint, and another's weights. Whoever gets past it meets a model of no layers."""
    from megatron_skywork.checkpoint.load import load_weights
    from megatron_skywork.convert.safety.safe_pickle import check_metadata

    check_metadata(folder)
    try:
        load_weights(folder, [])
    except (IndexError, ValueError, RuntimeError, AttributeError):
        return


# ------------------------------------------------------------------------------------------------------------------------------ pickles


def _calls(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling leaves the canary."""
    import logging
    import runpy
    import timeit

    import numpy
    import torch
    from test_convert_hostile_bin import Call

    at, script = str(canary), canary.parent / "script.txt"
    script.write_text(f"open({at!r}, 'w').close()")
    code = f"open({at!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"echo > {at}"),
        "subprocess": Call(subprocess.check_call, ["touch", at]),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(open, at, "w"),
        "mkdir": Call(os.mkdir, at),
        "a link": Call(os.symlink, "/", at),
        "timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "a script": Call(runpy.run_path, str(script)),
        "a log file": Call(logging.FileHandler, at),
        "shutil": Call(shutil.copy, str(script), at),
        "torch.save": Call(torch.save, [1], at),
        "numpy.savetxt": Call(numpy.savetxt, at, [1.0]),
        "in a key": {Call(os.system, f"echo > {at}"): 1},
        "deep inside": [{"a": (1, [Call(os.system, f"echo > {at}")])}],
        "as a state": Call(dict, state={"a": Call(os.mkdir, at)}),
    }


def _by_hand(canary: Path) -> dict[str, bytes]:
    """Pickles by opcodes, some of which Python's own pickler does not write."""
    touch = f"echo > {canary}".encode()
    short = struct.pack("<B", len(touch)) + touch
    return {
        "GLOBAL": b"cos\nsystem\n(S'" + touch + b"'\ntR.",
        "INST": b"(S'" + touch + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + touch + b"'\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R.",
        "a dotted name": b"\x80\x04\x8c\x06shutil\x8c\tos.system\x93\x8c" + short + b"\x85R.",
        "a module that torch imports": b"\x80\x02ctorch.serialization\nos.system\n(S'" + touch + b"'\ntR.",
        "in a dictionary": b"\x80\x02}X\x01\x00\x00\x00a(S'" + touch + b"'\nios\nsystem\ns.",
    }


def _pickles(canary: Path) -> dict[str, bytes]:
    found = {f"{name}, protocol {protocol}": pickle.dumps(call, protocol) for name, call in _calls(canary).items() for protocol in (0, 2, 5)}
    return found | _by_hand(canary)


def _put(place: str, folder: Path, content: bytes) -> None:
    """Lay a pickle where the readers find it."""
    from hostile_folders import archive
    from test_convert_hostile_index import change_index

    from megatron_skywork.convert.files.marker import write_marker

    packed = archive({"a": 1}, {"data.pkl": content})
    if place == "an object in __0_0.distcp":
        index = pickle.loads((folder / ".metadata").read_bytes())
        (at,) = [at for at in index.storage_data if "_extra_state" in at.fqn]
        size = (folder / "__0_0.distcp").stat().st_size
        with open(folder / "__0_0.distcp", "ab") as file:
            file.write(packed)
        change_index(folder, lambda index: index.storage_data[at].__dict__.update(offset=size, length=len(packed)))
    else:
        name, _, form = place.partition(", ")
        (folder / name).write_bytes(packed if form == "an archive" else content)
    if (folder / ".metadata").exists():
        write_marker(folder)


PLACES = {
    ".metadata": "ours", "common.pt": "ours", "common.pt, an archive": "ours", "an object in __0_0.distcp": "ours", "pytorch_model.bin": "bin",
    "pytorch_model.bin, an archive": "bin",
}  # fmt: skip


def crafted_pickles(folder: Path, short: bool) -> Outcome:
    trial, outcome = Trial(folder), Outcome()
    pickles = list(_pickles(trial.canary).items())
    for number, (place, kind) in enumerate(PLACES.items()):
        for name, content in pickles[number :: 12 if short else 1]:
            copy = trial.copy(kind)
            _put(place, copy, content)
            outcome.add(trial.failure(copy, f"{place}: {name}"))
    return outcome


def pickles_loaded(folder: Path, short: bool) -> Outcome:
    """Each of them does work: in a process of its own, `pickle.load` leaves the canary."""
    canary, outcome = folder / "canary", Outcome(note="pickle.load ran it")
    pickles = _pickles(canary)
    files = []
    for number, (name, content) in enumerate(list(pickles.items())[:: 8 if short else 1]):
        (folder / f"{number}.pickle").write_bytes(content)
        files.append((name, folder / f"{number}.pickle"))
    script = """
import os, pickle, shutil, sys
for path in sys.argv[2:]:
    try:
        with open(path, "rb") as file:
            pickle.load(file)
    except Exception:
        pass
    print(os.path.lexists(sys.argv[1]), flush=True)
    if os.path.islink(sys.argv[1]) or os.path.isfile(sys.argv[1]):
        os.unlink(sys.argv[1])
    elif os.path.isdir(sys.argv[1]):
        os.rmdir(sys.argv[1])
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'unit'}"}
    command = [sys.executable, "-c", script, str(canary), *(str(path) for _, path in files)]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}).stdout.split()
    for (name, _), found in zip(files, said, strict=True):
        outcome.add(f"{name}: ran" if found == "True" else None)
    return outcome


def index_lies(folder: Path, short: bool) -> Outcome:
    """Indexes of distributed checkpoints that point elsewhere, overlap, or are bombs; and what torch would allocate for a file that claims much."""
    from test_convert_hostile_bin import CLAIMS
    from test_convert_hostile_index import BOMBS, INDEX_CHANGES, change_index

    from megatron_skywork.convert.files.marker import write_marker

    trial, outcome = Trial(folder), Outcome()
    step = 8 if short else 1
    for name, (change, _) in list(INDEX_CHANGES.items())[::step]:
        copy = trial.copy("ours")
        with open(copy / "sparse.distcp", "wb") as file:
            file.truncate(2 << 30)
        change_index(copy, change)
        outcome.add(trial.failure(copy, f".metadata: {name}"))
    for name, bomb in list(BOMBS.items())[::step]:
        copy = trial.copy("ours")
        (copy / ".metadata").write_bytes(bomb())
        write_marker(copy)
        outcome.add(trial.failure(copy, f".metadata: {name}"))
    for name, claim in list(CLAIMS.items())[::step]:
        for file_name, kind in (("pytorch_model.bin", "bin"), ("common.pt", "ours")):
            copy = trial.copy(kind)
            (copy / file_name).write_bytes(claim())
            if kind == "ours":
                write_marker(copy)
            plain = file_name == "common.pt" and name in ("a deep list", "a pickle that is too large")  # plain data, as large as the file
            outcome.add(trial.failure(copy, f"{file_name}: {name}", may_be_used=plain))
    return outcome


# -------------------------------------------------------------------------------------------------------------------------- safetensors


def _safetensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """The file, changed in all the ways of the tests."""
    from test_convert_hostile import ENTRIES, HEADER_LENGTHS, HEADERS, NAME, OTHER, parts_of, put_together

    whole = path.read_bytes()
    header, data = parts_of(path)

    def made(*arguments: Any) -> bytes:
        put_together(path, *arguments)
        content = path.read_bytes()
        path.write_bytes(whole)
        return content

    for name, change in ENTRIES.items():
        changed = json.loads(json.dumps(header))
        change(changed)
        yield name, made(changed, data)
    for length in HEADER_LENGTHS:
        yield f"a header of {length} bytes", made(header, data, length)
    for text in HEADERS:
        yield f"header {text[:20]!r}", made(text, data)
    for name in ("../../canary", "/etc/canary", "..", "a" * 100_000, "\x1b[2J", ""):
        changed = {**header, name: header[OTHER]}
        changed.pop(OTHER)
        yield f"a tensor named {name[:20]!r}", made(changed, data)
    again = json.dumps({OTHER: header[NAME]})[1:-1]
    yield "a name twice", made(f"{json.dumps(header)[:-1]}, {again}}}".encode(), data)
    for cut in (0, 1, 7, 8, 9, len(whole) // 3, len(whole) - 4, len(whole) - 1):
        yield f"cut to {cut} bytes", whole[:cut]
    yield "a byte more", whole + b"\0"
    yield "a header of zeros", struct.pack("<Q", 200 << 20) + b"\0" * 1000


def safetensors(folder: Path, short: bool) -> Outcome:
    from test_convert_hostile import INDEX_FILES, INDEX_NAMES, NAME

    trial, outcome = Trial(folder), Outcome()
    step = 9 if short else 1
    copy = trial.copy("hf")
    path = copy / "model.safetensors"
    for name, content in list(_safetensors(path))[::step]:
        path.write_bytes(content)
        outcome.add(trial.failure(copy, f"model.safetensors: {name}"))
    for file_name in INDEX_NAMES[::step]:
        copy = trial.copy("sharded")
        path = copy / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][NAME] = file_name
        path.write_text(json.dumps(index))
        outcome.add(trial.failure(copy, f"index: a file named {str(file_name)[:30]!r}"))
    for text in INDEX_FILES[::step]:
        copy = trial.copy("sharded")
        (copy / "model.safetensors.index.json").write_text(text)
        outcome.add(trial.failure(copy, f"index: {text[:30]!r}"))
    return outcome


def naive_safetensors(folder: Path, short: bool) -> Outcome:
    """A reader of thirty lines, as there are many: what it takes is lost."""
    import numpy

    trial, outcome = Trial(folder), Outcome(note="taken by a reader that trusts the header")
    path = trial.copy("hf") / "model.safetensors"
    kinds = {"F32": numpy.float32, "F64": numpy.float64, "I32": numpy.int32}
    for name, content in list(_safetensors(path))[:: 9 if short else 1]:
        try:
            (length,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + length])
            tensors = {}
            for key, entry in header.items():
                if key != "__metadata__":
                    begin, end = entry["data_offsets"]
                    tensors[key] = numpy.frombuffer(content[8 + length + begin : 8 + length + end], kinds[entry["dtype"]])
        except Exception:
            outcome.add(None)
        else:
            outcome.add(f"{name}: {len(tensors)} tensors")
    return outcome


FAULTS = [
    Fault("crafted pickles in .metadata, common.pt, .distcp and .bin", crafted_pickles),
    Fault("control: the same pickles, loaded", pickles_loaded, is_control=True),
    Fault("indexes and archives that lie or are bombs", index_lies),
    Fault("crafted safetensors and their indexes", safetensors),
    Fault("control: the same safetensors and a reader that trusts their headers", naive_safetensors, is_control=True),
]
