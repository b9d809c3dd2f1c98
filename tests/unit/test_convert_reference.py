"""The yardstick and the step-0 gate: what is computed, that an error is seen, and that memory stays small."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_folders import MODEL, MOE, Tensors, ours_of, random_tensors, upcycled, write_hf, write_ours
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.check import reference_weights, verify
from megatron_skywork.convert.check.reference import Forward, gate, logits_of, rotary
from megatron_skywork.convert.check.reference_weights import HfLayers, OurLayers
from megatron_skywork.convert.check.verify import LogitDistance, Tokens, compare, refuse_if_failed, tokens_for
from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.errors import CheckpointError

TOKENS_T = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 49, 0])


class Held:
    """Tensors in memory, read as from a folder; counts what is read."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    def read(self, key: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        whole = self.tensors[key]
        return whole if offset is None else whole[tuple(slice(a, a + n) for a, n in zip(offset, shape or (), strict=True))].clone()


def test_attention_and_feed_forward_by_hand():
    """One layer, one head, one token: attention of one token is its value, so all can be written in three lines."""
    model = Model(num_layers=1, hidden_size=4, ffn_hidden_size=6, num_attention_heads=1, vocab_size=10, tie_embeddings=True)
    held = random_tensors(model, None)
    x = held["model.embed_tokens.weight"][7]

    def norm(value: torch.Tensor, name: str) -> torch.Tensor:
        return value / (value.square().mean() + model.norm_epsilon).sqrt() * held[name]

    at = "model.layers.0."
    x = x + held[at + "self_attn.o_proj.weight"] @ held[at + "self_attn.v_proj.weight"] @ norm(x, at + "input_layernorm.weight")
    y = norm(x, at + "post_attention_layernorm.weight")
    gated = torch.nn.functional.silu(held[at + "mlp.gate_proj.weight"] @ y) * (held[at + "mlp.up_proj.weight"] @ y)
    x = x + held[at + "mlp.down_proj.weight"] @ gated
    expected = held["model.embed_tokens.weight"] @ norm(x, "model.norm.weight")
    torch.testing.assert_close(logits_of(HfLayers(Held(held), model), torch.tensor([7]))[0], expected)


FAMILIES: dict[str, tuple[str, Model, Moe | None]] = {
    "dense": ("llama", MODEL, None),
    "tied, biased, normed": ("llama", MODEL.model_copy(update={"tie_embeddings": True, "qkv_bias": True, "qk_norm": True}), None),
    "skywork_moe": ("skywork_moe", MODEL, Moe(num_experts=4, layers=[1], shared_expert_ffn_hidden_size=12, shared_expert_gate=True)),
    "mixtral": ("mixtral", MODEL, Moe(num_experts=4, gate_norm=False, ffn_hidden_size=8)),
    "qwen2_moe": (
        "qwen2_moe",
        MODEL.model_copy(update={"qkv_bias": True, "rope_scaling_factor": 8.0}),
        Moe(num_experts=4, topk=3, gate_norm=False, pre_softmax=True, ffn_hidden_size=8, shared_expert_ffn_hidden_size=12, shared_expert_gate=True),
    ),
    "qwen3_moe": ("qwen3_moe", MODEL.model_copy(update={"qk_norm": True, "head_dim": 8}), Moe(num_experts=4, gate_norm=False, ffn_hidden_size=8, layers=[0])),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_both_views_of_the_same_weights_agree(case: str):
    naming, model, moe = FAMILIES[case]
    naming = naming if moe is not None else "skywork_moe"
    theirs = random_tensors(model, moe, naming)
    ours = ours_of(theirs, model, moe, naming)
    left = logits_of(HfLayers(Held(theirs), model, moe=moe, naming=naming), TOKENS_T)
    assert left.shape == (len(TOKENS_T), model.vocab_size), "padding is not part of the model"
    torch.testing.assert_close(logits_of(OurLayers(Held(ours), model, moe), TOKENS_T), left, atol=1e-6, rtol=1e-5)
    # Every tensor takes part: one that is not looked at would hide any error in it.
    for name in theirs:
        changed = {**theirs, name: theirs[name] * 1.5 + 0.1}
        other = logits_of(HfLayers(Held(changed), model, moe=moe, naming=naming), TOKENS_T)
        assert not torch.equal(other, left), name


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Llama": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "norm_topk_prob": False},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True, "mlp_only_layers": [0], "head_dim": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str):
    import transformers

    from megatron_skywork.convert.sources import open_source

    shape = dict(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, initializer_range=0.3,
        max_position_embeddings=16384, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**{**shape, **TRANSFORMERS[family]})
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(TOKENS_T[None]).logits[0]
    source = open_source(tmp_path)
    described = source.description
    found = logits_of(HfLayers(source.reader, described.model, torch.float64, described.moe, described.naming), TOKENS_T)
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)


def test_llama_31_frequencies():
    """Its three ranges: long waves are divided by the factor, short ones kept, and between them as the published constants say."""
    theta, width, factor = 500000.0, 128, 8.0
    inverse = [theta ** -(2 * index / width) for index in range(width // 2)]
    expected = []
    for frequency in inverse:
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            expected.append(frequency)
        elif wave > 8192:
            expected.append(frequency / factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    assert len({round(e / f, 12) for e, f in zip(expected, inverse, strict=True)}) > 3, "all three ranges occur"
    cos_T1D, sin_T1D = rotary(2, width, theta, factor)
    angles_D = torch.tensor(expected + expected, dtype=torch.float64)
    torch.testing.assert_close(cos_T1D[1, 0], angles_D.cos())
    torch.testing.assert_close(sin_T1D[1, 0], angles_D.sin())


@pytest.mark.parametrize(("options", "sums_to_one"), [({}, True), ({"pre_softmax": True}, False), ({"topk": 1}, False)])
def test_gate_probabilities(options: dict[str, Any], sums_to_one: bool):
    moe = Moe(num_experts=4, gate_norm=False, **options)
    logits_TE = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    probs_TK, chosen_TK = gate(logits_TE, moe)
    assert chosen_TK.tolist() == [[1, 2][: moe.topk]]
    plain = logits_TE.softmax(-1)[0, chosen_TK[0]]
    torch.testing.assert_close(probs_TK[0], plain / plain.sum() if sums_to_one else plain)


# ---------------------------------------------------------------------------------------------------------------------------------- memory


class Sizes(TorchDispatchMode):
    """Notes the largest tensor of the computing precision that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("kind", ["huggingface", "ours"])
def test_vocabulary_and_experts_are_never_whole_in_the_computing_precision(monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(reference_weights, "VOCABULARY_ROWS", 32)
    model, moe = MODEL.model_copy(update={"vocab_size": 1000}), Moe(num_experts=16)
    theirs = random_tensors(model, moe, dtype=torch.bfloat16)
    weights = HfLayers(Held(theirs), model, moe=moe) if kind == "huggingface" else OurLayers(Held(ours_of(theirs, model, moe)), model, moe)
    one_matrix = model.hidden_size * 4 * model.hidden_size
    with Sizes() as sizes, torch.no_grad():
        forward = Forward(weights, TOKENS_T)
        for layer in weights.layers():
            forward.advance(layer)
        tokens = sum(chunk_TC.shape[-1] for chunk_TC in forward.logits_TC())
    assert tokens == 1000 and 0 < sizes.largest <= one_matrix < 16 * 3 * model.ffn_hidden_size * model.hidden_size


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_streamed_distance_is_the_distance(chunk: int):
    generator = torch.Generator().manual_seed(0)
    a_TV = torch.randn(20, 50, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [20.0]]).repeat(10, 1)
    b_TV = a_TV + torch.randn(20, 50, generator=generator, dtype=torch.float64)
    distance = LogitDistance(20)
    for a_TC, b_TC in zip(a_TV.split(chunk, -1), b_TV.split(chunk, -1), strict=True):
        distance.add(a_TC, b_TC)
    found = distance.result()
    log_a_TV, log_b_TV = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
    assert found["kl"] == pytest.approx(float((log_a_TV.exp() * (log_a_TV - log_b_TV)).sum(-1).mean()), rel=1e-9)
    assert found["largest_logit_difference"] == float((a_TV - b_TV).abs().max()) and found["largest_logit"] == float(a_TV.abs().max())
    assert 0 < found["same_top_token"] < 1 and found["same_top_token"] == float((a_TV.argmax(-1) == b_TV.argmax(-1)).double().mean())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("difference", [float("nan"), float("inf")], ids=str)
def test_a_result_that_is_no_model_is_refused_whatever_its_method(difference: float, exact: bool):
    result = {"largest_logit_difference": difference, "tokens": 3, "layer_differences": [difference], "tolerance": 1e-4, "kl": difference}
    assert verify._passed(difference, exact) is False and verify._passed(5.0, exact) is (False if exact else None) and verify._passed(1e-5, True) is True
    with pytest.raises(CheckpointError, match="NaN or infinite logits"):
        refuse_if_failed({**result, "passed": verify._passed(difference, exact)})


def test_a_nan_is_neither_close_nor_lost():
    distance = LogitDistance(1)
    distance.add(torch.zeros(1, 3), torch.tensor([[0.0, float("nan"), 0.0]]))
    distance.add(torch.zeros(1, 3), torch.zeros(1, 3))
    found = distance.result()
    assert math.isnan(found["largest_logit_difference"]) and math.isnan(found["kl"])


# -------------------------------------------------------------------------------------------------------------------------------- the gate


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A dense model and the same upcycled by copying, in both formats each."""
    dense, mixture = random_tensors(MODEL, None), {}
    mixture = upcycled(dense, MODEL, MOE)
    qwen = Moe(num_experts=4, gate_norm=False)
    yield {
        "hf": write_hf(tmp_path / "hf", dense, MODEL, None, "llama"),
        "ours": write_ours(tmp_path / "ours", ours_of(dense, MODEL, None), MODEL, None),
        "moe hf": write_hf(tmp_path / "moe_hf", mixture, MODEL, MOE, "skywork_moe", shards=3),
        "moe ours": write_ours(tmp_path / "moe", ours_of(mixture, MODEL, MOE), MODEL, MOE),
        "moe mixtral": write_hf(tmp_path / "mixtral", upcycled(dense, MODEL, qwen, "mixtral"), MODEL, qwen, "mixtral"),
    }


@pytest.mark.parametrize("dense", ["hf", "ours"])
@pytest.mark.parametrize("other", ["moe hf", "moe ours", "moe mixtral"])
def test_every_pair_of_formats(folders: dict[str, Path], dense: str, other: str):
    lines = io.StringIO()
    result = compare(folders[dense], folders[other], progress=lines)
    assert result["passed"] is True and result["exact"] and result["largest_logit_difference"] < 1e-4 and result["kl"] < 1e-9
    assert len(result["layer_differences"]) == 2 and max(result["layer_differences"]) < 1e-5
    assert result["text"] == "random tokens" and result["tokens"] == 256
    assert lines.getvalue().count("verify: layer") == 2
    refuse_if_failed(result)


def test_an_error_is_seen_and_shows_where_it_begins(folders: dict[str, Path]):
    dense = random_tensors(MODEL, None)
    wrong = upcycled(dense, MODEL, MOE)
    wrong["model.layers.1.block_sparse_moe.experts.2.w2.weight"][0, 0] += 0.5
    write_ours(folders["moe ours"], ours_of(wrong, MODEL, MOE), MODEL, MOE)
    result = compare(folders["hf"], folders["moe ours"])
    assert result["passed"] is False and result["layer_differences"][0] < 1e-6 < 1e-3 < result["layer_differences"][1]
    with pytest.raises(CheckpointError, match="first layer to differ by more is number 2"):
        refuse_if_failed(result)


def test_an_inexact_method_is_not_judged(folders: dict[str, Path]):
    (folders["moe ours"] / "manifest.json").write_text(json.dumps({"method": {"name": "drop", "exact": False}}))
    write_marker(folders["moe ours"])
    result = compare(folders["hf"], folders["moe ours"])
    assert result["exact"] is False and result["passed"] is None


def test_what_cannot_be_compared_is_refused(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match="the first folder must be the dense model"):
        compare(folders["moe ours"], folders["moe hf"])
    short = MODEL.model_copy(update={"num_layers": 1})
    write_hf(tmp_path / "short", random_tensors(short, None), short, None, "llama")
    with pytest.raises(CheckpointError, match="num_layers 2 and 1"):
        compare(tmp_path / "short", folders["moe ours"])
    with pytest.raises(CheckpointError, match="model knows 0 to 49"):
        compare(folders["hf"], folders["moe ours"], [1, 50])
    with pytest.raises(CheckpointError, match="use auto, fp32, fp64"):
        compare(folders["hf"], folders["moe ours"], precision="bf16")


@pytest.mark.parametrize("place", ["", "hf"])
def test_text_is_used_where_there_is_a_tokenizer(tmp_path: Path, place: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (tmp_path / place).mkdir(exist_ok=True)
    tokenizer.save(str(tmp_path / place / "tokenizer.json"))
    given, sample = tokens_for(tmp_path, 256, "abc def"), tokens_for(tmp_path, 256, count=5000)
    assert given.text == "given" and tokenizer.decode(given.ids) == "abc def"
    decoded = tokenizer.decode(sample.ids)
    assert sample.text == "sample" and len(sample.ids) > 2000, "our text is long enough for a few thousand tokens"
    assert "渡轮" in decoded and "def " in decoded and "SELECT" in decoded and "ferry" in decoded
    assert len(tokens_for(tmp_path, 256).ids) == 256


def test_without_a_tokenizer_tokens_are_random_and_text_is_refused(tmp_path: Path):
    assert tokens_for(tmp_path, 30, count=50) == tokens_for(tmp_path, 30, count=50)
    tokens = tokens_for(tmp_path, 30, count=50)
    assert isinstance(tokens, Tokens) and tokens.text == "random tokens" and len(set(tokens.ids)) > 10 and max(tokens.ids) < 30
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor tokenizer.model"):
        tokens_for(tmp_path, 30, "text")
    with pytest.raises(CheckpointError, match="at least one"):
        tokens_for(tmp_path, 30, count=0)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x00 no tokenizer")
    with pytest.raises(CheckpointError, match="cannot be used as a tokenizer"):
        tokens_for(tmp_path, 30)
