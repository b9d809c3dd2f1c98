"""What goes into which file, and who writes it: what shares sources stays together, every source tensor is read once, ranks share without a word."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_folders import MODEL, random_tensors, write_hf
from safetensors.torch import load_file

from megatron_skywork.convert.export_hf import export_hf
from megatron_skywork.convert.files.hf_files import HfReader
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.layouts import PaddedVocab, Piece, Same, Stacked
from megatron_skywork.convert.streaming.hf_target import HfTarget
from megatron_skywork.convert.streaming.ranks import Ranks
from megatron_skywork.convert.streaming.run import Options
from megatron_skywork.convert.streaming.units import Ref, Unit, into_files, units_of
from megatron_skywork.convert.table import Weight
from megatron_skywork.convert.upcycling.options import UpcycleOptions
from megatron_skywork.convert.upcycling.upcycle import Output, upcycle

FINE = UpcycleOptions(num_experts=8, topk=4, granularity=2, shared_expert_ffn=8, shared_expert_gate=True, noise=0.1)
ONE_WORKER = Options(workers=1)


class BySuffix:
    """A recipe whose boxes come from the tensors that a table names for them."""

    def __init__(self, table: dict[str, list[tuple[Ref, ...]]]):
        self._table = table

    def sources(self, weight: Weight, piece: Piece) -> tuple[Ref, ...]:
        return self._table[weight.ours][piece.parts[0]] if piece.parts else ()

    def dtype(self, weight: Weight) -> torch.dtype:
        return torch.bfloat16 if weight.ours == "half" else torch.float32

    def make(self, unit: Unit, tensors: list[torch.Tensor]) -> Any:
        raise AssertionError("planning makes nothing")


def stacked(name: str, count: int, rows: int = 1) -> Weight:
    return Weight(name, tuple(f"{name}.{index}" for index in range(count)), Stacked(count, (rows, 4)), "fc1", 0)


def shown(clusters: list[list[Unit]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [[(unit.weight.ours, tuple(piece.parts[0] for piece in unit.pieces)) for unit in cluster] for cluster in clusters]


def test_boxes_of_one_source_are_a_unit_and_units_of_one_source_a_cluster():
    gate, up, norm = (0, "gate"), (0, "up"), (0, "norm")
    recipe = BySuffix({"experts": [(gate,), (up,), (gate,), (up,)], "norm": [(norm,)], "shared": [(gate,), (up,)]})
    clusters = units_of([stacked("experts", 4), stacked("norm", 1), stacked("shared", 2)], recipe)
    assert shown(clusters) == [[("experts", (0, 2)), ("shared", (0,))], [("experts", (1, 3)), ("shared", (1,))], [("norm", (0,))]]
    assert clusters[0][0].num_bytes == 2 * 4 * 4


def test_the_same_name_in_two_models_is_two_sources():
    recipe = BySuffix({"experts": [((0, "gate"),), ((1, "gate"),), ((0, "gate"),)]})
    assert shown(units_of([stacked("experts", 3)], recipe)) == [[("experts", (0, 2))], [("experts", (1,))]]


def test_what_is_invented_is_a_cluster_of_its_own_each_time():
    recipe = BySuffix({"router": [()], "other": [()]})
    assert shown(units_of([stacked("router", 1), stacked("other", 1)], recipe)) == [[("router", (0,))], [("other", (0,))]]


def test_files_hold_whole_clusters_in_order_up_to_their_size():
    recipe = BySuffix({"a": [((0, "a"),)], "b": [((0, "b"),)], "c": [((0, "c"),)], "half": [((0, "d"),)], "e": [((0, "e"),)]})
    clusters = units_of([stacked("a", 1), stacked("b", 1), stacked("c", 1, 100), stacked("half", 1, 2), stacked("e", 1)], recipe)

    def names(file_bytes: int) -> list[list[str]]:
        return [[unit.weight.ours for unit in file] for file in into_files(clusters, file_bytes)]

    assert names(32) == [["a", "b"], ["c"], ["half", "e"]], "a and b fill one exactly; c is larger than a file; bfloat16 counts half"
    assert names(31) == [["a"], ["b"], ["c"], ["half"], ["e"]]
    assert names(1) == [["a"], ["b"], ["c"], ["half"], ["e"]]
    assert names(1 << 30) == [["a", "b", "c", "half", "e"]]
    assert into_files([], 1) == []


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("dense") / "dense", random_tensors(MODEL, None), MODEL, None, "llama", shards=2)


def count_reads(monkeypatch: pytest.MonkeyPatch, reader: type, key: Any) -> Counter:
    counts: Counter = Counter()
    plain = reader.read  # type: ignore[attr-defined]

    def read(self: Any, *args: Any) -> torch.Tensor:
        counts[key(self, *args)] += 1
        return plain(self, *args)

    monkeypatch.setattr(reader, "read", read)
    return counts


@pytest.mark.parametrize("file_bytes", [1, 3000, None], ids=["many files", "some files", "one file"])
@pytest.mark.parametrize("form", ["mcore", "hf"])
def test_an_upcycling_reads_every_dense_tensor_once(form: str, file_bytes: int | None, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counts = count_reads(monkeypatch, HfReader, lambda reader, name: name)
    upcycle(dense, tmp_path / "moe", FINE, Output(form, file_bytes=file_bytes), ONE_WORKER)
    assert counts == dict.fromkeys(random_tensors(MODEL, None), 1)


def test_several_dense_models_are_read_once_each(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The trunk's mean needs every tensor of both; of the experts' matrices each model's."""
    other = write_hf(tmp_path / "other", random_tensors(MODEL, None, seed=9), MODEL, None, "llama")
    counts = count_reads(monkeypatch, HfReader, lambda reader, name: (reader.folder, name))
    options = UpcycleOptions(num_experts=4, expert_sources=((str(other), (1, 3)),), trunk="mean")
    upcycle(dense, tmp_path / "moe", options, Output(file_bytes=1), ONE_WORKER)
    assert counts == {(folder, name): 1 for folder in (dense, other) for name in random_tensors(MODEL, None)}


def test_an_export_reads_every_box_once(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Query, key and value lie in one box."""
    upcycle(dense, tmp_path / "moe", FINE, Output(file_bytes=3000), ONE_WORKER)
    counts = count_reads(monkeypatch, DistributedReader, lambda reader, key, offset=None, shape=None: (key, offset))
    export_hf(tmp_path / "moe", tmp_path / "hf", options=ONE_WORKER, shard_bytes=1)
    assert set(counts.values()) == {1} and sum("linear_qkv.weight" in key for key, _ in counts) == MODEL.num_layers


@pytest.mark.parametrize("shard_bytes", [1, 3000])
def test_no_shard_is_made_for_padding(shard_bytes: int, dense: Path, tmp_path: Path):
    """Our vocabulary is padded, Hugging Face's is not: a shard without tensors would be named by no index."""
    upcycle(dense, tmp_path / "moe", FINE, Output("hf", file_bytes=shard_bytes), ONE_WORKER)
    shards = {path.name: load_file(path) for path in (tmp_path / "moe").glob("*.safetensors")}
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert all(shards.values()) and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())


def test_padding_alone_is_no_shard():
    rows = Weight("embedding.word_embeddings.weight", ("embed",), PaddedVocab(5, 8, 4), "vocab", None)
    recipe = BySuffix({rows.ours: [((0, "embed"),)], "decoder.a": [((0, "a"),)]})
    norm = Weight("decoder.a", ("a",), Same((4,)), "hidden", None)
    target = HfTarget(units_of([norm, rows], recipe), 5 * 4 * 4)
    assert [file.name for file in target.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


# ------------------------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_ranks_share_everything_once_and_evenly(world_size: int):
    sizes = [(7919 * number) % 97 + 1 for number in range(30)]
    tasks = [(f"file {number}", size) for number, size in enumerate(sizes)]
    shares = [Ranks(rank, world_size).share(tasks) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(name for name, _ in tasks)
    loads = [sum(dict(tasks)[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes), "whoever has least gets the next"
    assert max(loads) <= max(sum(sizes) / world_size * 4 / 3, max(sizes)), "Graham's bound for the largest first"
    assert shares == [Ranks(rank, world_size).share(list(tasks)) for rank in range(world_size)]
    assert all(share == sorted(share, key=lambda name: int(name.split()[1])) for share in shares), "in the order of the files"


def test_the_largest_file_does_not_come_last():
    tasks = [(number, 1) for number in range(9)] + [(9, 9)]
    assert [Ranks(rank, 2).share(tasks) for rank in range(2)] == [[9], list(range(9))]


def test_equal_and_empty_tasks_are_spread():
    shares = [Ranks(rank, 4).share([(number, 5) for number in range(8)]) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 2, 2]
    assert sorted(sum((Ranks(rank, 3).share([(number, 0) for number in range(4)]) for rank in range(3)), [])) == [0, 1, 2, 3]
    assert Ranks(2, 3).share([]) == []


def test_a_process_of_its_own_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.from_environment()
    ranks.meet()
    assert (ranks.rank, ranks.world_size, ranks.from_first(lambda: "made")) == (0, 1, "made")
    ranks.close()
