"""Lines out of plain and compressed files: all of them, in order, with the damaged ones named."""

from __future__ import annotations

import gzip
import inspect
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hostile_folders import forget_peak, peak_megabytes

from megatron_skywork.data import documents
from megatron_skywork.data.documents import BadLine, expand_inputs, parse_line, read_blocks
from megatron_skywork.errors import DataError

LINES = [json.dumps({"text": f"document {number} " + "x" * (number % 700)}).encode() for number in range(2500)]
CONTENT = b"\n".join(LINES) + b"\n"


def lines_of(path: Path) -> tuple[list[bytes], str | None]:
    """All lines, and the damage if any; checks that the line numbers run on from block to block."""
    lines: list[bytes] = []
    damage = None
    for block in read_blocks(str(path)):
        assert damage is None
        assert block.first_line == len(lines) + 1
        assert len(block.lines) <= 512
        lines += block.lines
        damage = block.damage
    return lines, damage


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "two.gz", "two.zst"])
def test_every_line_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    half = len(CONTENT) // 2
    pack = {"jsonl": bytes, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[kind.rsplit(".")[-1]]
    content = pack(CONTENT[:half]) + pack(CONTENT[half:]) if kind.startswith("two") else pack(CONTENT)
    assert lines_of(written(tmp_path / f"a.{kind}", content)) == (LINES, None)


def test_zero_bytes_after_a_gzip_member_are_padding_and_other_bytes_are_not(tmp_path: Path) -> None:
    assert lines_of(written(tmp_path / "a.gz", gzip.compress(CONTENT) + b"\0" * 70_000)) == (LINES, None)
    lines, damage = lines_of(written(tmp_path / "b.gz", gzip.compress(CONTENT) + b"rubbish"))
    assert lines == LINES and damage


def test_ends_of_lines_and_files(tmp_path: Path) -> None:
    assert lines_of(written(tmp_path / "no_end", b"a\nb")) == ([b"a", b"b"], None)
    assert lines_of(written(tmp_path / "mark", b"\xef\xbb\xbfa\n\nb\n")) == ([b"a", b"", b"b"], None)
    assert lines_of(written(tmp_path / "mark_only", b"\xef\xbb\xbfa")) == ([b"a"], None)
    assert lines_of(written(tmp_path / "empty", b"")) == ([], None)
    assert lines_of(written(tmp_path / "separator", "a\u2028b\x0bc\n".encode())) == (["a\u2028b\x0bc".encode()], None)
    long_line = b"x" * 1_000_000
    assert lines_of(written(tmp_path / "long", long_line + b"\n" + long_line)) == ([long_line, long_line], None)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_truncated_stream_gives_the_whole_lines_before_the_cut(tmp_path: Path, kind: str) -> None:
    packed = gzip.compress(CONTENT) if kind == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT)
    for keep in (len(packed) - 1, len(packed) - 20, len(packed) // 2, 5):
        lines, damage = lines_of(written(tmp_path / f"a.{kind}", packed[:keep]))
        assert damage is not None and "cut off" in damage
        assert lines == LINES[: len(lines)]
    assert lines_of(written(tmp_path / f"nothing.{kind}", b""))[1] is not None


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_damaged_stream_is_noticed(tmp_path: Path, kind: str) -> None:
    packed = bytearray(gzip.compress(CONTENT) if kind == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT))
    packed[len(packed) // 2] ^= 255
    assert lines_of(written(tmp_path / f"a.{kind}", bytes(packed)))[1] is not None
    assert lines_of(written(tmp_path / f"b.{kind}", CONTENT))[1] is not None


def test_a_line_and_its_document() -> None:
    assert parse_line(b'{"text": "na\xc3\xafve \\ud83d\\ude42"}\r', "text") == "naïve 🙂"
    assert parse_line(b'{"body": ""}', "body") == ""
    assert parse_line(b" \t\r", "text") is None


BAD_LINES = [
    (b'{"text": "a"', "invalid JSON"), (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"), (b'["a"]', "expected a JSON object, found list"),
    (b'{"body": "a"}', "no field 'text'; the line has 'body'"), (b"{}", "the line has none"), (b'{"text": null}', "not a text but NoneType"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"), (b"[" * 200_000, "nested too deeply"), (b'{"text": ' + b"1" * 9999 + b"}", "invalid JSON"),
    ('{"text": "a"}'.encode("utf-16"), "invalid UTF-8|NUL"), (b'{"text": "a\0b"}', "NUL at byte 11"), (b"\0" * 99, "NUL at byte 0 .*a hole")]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(BadLine, match=reason):
        parse_line(line, "text")


def test_every_reason_is_counted_as_something() -> None:
    """The parent counts by these names: one that is not among them would be a KeyError in the middle of a run."""
    named = {line.split('"')[1] for line in inspect.getsource(documents).splitlines() if "raise BadLine(" in line}
    assert named | {"too_long", "unreadable_rest"} == set(documents.BAD_LINE_REASONS)


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst"])
def test_a_line_that_is_too_long_is_told_by_its_length_and_never_held(tmp_path: Path, kind: str) -> None:
    pack = {"jsonl": bytes, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[kind]
    content = b"a\n" + b"x" * 300_001 + b"\nb\n" + b"y" * 300_000 + b"\n" + b"z" * 999_999
    blocks = list(read_blocks(str(written(tmp_path / f"long.{kind}", pack(content))), max_line_bytes=300_000))
    assert [line for block in blocks for line in block.lines] == [b"a", 300_001, b"b", b"y" * 300_000, 999_999]
    tracemalloc.start()
    huge = written(tmp_path / f"huge.{kind}", pack(b"x" * 50_000_000))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert [line for block in read_blocks(str(huge), max_line_bytes=1000) for line in block.lines] == [50_000_000]
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert kind != "jsonl" or peak < 2_000_000


@pytest.mark.parametrize(("kind", "content"), [("gz", b"x" * (100 << 20)), ("zst", b"x" * (100 << 20)), ("zst", b"\n" * (16 << 20))], ids=range(3))
def test_a_small_file_that_unpacks_to_much_is_never_held(tmp_path: Path, kind: str, content: bytes) -> None:
    """zstandard would give all of these in one call, from a few kilobytes; and a list of empty lines is eight times as large as they are."""
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[kind]
    path = written(tmp_path / f"bomb.{kind}", pack(content))
    forget_peak()
    before = peak_megabytes()
    assert sum(len(block.lines) for block in read_blocks(str(path), max_line_bytes=1000)) in (1, 16 << 20)
    assert peak_megabytes() - before < 60


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl", "deep/er/d.jsonl.gz"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert expand_inputs(["*.jsonl"]) == ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    found = expand_inputs(["b.jsonl", str(tmp_path / "*.jsonl"), "./**/*.gz"])
    assert found == ["b.jsonl", f"{tmp_path}/a.jsonl", f"{tmp_path}/c[1].jsonl", "./deep/er/d.jsonl.gz"]
    assert expand_inputs(["c[1].jsonl"]) == ["c[1].jsonl"]
    for pattern in ("*.txt", "missing.jsonl", "deep"):
        with pytest.raises(DataError, match="no file matches"):
            expand_inputs(["a.jsonl", pattern])
