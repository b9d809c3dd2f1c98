"""Preprocessing as a user runs it: files in, a dataset or a clear refusal out."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import zstandard
from data_samples import make_bpe_folder, make_sentencepiece, sentences, write_jsonl

from megatron_skywork.data.documents import read_blocks
from megatron_skywork.data.indexed import paths_of, read_side_file
from megatron_skywork.data.preprocess import PreprocessOptions, Result, preprocess
from megatron_skywork.data.tokenizers import load_tokenizer
from megatron_skywork.data.verification import check_dataset, verify_content
from megatron_skywork.errors import ConfigError, DataError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
TEXTS = sentences(1500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers `bpe` and `sp`, and TEXTS in a.jsonl, b.jsonl.gz and c.jsonl.zst, 500 each."""
    folder = tmp_path_factory.mktemp("preprocess")
    make_bpe_folder(folder / "bpe")
    make_sentencepiece(folder / "sp")
    (folder / "docs").mkdir()
    write_jsonl(folder / "docs" / "a.jsonl", TEXTS[:500])
    for name, texts, pack in (("b.jsonl.gz", TEXTS[500:1000], gzip.compress), ("c.jsonl.zst", TEXTS[1000:], zstandard.ZstdCompressor().compress)):
        plain = write_jsonl(folder / "plain", texts)
        (folder / "docs" / name).write_bytes(pack(plain.read_bytes()))
    return folder


def run(folder: Path, output: Path, *, inputs: list[str] | None = None, tokenizer: str = "bpe", **options: Any) -> Result:
    patterns = inputs or [str(folder / "docs" / "*.jsonl"), str(folder / "docs" / "*.jsonl.*")]
    return preprocess(PreprocessOptions(inputs=patterns, tokenizer=str(folder / tokenizer), output=str(output), **options), stream=io.StringIO())


def tool(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd)


def documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def content(prefix: Path) -> dict[str, bytes]:
    return {kind: path.read_bytes() for kind, path in paths_of(str(prefix)).items()}


@pytest.mark.parametrize("tokenizer", ["bpe", "sp"])
def test_every_document_in_order_from_every_kind_of_file(folder: Path, tmp_path: Path, tokenizer: str) -> None:
    result = run(folder, tmp_path / "out", tokenizer=tokenizer)
    loaded = load_tokenizer(folder / tokenizer)
    assert documents(tmp_path / "out") == [[*loaded.encode(text), loaded.eos_id] for text in TEXTS]
    side = check_dataset(str(tmp_path / "out"), loaded.vocab_size, loaded)
    assert side == result.outputs[str(tmp_path / "out")]
    assert [Path(source["path"]).name for source in side.sources] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]


def test_the_command_with_many_workers_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """The holdout, too; and the two parts are all documents, each on one side. The long file makes more blocks than are ever under way at once."""
    docs, texts = folder / "docs" / "*", sentences(8000, seed=1)
    long_file = write_jsonl(tmp_path / "long.jsonl", texts)
    options = {"holdout": 0.1, "seed": 5}
    alone = run(folder, tmp_path / "one", holdout_output=str(tmp_path / "one_held"), inputs=[str(docs), str(long_file)], **options)
    done = tool("--input", folder / "docs" / "a.jsonl", folder / "docs" / "[b]*", "--input", docs, long_file, "--tokenizer", folder / "bpe", "--workers", "3",
                "--output", tmp_path / "many", "--holdout", "0.1", "--holdout-output", tmp_path / "many_held", "--seed", "5", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert content(tmp_path / "many") == content(tmp_path / "one") and content(tmp_path / "many_held") == content(tmp_path / "one_held")
    assert summary["counts"] == alone.counts and summary["tokens"] == alone.num_tokens > 0 and summary["tokens_per_second"] > 0
    parts = documents(tmp_path / "one"), documents(tmp_path / "one_held")
    assert 0.08 < len(parts[1]) / len(TEXTS + texts) < 0.12
    loaded = load_tokenizer(folder / "bpe")
    assert sorted(parts[0] + parts[1]) == sorted([*loaded.encode(text), loaded.eos_id] for text in TEXTS + texts)


def test_exit_codes_and_messages_of_the_command(folder: Path, tmp_path: Path) -> None:
    usage = tool("--input", "x", "--output", "y", cwd=tmp_path)
    assert usage.returncode == 2 and "--tokenizer" in usage.stderr
    both = tool("--input", "x", "--output", "y", "--tokenizer", "z", "--workers", "0", "--holdout", "0.1", cwd=tmp_path)
    assert both.returncode == 2 and "--workers 0" in both.stderr and "--holdout-output" in both.stderr
    missing = tool("--input", "x*", "--output", "y", "--tokenizer", "z", cwd=tmp_path)
    assert missing.returncode == 3 and "no file matches" in missing.stderr
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n{"text": 5}\n')
    bad = tool("--input", "bad.jsonl", "--output", "y", "--tokenizer", folder / "sp", cwd=tmp_path)
    assert bad.returncode == 3 and "bad.jsonl:3: field 'text' is not a text but int" in bad.stderr
    for done in (usage, both, missing, bad):
        assert "Traceback" not in done.stderr and not done.stdout
    skipped = tool("--input", "bad.jsonl", "--output", "y", "--tokenizer", folder / "sp", "--on-bad-line", "skip", cwd=tmp_path)
    assert skipped.returncode == 0 and "1 blank lines, 1 bad lines (1 no text)" in skipped.stdout and "skipped bad.jsonl:3" in skipped.stderr
    assert "\r" not in skipped.stderr and "\x1b" not in skipped.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "y.bin", "y.idx", "y.json"]


def test_the_command_does_not_wait_for_torch(folder: Path, tmp_path: Path) -> None:
    """Its import would be most of the processor time of a small file."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    words = ["--input", folder / "docs" / "a.jsonl", "--tokenizer", folder / "bpe", "--output", tmp_path / "out", "--workers", "2"]
    done = subprocess.run([sys.executable, str(TOOL), *map(str, words)], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_refused_or_skipped_with_file_and_number(folder: Path, tmp_path: Path, workers: int) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:1200]]
    lines = list(good)
    lines[700:700] = [b"{", b'{"text": "\xff"}', b'{"other": "a"}', b"", b'{"text": ""}', b'{"text": "\\ud800"}', b'{"text": 5}', b"[]", b"\0" * 4096,
                      b'{"text": "' + b"a" * 500_000 + b'"}']
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    arguments: dict[str, Any] = {"inputs": [str(tmp_path / "bad.jsonl")], "workers": workers, "max_line_bytes": 400_000}
    with pytest.raises(DataError, match=r"bad.jsonl:701: invalid JSON"):
        run(folder, tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    result = run(folder, tmp_path / "out", on_bad_line="skip", **arguments)
    reasons = dict.fromkeys(("invalid_json", "invalid_utf8", "no_field", "half_character", "no_text", "no_object", "nul_byte", "too_long"), 1)
    counts = {"lines": 1210, "documents": 1200, "held_out": 0, "empty_documents": 1, "blank_lines": 1, "bad_lines": 8, **reasons, "unreadable_rest": 0}
    assert result.counts == counts
    assert [line.split(": ")[0].rpartition(":")[2] for line in result.left_out] == ["701", "702", "703", "705", "706", "707", "708", "709", "710"]
    assert read_side_file(str(tmp_path / "out")).counts == result.counts
    loaded = load_tokenizer(folder / "bpe")
    assert documents(tmp_path / "out") == [[*loaded.encode(text), loaded.eos_id] for text in TEXTS[:1200]]


def test_an_empty_document_is_refused_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "some.jsonl", [*TEXTS[:3], "", *TEXTS[3:5]])
    options: dict[str, Any] = {"inputs": [str(tmp_path / "some.jsonl")]}
    with pytest.raises(DataError, match=r"some.jsonl:4: field 'text' holds no token; nothing was written: .*--on-empty skip"):
        run(folder, tmp_path / "out", on_empty="stop", **options)
    result = run(folder, tmp_path / "out", **options)
    assert (result.counts["documents"], result.counts["empty_documents"], result.counts["bad_lines"]) == (5, 1, 0) and len(result.left_out) == 1


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
def test_a_truncated_file_is_refused_or_read_to_the_cut(folder: Path, tmp_path: Path, name: str) -> None:
    whole = (folder / "docs" / name).read_bytes()
    cut = tmp_path / name
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    readable = sum(len(block.lines) for block in read_blocks(str(cut)))
    with pytest.raises(DataError, match=rf"{name}:{readable + 1}: .*cut off"):
        run(folder, tmp_path / "out", inputs=[str(cut)])
    if readable:
        result = run(folder, tmp_path / "out", inputs=[str(cut), str(folder / "docs" / "a.jsonl")], on_bad_line="skip")
        assert result.counts["documents"] == readable + 500 and result.counts["bad_lines"] == result.counts["unreadable_rest"] == 1


def test_an_existing_dataset_is_kept_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    small = [str(folder / "docs" / "a.jsonl")]
    run(folder, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"out.bin, .*already there"):
        run(folder, tmp_path / "out", inputs=small)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError):
        run(folder, tmp_path / "out", inputs=[*small, str(tmp_path / "bad.jsonl")], overwrite=True)
    assert content(tmp_path / "out") == before
    run(folder, tmp_path / "out", inputs=small, overwrite=True)
    assert read_side_file(str(tmp_path / "out")).num_documents == 500


def test_end_tokens_and_fields(folder: Path, tmp_path: Path) -> None:
    small = [str(folder / "docs" / "a.jsonl")]
    loaded = load_tokenizer(folder / "bpe")
    run(folder, tmp_path / "plain", inputs=small, append_eod=False)
    assert documents(tmp_path / "plain")[0] == loaded.encode(TEXTS[0])
    assert read_side_file(str(tmp_path / "plain")).eod_id is None
    run(folder, tmp_path / "both", inputs=small, prepend_bos=True, eod_token="the")
    assert documents(tmp_path / "both")[0] == [loaded.bos_id, *loaded.encode(TEXTS[0]), loaded.token_id("the")]
    assert read_side_file(str(tmp_path / "both")).eod_id == loaded.token_id("the")
    (tmp_path / "field.jsonl").write_text('{"body": "a gate", "text": "no"}\n')
    run(folder, tmp_path / "field", inputs=[str(tmp_path / "field.jsonl")], field="body")
    assert documents(tmp_path / "field")[0][:-1] == loaded.encode("a gate")


def test_what_cannot_be_done_is_said(folder: Path, tmp_path: Path) -> None:
    small = {"inputs": [str(folder / "docs" / "a.jsonl")]}
    (tmp_path / "nothing.jsonl").write_text('{"text": ""}\n')
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "tokenizer.json").write_bytes((folder / "bpe" / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="no document would be in it .*1 empty documents"):
        run(folder, tmp_path / "out", inputs=[str(tmp_path / "nothing.jsonl")])
    with pytest.raises(DataError, match="raise --holdout"):
        run(folder, tmp_path / "out", holdout=1e-9, holdout_output=str(tmp_path / "held"), **small)
    with pytest.raises(DataError, match="names no end-of-sequence token"):
        run(tmp_path, tmp_path / "out", tokenizer="lone", **small)
    with pytest.raises(DataError, match="not in the vocabulary"):
        run(folder, tmp_path / "out", eod_token="<|absent|>", **small)
    with pytest.raises(DataError, match="cannot write there"):
        run(folder, tmp_path / "nothing.jsonl" / "out", **small)
    with pytest.raises(ConfigError, match="the same as --output"):
        run(folder, tmp_path / "out", holdout=0.1, holdout_output=str(tmp_path / "." / "out"), **small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lone", "nothing.jsonl"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_live_line_on_a_terminal_and_plain_lines_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr("megatron_skywork.data.preprocess._PLAIN_SECONDS", 0.0)
    monkeypatch.setattr("megatron_skywork.data.preprocess._LIVE_SECONDS", 0.0)
    stream = Stream()
    preprocess(PreprocessOptions(inputs=[str(folder / "docs" / "a.jsonl")], tokenizer=str(folder / "bpe"), output=str(tmp_path / "out")), stream=stream)
    shown = stream.getvalue()
    assert "500 documents" in shown and "tokens/s, a.jsonl" in shown
    assert ("\r" in shown, "\n" in shown) == (terminal, not terminal)


def test_copies_of_a_document_are_held_out_together(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "twice.jsonl", TEXTS[:300] * 2)
    run(folder, tmp_path / "out", inputs=[str(tmp_path / "twice.jsonl")], holdout=0.3, holdout_output=str(tmp_path / "held"))
    train, held = ({tuple(document) for document in documents(tmp_path / name)} for name in ("out", "held"))
    assert train and held and not train & held


def test_a_killed_run_leaves_no_dataset_and_no_process_and_can_be_run_again(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "many.jsonl", TEXTS * 40)
    command = ["--input", str(tmp_path / "many.jsonl"), "--tokenizer", str(folder / "sp"), "--output", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen([sys.executable, str(TOOL), *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = tmp_path / "out.partial.bin"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None, "it finished before it could be killed"
        time.sleep(0.01)
    with pytest.raises(DataError, match="another process is writing"):
        run(folder, tmp_path / "out", inputs=[str(tmp_path / "many.jsonl")])
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert children and not alive
    assert not any(path.exists() for path in paths_of(str(tmp_path / "out")).values())
    run(folder, tmp_path / "out")
    assert read_side_file(str(tmp_path / "out")).num_documents == len(TEXTS)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


@pytest.mark.parametrize("kind", ["bin", "idx", "json"])
def test_a_run_that_dies_between_two_names_leaves_no_dataset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Beside an old dataset too: a .bin of one and an .idx of the other must never be read together."""
    replace = os.replace

    def dying(source: str | Path, target: str | Path) -> None:
        if str(target).endswith(f"out.{kind}"):
            os._exit(9)
        replace(source, target)

    for overwrite in (False, True):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(os, "replace", dying)
            run(folder, tmp_path / "out", inputs=[str(folder / "docs" / "a.jsonl")], overwrite=overwrite, seed=8)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        with pytest.raises(DataError):
            check_dataset(str(tmp_path / "out"), 512)
        run(folder, tmp_path / "out", inputs=[str(folder / "docs" / "a.jsonl")], overwrite=True)
        assert verify_content(str(tmp_path / "out")).num_documents == 500
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]


def test_verify_looks_at_every_dataset_and_says_which_is_damaged(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "plain"):
        run(folder, tmp_path / name, inputs=[str(folder / "docs" / "a.jsonl")])
    paths_of(str(tmp_path / "plain"))["json"].unlink()
    done = tool("verify", "a", "b", "plain", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[0].startswith("a: whole, 500 documents") and "no plain.json, so there is no hash to compare" in done.stdout.splitlines()[2]
    damaged = bytearray((tmp_path / "a.bin").read_bytes())
    damaged[100] ^= 4
    (tmp_path / "a.bin").write_bytes(damaged)
    done = tool("verify", "a", "b", "gone", "--json", cwd=tmp_path)
    assert done.returncode == 3 and "error: a.bin: sha256" in done.stderr and "error: gone.json: no such file" in done.stderr
    assert [(result["prefix"], result["whole"]) for result in json.loads(done.stdout)] == [("a", False), ("b", True), ("gone", False)]
    assert tool("verify", cwd=tmp_path).returncode == 2
    assert "Exit codes: 0 all are whole" in tool("verify", "--help", cwd=tmp_path).stdout
