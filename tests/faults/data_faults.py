"""Datasets and documents that are cut, flipped, mixed up or damaged: noticed at the start or by `verify`, and of documents each one refused or counted, with
file and line; none is lost without a word, and none is read that was not written.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from fault import Fault, Outcome

KINDS = ("bin", "idx", "json")


def _dataset(folder: Path, name: str = "set", seed: int = 0, count: int = 30) -> tuple[str, dict[str, Path], dict[str, bytes]]:
    """Prefix, paths and contents of a small dataset."""
    from data_samples import make_bpe_folder, make_dataset

    from megatron_skywork import device
    from megatron_skywork.data.indexed import paths_of

    device.prepare()  # before anything below comes to megatron-core
    folder.mkdir(exist_ok=True)
    prefix = make_dataset(folder, name, make_bpe_folder(folder / "tokenizer", seed), count=count, seed=seed)
    paths = {kind: paths_of(prefix)[kind] for kind in KINDS}
    return prefix, paths, {kind: path.read_bytes() for kind, path in paths.items()}


def _answer(check: Callable[[], object]) -> str:
    """`refused`, `taken`, or what went wrong instead."""
    from megatron_skywork.errors import DataError

    try:
        check()
    except DataError as refusal:
        return "refused" if str(refusal) and "Traceback" not in str(refusal) else "refused without a word"
    except BaseException as failure:
        return f"{type(failure).__name__}: {failure}"[:200]
    return "taken"


def _checks(prefix: str, at_start: bool) -> str | None:
    """What is wrong when `verify`, and the start of a run where it should, do not refuse a dataset."""
    from megatron_skywork.data.verification import check_dataset, verify_content

    answers = {"verify": _answer(lambda: verify_content(prefix))}
    if at_start:
        answers["the start"] = _answer(lambda: check_dataset(prefix, 512))
    wrong = [f"by {name}: {answer}" for name, answer in answers.items() if answer != "refused"]
    return "; ".join(wrong) or None


def cuts(folder: Path, short: bool) -> Outcome:
    """At every byte of the index and of the side file, and all over the tokens; the index without its side file too."""
    prefix, paths, whole = _dataset(folder)
    outcome = Outcome()
    for kind, step in (("idx", 1), ("json", 3), ("bin", 11)):
        for cut in range(0, len(whole[kind]), step * (60 if short else 1)):
            if kind == "json" and whole[kind][cut:].strip() == b"":
                continue  # the last line's end says nothing
            paths[kind].write_bytes(whole[kind][:cut])
            failure = _checks(prefix, at_start=True)
            outcome.add(f".{kind} cut to {cut} bytes, {failure}" if failure else None)
        paths[kind].write_bytes(whole[kind])
    paths["json"].unlink()
    for kind, step in (("idx", 7), ("bin", 31)):
        for cut in range(0, len(whole[kind]), step * (60 if short else 1)):
            paths[kind].write_bytes(whole[kind][:cut])
            failure = _checks(prefix, at_start=True)
            outcome.add(f".{kind} without a side file cut to {cut} bytes, {failure}" if failure else None)
        paths[kind].write_bytes(whole[kind])
    return outcome


def flips(folder: Path, short: bool) -> Outcome:
    """One bit at a time. Those of the tokens are for `verify`, all others for the start as well."""
    prefix, paths, whole = _dataset(folder)
    outcome, choose = Outcome(), random.Random(17)
    for number in range(60 if short else 900):
        kind = KINDS[number % 3]
        position, bit = choose.randrange(len(whole[kind])), choose.randrange(8)
        damaged = bytearray(whole[kind])
        damaged[position] ^= 1 << bit
        paths[kind].write_bytes(damaged)
        failure = _checks(prefix, at_start=kind != "bin")
        outcome.add(f".{kind}, bit {bit} of byte {position}, {failure}" if failure else None)
        paths[kind].write_bytes(whole[kind])
    return outcome


def mixed_up(folder: Path, short: bool) -> Outcome:
    """Files of another dataset, missing files, files with more in them, another tokenizer, and a vocabulary that is too small."""
    from megatron_skywork.data.tokenizers import load_tokenizer
    from megatron_skywork.data.verification import check_dataset

    prefix, paths, whole = _dataset(folder)
    _, _, other = _dataset(folder / "other", seed=5, count=31)
    outcome = Outcome()
    for kind in KINDS:
        same_size = (other[kind] + whole[kind])[: len(whole[kind])]
        zeros = bytes(len(whole[kind]))
        for name, content in (("another's", other[kind]), ("another's of this size", same_size), ("a byte more", whole[kind] + b"x"), ("zeros", zeros)):
            paths[kind].write_bytes(content)
            failure = _checks(prefix, at_start=kind != "bin" or len(content) != len(whole[kind]))
            outcome.add(f".{kind}: {name}, {failure}" if failure else None)
        paths[kind].unlink()
        if kind != "json":  # without it the pair is read as Megatron-LM writes it
            failure = _checks(prefix, at_start=True)
            outcome.add(f".{kind}: missing, {failure}" if failure else None)
        paths[kind].write_bytes(whole[kind])
    tokenizer = load_tokenizer(folder / "other" / "tokenizer")
    for name, answer in {
        "another tokenizer": _answer(lambda: check_dataset(prefix, 512, tokenizer)), "a small vocabulary": _answer(lambda: check_dataset(prefix, 300)),
    }.items():  # fmt: skip
        outcome.add(None if answer == "refused" else f"{name}: {answer}")
    return outcome


def naive_tokens(folder: Path, short: bool) -> Outcome:
    """megatron-core's own reader on flipped tokens and on those of another dataset."""
    prefix, paths, whole = _dataset(folder)
    _, _, other = _dataset(folder / "other", seed=5, count=31)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    outcome, choose = Outcome(note="read without a word"), random.Random(3)
    contents = [(other["bin"] + whole["bin"])[: len(whole["bin"])]]
    for _ in range(20 if short else 100):
        damaged = bytearray(whole["bin"])
        damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
        contents.append(bytes(damaged))
    for number, content in enumerate(contents):
        paths["bin"].write_bytes(content)
        try:
            dataset = IndexedDataset(prefix)
            read = sum(len(dataset[document]) for document in range(len(dataset)))
        except Exception:
            outcome.add(None)
        else:
            outcome.add(f"content {number}: {read} tokens")
    return outcome


# ------------------------------------------------------------------------------------------------------------------------------ documents


def _damaged_lines() -> list[tuple[str, bytes]]:
    from test_data_documents import BAD_LINES

    lines = [(reason, line) for line, reason in BAD_LINES if b"\n" not in line]
    return [*lines, ("too long", b'{"text": "' + b"a" * 500_000 + b'"}'), ("an empty document", b'{"text": ""}')]


def _documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def documents(folder: Path, short: bool) -> Outcome:
    """A damaged line among whole ones, in a plain and in packed files: refused with file and line, or left out and counted, and all others are there."""
    _dataset(folder)
    import zstandard
    from data_samples import sentences

    from megatron_skywork.data.preprocess import PreprocessOptions, preprocess
    from megatron_skywork.errors import DataError

    outcome, texts = Outcome(), sentences(12, seed=2)
    good = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    pack: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    out, tokenizer = folder / "out", str(folder / "tokenizer")
    preprocess(PreprocessOptions(inputs=[str(folder / "set.jsonl")], tokenizer=tokenizer, output=str(folder / "again")))
    (folder / "good.jsonl").write_bytes(b"\n".join(good))
    preprocess(PreprocessOptions(inputs=[str(folder / "good.jsonl")], tokenizer=tokenizer, output=str(folder / "good")))
    expected = _documents(folder / "good")
    for number, (reason, line) in enumerate(_damaged_lines()[:: 4 if short else 1]):
        for ending, packed in list(pack.items())[:: 3 if short else 1]:
            place = number % (len(good) + 1)
            path = folder / f"{number}.jsonl{ending}"
            path.write_bytes(packed(b"\n".join([*good[:place], line, *good[place:]]) + b"\n"))
            options = {"inputs": [str(path)], "tokenizer": tokenizer, "output": str(out), "max_line_bytes": 400_000}
            failure = None
            try:
                preprocess(PreprocessOptions(**options, on_empty="stop"))
                failure = "taken"
            except DataError as refusal:
                if f"{path.name}:{place + 1}: " not in str(refusal):
                    failure = f"refused as {refusal}"
            except Exception as other:
                failure = f"{type(other).__name__}: {other}"
            if list(folder.glob("out.*")):
                failure = "a refusal left files"
            with redirect_stderr(io.StringIO()):
                result = preprocess(PreprocessOptions(**options, on_bad_line="skip"))
            left_out = result.counts["bad_lines"] + result.counts["empty_documents"]
            if (result.counts["documents"], left_out, len(result.left_out)) != (len(good), 1, 1) or f":{place + 1}: " not in result.left_out[0]:
                failure = f"skipped as {result.counts}, {result.left_out}"
            elif _documents(out) != expected:
                failure = "the other documents are not what they were"
            outcome.add(f"{path.name}, {reason}: {failure}" if failure else None)
            for left in folder.glob("out.*"):
                left.unlink()
    return outcome


def packed_documents(folder: Path, short: bool) -> Outcome:
    """Streams cut anywhere or with a flipped bit: the whole lines before the damage, then the damage in words, and never a line that was not written."""
    import zstandard
    from test_data_documents import LINES, lines_of

    outcome, choose = Outcome(), random.Random(9)
    lines = LINES[:200]
    content = b"\n".join(lines) + b"\n"
    packs = {"gz": gzip.compress(content), "zst": zstandard.ZstdCompressor(write_checksum=True).compress(content)}
    for kind, packed in packs.items():
        cut_at = range(0, len(packed), max(len(packed) // (20 if short else 400), 1))
        damaged = [(f"cut to {cut} bytes", packed[:cut]) for cut in cut_at]
        for _ in range(20 if short else 250):
            changed = bytearray(packed)
            changed[choose.randrange(12, len(changed))] ^= 1 << choose.randrange(8)
            damaged.append(("a bit flipped", bytes(changed)))
        for name, piece in damaged:
            path = folder / f"a.{kind}"
            path.write_bytes(piece)
            try:
                found, damage = lines_of(path)
            except Exception as failure:
                outcome.add(f"{kind}, {name}: {type(failure).__name__}: {failure}")
                continue
            harmless = found == lines and name == "a bit flipped"  # one that says nothing, such as the size of the window
            outcome.add(f"{kind}, {name}: {len(found)} lines and no damage" if damage is None and not harmless else None)
    return outcome


def naive_documents(folder: Path, short: bool) -> Outcome:
    """A loop over lines that ignores what it cannot decode and goes on: what it leaves out, or takes, without a word."""
    good = [b'{"text": "a"}'] * 5
    outcome = Outcome(note="left out or taken without a word")
    for reason, line in _damaged_lines():
        (folder / "a.jsonl").write_bytes(b"\n".join([*good, line, *good]) + b"\n")
        try:
            texts = []
            for text in (folder / "a.jsonl").read_text(encoding="utf-8", errors="ignore").splitlines():
                try:
                    texts.append(json.loads(text)["text"])
                except ValueError:
                    continue
        except Exception:
            outcome.add(None)
        else:
            outcome.add(f"{reason}: {len(texts)} texts")
    return outcome


FAULTS = [
    Fault("cuts of a dataset's .bin, .idx and .json", cuts),
    Fault("flipped bits of a dataset's .bin, .idx and .json", flips),
    Fault("a dataset's files mixed up, and another tokenizer", mixed_up),
    Fault("control: flipped and foreign tokens read by megatron-core alone", naive_tokens, is_control=True),
    Fault("damaged lines among documents", documents),
    Fault("packed documents that are cut or flipped", packed_documents),
    Fault("control: the same lines and a loop that goes on", naive_documents, is_control=True),
]
