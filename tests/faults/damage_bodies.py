"""What a child of the warm process does to finished checkpoints, and who has to notice: a start of the run, or the verification of a converted folder.

Every damage is done to the one file, looked at, and undone. A reader is given the folder and answers None when it takes it for good.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convert_bodies import convert, make_dense, verified

FLIPS = 500
_FLIPS_SHORT = 12
_NEWEST, _BEFORE = "step_00000002", "step_00000001"
_OUTSIDE = ("../step_00000001/__0_0.distcp", "/etc/hostname", "a/../../x", "..", "")
# Notices damage in a folder: None when it takes the folder for good, else what it said; or a line that begins with "!" when it did something wrong.
Reader = Callable[[Path], str | None]
Damage = tuple[str, Path, bytes | None]


def train_as_rank(settings: dict[str, Any], rank: int, world_size: int, meet: str) -> None:
    """One rank of the run whose checkpoints are damaged."""
    import torch
    from run_bodies import undisturbed

    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size)
    undisturbed(settings)


def make_converted(place: str) -> None:
    """A converted folder of several files, and another model's beside it."""
    for name, seed in (("out", 0), ("other", 1)):
        make_dense(Path(place, f"dense-{seed}"), seed)
        if convert(Path(place, f"dense-{seed}"), Path(place, name)) != 0:
            raise SystemExit(1)


# ------------------------------------------------------------------------------------------------------------------------------- readers


@contextlib.contextmanager
def a_start() -> Iterator[Reader]:
    """A start of the run: it must pass over the damaged folder with a word, and take the one before."""
    from run_bodies import SETTINGS

    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.verify import newest
    from megatron_skywork.config.schema import Config

    parallel.start(Config(**SETTINGS))

    def look(folder: Path) -> str | None:
        found, passed_over = newest(folder.parent.parent)
        if found is not None and found.name == _NEWEST:
            return None
        return passed_over[0] if found is not None and found.name == _BEFORE and len(passed_over) == 1 else f"!a start takes {found}"

    yield look


def verification(folder: Path) -> str | None:
    """`convert_checkpoint.py verify`: exit code 3 and a problem."""
    code, problems = verified(folder)
    return None if code == 0 else "; ".join(problems) if code == 3 and problems else f"!exit code {code}, problems {problems}"


def sizes_only(folder: Path) -> str | None:
    """The naive one: every file that is listed is there in its size."""
    sizes = json.loads((folder / "complete.json").read_bytes())
    wrong = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    return f"sizes differ: {wrong}" if wrong else None


def tried(folder: Path, damages: Iterator[Damage], reader: Reader, note: str = "") -> list[Any]:
    """Do each damage, ask the reader, undo it; returns how many, those that were not noticed, and a note."""
    lost, number = [], 0
    if (said := reader(folder)) is not None:
        raise RuntimeError(f"not damaged, and refused: {said}")
    for name, path, content in damages:
        number += 1
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        said = _asked(reader, folder)
        path.write_bytes(whole)
        if said is None or said.startswith("!"):
            lost.append(f"{name}: {'taken for good' if said is None else said[1:]}")
    if reader(folder) is not None:
        raise RuntimeError("damage was left behind")
    return [number, lost, note]


def _asked(reader: Reader, folder: Path) -> str | None:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return reader(folder)
    except Exception as failure:  # of the naive reader; ours must not raise
        return f"{'' if reader is sizes_only else '!'}{failure!r}"


# ------------------------------------------------------------------------------------------------------------------------------- damages


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncations(folder: Path, short: bool) -> Iterator[Damage]:
    """Every file, empty, of one byte, by half, without its last byte, and gone."""
    for path in files_of(folder)[:: 4 if short else 1]:
        whole = path.read_bytes()
        for length in sorted({0, 1, len(whole) // 2, len(whole) - 1} - {len(whole)}):
            yield f"{path.name} cut to {length} of {len(whole)} bytes", path, whole[:length]
        yield f"{path.name} gone", path, None


def flips(folder: Path, short: bool) -> Iterator[Damage]:
    """Single bits, in all files in turn, so that small ones get as many as large ones."""
    draw, paths = random.Random(0), files_of(folder)
    for number in range(_FLIPS_SHORT if short else FLIPS):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        yield f"{path.name}: bit {bit} of byte {at}", path, whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


def replacements(folder: Path, others: list[Path]) -> Iterator[Damage]:
    """Each file of weights in the place of each other one, of this folder and of others."""
    shards = sorted(folder.glob("*.distcp"))
    for path in shards:
        for other in [*shards, *(other / path.name for other in others)]:
            if other != path and other.read_bytes() != path.read_bytes():
                yield f"{path.name} is {other.parent.name}/{other.name}", path, other.read_bytes()


def mutations(folder: Path, short: bool) -> Iterator[Damage]:
    """Manifest and marker with entries removed, sizes and hashes changed, names that lead out; as found after an accident, without a new seal."""
    from megatron_skywork.convert.files.marker import marker_text, sealed

    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    names = sorted(content["files"])[:: 6 if short else 1]
    entry = content["files"][names[0]]
    changed = [(f"without {key}", {name: value for name, value in content.items() if name != key}) for key in content]
    files = content["files"]
    for name in names:
        changed.append((f"without the entry of {name}", {**content, "files": {key: value for key, value in files.items() if key != name}}))
        for field in ("bytes", "sha256"):
            changed.append((f"{name} without {field}", {**content, "files": {**files, name: {k: v for k, v in files[name].items() if k != field}}}))
        changed.append((f"{name} of another size", {**content, "files": {**files, name: {**files[name], "bytes": files[name]["bytes"] + 1}}}))
        changed.append((f"{name} with another hash", {**content, "files": {**files, name: {**files[name], "sha256": "0" * 64}}}))
        for outside in _OUTSIDE:
            renamed = {outside if key == name else key: value for key, value in files.items()}
            changed.append((f"{name} under the name {outside!r}", {**content, "files": renamed}))
    changed += [("with a list of files", {**content, "files": []}), ("empty", {}), ("with one more file", {**content, "files": {**files, "more": entry}})]
    for name, mutated in changed:
        yield f"{path.name} {name}", path, (json.dumps(mutated, indent=1) + "\n").encode()
        if mutated and "without seal" not in name:
            yield f"{path.name} {name}, with a new seal", path, sealed({key: value for key, value in mutated.items() if key != "seal"}).encode()
    path = folder / "complete.json"
    sizes = json.loads(path.read_bytes())
    for name in [key for key in sizes if key in names or key == "manifest.json"]:
        yield f"{path.name} without {name}", path, marker_text({key: size for key, size in sizes.items() if key != name}).encode()
        yield f"{path.name} with another size of {name}", path, marker_text({**sizes, name: sizes[name] - 1}).encode()
        for outside in _OUTSIDE:
            yield f"{path.name} with {outside!r}", path, marker_text({(outside if key == name else key): size for key, size in sizes.items()}).encode()
    for text in (b"", b"{}", b"[]", b"null", b"{" * 10000, b"\xff\xfe", json.dumps(sizes).encode()):
        yield f"{path.name} is {text[:20]!r}", path, text


# -------------------------------------------------------------------------------------------------------------------------- who, with what


def _of_a_run(damages: Callable[[Path, bool], Iterator[Damage]]) -> Callable[[str, bool], list[Any]]:
    def body(run_dir: str, short: bool) -> list[Any]:
        folder = Path(run_dir, "checkpoints", _NEWEST)
        with a_start() as reader:
            return tried(folder, damages(folder, short), reader)

    return body


def _of_a_conversion(damages: Callable[[Path, bool], Iterator[Damage]]) -> Callable[[str, bool], list[Any]]:
    return lambda out, short: tried(Path(out), damages(Path(out), short), verification)


def _swaps_of_a_run(folder: Path, short: bool) -> Iterator[Damage]:
    return replacements(folder, [folder.with_name(_BEFORE)])


def _swaps_of_a_conversion(folder: Path, short: bool) -> Iterator[Damage]:
    found = list(replacements(folder, [folder.with_name("other")]))
    return iter(found[:: len(found) // 5] if short else found)


def _before_a_naive_reader(damages: Callable[[Path, bool], Iterator[Damage]]) -> Callable[[str, bool], list[Any]]:
    def body(run_dir: str, short: bool) -> list[Any]:
        folder = Path(run_dir, "checkpoints", _NEWEST)
        return tried(folder, damages(folder, True), sizes_only)

    return body


truncations_of_a_run, truncations_of_a_conversion = _of_a_run(truncations), _of_a_conversion(truncations)
flips_of_a_run, flips_of_a_conversion = _of_a_run(flips), _of_a_conversion(flips)
swaps_of_a_run, swaps_of_a_conversion = _of_a_run(_swaps_of_a_run), _of_a_conversion(_swaps_of_a_conversion)
mutations_of_a_run, mutations_of_a_conversion = _of_a_run(mutations), _of_a_conversion(mutations)
flips_before_a_naive_reader, swaps_before_a_naive_reader = _before_a_naive_reader(flips), _before_a_naive_reader(_swaps_of_a_run)
