"""A dry run says what is then written, and needs no weight for that; our folders are read from any thread, box by box."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_folders import MODEL, MOE, ours_of, random_tensors, write_hf, write_ours
from safetensors.torch import load_file

from megatron_skywork.convert.files.hf_files import HfReader
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.safety.safe_pickle import read_metadata
from megatron_skywork.convert.sources import OurTensors
from megatron_skywork.convert.upcycling import plan as upcycle_plan
from megatron_skywork.convert.upcycling.options import UpcycleOptions
from megatron_skywork.convert.upcycling.plan import plan, write_rate
from megatron_skywork.convert.upcycling.upcycle import Output, upcycle
from megatron_skywork.errors import CheckpointError, ConfigError

DENSE_SECTION = b"model: {num_layers: 2, hidden_size: 16, ffn_hidden_size: 24, num_attention_heads: 4, vocab_size: 50}\n"
ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "copies": UpcycleOptions(num_experts=4),
    "one layer": UpcycleOptions(num_experts=4, layers=(1,), noise=0.1),
    "granular, shared, gated": UpcycleOptions(num_experts=8, topk=4, granularity=2, shared_expert_ffn=8, shared_expert_gate=True),
}


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """While a plan is made."""
    plain = HfReader.read

    def read(self: HfReader, name: str) -> torch.Tensor:
        assert not planning, "a plan reads no weight"
        return plain(self, name)

    monkeypatch.setattr(HfReader, "read", read)


planning: list[bool] = []


def planned(*args: Any, **options: Any) -> dict[str, Any]:
    planning.append(True)
    try:
        return plan(*args, probe=False, **options)
    finally:
        planning.pop()


def make_dense(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    write_hf(folder, random_tensors(MODEL, None, dtype=dtype), MODEL, None, "llama", shards)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")}))
    return folder


def tensor_bytes(folder: Path, form: str) -> int:
    if form == "hf":
        return sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values())
    return sum(info.dtype.itemsize * torch.Size(info.shape).numel() for info in DistributedReader(folder).tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["mcore", "hf"])
def test_planned_bytes_are_those_of_the_tensors_then_written(form: str, shape: str, dtype: torch.dtype, tmp_path: Path):
    dense, output = make_dense(tmp_path / "dense", dtype), Output(form)
    found = planned(dense, tmp_path / "out", SHAPES[shape], output)
    made = upcycle(dense, tmp_path / "out", SHAPES[shape], output)
    assert found["bytes"] == tensor_bytes(tmp_path / "out", form)
    assert {key: found[key] for key in ("layout", "parameters", "exact", "method")} == {key: made[key] for key in ("layout", "parameters", "exact", "method")}
    boxes = len(read_metadata(tmp_path / "out").storage_data) if form == "mcore" else 0
    assert 0 < made["bytes"] - found["bytes"] < boxes * 2048 + 20_000, "what lies around the numbers"


@pytest.mark.parametrize("form", ["mcore", "hf"])
def test_a_source_of_several_dtypes_is_counted_by_each(form: str, tmp_path: Path):
    tensors = {name: tensor.to(torch.float32 if "norm" in name else torch.bfloat16) for name, tensor in random_tensors(MODEL, None).items()}
    dense = write_hf(tmp_path / "dense", tensors, MODEL, None, "llama")
    found = planned(dense, tmp_path / "out", SHAPES["copies"], Output(form))
    upcycle(dense, tmp_path / "out", SHAPES["copies"], Output(form))
    assert found["dtype"] == "bfloat16" and found["bytes"] == tensor_bytes(tmp_path / "out", form)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_config_says_what_the_whole_folder_says(shards: int, tmp_path: Path):
    dense = make_dense(tmp_path / "dense", torch.bfloat16, shards)
    whole = planned(dense, tmp_path / "out", SHAPES["copies"])
    alone = planned(dense / "config.json", tmp_path / "out", SHAPES["copies"])
    for path in dense.glob("model*"):
        path.unlink()
    bare = planned(dense, tmp_path / "out", SHAPES["copies"])
    for described in (alone, bare):
        same = {"notes", "free_bytes"}
        assert {key: value for key, value in described.items() if key not in same} == {key: value for key, value in whole.items() if key not in same}
        assert described["notes"] == ["planned from its config alone; no weights are there"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_the_report_s_model_from_a_run_s_configuration(tmp_path: Path):
    """Skywork-13B with 16 experts, as in the report: 146B parameters, 22B active."""
    found = planned(ROOT / "configs" / "skywork_13b.yaml", tmp_path / "out", UpcycleOptions(num_experts=16))
    assert found["dtype"] == "bfloat16" and found["exact"] and 145e9 < found["parameters"]["total"] < 147e9 and 21e9 < found["parameters"]["active"] < 23e9
    assert 2 * found["parameters"]["total"] <= found["bytes"] < 2.01 * found["parameters"]["total"]
    assert found["fits"] == (found["bytes"] <= found["free_bytes"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "no UTF-8 at byte 0"),
        (b"model: 3\n", "no section model:"),
        (b"[1]\n", "no section model:"),
        (b"", "no section model:"),
        (b"model: {1: 2}\n", "the key 1 is not text"),
        (b"model: {num_layers: many}\n", "model.num_layers"),
        (b"model: {num_layers: 2\n", "line|:1:|:2:"),
        (DENSE_SECTION + b"moe: {num_experts: 4}\n", "a mixture of experts"),
    ],
)
def test_a_configuration_that_describes_no_dense_model_is_a_sentence(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as refusal:
        planned(tmp_path / "run.yaml", tmp_path / "out", SHAPES["copies"])
    assert "run.yaml" in str(refusal.value)


def test_what_cannot_be_made_cannot_be_planned(tmp_path: Path):
    dense = make_dense(tmp_path / "dense")
    with pytest.raises(ConfigError):
        planned(dense, tmp_path / "out", UpcycleOptions(num_experts=4, topk=9))
    with pytest.raises(CheckpointError, match="gate_norm"):
        planned(dense, tmp_path / "out", SHAPES["copies"], Output("hf", "mixtral"))
    with pytest.raises(CheckpointError, match="no such file"):
        planned(tmp_path / "none.yaml", tmp_path / "out", SHAPES["copies"])
    write_hf(tmp_path / "moe", random_tensors(MODEL, MOE), MODEL, MOE, "skywork_moe")
    for place in (tmp_path / "moe", tmp_path / "moe" / "config.json"):
        with pytest.raises(CheckpointError, match="is a mixture of experts already"):
            planned(place, tmp_path / "out", SHAPES["copies"])


def test_the_estimate_is_the_bytes_over_the_rate_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dense = make_dense(tmp_path / "dense")
    monkeypatch.setattr(upcycle_plan, "write_rate", lambda out: 1000.0)
    usage = shutil.disk_usage(tmp_path)
    for free, rate in ((10 << 30, 1000.0), (1 << 20, None), (1000, None)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        found = plan(dense, tmp_path / "out", SHAPES["copies"])
        assert (found["bytes_per_second"], found["free_bytes"], found["fits"]) == (rate, free, found["bytes"] <= free)
        assert found["seconds_estimate"] == (found["bytes"] / rate if rate else None)
    assert not found["fits"]


def test_the_probe_writes_where_the_result_will_lie_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upcycle_plan, "BLOCK_BYTES", 4096)
    rate = write_rate(tmp_path / "not" / "yet" / "out")
    assert rate is not None and rate > 0 and list(tmp_path.iterdir()) == []
    assert write_rate(Path("/proc/nothing/can/be/written/here")) is None


# -------------------------------------------------------------------------------------------------------------------------- our folders


@pytest.mark.parametrize("naming", ["skywork_moe", "qwen3_moe"])
def test_ours_are_read_by_their_names_from_any_thread(naming: str, tmp_path: Path):
    tensors = random_tensors(MODEL, MOE, naming)
    write_ours(tmp_path / "ours", ours_of(tensors, MODEL, MOE, naming), MODEL, MOE)
    ours = OurTensors(DistributedReader(tmp_path / "ours"), MODEL, MOE, naming)
    assert {name: info.shape for name, info in ours.tensors.items()} == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = [name for _ in range(20) for name in tensors]
    with ThreadPoolExecutor(8) as threads:
        for name, found in zip(names, threads.map(ours.read, names), strict=True):
            assert torch.equal(found, tensors[name]), name
    with pytest.raises(CheckpointError, match="no tensor model.nothing"):
        ours.read("model.nothing")


def test_neighbours_out_of_one_box_cost_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = random_tensors(MODEL, None)
    write_ours(tmp_path / "ours", ours_of(tensors, MODEL, None), MODEL, None)
    reads: Counter = Counter()
    plain = DistributedReader.read
    monkeypatch.setattr(DistributedReader, "read", lambda self, key, *box: reads.update([key]) or plain(self, key, *box))
    ours = OurTensors(DistributedReader(tmp_path / "ours"), MODEL, None)
    for name in tensors:
        ours.read(name)
    fc1 = {key: count for key, count in reads.items() if count > 1}
    assert set(fc1) == {f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in range(2)} and set(fc1.values()) == {2}, "gate and up are two boxes"
