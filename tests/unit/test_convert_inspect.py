"""`inspect`: what a folder is and how alike its experts are, in either format and every naming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_folders import MODEL, MOE, Tensors, ours_of, random_tensors, upcycled, write_hf, write_ours

from megatron_skywork.config.schema import Moe
from megatron_skywork.convert.check.inspect_folder import inspect_folder, state_sentence
from megatron_skywork.convert.files.checkpoint_folder import write_manifest
from megatron_skywork.convert.files.marker import write_marker

FAMILIES = {
    "skywork_moe": MOE,
    "mixtral": Moe(num_experts=4, gate_norm=False),
    "qwen2_moe": Moe(
        num_experts=4, gate_norm=False, pre_softmax=True, ffn_hidden_size=24, shared_expert_ffn_hidden_size=24, shared_expert_gate=True, layers=[1]
    ),
    "qwen3_moe": Moe(num_experts=4, gate_norm=False, ffn_hidden_size=24),
}
MODELS = {"qwen2_moe": MODEL.model_copy(update={"qkv_bias": True}), "qwen3_moe": MODEL.model_copy(update={"qk_norm": True})}


def cosine(tensors: Tensors, layer: int, naming: str) -> float:
    """All pairs, written out."""
    block, words = ("mlp", ("gate_proj", "up_proj", "down_proj")) if naming.startswith("qwen") else ("block_sparse_moe", ("w1", "w3", "w2"))
    at = f"model.layers.{layer}.{block}.experts"
    experts = [torch.cat([tensors[f"{at}.{expert}.{word}.weight"].flatten() for word in words]).double() for expert in range(4)]
    pairs = [torch.cosine_similarity(a, b, dim=0) for index, a in enumerate(experts) for b in experts[index + 1 :]]
    return float(torch.stack(pairs).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_and_our_folders_say_the_same(tmp_path: Path, family: str):
    model, moe = MODELS.get(family, MODEL), FAMILIES[family]
    tensors = random_tensors(model, moe, family)
    for name in tensors:  # somewhat alike
        if ".experts." in name:
            tensors[name] += 0.2
    theirs = inspect_folder(write_hf(tmp_path / "hf", tensors, model, moe, family, shards=2))
    ours = inspect_folder(write_ours(tmp_path / "ours", ours_of(tensors, model, moe, family), model, moe))
    layers = [str(layer) for layer in moe.layers or range(model.num_layers)]
    assert list(theirs["expert_similarity"]["layers"]) == layers
    for result in (theirs, ours):
        for layer in layers:
            expected = cosine(tensors, int(layer), family)
            assert 0.05 < expected < 0.95 and result["expert_similarity"]["layers"][layer] == pytest.approx(expected, abs=1e-6)
    assert theirs["kind"] == "huggingface" and theirs["family"] == family and ours["kind"] == "weights" and ours["state"] == "holds weights only"
    del theirs["layout"]["padded_vocabulary"], ours["layout"]["padded_vocabulary"]  # which a config.json does not have
    assert theirs["layout"] == ours["layout"] and theirs["layout"]["experts"] == 4
    assert theirs["parameters"]["total"] == sum(tensor.numel() for tensor in tensors.values())
    assert theirs["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) and theirs["dtype"] == "float32"
    assert theirs["manifest"].startswith("none") and ours["manifest"].startswith("none")


def test_copies_are_alike_and_zeros_are_like_nothing(tmp_path: Path):
    tensors = upcycled(random_tensors(MODEL, None), MODEL, MOE)
    folder = write_ours(tmp_path / "copies", ours_of(tensors, MODEL, MOE), MODEL, MOE)
    assert inspect_folder(folder)["expert_similarity"]["mean"] == pytest.approx(1.0, abs=1e-6)
    for name in tensors:
        if "layers.1." in name and ".experts.2." in name:
            tensors[name] = torch.zeros_like(tensors[name])
    folder = write_ours(tmp_path / "zeros", ours_of(tensors, MODEL, MOE), MODEL, MOE)
    found = inspect_folder(folder)["expert_similarity"]
    assert found["layers"] == {"0": pytest.approx(1.0, abs=1e-6), "1": pytest.approx(0.5, abs=1e-6)}, "three of six pairs are copies"
    assert "expert_similarity" not in inspect_folder(folder, similarity=False)


def test_a_dense_folder(tmp_path: Path):
    result = inspect_folder(write_hf(tmp_path, random_tensors(MODEL, None, dtype=torch.bfloat16), MODEL, None, "llama"))
    assert result["family"] == "llama" and result["dtype"] == "bfloat16" and "expert_similarity" not in result and "experts" not in result["layout"]


def test_what_training_keeps_is_named_in_a_sentence(tmp_path: Path):
    ours = ours_of(random_tensors(MODEL, MOE), MODEL, MOE)
    extra = {f"optimizer.state.{kind}.{name}": torch.zeros(1) for name in ours for kind in ("param", "exp_avg", "exp_avg_sq")}
    extra |= {f"decoder.layers.{layer}.mlp.router.aux_coefficient": torch.zeros(()) for layer in range(2)}
    extra |= {"decoder.layers.0.mlp.router.batch_means": torch.zeros(2, 4), "rng/shard_0_1": torch.zeros(1)}
    extra |= {"decoder.layers.0.x._extra_state/shard_0_1": [None]}
    folder = write_ours(tmp_path / "step", ours, MODEL, MOE, extra)
    (folder / "state.json").write_text(json.dumps({"step": 12}))
    write_marker(folder)
    result = inspect_folder(folder)
    count = len(ours)
    assert result["kind"] == "training" and result["step"] == 12
    assert set(result["state"].removeprefix("holds also ").split(", ")) == {
        f"fp32 master weights ({count})", f"optimizer moments ({2 * count})", "adaptive coefficients (2)", "other router state (1)",
        "random states (1)"}  # fmt: skip
    assert state_sentence(["teacher.weight"]) == "holds also unknown items (teacher...) (1)"


@pytest.mark.parametrize("kind", ["huggingface", "weights"])
def test_the_manifest_and_whether_files_are_as_recorded(tmp_path: Path, kind: str):
    tensors = random_tensors(MODEL, MOE)
    if kind == "huggingface":
        folder = write_hf(tmp_path, tensors, MODEL, MOE, "skywork_moe")
    else:
        folder = write_ours(tmp_path / "ours", ours_of(tensors, MODEL, MOE), MODEL, MOE)
        (folder / "complete.json").unlink()
    write_manifest(folder, {"kind": kind, "method": {"name": "copy", "exact": True}, "source": {"family": "llama"}}, {})
    if kind == "weights":
        write_marker(folder)
    result = inspect_folder(folder)
    assert result["method"] == {"name": "copy", "exact": True} and result["source"] == {"family": "llama"} and "torch" in result["versions"]
    assert result["manifest"].endswith("files are there in their recorded sizes")
    (folder / "README.md").write_text("new")
    assert inspect_folder(folder)["manifest"] == "files differ from it: README.md"
