"""What a rank reads: the same samples whatever the layout, the run length, or the number of restarts."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import data_config, make_bpe_folder, make_dataset, make_sentencepiece
from torch import Tensor
from torch._utils import ExceptionWrapper

from megatron_skywork.config.schema import Config
from megatron_skywork.data.datasets import build_train_dataset, build_valid_datasets
from megatron_skywork.data.indexed import IndexedWriter, paths_of
from megatron_skywork.data.loader import PADDING, MicroBatches, build_train_loader, build_valid_loaders
from megatron_skywork.errors import DataError

SEQ = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    tokenizer = make_bpe_folder(folder / "tokenizer")
    make_dataset(folder, "a", tokenizer, count=60, seed=1)
    make_dataset(folder, "b", tokenizer, count=25, seed=2)
    make_dataset(folder, "no_eod", tokenizer, count=20, seed=3, append_eod=False)
    make_dataset(folder, "short", tokenizer, count=1, seed=4)
    make_dataset(folder, "other_tokenizer", make_sentencepiece(folder / "sp"), count=20)
    return folder


def blend(folder: Path, run: Path, data: dict[str, Any] | None = None, **train: Any) -> Config:
    sources = [{"path": str(folder / "a"), "weight": 0.7}, {"path": str(folder / "b"), "weight": 0.3}]
    return data_config(run, {"train": sources, "valid": {"b": str(folder / "b"), "both": sources}, **(data or {})}, train)


def rows(batches: list[dict[str, Tensor]]) -> list[bytes]:
    """Each row's tokens and labels, as something that can be compared and counted."""
    return [torch.cat([tokens, labels]).numpy().tobytes() for batch in batches for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True)]


def take(config: Config, count: int, dp_rank: int = 0, dp_size: int = 1, consumed: int = 0) -> list[dict[str, Tensor]]:
    return list(itertools.islice(build_train_loader(config, dp_rank=dp_rank, dp_size=dp_size, consumed_samples=consumed), count))


@pytest.mark.parametrize(("num_workers", "dp_size", "ahead"), [(1, 1, 12), (1, 3, 4), (2, 1, 6), (2, 6, 2)])
def test_a_whole_step_is_read_ahead(folder: Path, tmp_path: Path, num_workers: int, dp_size: int, ahead: int) -> None:
    """Of 12 micro-batches a step; each worker holds its share of them, and two at least."""
    config = blend(folder, tmp_path, {"num_workers": num_workers}, global_batch_size=12, micro_batch_size=1)
    iterator = build_train_loader(config, dp_rank=0, dp_size=dp_size, consumed_samples=0)
    assert iterator._prefetch_factor == ahead  # type: ignore[attr-defined]


def test_shapes_and_types_of_a_batch(folder: Path, tmp_path: Path) -> None:
    batch = take(blend(folder, tmp_path), 1)[0]
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert all(tensor.shape == (2, SEQ) for tensor in batch.values())
    assert [batch[key].dtype for key in ("tokens", "labels", "position_ids", "loss_mask")] == [torch.int64] * 3 + [torch.float32]
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert (batch["loss_mask"] == 1).all() and torch.equal(batch["position_ids"], torch.arange(SEQ).expand(2, SEQ))


def test_an_epoch_is_every_token_once(folder: Path, tmp_path: Path) -> None:
    """The samples of one epoch, put back in the order of the cut, are the documents end to end."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = build_train_dataset(data_config(tmp_path, {"train": [str(folder / "a")]}))
    source = dataset.datasets[0]
    documents = IndexedDataset(str(folder / "a"))
    stream = np.concatenate([documents[int(number)] for number in source.document_index])
    assert len(source) == (len(stream) - 1) // SEQ
    walked = [dataset[index] for index in range(len(source))]
    cut = [stream[begin : begin + SEQ + 1] for begin in range(0, len(source) * SEQ, SEQ)]
    assert sorted(sample["tokens"].tolist() for sample in walked) == sorted(piece[:-1].tolist() for piece in cut)
    assert sorted(sample["labels"].tolist() for sample in walked) == sorted(piece[1:].tolist() for piece in cut)
    assert [sample["tokens"].tolist() for sample in walked] != [piece[:-1].tolist() for piece in cut]
    assert source.document_index.tolist() != list(range(60))


@pytest.mark.parametrize(("micro", "dp_size"), [(1, 1), (2, 1), (2, 2), (1, 4), (2, 4), (4, 2), (8, 1)])
def test_a_step_takes_the_same_samples_under_every_layout(folder: Path, tmp_path: Path, micro: int, dp_size: int) -> None:
    global_batch, steps = 8, 20  # past the end of both datasets' first epoch
    reference = rows(take(blend(folder, tmp_path, micro_batch_size=1), global_batch * steps))
    config = blend(folder, tmp_path, micro_batch_size=micro)
    per_step = global_batch // (micro * dp_size)
    ranks = [take(config, per_step * steps, rank, dp_size) for rank in range(dp_size)]
    for step in range(steps):
        consumed = [row for rank in ranks for row in rows(rank[step * per_step : (step + 1) * per_step])]
        assert sorted(consumed) == sorted(reference[step * global_batch : (step + 1) * global_batch])


def test_row_of_a_micro_batch_is_the_documented_sample() -> None:
    consumed, micro, dp_size = 100, 3, 4
    for rank in range(dp_size):
        for m, batch in enumerate(itertools.islice(MicroBatches(consumed, None, micro, rank, dp_size), 5)):
            assert batch == [consumed + m * micro * dp_size + rank * micro + row for row in range(micro)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_goes_on_where_the_run_stopped(folder: Path, tmp_path: Path, num_workers: int) -> None:
    config = blend(folder, tmp_path, {"num_workers": num_workers})
    whole = rows(take(blend(folder, tmp_path), 30))
    for consumed in (0, 2, 17, 40):
        assert rows(take(config, 3, consumed=consumed)) == whole[consumed : consumed + 6]


def test_run_length_batch_size_and_layout_do_not_change_sample_i(folder: Path, tmp_path: Path) -> None:
    first = build_train_dataset(blend(folder, tmp_path, steps=1))
    second = build_train_dataset(blend(folder, tmp_path / "elsewhere", steps=100_000, global_batch_size=64))
    for index in (0, 1, 57, 500):
        assert torch.equal(first[index]["tokens"], second[index]["tokens"])
    other_seed = build_train_dataset(blend(folder, tmp_path, seed=8))
    assert any(not torch.equal(first[index]["tokens"], other_seed[index]["tokens"]) for index in range(4))


def test_loading_leaves_the_random_state_of_the_run_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(blend(folder, tmp_path), 2)
    [list(loader) for loader in build_valid_loaders(blend(folder, tmp_path), dp_rank=0, dp_size=1).values()]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("eval_samples", "micro", "dp_size"), [(10, 2, 1), (10, 2, 2), (10, 4, 1), (7, 2, 4), (1, 2, 4), (200, 8, 2)])
@pytest.mark.parametrize("mock", [False, True])
def test_evaluation_sees_each_sample_on_one_rank(folder: Path, tmp_path: Path, eval_samples: int, micro: int, dp_size: int, mock: bool) -> None:
    config = blend(folder, tmp_path, {"mock": mock}, eval_samples=eval_samples, micro_batch_size=micro)
    expected = {name: rows([{key: tensor[None] for key, tensor in dataset[index].items()} for index in range(eval_samples)])
                for name, dataset in build_valid_datasets(config).items()}
    assert set(expected) == {"b", "both"}
    ranks = [build_valid_loaders(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for name in expected:
        seen = []
        for loader in (rank[name] for rank in ranks):
            batches = list(loader)
            assert len(batches) == len(loader) == -(-eval_samples // (micro * dp_size))
            assert rows(list(loader)) == rows(batches)  # once more, the same
            for batch in batches:
                assert batch["tokens"].shape == (micro, SEQ)
                counted = batch["loss_mask"].sum(1) > 0
                seen += rows([{key: tensor[counted] for key, tensor in batch.items()}])
        assert sorted(seen) == sorted(expected[name])


def test_padding_is_what_lies_beyond_the_end() -> None:
    assert list(MicroBatches(0, 5, 2, 1, 2)) == [[2, 3], [PADDING, PADDING]]
    assert list(MicroBatches(0, 5, 2, 0, 2)) == [[0, 1], [4, PADDING]]


def test_document_boundaries(folder: Path, tmp_path: Path) -> None:
    options = {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    batch = take(blend(folder, tmp_path, options), 1)[0]
    plain = take(blend(folder, tmp_path), 1)[0]
    assert torch.equal(batch["tokens"], plain["tokens"])
    assert set(batch) == {*plain, "document_lengths"} and batch["document_lengths"].shape == (2, SEQ)
    ends = batch["tokens"] == 1
    assert ends.any() and torch.equal(batch["loss_mask"] == 0, ends)
    for row in range(2):
        lengths = [length for length in batch["document_lengths"][row].tolist() if length]
        assert sum(lengths) == SEQ and torch.equal(torch.tensor(lengths).cumsum(0)[: ends[row].sum()] - 1, ends[row].nonzero().flatten())
        assert batch["position_ids"][row].tolist() == [position for length in lengths for position in range(length)]


@pytest.mark.parametrize("option", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_boundaries_need_end_tokens(folder: Path, tmp_path: Path, option: str) -> None:
    data = {"train": [str(folder / "no_eod")]}
    assert take(data_config(tmp_path, data), 1)
    with pytest.raises(DataError, match=rf"no_eod.json: its documents carry no end token, which data.{option}=true needs"):
        build_train_dataset(data_config(tmp_path, {**data, option: True}))


def test_data_that_does_not_fit_is_refused_before_a_token_is_read(folder: Path, tmp_path: Path) -> None:
    def refuse(reason: str, data: dict[str, Any], vocab_size: int = 512, build: Any = build_train_dataset) -> None:
        with pytest.raises(DataError, match=reason):
            build(data_config(tmp_path, data, vocab_size=vocab_size))

    a, short = str(folder / "a"), str(folder / "short")
    tokens = json.loads(paths_of(short)["json"].read_text())["num_tokens"]
    refuse("data.train: no dataset named", {})
    refuse(f"data.train: .*short holds {tokens} tokens, and one sample of data.seq_length=4096 needs 4097", {"train": [short], "seq_length": 4096})
    refuse(f"at most {tokens - 1}", {"train": [a, short], "seq_length": tokens})
    refuse("data.valid.mine: .*short holds", {"valid": {"mine": short}, "seq_length": 4096}, build=build_valid_datasets)
    refuse("data.valid.mine: no dataset named", {"valid": {"mine": []}}, build=build_valid_datasets)
    refuse("a.json: token id .* beyond the model's vocabulary of 100", {"train": [a]}, vocab_size=100)
    refuse("a run has one tokenizer", {"train": [a, str(folder / "other_tokenizer")]})
    other = {"train": [a], "valid": {"mine": [str(folder / "other_tokenizer")]}}
    refuse("data.valid.mine: .*other_tokenizer was made with .*, .*/a with .*a run has one tokenizer", other, build=build_valid_datasets)
    refuse("a.json: made with another tokenizer", {"train": [a], "tokenizer": str(folder / "sp" / "tokenizer.model")})
    refuse("nowhere.json: no such file", {"train": [str(folder / "nowhere")]})
    assert take(data_config(tmp_path, {"train": [short], "tokenizer": str(folder / "tokenizer"), "seq_length": tokens - 1}), 2)


def test_a_rewritten_dataset_does_not_meet_the_old_index(folder: Path, tmp_path: Path) -> None:
    for path in paths_of(str(folder / "a")).values():
        shutil.copy(path, tmp_path)
    config = data_config(tmp_path, {"train": [str(tmp_path / "a")], "cache_dir": str(tmp_path / "cache")})
    first = build_train_dataset(config)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 2  # no lock, no temporary file
    build_train_dataset(config)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files
    make_dataset(tmp_path, "a", folder / "tokenizer", count=90, seed=5, overwrite=True)
    second = build_train_dataset(config)
    assert len(second.datasets[0]) > len(first.datasets[0])
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_forbidden_cache_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set data.cache_dir"):
        build_train_dataset(data_config(tmp_path, {"train": [str(folder / "a")], "cache_dir": str(tmp_path / "file")}))


def test_a_damaged_cache_is_built_again(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it would say is a number like any other: a flipped bit in it would be another sample, or one read from the middle of nowhere."""
    config = data_config(tmp_path, {"train": [str(folder / "a")], "cache_dir": str(tmp_path / "cache")})
    whole = [sample["tokens"] for sample in samples_of(build_train_dataset(config).datasets[0])]
    for path in sorted((tmp_path / "cache").iterdir()):
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        path.write_bytes(damaged)
        again = build_train_dataset(config).datasets[0]
        assert path.read_bytes() == content and f"{path}: this sample index is damaged; it is built again" in caplog.text
        assert all(torch.equal(sample["tokens"], tokens) for sample, tokens in zip(samples_of(again), whole, strict=True))


def samples_of(source: Any) -> list[dict[str, Tensor]]:
    return [source[index] for index in range(len(source))]


def overwritten(folder: Path, tmp_path: Path, position: int, value: int) -> tuple[Config, str]:
    """A copy of dataset `a` whose token at `position` of the file was changed behind everybody's back, and a config that reads all of it."""
    for path in paths_of(str(folder / "a")).values():
        shutil.copy(path, tmp_path)
    tokens = np.memmap(tmp_path / "a.bin", dtype=np.uint16, mode="r+")
    tokens[position] = value
    tokens.flush()
    return data_config(tmp_path, {"train": [str(tmp_path / "a")]}), str(tmp_path / "a.bin")


@pytest.mark.parametrize("shift", [0, 1, 9, SEQ])
def test_an_id_beyond_the_vocabulary_is_refused_with_file_document_and_token(folder: Path, tmp_path: Path, shift: int) -> None:
    """At several places of the fourth sample, whose place in the file is worked out here from the documents' lengths."""
    whole = build_train_dataset(data_config(tmp_path / "whole", {"train": [str(folder / "a")]})).datasets[0]
    lengths = np.array(whole.dataset.sequence_lengths)
    ends = np.cumsum(lengths[whole.document_index])
    entry = int(np.searchsorted(ends, 3 * SEQ + shift, side="right"))
    document = int(whole.document_index[entry])
    token = 3 * SEQ + shift - int(ends[entry] - lengths[document])
    config, path = overwritten(folder, tmp_path, int(lengths[:document].sum()) + token, 512)
    source = build_train_dataset(config).datasets[0]
    said = rf"{path}: token {token} of document {document} \(both counted from 0\) is 512, outside the model's vocabulary of 512 .*verify {path[:-4]}"
    refused = 0
    for sample in range(len(source)):
        try:
            source[sample]
        except DataError as error:
            refused += 1
            assert re.fullmatch(said, str(error))
    assert 1 <= refused <= 2  # a sample ends with the token that the next one begins with


def test_an_id_below_zero_is_no_padding(tmp_path: Path) -> None:
    """megatron-core pads with -1 and leaves it out of the loss: a damaged token would be left out without a word."""
    writer = IndexedWriter(str(tmp_path / "a"), 70_000)
    tokens = np.arange(2 * SEQ + 2, dtype=np.int32)
    tokens[SEQ + 5] = -1
    writer.add(tokens, np.array([len(tokens)]))
    writer.finish({"tokenizer_name": "t", "tokenizer_fingerprint": "f", "vocab_size": 70_000, "eod_id": None}, [], {}, {})
    writer.publish()
    source = build_train_dataset(data_config(tmp_path, {"train": [str(tmp_path / "a")]})).datasets[0]
    assert source[0]["loss_mask"].all()
    with pytest.raises(DataError, match=f"token {SEQ + 5} of document 0 .* is -1"):
        source[1]


def test_a_loader_process_hands_the_sentence_on_without_its_traceback(folder: Path, tmp_path: Path) -> None:
    config, path = overwritten(folder, tmp_path, 0, 60_000)
    with pytest.raises(DataError) as here:
        samples_of(build_train_dataset(config).datasets[0])
    try:
        raise here.value
    except DataError:
        handed_on = ExceptionWrapper(where="in DataLoader worker process 0")  # as torch does in the loader process
    with pytest.raises(DataError) as there:
        handed_on.reraise()
    assert str(there.value) == str(here.value) and str(here.value).startswith(f"{path}: token 0 of document 0 ")


def test_a_pair_without_a_side_file_is_read_as_the_same_samples(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Megatron-LM leaves it; with data.tokenizer the end token is known, and documents are told apart."""
    for kind in ("bin", "idx"):
        shutil.copy(paths_of(str(folder / "a"))[kind], tmp_path)
    data = {"train": [str(tmp_path / "a")], "reset_attention_mask": True, "reset_position_ids": True}
    with pytest.raises(DataError, match=r"a.bin: its documents carry no end token, .*name data.tokenizer"):
        build_train_dataset(data_config(tmp_path, data))
    plain = build_train_dataset(data_config(tmp_path, {**data, "tokenizer": str(folder / "tokenizer")}))
    assert "a.json: missing; sizes and structure were checked" in caplog.text
    recorded = build_train_dataset(data_config(tmp_path / "other", {**data, "train": [str(folder / "a")]}))
    for ours, theirs in zip(samples_of(plain.datasets[0]), samples_of(recorded.datasets[0]), strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    mixed = data_config(tmp_path, {"train": [str(tmp_path / "a"), str(folder / "b"), str(folder / "other_tokenizer")]})
    with pytest.raises(DataError, match="a run has one tokenizer"):
        build_train_dataset(mixed)


def test_loader_processes_survive_the_signals_of_a_scheduler_and_end_with_the_run(folder: Path, tmp_path: Path) -> None:
    """A scheduler signals every process of a job; the run must still get its batches, and leave no process behind even if it keeps the loader."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(f"""
        import itertools, json, os, signal, sys
        import multiprocessing
        from pathlib import Path
        from data_samples import data_config
        from megatron_skywork.data.loader import build_train_loader
        config = data_config(Path({str(tmp_path)!r}), {{"mock": True, "num_workers": 2}})
        for trial in range(30):  # signals one right after the other, to processes that have only just begun
            loader = build_train_loader(config, dp_rank=0, dp_size=1, consumed_samples=0)
            children = [child.pid for child in multiprocessing.active_children()]
            assert len(children) == 2
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP, signal.SIGUSR1):
                for child in children:
                    os.kill(child, number)
            for _ in range(10):
                next(loader)
            if trial < 29:
                loader._shutdown_workers()
        print(json.dumps(children))
    """))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    for child in json.loads(done.stdout.splitlines()[-1]):
        with pytest.raises(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
