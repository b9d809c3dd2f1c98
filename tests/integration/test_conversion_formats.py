"""Whole folders through every conversion: every family, dtype and form comes out as it went in, computes what transformers computes, and is verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from convert_folders import random_tensors, write_hf, write_ours  # noqa: E402
from small_gguf import write_gguf  # noqa: E402
from small_models import (  # noqa: E402
    FAMILIES,
    MANY_TOKENS,
    SCALED,
    SHAPE,
    TOKENS,
    add_remote_code,
    add_tokenizer,
    all_tensors,
    assert_same_tensors,
    hf_logits,
    make,
    our_logits,
    our_tensors,
    reference_logits,
    same_bits,
)  # fmt: skip

import convert_checkpoint  # noqa: E402
import upcycle_dense  # noqa: E402
from megatron_skywork.config.schema import Model, Moe  # noqa: E402
from megatron_skywork.convert.export_hf import export_hf  # noqa: E402
from megatron_skywork.convert.families import same_model  # noqa: E402
from megatron_skywork.convert.files.checkpoint_folder import describe  # noqa: E402
from megatron_skywork.convert.files.marker import write_marker  # noqa: E402
from megatron_skywork.convert.import_hf import import_hf  # noqa: E402
from megatron_skywork.convert.upcycling.options import UpcycleOptions  # noqa: E402
from megatron_skywork.convert.upcycling.upcycle import Output, upcycle  # noqa: E402
from megatron_skywork.errors import CheckpointError  # noqa: E402

pytestmark = pytest.mark.usefixtures("remote_code_cache")

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    **FAMILIES,
    "llama untied": ("LlamaConfig", {}),
    "llama 3.1": ("LlamaConfig", {"head_dim": 16, **SCALED}),
    "llama without padding": ("LlamaConfig", {"vocab_size": 128}),
}
QWEN = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN, "shared_expert_intermediate_size": 20, "norm_topk_prob": False, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", {**QWEN, "head_dim": 16, "norm_topk_prob": True}),
}
SKYWORK = {
    "skywork_moe": (Model(num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=100), Moe(num_experts=4)),
    "skywork_moe with everything": (
        Model(num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=1, vocab_size=100, qkv_bias=True, tie_embeddings=True),
        Moe(num_experts=4, topk=3, layers=[0, 2], ffn_hidden_size=20, shared_expert_ffn_hidden_size=28, shared_expert_gate=True, gate_norm_scale=0.5),
    ),
}
DTYPES = {torch.bfloat16: (True, False), torch.float16: (False, True), torch.float32: (True, True)}


def make_case(folder: Path, case: str, dtype: torch.dtype, shards: bool) -> Path:
    if case in SKYWORK:
        model, moe = SKYWORK[case]
        tensors = {name: tensor if name.endswith("moe.gate.weight") else tensor.to(dtype) for name, tensor in random_tensors(model, moe).items()}
        return add_remote_code(write_hf(folder, tensors, model, moe, "skywork_moe", shards=3 if shards else 1))
    return make(folder, *{**DENSE, **MIXTURES}[case], dtype=dtype, **({"max_shard_size": "20KB"} if shards else {}))


def files_of(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


# --------------------------------------------------------------------------------------------------------------------- in, out, and logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*DENSE, *MIXTURES, *SKYWORK])
def test_import_then_export_is_bit_for_bit_and_computes_the_same(case: str, dtype: torch.dtype, tmp_path: Path):
    shards_in, shards_out = DTYPES[dtype]
    source = make_case(tmp_path / "source", case, dtype, shards_in)
    assert (files_of(source) > 1) == shards_in
    import_hf(source, tmp_path / "ours", file_bytes=30_000)
    result = export_hf(tmp_path / "ours", tmp_path / "out", **({"shard_bytes": 20_000} if shards_out else {}))
    assert result["family"] == case.split()[0] and (files_of(tmp_path / "out") > 1) == shards_out
    assert_same_tensors(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    described = describe(tmp_path / "ours")
    assert same_model(config, *described) and same_model(json.loads((tmp_path / "out" / "config.json").read_text()), *described)
    tensors = our_tensors(tmp_path / "ours")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("router.weight")} == {dtype}
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & set(tensors):
        assert len(tensors[name]) == 128 and not tensors[name][config["vocab_size"] :].any()
    if dtype == torch.float32:
        tokens = MANY_TOKENS if case == "llama 3.1" else TOKENS
        expected = hf_logits(source, tokens)
        torch.testing.assert_close(our_logits(tmp_path / "ours", tokens), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(reference_logits(source, tokens), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(hf_logits(tmp_path / "out", tokens), expected, atol=1e-5, rtol=0)


def test_positions_of_llama_3_1_matter_in_the_test_above(tmp_path: Path):
    source = make(tmp_path / "in", *DENSE["llama 3.1"])
    config = json.loads((source / "config.json").read_text())
    expected = reference_logits(source, MANY_TOKENS)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (source / "config.json").write_text(json.dumps(config))
    assert (reference_logits(source, MANY_TOKENS) - expected).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------- dense families become mixtures

PLAIN = UpcycleOptions(num_experts=4, gate_norm=False)
GATED = UpcycleOptions(num_experts=8, topk=4, granularity=2, gate_norm=False, shared_expert_ffn=16, shared_expert_gate=True)
NORMED = UpcycleOptions(num_experts=4, shared_expert_ffn=16, shared_expert_gate=True)
TARGETS = {
    "llama": {"mixtral": PLAIN, "qwen2_moe": GATED, "qwen3_moe": None},
    "llama untied": {"mixtral": PLAIN, "qwen2_moe": GATED},
    "llama 3.1": {"mixtral": PLAIN, "qwen2_moe": GATED},
    "mistral": {"mixtral": PLAIN, "qwen2_moe": GATED},
    "qwen2": {"mixtral": None, "qwen2_moe": GATED},
    "qwen3": {"mixtral": None, "qwen2_moe": None, "qwen3_moe": PLAIN},
}


@pytest.mark.parametrize("family", TARGETS)
def test_a_mixture_in_any_family_that_fits_is_the_dense_model_to_transformers(family: str, tmp_path: Path):
    """Written directly and by way of a folder of ours, which gives the same bits; families that cannot hold it are refused."""
    dense = make(tmp_path / "dense", *DENSE[family])
    tokens = MANY_TOKENS if family == "llama 3.1" else TOKENS
    expected = hf_logits(dense, tokens)
    for name, options in {"skywork_moe": NORMED, **TARGETS[family]}.items():
        direct, ours, exported = (tmp_path / f"{kind}-{name}" for kind in ("direct", "ours", "exported"))
        if options is None:
            with pytest.raises(CheckpointError, match=f"the {name} format cannot hold this model"):
                upcycle(dense, direct, GATED if name == "qwen2_moe" else PLAIN, Output("hf", name))
            assert not direct.exists()
            continue
        upcycle(dense, direct, options, Output("hf", name, 40_000))
        upcycle(dense, ours, options)
        assert export_hf(ours, exported, name)["family"] == name
        assert_same_tensors(direct, exported)
        assert json.loads((direct / "config.json").read_text()) == json.loads((exported / "config.json").read_text())
        assert bool(list(direct.glob("*.py"))) == (name == "skywork_moe") and files_of(direct) > 1
        torch.testing.assert_close(hf_logits(direct, tokens, trust=name == "skywork_moe"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_to_either_form_with_the_same_bits(dtype: torch.dtype, tmp_path: Path):
    dense = make(tmp_path / "dense", *DENSE["qwen2"], dtype=dtype)
    options = UpcycleOptions(num_experts=8, topk=4, granularity=2, drop_ratio=0.5, shared_expert_ffn=16, shared_expert_gate=True, layers=(0, 2))
    upcycle(dense, tmp_path / "direct", options, Output("hf"))
    upcycle(dense, tmp_path / "ours", options)
    export_hf(tmp_path / "ours", tmp_path / "exported")
    assert_same_tensors(tmp_path / "direct", tmp_path / "exported")
    tensors = all_tensors(tmp_path / "direct")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("moe.gate.weight")} == {dtype}
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("moe.gate.weight")} == {torch.float32}


def test_generation_with_a_cache_equals_generation_without(tmp_path: Path):
    make(tmp_path / "dense", *DENSE["qwen3"])
    options = UpcycleOptions(num_experts=4, noise=1.0, router_init_std=1.0, shared_expert_ffn=16, shared_expert_gate=True)
    upcycle(tmp_path / "dense", tmp_path / "hf", options, Output("hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    words = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.stack([TOKENS[:6], TOKENS[6:12]])
    cached = model.generate(prompt, use_cache=True, **words)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **words)) and cached.shape == (2, 22)
    torch.testing.assert_close(model(cached[:1]).logits[0].detach(), reference_logits(tmp_path / "hf", cached[0]), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------------- resharding


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Path]]]:
    """A folder from every command that writes one, with its sources."""
    base = tmp_path_factory.mktemp("folders")
    dense = add_tokenizer(make(base / "dense", *DENSE["llama"]))
    other = make(base / "other", *DENSE["llama"], seed=8)
    (base / "text.txt").write_text("The ferry left the harbour a little after six; 14.5 miles, 11 knots. " * 3)
    made: dict[str, tuple[Path, list[Path]]] = {}

    def write(name: str, tool: Any, words: list[Any], *sources: Path) -> None:
        assert tool.main([*map(str, words), "--out", str(base / name)]) == 0
        made[name] = base / name, list(sources)

    moe = ["--dense", dense, "--num-experts", 4, "--shared-expert-ffn", 16, "--shared-expert-gate", "--moe-layers", "0,2"]
    write("upcycled", upcycle_dense, moe, dense)
    write("upcycled hf", upcycle_dense, [*moe, "--format", "hf", "--file-gib", 50_000 / 2**30], dense)
    write("two models", upcycle_dense, ["--dense", dense, "--num-experts", 4, "--experts-from", f"{other}=1,3", "--trunk", "mean"], dense, other)
    write("text", upcycle_dense, ["--dense", dense, "--num-experts", 4, "--router-init", "text", "--router-text", base / "text.txt"], dense, base / "text.txt")
    write("imported", convert_checkpoint, ["import", "--hf", dense], dense)
    write("exported", convert_checkpoint, ["export", "--checkpoint", base / "upcycled"], base / "upcycled")
    write("resharded", convert_checkpoint, ["reshard", "--checkpoint", base / "upcycled", "--tp", 2, "--etp", 2], base / "upcycled")
    return made


def training_checkpoint(folder: Path, weights: Path) -> Path:
    """What training leaves, as far as a reader sees it: master weights, moments and router state beside the weights, config.yaml and state.json."""
    tensors = our_tensors(weights)
    extra: dict[str, Any] = {f"optimizer.state.{kind}.{name}": torch.randn(tensor.shape) for kind in ("param", "exp_avg") for name, tensor in tensors.items()}
    extra |= {"decoder.layers.0.mlp.router.aux_coefficient": torch.ones(1), "rng_state": {"seed": 3}}
    write_ours(folder, tensors, *describe(weights), extra=extra)
    (folder / "model.yaml").rename(folder / "config.yaml")
    (folder / "state.json").write_text(json.dumps({"step": 7}))
    write_marker(folder)
    return folder


def boxes(folder: Path, key: str) -> list[tuple[int, ...]]:
    entry = torch.distributed.checkpoint.FileSystemReader(str(folder)).read_metadata().state_dict_metadata[key]
    return [tuple(chunk.sizes) for chunk in entry.chunks]


@pytest.mark.parametrize("trained", [False, True], ids=["weights", "training"])
@pytest.mark.parametrize("tp", [2, 4])
def test_resharding_cuts_boxes_and_keeps_every_bit(tp: int, trained: bool, folders: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = folders["upcycled"][0]
    source = training_checkpoint(tmp_path / "step_7", weights) if trained else weights
    words = ["reshard", "--checkpoint", str(source), "--out", str(tmp_path / "out"), "--tp", str(tp), "--etp", "2", "--json"]
    assert convert_checkpoint.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == (7 if trained else None) and told["cut"] == {"tp": tp, "etp": 2}
    assert same_bits(our_tensors(tmp_path / "out"), our_tensors(weights))
    names = set(torch.distributed.checkpoint.FileSystemReader(str(tmp_path / "out")).read_metadata().state_dict_metadata)
    assert {name for name in names if "_extra_state" not in name} == set(our_tensors(weights)) and not (tmp_path / "out" / "state.json").exists()
    at = "decoder.layers.{}."
    for key, expected in {
        at.format(0) + "self_attention.linear_qkv.weight": [(64 // tp, 32)] * tp,
        at.format(0) + "self_attention.linear_proj.weight": [(32, 32 // tp)] * tp,
        at.format(1) + "mlp.linear_fc1.weight": [(48 // tp, 32)] * 2 * tp,
        at.format(1) + "mlp.linear_fc2.weight": [(32, 48 // tp)] * tp,
        at.format(2) + "mlp.experts.experts.linear_fc1.weight": [(1, 16, 32)] * 4 * 2 * 2,
        at.format(2) + "mlp.experts.experts.linear_fc2.weight": [(1, 32, 16)] * 4 * 2,
        at.format(2) + "mlp.shared_experts.linear_fc1.weight": [(16 // tp, 32)] * 2 * tp,
        at.format(2) + "mlp.shared_experts.linear_fc2.weight": [(32, 16 // tp)] * tp,
        at.format(2) + "mlp.router.weight": [(4, 32)],
        "embedding.word_embeddings.weight": [(100, 32), (28, 32)],
    }.items():
        assert sorted(boxes(tmp_path / "out", key)) == sorted(expected), key
    assert convert_checkpoint.main(["verify", str(tmp_path / "out"), "--source", str(source), "--finite"]) == 0
    torch.testing.assert_close(our_logits(tmp_path / "out"), our_logits(weights), atol=0, rtol=0)


def test_a_cast_while_resharding_leaves_the_router(folders: dict, tmp_path: Path):
    words = ["reshard", "--checkpoint", str(folders["upcycled"][0]), "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    assert convert_checkpoint.main(words) == 0
    before = our_tensors(folders["upcycled"][0])
    assert same_bits(our_tensors(tmp_path / "out"), {name: value if name.endswith("router.weight") else value.bfloat16() for name, value in before.items()})


def test_what_was_cut_leaves_as_what_was_not(folders: dict, tmp_path: Path):
    """An export takes boxes together, casts all but the router, and gives back the small files it was given."""
    assert convert_checkpoint.main(["export", "--checkpoint", str(folders["resharded"][0]), "--out", str(tmp_path / "hf")]) == 0
    exported, dense = folders["exported"][0], folders["imported"][1][0]
    assert_same_tensors(tmp_path / "hf", exported)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (dense / name).read_bytes() == (exported / name).read_bytes()
    for word, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert convert_checkpoint.main(["export", "--checkpoint", str(folders["resharded"][0]), "--out", str(tmp_path / word), "--dtype", word]) == 0
        cast = {name: value if name.endswith("moe.gate.weight") else value.to(dtype) for name, value in all_tensors(exported).items()}
        assert same_bits(all_tensors(tmp_path / word), cast) and json.loads((tmp_path / word / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_a_tokenizer_that_is_not_there_is_no_tokenizer(folders: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    for place in (tmp_path / "none", folders["upcycled"][0]):
        words = ["export", "--checkpoint", str(folders["upcycled"][0]), "--out", str(tmp_path / "hf"), "--tokenizer", str(place)]
        assert convert_checkpoint.main(words) == 3
        assert f"--tokenizer {place}" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert convert_checkpoint.main([*words[:-1], str(folders["upcycled"][0] / "hf")]) == 0 and (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize("words", [["--tp", "3"], ["--tp", "0"], ["--etp", "5"], ["--etp", "-1"], ["--tp", "64"]], ids=" ".join)
def test_degrees_that_do_not_divide_are_wrong_arguments(words: list[str], folders: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert convert_checkpoint.main(["reshard", "--checkpoint", str(folders["upcycled"][0]), "--out", str(tmp_path / "out"), *words]) == 2
    assert f"{words[0]}={words[1]}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_dense_model_has_no_experts_to_cut(folders: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert convert_checkpoint.main(["reshard", "--checkpoint", str(folders["imported"][0]), "--out", str(tmp_path / "out"), "--etp", "2"]) == 2
    assert "--etp=2" in capsys.readouterr().err and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------------- verify and inspect


def test_what_every_command_writes_is_verified_and_inspected(folders: dict, capsys: pytest.CaptureFixture):
    for name, (folder, sources) in folders.items():
        for given in ([], *([source] for source in sources), sources):
            words = [word for source in given for word in ("--source", str(source))]
            code = convert_checkpoint.main(["verify", str(folder), *words, "--finite", "--json"])
            assert code == 0, (name, json.loads(capsys.readouterr().out)["problems"])
        stranger = folders["imported"][0] if name != "imported" else folders["upcycled"][0]
        assert convert_checkpoint.main(["verify", str(folder), "--source", str(stranger)]) == 3, name
        capsys.readouterr()
        assert convert_checkpoint.main(["inspect", str(folder), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["kind"] == ("huggingface" if name in ("upcycled hf", "exported") else "weights")
        assert "there in their recorded sizes" in told["manifest"] and told["layout"].get("experts") == (None if name == "imported" else 4)


def test_a_changed_source_is_named(folders: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, sources = folders["two models"]
    changed = shutil.copytree(sources[1], tmp_path / "other")
    flip(changed / "model.safetensors")
    assert convert_checkpoint.main(["verify", str(folder), "--source", str(sources[0]), "--source", str(changed), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["problems"] == [f"source {changed}: model.safetensors differs"]


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["upcycled", "upcycled hf", "resharded"])
def test_one_flipped_bit_in_any_file_is_named(name: str, folders: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = shutil.copytree(folders[name][0], tmp_path / "folder")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) >= 9 and {"manifest.json", "config.json", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        flip(path)
        assert convert_checkpoint.main(["verify", str(folder), "--json"]) == 3, path.name
        told = capsys.readouterr()
        assert any(str(path.relative_to(folder)) in line for line in json.loads(told.out)["problems"]), (path.name, told)
        path.write_bytes(whole)
    assert convert_checkpoint.main(["verify", str(folder)]) == 0


# ---------------------------------------------------------------------------------------------------------------------- gguf and advice


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_file_is_a_source(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("gguf")
    changes = {"intermediate_size": 64, "tie_word_embeddings": kind == "Q8_0"}  # quantization takes 32 numbers of a row at a time
    tensors = all_tensors(make(tmp_path / "hf", "LlamaConfig", changes))
    file = write_gguf(tmp_path / "x.gguf", tensors, {**SHAPE, **changes}, kind)
    words = ["--dense", str(file), "--out", str(tmp_path / "moe"), "--num-experts", "4"]
    assert upcycle_dense.main([*words, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verify"]["passed"]
    for folder, source in ((tmp_path / "moe", file), (tmp_path / "ours", file), (tmp_path / "back", tmp_path / "ours")):
        if folder.name == "ours":
            assert convert_checkpoint.main(["import", "--hf", str(source), "--out", str(folder)]) == 0
        elif folder.name == "back":
            assert convert_checkpoint.main(["export", "--checkpoint", str(source), "--out", str(folder)]) == 0
        assert convert_checkpoint.main(["verify", str(folder), "--source", str(source)]) == 0
    back = all_tensors(tmp_path / "back")
    assert set(back) == set(tensors) and {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    for name, tensor in back.items():
        if kind == "F16":
            assert torch.equal(tensor, (tensors[name].half() if tensor.ndim == 2 else tensors[name]).bfloat16()), name
        else:
            torch.testing.assert_close(tensor.float(), tensors[name], atol=0.01 * float(tensors[name].abs().max()), rtol=0)


@pytest.mark.parametrize("damage", [lambda content: content[:200], lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"none"])
def test_a_damaged_gguf_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "x.gguf", all_tensors(make(tmp_path / "hf", "LlamaConfig", {})), SHAPE, "F16")
    file.write_bytes(damage(file.read_bytes()))
    assert upcycle_dense.main(["--dense", str(file), "--out", str(tmp_path / "moe"), "--num-experts", "4"]) == 3
    assert "x.gguf: transformers cannot read it" in capsys.readouterr().err and not (tmp_path / "moe").exists()


def test_advice_as_text_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture):
    dense = make(tmp_path / "dense", *DENSE["llama"])
    words = ["advise", "--dense-tokens", "1T", "--budget-tokens", "10B"]
    model, numbers = ["--dense", str(dense), "--num-experts", "4"], ["--dense-parameters", "13.85B", "--active-parameters", "22.7B"]
    assert upcycle_dense.main([*words, *model]) == 0 and "upcycle the dense model" in capsys.readouterr().out
    assert upcycle_dense.main([*words, *model, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    counted = sum(tensor.numel() for tensor in all_tensors(dense).values())
    assert told["verdict"] == "upcycle" and told["dense_parameters"] == counted and told["active_parameters"] == counted + 3 * (3 * 32 * 48 + 4 * 32)
    assert upcycle_dense.main(["advise", "--dense-tokens", "1B", "--budget-tokens", "10B", *numbers, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "scratch"
    for wrong in ([], numbers[:2], model[:2], [*model, *numbers], [*model, *numbers[:2]], [*numbers, *model[2:]], [*model[:2], "--num-experts", "0"],
                  ["--dense-parameters", "-1", *numbers[2:]], ["--dense-parameters", "many", *numbers[2:]]):  # fmt: skip
        assert upcycle_dense.main([*words, *wrong]) == 2, wrong
        assert "error" in capsys.readouterr().err
    assert upcycle_dense.main(["advise", "--dense-tokens", "0", "--budget-tokens", "1B", *numbers]) == 2
