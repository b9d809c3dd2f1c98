"""Conversion as a user does it, held against transformers: its own models, made on the spot, go in, become mixtures, and come out again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from small_models import FAMILIES, ROOT, TOKENS, all_tensors, assert_same_tensors, hf_logits, make, our_logits, training_logits  # noqa: E402

import convert_checkpoint  # noqa: E402
import upcycle_dense  # noqa: E402
from megatron_skywork.config.schema import Moe  # noqa: E402
from megatron_skywork.convert.check.inspect_folder import inspect_folder  # noqa: E402
from megatron_skywork.convert.check.reference import HfLayers, logits_of  # noqa: E402
from megatron_skywork.convert.check.verify import compare, tokens_for  # noqa: E402
from megatron_skywork.convert.export_hf import export_hf  # noqa: E402
from megatron_skywork.convert.files.checkpoint_folder import describe  # noqa: E402
from megatron_skywork.convert.files.marker import write_marker  # noqa: E402
from megatron_skywork.convert.files.mcore_files import DistributedReader  # noqa: E402
from megatron_skywork.convert.import_hf import import_hf  # noqa: E402
from megatron_skywork.convert.sources import open_source  # noqa: E402
from megatron_skywork.convert.upcycling.options import UpcycleOptions  # noqa: E402
from megatron_skywork.convert.upcycling.upcycle import upcycle  # noqa: E402
from megatron_skywork.errors import CheckpointError, ConfigError  # noqa: E402

OPTIONS = UpcycleOptions(num_experts=4)


pytestmark = pytest.mark.usefixtures("remote_code_cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("dense")
    folders = {name: make(base / name, *kind) for name, kind in FAMILIES.items()}
    # Skywork-13B: LLaMA's names and its own model type, in pickled shards.
    weights, config = load_file(folders["llama"] / "model.safetensors"), json.loads((folders["llama"] / "config.json").read_text())
    folders["skywork"] = base / "skywork"
    folders["skywork"].mkdir()
    (folders["skywork"] / "config.json").write_text(json.dumps({**config, "model_type": "skywork", "architectures": ["SkyworkForCausalLM"]}))
    names = sorted(weights)
    halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in halves.items():
        torch.save({name: weights[name] for name in part}, folders["skywork"] / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folders["skywork"] / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folders


# ------------------------------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_computes_what_transformers_computes(family: str, dense: dict[str, Path], tmp_path: Path):
    expected = hf_logits(dense[family])
    source = open_source(dense[family])
    torch.testing.assert_close(logits_of(HfLayers(source.reader, source.description.model), TOKENS), expected, atol=1e-4, rtol=0)
    import_hf(dense[family], tmp_path / "ours")
    torch.testing.assert_close(our_logits(tmp_path / "ours"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_is_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path):
    make(tmp_path / "in", *FAMILIES[family], dtype=dtype)
    import_hf(tmp_path / "in", tmp_path / "ours")
    result = export_hf(tmp_path / "ours", tmp_path / "out", shard_bytes=20_000)
    assert result["family"] == family and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    torch.testing.assert_close(hf_logits(tmp_path / "out"), hf_logits(tmp_path / "in"), atol=0, rtol=0)


def test_skywork_13b_form_goes_in_and_comes_out_as_llama(dense: dict[str, Path], tmp_path: Path):
    import_hf(dense["skywork"], tmp_path / "ours")
    assert export_hf(tmp_path / "ours", tmp_path / "out")["family"] == "llama"
    assert_same_tensors(tmp_path / "out", dense["llama"])


# ---------------------------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("family", [*FAMILIES, "skywork"])
def test_upcycled_computes_what_the_dense_model_computes(family: str, dense: dict[str, Path], tmp_path: Path):
    upcycle(dense[family], tmp_path / "moe", OPTIONS)
    result = compare(dense[family], tmp_path / "moe", tokens_for(dense[family], 100))
    assert result["passed"] and result["largest_logit_difference"] < 1e-5 and result["same_top_token"] == 1.0
    expected = hf_logits(dense["llama" if family == "skywork" else family])
    torch.testing.assert_close(our_logits(tmp_path / "moe"), expected, atol=1e-4, rtol=0)
    assert export_hf(tmp_path / "moe", tmp_path / "hf")["family"] == "skywork_moe"
    torch.testing.assert_close(hf_logits(tmp_path / "hf"), expected, atol=1e-4, rtol=0)


VARIANTS = {
    "plain gate": {"gate_norm": False},
    "lambda 0.5": {"gate_norm_scale": 0.5},
    "some layers, top-3": {"layers": (0, 2), "topk": 3},
    "top-1": {"topk": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_remote_code_computes_what_the_reference_computes(variant: str, dense: dict[str, Path], tmp_path: Path):
    """With experts that differ and a router that decides, which copies would not show."""
    upcycle(dense["llama"], tmp_path / "moe", UpcycleOptions(num_experts=4, noise=1.0, router_init_std=1.0, **VARIANTS[variant]))
    expected = our_logits(tmp_path / "moe")
    assert (expected - hf_logits(dense["llama"])).abs().max() > 0.1
    export_hf(tmp_path / "moe", tmp_path / "hf")
    torch.testing.assert_close(hf_logits(tmp_path / "hf"), expected, atol=1e-4, rtol=0)
    import_hf(tmp_path / "hf", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "hf2")
    assert_same_tensors(tmp_path / "hf", tmp_path / "hf2")
    torch.testing.assert_close(our_logits(tmp_path / "again"), expected, atol=0, rtol=0)


def test_generation_with_cache_equals_generation_without(dense: dict[str, Path], tmp_path: Path):
    upcycle(dense["qwen3"], tmp_path / "moe", UpcycleOptions(num_experts=4, noise=1.0, router_init_std=1.0))
    export_hf(tmp_path / "moe", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    prompt = torch.stack([TOKENS[:6], TOKENS[6:12]])
    kwargs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **kwargs)) and cached.shape == (2, 18)
    assert len(model(prompt, output_hidden_states=True).hidden_states) == 4


def test_the_gate_stays_in_fp32_when_loaded_in_half_precision(dense: dict[str, Path], tmp_path: Path):
    upcycle(dense["llama"], tmp_path / "moe", OPTIONS)
    export_hf(tmp_path / "moe", tmp_path / "hf", dtype="bf16")
    stored = all_tensors(tmp_path / "hf")["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(stored, DistributedReader(tmp_path / "moe").read("decoder.layers.0.mlp.router.weight")), "not rounded on the way either"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype="auto")
    layer = model.model.layers[0]
    assert layer.block_sparse_moe.gate.weight.dtype == torch.float32 and layer.block_sparse_moe.experts[0].w1.weight.dtype == torch.bfloat16


def test_mixtral_in_and_out(tmp_path: Path):
    make(tmp_path / "in", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None})
    import_hf(tmp_path / "in", tmp_path / "ours")
    torch.testing.assert_close(our_logits(tmp_path / "ours"), hf_logits(tmp_path / "in"), atol=1e-4, rtol=0)
    assert export_hf(tmp_path / "ours", tmp_path / "out")["family"] == "mixtral"
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    assert abs(inspect_folder(tmp_path / "in")["expert_similarity"]["mean"]) < 0.1
    export_hf(tmp_path / "ours", tmp_path / "sky", family="skywork_moe")
    torch.testing.assert_close(hf_logits(tmp_path / "sky"), hf_logits(tmp_path / "in"), atol=1e-4, rtol=0)


def test_a_plain_gate_can_leave_as_mixtral(dense: dict[str, Path], tmp_path: Path):
    upcycle(dense["mistral"], tmp_path / "moe", UpcycleOptions(num_experts=4, gate_norm=False))
    export_hf(tmp_path / "moe", tmp_path / "hf", family="mixtral")
    assert not list((tmp_path / "hf").glob("*.py"))
    torch.testing.assert_close(hf_logits(tmp_path / "hf"), hf_logits(dense["mistral"]), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------------- seeds and folders


def test_the_same_seed_gives_the_same_files(dense: dict[str, Path], tmp_path: Path):
    noisy = UpcycleOptions(num_experts=4, noise=0.1, seed=1)
    upcycle(dense["llama"], tmp_path / "a", noisy)
    upcycle(dense["llama"], tmp_path / "b", noisy)
    upcycle(dense["llama"], tmp_path / "c", UpcycleOptions(num_experts=4, noise=0.1, seed=2))
    hashes = [json.loads((tmp_path / name / "manifest.json").read_text())["files"]["__0_0.distcp"]["sha256"] for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    readers = [DistributedReader(tmp_path / name) for name in "ac"]
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    assert not torch.equal(*(reader.read(key) for reader in readers))
    experts = readers[0].read(key)
    assert not torch.equal(experts[0], experts[1]), "every expert has noise of its own"
    assert not torch.equal(*(readers[0].read(f"decoder.layers.{layer}.mlp.router.weight") for layer in (0, 1))), "every layer has a router of its own"


def test_folder_has_all_that_training_and_export_need(dense: dict[str, Path], tmp_path: Path):
    (dense["llama"] / "tokenizer.json").write_text("{}")
    upcycle(dense["llama"], tmp_path / "moe", OPTIONS)
    model, moe = describe(tmp_path / "moe")
    assert (model.vocab_size, model.padded_vocab_size, model.tie_embeddings) == (100, 128, True)
    assert moe == Moe(num_experts=4, topk=2, gate_norm=True) and moe.capacity_factor is None
    manifest = json.loads((tmp_path / "moe" / "manifest.json").read_text())
    assert (
        manifest["method"]["name"] == "copy" and manifest["method"]["seed"] == 1234 and set(manifest["source"]["files"]) == {"config.json", "model.safetensors"}
    )
    named = set(json.loads((tmp_path / "moe" / "complete.json").read_text()))
    assert {"model.yaml", "manifest.json", "hf/tokenizer.json", "hf/config.json", ".metadata", "metadata.json", "common.pt"} <= named
    router = DistributedReader(tmp_path / "moe").read("decoder.layers.0.mlp.router.weight")
    assert router.dtype == torch.float32 and 0.005 < float(router.std()) < 0.02
    assert "tokenizer.json" in export_hf(tmp_path / "moe", tmp_path / "hf")["tokenizer_files"]
    (dense["llama"] / "tokenizer.json").unlink()


# ------------------------------------------------------------------------------------------------------------------------------- errors


def broken(source: Path, target: Path, change) -> Path:
    target.mkdir()
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_every_tensor_that_does_not_fit_is_listed(dense: dict[str, Path], tmp_path: Path):
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.0.self_attn.q_proj.weight"], weights["model.layers.2.mlp.up_proj.weight"]
        weights["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)
        weights["model.norm.weight"] = torch.zeros(33)
        weights["model.layers.1.input_layernorm.weight"] = torch.zeros(32, dtype=torch.int8)
        weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # a buffer of older files, no weight

    with pytest.raises(CheckpointError) as refusal:
        upcycle(broken(dense["llama"], tmp_path / "bad", change), tmp_path / "out", OPTIONS)
    text = str(refusal.value)
    assert "5 tensors do not fit" in text and "rotary_emb" not in text
    assert (
        "layers.0.self_attn.q_proj.weight: missing" in text
        and "layers.2.mlp.up_proj.weight: missing" in text
        and "layers.3.mlp.up_proj.weight: left over" in text
    )
    assert "model.norm.weight: shape (33,), (32,) expected" in text and "int8" in text
    assert not (tmp_path / "out").exists()


def test_a_stored_output_layer_of_a_tied_model_must_be_the_embedding(dense: dict[str, Path], tmp_path: Path):
    same = broken(dense["llama"], tmp_path / "same", lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    import_hf(same, tmp_path / "ours")
    other = broken(dense["llama"], tmp_path / "other", lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        import_hf(other, tmp_path / "ours2")


def test_a_truncated_checkpoint_is_not_exported(dense: dict[str, Path], tmp_path: Path):
    upcycle(dense["llama"], tmp_path / "moe", OPTIONS)
    file = tmp_path / "moe" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="__0_0.distcp"):
        export_hf(tmp_path / "moe", tmp_path / "hf")
    write_marker(tmp_path / "moe")  # a marker that fits the damage: the file itself is noticed
    with pytest.raises(CheckpointError, match="ends at byte"):
        export_hf(tmp_path / "moe", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_settings_that_change_the_forward_are_not_exported(dense: dict[str, Path], tmp_path: Path):
    import yaml

    upcycle(dense["llama"], tmp_path / "moe", OPTIONS)
    sections = yaml.safe_load((tmp_path / "moe" / "model.yaml").read_text())
    (tmp_path / "moe" / "config.yaml").write_text(yaml.safe_dump({**sections, "megatron": {"rotary_interleaved": True, "moe_router_fusion": True}}))
    with pytest.raises(CheckpointError, match="rotary_interleaved=True, which"):
        export_hf(tmp_path / "moe", tmp_path / "hf")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_experts": 1}, "num.experts"),
        ({"num_experts": 4, "topk": 5}, "topk=5"),
        ({"num_experts": 4, "layers": (3,)}, r"\[3\]"),
        ({"num_experts": 4, "noise": -1.0}, "noise"),
        ({"num_experts": 4, "noise": 1e300}, "0 to 100"),
        ({"num_experts": 4, "router_init_std": 1e300}, "0 to 100"),
    ],
)
def test_impossible_options_are_configuration_errors(options: dict, problem: str, dense: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match=problem):
        upcycle(dense["llama"], tmp_path / "out", UpcycleOptions(**options))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------------------- tools


def test_the_commands_of_the_readme(dense: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    moe, hf = str(tmp_path / "moe"), str(tmp_path / "hf")
    words = ["--dense", str(dense["llama"]), "--out", moe, "--num-experts", "4", "--moe-layers", "0,2", "--json"]

    assert upcycle_dense.main([*words, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] and not (tmp_path / "moe").exists()
    assert upcycle_dense.main([*words, "--verify", "--verify-tokens", "16"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["verify"]["passed"] and done["parameters"] == planned["parameters"]
    assert upcycle_dense.main(words) == 3 and "--overwrite" in capsys.readouterr().err
    assert upcycle_dense.main([*words, "--overwrite"]) == 0
    assert upcycle_dense.main(["--dense", str(tmp_path / "none"), "--out", hf, "--num-experts", "4"]) == 3
    assert upcycle_dense.main(["--dense", str(dense["llama"]), "--out", hf, "--num-experts", "0"]) == 2
    assert upcycle_dense.main([*words, "--hf-family", "mixtral"]) == 2 and "--format hf" in capsys.readouterr().err
    capsys.readouterr()

    assert convert_checkpoint.main(["verify-upcycle", "--dense", str(dense["llama"]), "--checkpoint", moe, "--precision", "fp64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_logit_difference"] < 1e-12
    assert convert_checkpoint.main(["inspect", moe, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "weights" and told["layout"]["moe_layers"] == 2 and told["expert_similarity"]["mean"] == pytest.approx(1.0, abs=1e-6)
    assert convert_checkpoint.main(["export", "--checkpoint", moe, "--out", hf, "--dtype", "bf16"]) == 0
    assert convert_checkpoint.main(["inspect", hf]) == 0 and "skywork_moe" in capsys.readouterr().out
    assert convert_checkpoint.main(["export", "--checkpoint", moe, "--out", str(tmp_path / "x"), "--format", "llama"]) == 3
    assert convert_checkpoint.main(["import", "--hf", hf, "--out", str(tmp_path / "again")]) == 0
    assert convert_checkpoint.main(["verify-upcycle", "--dense", str(dense["qwen2"]), "--checkpoint", moe]) == 3


def test_a_result_that_differs_is_refused_and_leaves_nothing(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    from megatron_skywork.convert.layouts import QkvByGroup

    monkeypatch.setattr(QkvByGroup, "pack", lambda self, piece, tensors: torch.cat(list(tensors)).reshape(self.whole))
    assert upcycle_dense.main(["--dense", str(dense["llama"]), "--out", str(tmp_path / "moe"), "--num-experts", "4", "--verify"]) == 3
    assert "does not compute what the dense model computes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------- megatron-core

def test_the_training_model_computes_what_transformers_computes(dense: dict[str, Path], tmp_path: Path):
    """The whole chain: transformers' dense model, upcycled, in megatron-core's GPTModel with our router."""
    base = tmp_path / "folders"
    expected = {}
    for family in FAMILIES:
        upcycle(dense[family], base / family, OPTIONS)
        expected[family] = hf_logits(dense[family])
    upcycle(dense["llama"], base / "different", UpcycleOptions(num_experts=4, layers=(1, 2), noise=1.0, router_init_std=1.0, gate_norm_scale=2.0))
    expected["different"] = our_logits(base / "different")
    import_hf(dense["qwen2"], base / "plain")
    expected["plain"] = expected["qwen2"]
    found = training_logits(base)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


IN_LAYOUTS = """
import os, sys, threading
from pathlib import Path
from megatron_skywork import device
device.prepare()
import torch
from megatron.core import dist_checkpointing
from megatron_skywork import parallel
from megatron_skywork.checkpoint.capture import capture
from megatron_skywork.checkpoint.commit import commit
from megatron_skywork.checkpoint.content import sharded_weights
from megatron_skywork.checkpoint.load import load_weights
from megatron_skywork.checkpoint.write import write_part
from megatron_skywork.config.load import load_config
from megatron_skywork.model.build import build_chunks
base = Path(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{base}/meeting", rank=int(os.environ["RANK"]), world_size=4)
for tp, pp, ep in ((2, 2, 2), (1, 4, 1), (2, 1, 4), (1, 1, 2)):
    overrides = ["train.steps=1", "train.global_batch_size=4", "train.precision=fp32", "data.mock=true", "data.seq_length=16"]
    overrides += [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.ep={ep}"]
    config = load_config([base / "moe" / "model.yaml"], overrides, 4)
    parallel.build_groups(config.parallel)
    parallel.seed_everything(1)
    chunks = build_chunks(config)
    load_weights(base / "moe", chunks)
    # megatron-core's own strict load first: every key the model asks for is in the folder, extra states included.
    weights = sharded_weights(chunks)["model"]
    _, missing, unexpected = dist_checkpointing.load(sharded_weights(chunks)["model"], str(base / "moe"), strict="return_all")
    assert not unexpected, unexpected
    out, staging = base / f"again-{tp}-{pp}-{ep}", base / f"staged-{tp}-{pp}-{ep}"
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        staging.mkdir()
    captured, common = capture(weights, copies=False)
    torch.distributed.barrier()
    parts = [None] * 4 if is_first else None
    torch.distributed.gather_object(write_part(staging, captured, threading.Event(), True), parts, dst=0)
    if is_first:
        assert not [part.failure for part in parts if part.failure]
        commit(staging, out, captured.index, common, {}, 0, parts)
    torch.distributed.barrier()
    parallel.parallel_state.destroy_model_parallel()
torch.distributed.destroy_process_group()
"""


def test_any_layout_loads_it_and_what_any_layout_saves_is_read(tmp_path: Path):
    """Four ranks load an upcycled folder under several layouts and save it again; every tensor that comes back is the one that went in."""
    make(tmp_path / "dense", "LlamaConfig", {"num_hidden_layers": 4})
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleOptions(num_experts=4, noise=1.0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", IN_LAYOUTS, str(tmp_path)]
    logs = [open(tmp_path / f"log-{rank}", "w+") for rank in range(4)]  # noqa: SIM115  the processes write into them
    ranks = [subprocess.Popen(words, stdout=log, stderr=log, env={**environment, "RANK": str(rank)}, cwd=tmp_path) for rank, log in enumerate(logs)]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        for log in logs:
            log.close()
    assert codes == [0] * 4, (tmp_path / "log-0").read_text()[-3000:]
    source = DistributedReader(tmp_path / "moe")
    folders = sorted(tmp_path.glob("again-*"))
    assert len(folders) == 4
    for folder in folders:
        reader = DistributedReader(folder)
        assert set(reader.tensors) == set(source.tensors)
        assert all(torch.equal(reader.read(name), source.read(name)) for name in source.tensors), folder.name
