"""Texts from strangers: YAML, tokenizers and packed documents that were made to harm; what is asked of their readers is what `stranger_faults` asks."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from fault import Fault, Outcome
from stranger_faults import ROOT, Trial, lying_in

# --------------------------------------------------------------------------------------------------------------------------------- YAML


def _yaml(canary: Path) -> dict[str, str]:
    """Texts that a full loader obeys, that grow, or that say two things."""
    code = f"open({str(canary)!r}, 'w')"
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{later}: &{later} [{', '.join([f'*{earlier}'] * 9)}]\n" for earlier, later in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return {
        "object/apply:os.system": f"model: !!python/object/apply:os.system ['echo > {canary}']\n",
        "object/apply:eval": f"model: !!python/object/apply:builtins.eval [\"{code}\"]\n",
        "object/new:subprocess": f"model: !!python/object/new:subprocess.Popen [[touch, {canary}]]\n",
        "object/new with a state": f"model: !!python/object/new:os.mkdir [{canary}]\n",
        "a tag of its own handle": f"%TAG !p! tag:yaml.org,2002:python/\n---\nmodel: !p!object/apply:os.mkdir [{canary}]\n",
        "a written out tag": f"model: !<tag:yaml.org,2002:python/object/apply:os.mkdir> [{canary}]\n",
        "in a key": f"? !!python/object/apply:os.mkdir [{canary}]\n: 1\n",
        "a name": "model: !!python/name:os.system ''\n",
        "a module": "model: !!python/module:os ''\n",
        "a tuple": "model: !!python/tuple [1]\n",
        "a binary": "model: !!binary aGVsbG8=\n",
        "a set": "model: !!set {a, b}\n",
        "a billion laughs": laughs,
        "an endless list": "model: &a [*a]\n",
        "a merge": "a: &a {steps: 1}\ntrain:\n  <<: *a\n",
        "a key twice": "train: {steps: 1}\ntrain: {steps: 2}\n",
        "a key twice inside": "train: {steps: 1, steps: 2}\n",
        "two documents": "train: {steps: 1}\n---\ntrain: {steps: 2}\n",
        "deep": "a: " + "[" * 100_000 + "]" * 100_000 + "\n",
        "deep without an end": "a: " + "{a: " * 50_000 + "\n",
        "a long number": "a: " + "9" * 1_000_000 + "\n",
        "no UTF-8": "a: \udcff\n",
        "NUL": "a: \0\n",
    }


def crafted_yaml(folder: Path, short: bool) -> Outcome:
    """As settings on the command line, and as the description of a checkpoint's model."""
    from config_faults import command_line, inside
    from hostile_folders import bounded

    from megatron_skywork.convert.files.marker import write_marker

    trial, outcome = Trial(folder), Outcome()
    for name, text in list(_yaml(trial.canary).items())[:: 4 if short else 1]:
        content = text.encode(errors="surrogateescape")
        (folder / "x.yaml").write_bytes(content)
        before = lying_in(folder)
        with inside(folder), bounded():
            code, said = command_line("--config", "x.yaml", "--dry-run")
        failure = None if code == 2 and "x.yaml" in said and "Traceback" not in said else f"{name}: answered with {code!r}: {said[:200]}"
        if lying_in(folder) != before:
            trial.canary.unlink(missing_ok=True)
            failure = f"{name}: something was done: {sorted(lying_in(folder) - before)}"
        outcome.add(failure)
        copy = trial.copy("ours")
        (copy / "model.yaml").write_bytes(content)
        write_marker(copy)
        outcome.add(trial.failure(copy, f"model.yaml: {name}"))
    return outcome


def naive_yaml(folder: Path, short: bool) -> Outcome:
    """`yaml.unsafe_load` obeys; `yaml.safe_load` takes what says two things."""
    import yaml

    canary, outcome = folder / "canary", Outcome(note="obeyed, or taken without a word")
    texts = _yaml(canary)
    for name in ("deep", "deep without an end", "a long number", "a billion laughs"):
        texts.pop(name)
    for name, text in texts.items():
        for load in (yaml.unsafe_load, yaml.safe_load):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    load(text)
                taken = True
            except Exception:
                taken = False
            if canary.exists() or taken:
                outcome.add(f"{name}: {load.__name__}")
            else:
                outcome.add(None)
            if canary.is_dir():
                canary.rmdir()
            canary.unlink(missing_ok=True)
    return outcome


# --------------------------------------------------------------------------------------------------------------------------- tokenizers


def _tokenizers(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """What it is, where it lies, whether it may turn out to be harmless."""
    from data_samples import make_bpe_folder, make_sentencepiece

    whole = make_bpe_folder(folder / "whole")
    content = json.loads((whole / "tokenizer.json").read_text())
    model = make_sentencepiece(folder / "sp").read_bytes()

    def json_of(name: str, text: str | bytes, config: str | None = None) -> Path:
        at = folder / name
        at.mkdir()
        (at / "tokenizer.json").write_bytes(text.encode() if isinstance(text, str) else text)
        if config is not None:
            (at / "tokenizer_config.json").write_text(config)
        return at

    texts: dict[str, str | bytes] = {
        "empty": "", "no object": "[]", "deep": "[" * 200_000, "no model": "{}", "no UTF-8": b"\xff\xfe", "a pickle": pickle.dumps({"model": 1}),
        "model a list": '{"model": []}', "unknown model": '{"model": {"type": "Nonsense"}}', "a version of its own": json.dumps({**content, "version": "9.0"}),
        "vocabulary a list": json.dumps({**content, "model": {**content["model"], "vocab": ["a"]}}),
        "negative ids": json.dumps({**content, "model": {**content["model"], "vocab": {"a": -1}}}),
        "ids beyond 32 bits": json.dumps({**content, "model": {**content["model"], "vocab": {"a": 1 << 40}}}),
        "merges of nothing": json.dumps({**content, "model": {**content["model"], "merges": [["no", "where"]]}}),
        "a pattern that is none": json.dumps({**content, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}),
        "cut": json.dumps(content)[:-100],
    }  # fmt: skip
    for name, text in texts.items():
        yield f"tokenizer.json: {name}", json_of(name, text), False
    attack = json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil", "eos_token": "</s>"})
    at = json_of("with code beside it", json.dumps(content), attack)
    (at / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\n")
    yield "tokenizer_config.json: code beside it", at, True
    for name, config in {"an end that is none": '{"eos_token": "<|end|>"}', "no JSON": "{", "a list": "[]", "an end of a number": '{"eos_token": 3}'}.items():
        yield f"tokenizer_config.json: {name}", json_of(f"config, {name}", json.dumps(content), config), name != "an end that is none" and name != "no JSON"

    def model_of(name: str, content: bytes) -> Path:
        (folder / f"{name}.model").write_bytes(content)
        return folder / f"{name}.model"

    for name, made in {"empty": b"", "a pickle": pickle.dumps({"a": 1}), "zeros": b"\0" * 5000, "a long field": b"\x0a\xff\xff\xff\xff\x0f" + model}.items():
        yield f"tokenizer.model: {name}", model_of(name, made), False
    choose = random.Random(4)
    for number in range(60):
        changed = bytearray(model)
        for _ in range(choose.choice([1, 1, 2, 8])):
            changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
        yield f"tokenizer.model: flips {number}", model_of(f"flips {number}", bytes(changed)), True
    for number in range(10):
        yield f"tokenizer.model: cut {number}", model_of(f"cut {number}", model[: len(model) * number // 10 + number]), True


_LOAD = """
import os, sys
from megatron_skywork.data.tokenizers import load_tokenizer
from megatron_skywork.errors import DataError
for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        code = 4
        try:
            found = load_tokenizer(path)
            found.decode(found.encode("the gate, naïve 模型"))
            code = 0
        except DataError as refusal:
            code = 3 if path.split("/")[-1] in str(refusal) else 5
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def tokenizers(folder: Path, short: bool) -> Outcome:
    """Each in a process of its own: the libraries are not Python, and what they fall over is a signal."""
    canary, outcome = folder / "canary", Outcome()
    cases = list(_tokenizers(folder))[:: 6 if short else 1]
    before = lying_in(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    answer = subprocess.run([sys.executable, "-c", _LOAD, *(str(path) for _, path, _ in cases)], capture_output=True, text=True, env=environment)
    codes = [int(line) for line in answer.stdout.split()]
    for (name, _, may_be_used), code in zip(cases, codes, strict=True):
        outcome.add(None if code == 3 or (code == 0 and may_be_used) else f"{name}: {'taken' if code == 0 else f'ended with {code}'}")
    if canary.exists() or lying_in(folder) != before:
        outcome.lost.append(f"left {sorted(map(str, lying_in(folder) - before))}")
    return outcome


# ------------------------------------------------------------------------------------------------------------------------- packed bombs


def _bombs(megabytes: int) -> dict[str, tuple[str, bytes]]:
    """Small files that unpack to much: one line without an end, lines without an end of them, and a window that is larger than what it holds."""
    import gzip

    import zstandard

    packer = zstandard.ZstdCompressor(level=3)
    line = b'{"text": "' + b"a" * (megabytes << 20)
    window = bytearray(zstandard.ZstdCompressor(write_content_size=False).compress(b"a" * 1000))
    # Frame header: magic, descriptor, then the window's logarithm in the upper five bits.
    huge_window = bytes(window[:5]) + bytes([(31 - 10) << 3]) + bytes(window[6:])
    return {
        "zst, one line": ("a.jsonl.zst", packer.compress(line)),
        "gz, one line": ("a.jsonl.gz", gzip.compress(line, 9)),
        "zst in zst": ("a.jsonl.zst", packer.compress(packer.compress(line))),
        "zst, zeros": ("a.jsonl.zst", packer.compress(b"\0" * (megabytes << 20))),
        "zst, only ends of lines": ("a.jsonl.zst", packer.compress(b"\n" * (megabytes << 16))),
        "zst, a window of 2 GiB": ("a.jsonl.zst", huge_window),
        "zst, many frames": ("a.jsonl.zst", packer.compress(line[: 1 << 20]) * megabytes),
    }


def packed_bombs(folder: Path, short: bool) -> Outcome:
    """Preparing data from them: refused with file and line, or skipped and counted; never unpacked as a whole."""
    from data_samples import make_bpe_folder
    from hostile_folders import forget_peak, peak_megabytes

    from megatron_skywork.data.documents import read_blocks
    from megatron_skywork.data.preprocess import PreprocessOptions, preprocess
    from megatron_skywork.errors import DataError

    outcome, tokenizer, megabytes = Outcome(), make_bpe_folder(folder / "tokenizer"), 100 if short else 400
    bombs = list(_bombs(megabytes).items())
    for name, (file_name, content) in bombs[:: 3 if short else 1]:
        path = folder / file_name
        path.write_bytes(content)
        forget_peak()
        before, failure = peak_megabytes(), None
        for _ in read_blocks(str(path), max_line_bytes=1 << 20):
            pass
        if name != "zst, only ends of lines":  # blank lines are no documents, and no damage
            try:
                options = PreprocessOptions(inputs=[str(path)], tokenizer=str(tokenizer), output=str(folder / "out"), max_line_bytes=1 << 20)
                preprocess(options)
                failure = f"{name}: taken"
            except DataError as refusal:
                failure = None if file_name in str(refusal) else f"{name}: refused as {refusal}"
        touched = peak_megabytes() - before
        if touched > 80:
            failure = f"{name}: {len(content)} bytes took {touched:.0f} MB"
        if (folder / "out.bin").exists():
            failure = f"{name}: left a dataset"
        outcome.add(failure)
        path.unlink()
    return outcome


def naive_unpacking(folder: Path, short: bool) -> Outcome:
    """Unpacked at once, as a line or two of Python do it."""
    import gzip

    import zstandard
    from hostile_folders import forget_peak, peak_megabytes

    outcome = Outcome(note="unpacked as a whole")
    for name, (file_name, content) in list(_bombs(100).items())[:2]:
        forget_peak()
        before = peak_megabytes()
        text = gzip.decompress(content) if file_name.endswith("gz") else zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
        touched = peak_megabytes() - before
        del text
        outcome.add(f"{name}: {touched:.0f} MB" if touched > 80 else None)
    return outcome


FAULTS = [
    Fault("crafted YAML, as settings and as a model's description", crafted_yaml),
    Fault("control: the same YAML, loaded by PyYAML", naive_yaml, is_control=True),
    Fault("crafted tokenizers", tokenizers),
    Fault("packed documents that are bombs", packed_bombs),
    Fault("control: the same bombs, unpacked at once", naive_unpacking, is_control=True),
]
