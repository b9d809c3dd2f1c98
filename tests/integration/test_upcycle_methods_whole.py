"""Every method of upcycling on whole folders: what a manifest calls exact is the dense model to every program, the rest is what the method says it is."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from small_models import (  # noqa: E402
    FAMILIES,
    add_tokenizer,
    all_tensors,
    assert_same_tensors,
    hf_logits,
    make,
    our_logits,
    our_tensors,
    reference_logits,
    same_bits,
    training_logits,
)  # fmt: skip

import convert_checkpoint  # noqa: E402
import upcycle_dense  # noqa: E402
from megatron_skywork.convert.check.verify import compare, open_layers, tokens_for  # noqa: E402
from megatron_skywork.convert.export_hf import export_hf  # noqa: E402
from megatron_skywork.convert.import_hf import import_hf  # noqa: E402
from megatron_skywork.convert.reshard import reshard  # noqa: E402
from megatron_skywork.convert.upcycling.options import UpcycleOptions  # noqa: E402
from megatron_skywork.convert.upcycling.plan import plan  # noqa: E402
from megatron_skywork.convert.upcycling.router_text import rows_from_text, token_lists_for  # noqa: E402
from megatron_skywork.convert.upcycling.upcycle import Output, upcycle  # noqa: E402
from megatron_skywork.errors import CheckpointError  # noqa: E402

pytestmark = pytest.mark.usefixtures("remote_code_cache")

HF = Output("hf")
MATRICES = {"w1": ("gate_proj", 0), "w3": ("up_proj", 0), "w2": ("down_proj", 1)}  # the axis of the inner columns
TEXTS = ("The ferry left the harbour at six.", "def median(values): return 0", "14.5 / 13.4 = 1.08 hours, 65 minutes", "SELECT port FROM crossings;")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("dense")
    llama = ("LlamaConfig", {"tie_word_embeddings": False})
    folders = {"main": add_tokenizer(make(base / "main", *llama)), "code": make(base / "code", *llama, seed=8), "maths": make(base / "maths", *llama, seed=9)}
    folders |= {str(dtype)[6:]: make(base / str(dtype)[6:], *llama, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    folders |= {"qwen3": make(base / "qwen3", *FAMILIES["qwen3"])}
    import_hf(folders["main"], base / "ours")
    return {**folders, "ours": base / "ours"}


def options_of(**changes: Any) -> UpcycleOptions:
    return UpcycleOptions(**{"num_experts": 4, "router_init_std": 1.0, **changes})


def pieces(count: int) -> dict[str, int]:
    return {"num_experts": 4 * count, "topk": 2 * count, "granularity": count}


# What is exact by its manifest; what is not: because it is another model, only because weights round, or depending on how top-k breaks ties.
EXACT, OTHER, NEAR, TIES = "exact", "another model", "near", "ties"
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "copy": ({}, EXACT),
    "copy, plain gate": ({"gate_norm": False}, EXACT),
    "copy, lambda": ({"gate_norm_scale": 0.5, "topk": 3}, EXACT),
    "copy, some layers": ({"layers": (0, 2)}, EXACT),
    "top-1": ({"topk": 1}, OTHER),
    "pre_softmax": ({"pre_softmax": True}, OTHER),
    "pre_softmax, plain gate, zero router": ({"pre_softmax": True, "gate_norm": False, "router_init": "zero"}, NEAR),
    "top-1, plain gate, zero router": ({"topk": 1, "gate_norm": False, "router_init": "zero"}, NEAR),
    "noise": ({"noise": 0.3}, OTHER),
    "drop": ({"drop_ratio": 0.5}, OTHER),
    "drop, some layers": ({"drop_ratio": 0.5, "layers": (0, 2)}, OTHER),
    "granular 2": (pieces(2), EXACT),
    "granular 4": (pieces(4), EXACT),
    "granular 4, some layers": ({**pieces(4), "layers": (0, 2)}, EXACT),
    "granular 3": (pieces(3), NEAR),
    "granular 2, zero router": ({**pieces(2), "router_init": "zero"}, TIES),
    "granular 2, std 0": ({**pieces(2), "router_init_std": 0.0}, TIES),
    "granular 2, drop": ({**pieces(2), "drop_ratio": 0.5}, OTHER),
    "granular 2, pre_softmax": ({**pieces(2), "pre_softmax": True}, OTHER),
    "shared part": ({"shared_expert_ffn": 16}, EXACT),
    "shared part, gated": ({"shared_expert_ffn": 16, "shared_expert_gate": True}, EXACT),
    "shared part, top-1": ({"shared_expert_ffn": 16, "topk": 1}, OTHER),
    "shared whole": ({"shared_expert_ffn": 48}, EXACT),
    "shared whole, gated": ({"shared_expert_ffn": 48, "shared_expert_gate": True}, EXACT),
    "shared whole, top-1": ({"shared_expert_ffn": 48, "topk": 1}, EXACT),
    "shared whole, pre_softmax": ({"shared_expert_ffn": 48, "pre_softmax": True}, EXACT),
    "shared whole, granular 3": ({**pieces(3), "shared_expert_ffn": 48, "shared_expert_gate": True}, EXACT),
    "shared part, granular 4": ({**pieces(4), "shared_expert_ffn": 16}, EXACT),
    "shared part, gated, granular 2, some layers": ({**pieces(2), "shared_expert_ffn": 16, "shared_expert_gate": True, "layers": (0, 2)}, EXACT),
    "shared part, granular 2, drop": ({**pieces(2), "shared_expert_ffn": 16, "drop_ratio": 0.25}, OTHER),
    "shared part, granular 2, noise": ({**pieces(2), "shared_expert_ffn": 16, "noise": 0.3}, OTHER),
    "zero router": ({"router_init": "zero"}, EXACT),
    "orthogonal router": ({"router_init": "orthogonal"}, EXACT),
    "orthogonal router, granular 2": ({**pieces(2), "router_init": "orthogonal"}, EXACT),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_manifest_says(method: str, dense: dict[str, Path], tmp_path: Path):
    changes, kind = METHODS[method]
    options = options_of(**changes)
    result = upcycle(dense["main"], tmp_path / "ours", options)
    recorded = json.loads((tmp_path / "ours" / "manifest.json").read_text())["method"]
    assert recorded["exact"] == result["exact"] == (kind == EXACT) and bool(result["inexact_because"]) == (kind != EXACT)
    found = compare(dense["main"], tmp_path / "ours", tokens_for(dense["main"], 100, count=64))
    assert found["passed"] is (True if kind == EXACT else None)
    low, high = {OTHER: (0.01, math.inf), TIES: (0.0, math.inf)}.get(kind, (0.0, 1e-4))
    assert low <= found["largest_logit_difference"] < high, found

    upcycle(dense["main"], tmp_path / "direct", options, HF)
    export_hf(tmp_path / "ours", tmp_path / "exported")
    assert_same_tensors(tmp_path / "direct", tmp_path / "exported")
    if "zero" not in method and "std 0" not in method:  # equal logits: every program's top-k may take others
        expected = hf_logits(dense["main"]) if kind == EXACT else our_logits(tmp_path / "ours")
        torch.testing.assert_close(hf_logits(tmp_path / "direct"), expected, atol=1e-4, rtol=0)


def test_the_command_tells_exact_from_inexact(dense: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--dense", str(dense["main"]), "--num-experts", "8", "--topk", "4", "--granularity", "2", "--verify", "--verify-tokens", "32", "--out"]
    assert upcycle_dense.main([*words, str(tmp_path / "exact")]) == 0
    told = capsys.readouterr().out
    assert "computes what the dense model computes" in told and "equal within the tolerance" in told
    for number, (more, why) in enumerate([(["--drop-ratio", "0.5"], "changed on purpose"), (["--experts-from", f"{dense['code']}=1"], "several models")]):
        assert upcycle_dense.main([*words, str(tmp_path / str(number)), *more]) == 0
        told = capsys.readouterr().out
        distance = re.search(r"largest logit difference (\S+), KL (\S+); inexact by its method", told)
        assert why in told and distance and float(distance[1]) > 0.01 and float(distance[2]) > 1e-6
    wrong_words = ["--drop-ratio", "0.5", "--noise", "0.1", "--granularity", "0", "--experts-from", f"{dense['code']}=9"]
    assert upcycle_dense.main([*words, str(tmp_path / "x"), *wrong_words]) == 2
    wrong = capsys.readouterr().err
    assert all(name in wrong for name in ("--granularity=0", "--noise=0.1", "--experts-from")) and not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------------------ what is inside of them


def expert(tensors: dict[str, torch.Tensor], layer: int, number: int, word: str) -> torch.Tensor:
    return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{word}.weight"]


def source_matrix(tensors: dict[str, torch.Tensor], layer: int, word: str) -> torch.Tensor:
    return tensors[f"model.layers.{layer}.mlp.{MATRICES[word][0]}.weight"]


def changed_columns(new: torch.Tensor, old: torch.Tensor, axis: int) -> set[int]:
    return set((new != old).any(dim=1 - axis).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("place", ["main", "bfloat16"])
def test_drop_draws_the_right_share_of_columns_anew_and_keeps_the_rest(place: str, dense: dict[str, Path], tmp_path: Path):
    """0.3 of 48 columns are 14; a column that was not drawn has all its bits, in all three matrices."""
    upcycle(dense[place], tmp_path / "hf", options_of(drop_ratio=0.3), HF)
    old, new = all_tensors(dense[place]), all_tensors(tmp_path / "hf")
    sets = set()
    drawn: dict[str, list[torch.Tensor]] = {word: [] for word in MATRICES}
    for layer, number in itertools.product(range(3), range(4)):
        found = [changed_columns(expert(new, layer, number, word), source_matrix(old, layer, word), axis) for word, (_, axis) in MATRICES.items()]
        assert found[0] == found[1] == found[2] and len(found[0]) == math.floor(0.3 * 48)
        sets.add(tuple(sorted(found[0])))
        for word, (_, axis) in MATRICES.items():
            where = torch.tensor(sorted(found[0]))
            of_old = source_matrix(old, layer, word).float().index_select(axis, where)
            drawn[word].append((expert(new, layer, number, word).float().index_select(axis, where) - of_old.mean()) / of_old.std())
    assert len(sets) == 12, "every expert of every layer draws a set of its own"
    for word, numbers in drawn.items():
        together = torch.cat([part.flatten() for part in numbers])
        assert abs(float(together.mean())) < 0.06 and 0.95 < float(together.std()) < 1.05, word
        assert len(together.unique()) > 0.8 * len(together) if place == "main" else True


def test_drop_with_pieces_and_a_shared_expert_keeps_the_other_columns(dense: dict[str, Path], tmp_path: Path):
    """Columns 0 to 15 are the shared expert's; of the 32 others a quarter is drawn anew; the two pieces side by side are the copy, down doubled."""
    upcycle(dense["main"], tmp_path / "hf", options_of(**pieces(2), shared_expert_ffn=16, shared_expert_gate=True, drop_ratio=0.25), HF)
    old, new = all_tensors(dense["main"]), all_tensors(tmp_path / "hf")
    for layer, (word, (_, axis)) in itertools.product(range(3), MATRICES.items()):
        matrix, factor = source_matrix(old, layer, word), 2.0 if word == "w2" else 1.0
        assert torch.equal(new[f"model.layers.{layer}.block_sparse_moe.shared_expert.{word}.weight"], matrix.narrow(axis, 0, 16) * factor)
        sets = []
        for copy in range(4):
            whole = torch.cat([expert(new, layer, 2 * copy + index, word) for index in range(2)], dim=axis)
            sets.append(changed_columns(whole, matrix.narrow(axis, 16, 32) * factor, axis))
        assert [len(found) for found in sets] == [8] * 4 and len({tuple(sorted(found)) for found in sets}) == 4
        assert not new[f"model.layers.{layer}.block_sparse_moe.shared_expert_gate.weight"].any()


def test_noise_has_the_given_share_of_each_matrix_s_deviation(dense: dict[str, Path], tmp_path: Path):
    upcycle(dense["main"], tmp_path / "hf", options_of(noise=0.05), HF)
    old, new = all_tensors(dense["main"]), all_tensors(tmp_path / "hf")
    for layer, word in itertools.product(range(3), MATRICES):
        matrix = source_matrix(old, layer, word)
        noise = torch.stack([expert(new, layer, number, word) - matrix for number in range(4)]).flatten(1)
        assert (noise.std(dim=1) / matrix.std() / 0.05 - 1).abs().max() < 0.1 and noise.mean(dim=1).abs().max() < 0.2 * 0.05 * matrix.std()
        assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.15, "every expert has noise of its own"


@pytest.mark.parametrize("changes", [{"noise": 0.1}, {"drop_ratio": 0.5, **pieces(2)}, {"router_init": "orthogonal", "drop_ratio": 0.5}], ids=str)
def test_a_seed_decides_every_byte(changes: dict[str, Any], dense: dict[str, Path], tmp_path: Path):
    files = {}
    for name, seed, output in (("a", 1, Output(file_bytes=40_000)), ("b", 1, Output(file_bytes=40_000)), ("c", 2, Output(file_bytes=40_000)), ("d", 1, HF)):
        upcycle(dense["main"], tmp_path / name, options_of(seed=seed, **changes), output)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.distcp")}
    assert files["a"] == files["b"] and len(files["a"]) > 3
    left, right = our_tensors(tmp_path / "a"), our_tensors(tmp_path / "c")
    random = {name for name in left if ".router." in name or ".experts.experts." in name}
    assert random == {name for name in left if not torch.equal(left[name], right[name])}
    for key in random:
        assert len({tuple(part.flatten().tolist()) for part in left[key]}) == (4 if "router" in key else len(left[key])), f"{key}: rows that repeat"


def test_routers_start_as_they_are_told(dense: dict[str, Path], tmp_path: Path):
    for init in ("normal", "zero", "orthogonal"):
        upcycle(dense["main"], tmp_path / init, options_of(num_experts=32, topk=4, granularity=2, router_init=init, router_init_std=0.02), HF)
        rows = [all_tensors(tmp_path / init)[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(3)]
        assert all(torch.equal(part[0::2], part[1::2]) and part.dtype == torch.float32 for part in rows), "the pieces of a copy have one row"
        assert init == "zero" or not any(torch.equal(one, other) for one, other in itertools.combinations(rows, 2))
        for part in rows:
            product = part[::2] @ part[::2].T / (32 * 0.02**2)
            assert not part.any() if init == "zero" else abs(float(product.diagonal().mean()) - 1) < 0.3
            if init == "orthogonal":
                torch.testing.assert_close(product, torch.eye(16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 4])
def test_routers_from_text(count: int, dense: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text * 8)
    given = [str(tmp_path / f"{number}.txt") for number in range(count)]
    words = ["--dense", str(dense["main"]), "--num-experts", "8", "--topk", "4", "--granularity", "2", "--router-init", "text", "--router-init-std", "0.02"]
    words += ["--moe-layers", "0,2", "--verify", "--json", *(word for text in given for word in ("--router-text", text)), "--router-tokens"]
    assert upcycle_dense.main([*words, "200", "--out", str(tmp_path / "moe")]) == 0
    assert json.loads(capsys.readouterr().out)["verify"]["passed"]
    lists = token_lists_for(dense["main"], given, 200)
    expected = rows_from_text(open_layers(dense["main"], torch.float32), lists, [0, 2], 4, 0.02, seed=1234)
    tensors = our_tensors(tmp_path / "moe")
    for layer, rows in expected.items():
        found = tensors[f"decoder.layers.{layer}.mlp.router.weight"]
        assert torch.equal(found, rows.repeat_interleave(2, dim=0)) and abs(float(rows.mean(0).abs().max())) < 1e-7
    sources = [word for place in (dense["main"], *given) for word in ("--source", str(place))]
    assert convert_checkpoint.main(["verify", str(tmp_path / "moe"), *sources]) == 0
    assert upcycle_dense.main([*words, "40", "--out", str(tmp_path / "shorter"), "--format", "hf"]) == 0
    assert not torch.equal(all_tensors(tmp_path / "shorter")["model.layers.0.block_sparse_moe.gate.weight"], tensors["decoder.layers.0.mlp.router.weight"])
    assert upcycle_dense.main([*words, "40", "--out", str(tmp_path / "x"), "--router-text", given[0]]) == 2
    assert "texts" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_rows_of_another_text_are_not_mixed_into_what_was_interrupted(dense: dict[str, Path], tmp_path: Path):
    """How much of a text was read is no option of the result, and decides its bytes all the same."""
    options = options_of(router_init="text", router_texts=(str(dense["main"] / "config.json"),))

    def broken_disk(folder: Path) -> dict[str, Any]:
        raise OSError("disk")

    def rows(value: float) -> dict[int, torch.Tensor]:
        return {layer: torch.full((4, 32), value) for layer in range(3)}

    with pytest.raises(OSError, match="disk"):
        upcycle(dense["main"], tmp_path / "out", options, accept=broken_disk, routers=lambda moe: rows(1.0))
    assert upcycle(dense["main"], tmp_path / "out", options, routers=lambda moe: rows(2.0))["resumed_files"] == 0
    assert {float(value.unique()) for name, value in our_tensors(tmp_path / "out").items() if name.endswith("router.weight")} == {2.0}


@pytest.mark.parametrize("method", ["copy, some layers", "shared part, gated, granular 2, some layers"])
@pytest.mark.parametrize("place", ["main", "bfloat16"])
def test_a_dry_run_says_what_is_written(method: str, place: str, dense: dict[str, Path], tmp_path: Path):
    for name, output, read in (("ours", Output(), our_tensors), ("hf", HF, all_tensors)):
        planned = plan(dense[place], tmp_path / name, options_of(**METHODS[method][0]), output, probe=False)
        written = upcycle(dense[place], tmp_path / name, options_of(**METHODS[method][0]), output)
        tensors = read(tmp_path / name).values()
        assert planned["bytes"] == sum(tensor.nbytes for tensor in tensors) <= written["bytes"]
        assert planned["parameters"] == written["parameters"] and planned["exact"] == written["exact"]
        assert name == "ours" or planned["parameters"]["total"] == sum(tensor.numel() for tensor in tensors)


# ------------------------------------------------------------------------------------------------------------------- where they come from


@pytest.mark.parametrize("trunk", ["dense", "mean"])
def test_experts_of_several_dense_models(trunk: str, dense: dict[str, Path], tmp_path: Path):
    places = [dense[name] for name in ("main", "code", "maths")]
    sources = ((str(places[1]), (1, 3)), (str(places[2]), (2,)))
    options = options_of(**pieces(2), shared_expert_ffn=16, expert_sources=sources, trunk=trunk, layers=(0, 2))
    result = upcycle(places[0], tmp_path / "ours", options)
    assert not result["exact"] and "experts come from several models" in result["inexact_because"]
    upcycle(places[0], tmp_path / "hf", options, HF)
    export_hf(tmp_path / "ours", tmp_path / "exported")
    assert_same_tensors(tmp_path / "hf", tmp_path / "exported")
    models, new = [all_tensors(place) for place in places], all_tensors(tmp_path / "hf")
    for layer, copy, index, (word, (_, axis)) in itertools.product((0, 2), range(4), range(2), MATRICES.items()):
        matrix = source_matrix(models[[0, 1, 2, 1][copy]], layer, word).narrow(axis, 16 + 16 * index, 16)
        assert torch.equal(expert(new, layer, 2 * copy + index, word), matrix * (2.0 if word == "w2" else 1.0))
        assert torch.equal(new[f"model.layers.{layer}.block_sparse_moe.shared_expert.{word}.weight"], source_matrix(models[0], layer, word).narrow(axis, 0, 16))
    trunk_names = {name for name in new if "block_sparse_moe" not in name}
    assert {"lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.post_attention_layernorm.weight"} <= trunk_names
    for name in trunk_names:
        mean = torch.stack([model[name].double() for model in models]).mean(0).float()
        torch.testing.assert_close(new[name], models[0][name] if trunk == "dense" else mean, atol=0 if trunk == "dense" else 1e-7, rtol=0)
    torch.testing.assert_close(hf_logits(tmp_path / "hf"), our_logits(tmp_path / "ours"), atol=1e-4, rtol=0)


def test_several_times_the_same_dense_model_is_that_model(dense: dict[str, Path], tmp_path: Path):
    sources = ((str(dense["main"]), (1,)), (str(dense["ours"]), (2, 3)))
    upcycle(dense["main"], tmp_path / "ours", options_of(expert_sources=sources, trunk="mean"))
    assert compare(dense["main"], tmp_path / "ours")["largest_logit_difference"] < 1e-4
    upcycle(dense["main"], tmp_path / "copy", options_of())
    assert same_bits(our_tensors(tmp_path / "ours"), our_tensors(tmp_path / "copy"))


@pytest.mark.parametrize("other", ["bfloat16", "qwen3"])
def test_dense_models_that_do_not_fit_together_are_refused(other: str, dense: dict[str, Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match="is stored in bfloat16" if other == "bfloat16" else "qk_norm is True"):
        upcycle(dense["main"], tmp_path / "out", options_of(expert_sources=((str(dense[other]), (1,)),)))
    assert not list(tmp_path.iterdir())


def test_a_dense_folder_of_ours_is_a_source_like_any_other(dense: dict[str, Path], tmp_path: Path):
    options = options_of(**pieces(2), drop_ratio=0.5, shared_expert_ffn=16)
    for place in ("main", "ours"):
        upcycle(dense[place], tmp_path / place, options)
        upcycle(dense[place], tmp_path / f"{place}-exact", options_of(), HF)
    assert same_bits(our_tensors(tmp_path / "main"), our_tensors(tmp_path / "ours"))
    assert_same_tensors(tmp_path / "main-exact", tmp_path / "ours-exact")
    assert compare(dense["ours"], tmp_path / "ours-exact")["passed"] and (tmp_path / "ours-exact" / "tokenizer.json").is_file()
    assert convert_checkpoint.main(["verify", str(tmp_path / "ours"), "--source", str(dense["ours"])]) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["copy", "granular 4", "shared part, gated, granular 2, some layers", "shared whole, granular 3"])
def test_exact_methods_are_exact_in_half_precision(method: str, dtype: str, dense: dict[str, Path], tmp_path: Path):
    upcycle(dense[dtype], tmp_path / "moe", options_of(**METHODS[method][0]))
    assert compare(dense[dtype], tmp_path / "moe")["passed"]
    kinds = {name.endswith("router.weight"): str(tensor.dtype) for name, tensor in our_tensors(tmp_path / "moe").items()}
    assert kinds == {True: "torch.float32", False: f"torch.{dtype}"}


@pytest.mark.parametrize("changes", [{}, {"shared_expert_ffn": 16, "shared_expert_gate": True}], ids=["copy", "shared"])
def test_a_feed_forward_of_several_dtypes_is_refused_and_not_rounded(changes: dict[str, Any], dense: dict[str, Path], tmp_path: Path):
    weights = {name: value.bfloat16() if "gate_proj" in name else value for name, value in all_tensors(dense["main"]).items()}
    (tmp_path / "mixed").mkdir()
    save_file(weights, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "mixed" / "config.json").write_text((dense["main"] / "config.json").read_text())
    for output in (Output(), HF):
        with pytest.raises(CheckpointError, match="are stored as bfloat16, float32"):
            upcycle(tmp_path / "mixed", tmp_path / "out", options_of(**changes), output)
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


# --------------------------------------------------------------------------------------------------------------------- the training model


def test_the_training_model_computes_what_the_reference_computes(dense: dict[str, Path], tmp_path: Path):
    base, expected = tmp_path / "folders", {}
    for method in ("shared part", "shared part, gated", "granular 4", "drop", "shared part, gated, granular 2, some layers", "shared part, granular 2, drop",
                   "shared whole, granular 3", "granular 2, pre_softmax", "shared part, top-1"):  # fmt: skip
        changes, kind = METHODS[method]
        name = method.replace(" ", "_").replace(",", "")
        upcycle(dense["main"], base / name, options_of(**changes))
        expected[name] = hf_logits(dense["main"]) if kind == EXACT else our_logits(base / name)
    changes = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}
    for normalized in (True, False):
        source = make(tmp_path / f"qwen-{normalized}", "Qwen2MoeConfig", {**changes, "norm_topk_prob": normalized})
        import_hf(source, base / source.name)
        expected[source.name] = hf_logits(source)
        torch.testing.assert_close(reference_logits(source), expected[source.name], atol=1e-4, rtol=0)
    reshard(base / "shared_part_gated_granular_2_some_layers", base / "resharded", tp=2, etp=2)
    expected["resharded"] = hf_logits(dense["main"])
    found = training_logits(base)
    assert set(found) == set(expected)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
