"""Commands of a user who mistypes, has odd things in the environment, or was handed an odd folder: a sentence and an exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for place in ("tests/unit", "tools"):
    sys.path.insert(0, str(ROOT / place))
from convert_folders import MODEL, random_tensors, write_hf  # noqa: E402

import convert_checkpoint  # noqa: E402
import generate  # noqa: E402
import upcycle_dense  # noqa: E402
from megatron_skywork.convert.streaming.ranks import Ranks  # noqa: E402
from megatron_skywork.errors import ConfigError  # noqa: E402


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("dense") / "dense", random_tensors(MODEL, None), MODEL, None, "llama")


def words(dense: Path, out: Path, *more: str) -> list[str]:
    return ["--dense", str(dense), "--out", str(out), "--num-experts", "4", *more]


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "3"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "abc"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}],
    ids=str,
)
def test_half_of_torchrun_s_environment_is_a_sentence(variables: dict[str, str], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="unset them to run alone"):
        Ranks.from_environment()
    assert upcycle_dense.main(words(dense, tmp_path / "out")) == 2 and list(tmp_path.iterdir()) == []


def test_overwriting_deletes_nothing_that_no_conversion_wrote(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "project"
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "my web application"}')
    (out / "thesis.tex").write_text("do not lose")
    assert upcycle_dense.main(words(dense, out, "--overwrite")) == 3
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "thesis.tex"]
    assert upcycle_dense.main(words(dense, tmp_path / "moe")) == 0 and upcycle_dense.main(words(dense, tmp_path / "moe", "--overwrite", "--seed", "2")) == 0
    (tmp_path / "moe" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert upcycle_dense.main(words(dense, tmp_path / "moe", "--overwrite", "--seed", "3")) == 3
    assert "notes.txt, which no conversion wrote" in capsys.readouterr().err and (tmp_path / "moe" / "notes.txt").exists()


def test_nothing_is_written_into_what_is_read(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    before = sorted(dense.rglob("*"))
    assert upcycle_dense.main(words(dense, dense / "moe")) == 3 and "which is read" in capsys.readouterr().err
    assert convert_checkpoint.main(["import", "--hf", str(dense), "--out", str(dense / "x" / "y")]) == 3
    assert sorted(dense.rglob("*")) == before
    assert convert_checkpoint.main(["import", "--hf", str(dense), "--out", str(tmp_path / "ours")]) == 0
    for command in ("export", "reshard"):
        assert convert_checkpoint.main([command, "--checkpoint", str(tmp_path / "ours"), "--out", str(tmp_path / "ours" / "z")]) == 3


def test_a_text_to_compare_on_is_looked_at_before_anything_is_written(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert upcycle_dense.main(words(dense, tmp_path / "out", "--verify", "--verify-text", "hello")) == 3
    said = capsys.readouterr().err
    assert "tokenizer" in said and "upcycle:" not in said and list(tmp_path.iterdir()) == []


def test_names_from_a_folder_cannot_pass_for_output(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert upcycle_dense.main(words(dense, tmp_path / "out")) == 0
    (tmp_path / "out" / "z\npassed: True\x1b[31mRED").write_text("x")
    capsys.readouterr()
    assert convert_checkpoint.main(["verify", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().out
    assert "\x1b" not in said and "passed: True" not in said.splitlines() and "passed: False" in said.splitlines()


def test_a_result_that_cannot_be_printed_is_said(dense: Path, tmp_path: Path):
    command = [sys.executable, str(ROOT / "tools" / "upcycle_dense.py"), *words(dense, tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "its result cannot be printed" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "complete.json").is_file()


@pytest.mark.parametrize("text", ["{nope", "[]", '{"auto_map": 3}', "{}", '{"model_type": "llama"}', "\x00"])
def test_generating_from_what_is_no_model_is_a_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    assert generate.main(["--model", str(tmp_path), "--prompt", "x"]) == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_generating_nothing_is_a_usage(tmp_path: Path):
    for more in (["--prompt", ""], ["--prompt", "x", "--max-new-tokens", "0"]):
        with pytest.raises(SystemExit) as refusal:
            generate.main(["--model", str(tmp_path), *more])
        assert refusal.value.code == 2
    assert generate.main(["--model", str(tmp_path / "none"), "--prompt", "x"]) == 3


def test_the_gate_s_own_text_has_all_three_kinds_in_its_first_tokens():
    from megatron_skywork.convert.check.sample_text import SAMPLE

    start = SAMPLE[:700]
    assert "notice" in start and "SELECT" in start and "渡轮" in start


def test_json_of_an_answer_says_how_long_writing_took(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert upcycle_dense.main(words(dense, tmp_path / "out", "--verify", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["write_seconds"] <= found["seconds"]
