"""Router rows from text: against the hidden states that transformers computes, in one reading of the model, and what is refused."""

from __future__ import annotations

import io
import math
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from convert_folders import MODEL, MOE, Tensors, ours_of, random_tensors, write_hf, write_ours

from megatron_skywork.convert.check.reference_weights import HfLayers
from megatron_skywork.convert.check.verify import open_layers, tokens_for
from megatron_skywork.convert.upcycling import router_text
from megatron_skywork.convert.upcycling.methods.router_init import from_hidden, from_texts
from megatron_skywork.convert.upcycling.methods.seeds import generator
from megatron_skywork.convert.upcycling.router_text import count_problem, rows_from_text, token_lists_for
from megatron_skywork.errors import CheckpointError, ConfigError, DataError

LONG = MODEL.model_copy(update={"num_layers": 4})
TEXTS = [torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (40, 23, 31, 8)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("dense"), random_tensors(LONG, None), LONG, None, "llama")


def hooked(folder: Path, sequences: list[list[int]], index: int) -> torch.Tensor:
    """What goes into a layer's feed-forward by transformers, each sequence run by itself, one after the other."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.model.layers[index].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    return torch.cat(seen)


# ------------------------------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_text_gives_the_centroids_of_what_the_router_will_see(dense: Path, dtype: torch.dtype):
    rows = rows_from_text(open_layers(dense, dtype), TEXTS[:1], [0, 1, 3], 4, 0.02, seed=5)
    assert list(rows) == [0, 1, 3] and all(rows_EH.dtype == torch.float32 and rows_EH.shape == (4, 16) for rows_EH in rows.values())
    for index, rows_EH in rows.items():
        expected_EH = from_hidden(hooked(dense, TEXTS[:1], index), 4, 0.02, generator(5, "router", index))
        torch.testing.assert_close(rows_EH, expected_EH, atol=1e-6, rtol=0)
        assert rows_EH.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-5)
    for one, other in ((0, 1), (1, 3), (0, 3)):
        assert (rows[one] - rows[other]).abs().max() > 0.01


def test_a_text_for_every_expert_gives_it_that_text_s_mean(dense: Path):
    rows = rows_from_text(open_layers(dense, torch.float32), TEXTS, [2], 4, 0.02, seed=5)
    expected_EH = from_texts([hooked(dense, [text], 2) for text in TEXTS], 0.02)
    torch.testing.assert_close(rows[2], expected_EH, atol=1e-6, rtol=0)
    swapped = rows_from_text(open_layers(dense, torch.float32), [TEXTS[1], TEXTS[0], *TEXTS[2:]], [2], 4, 0.02, seed=5)
    torch.testing.assert_close(swapped[2], rows[2][[1, 0, 2, 3]], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("limit", "lengths"), [(40, [40]), (39, [20, 20]), (16, [14, 13, 13]), (1, [1] * 40)])
def test_a_long_text_is_cut_into_sequences_of_nearly_one_length(dense: Path, monkeypatch: pytest.MonkeyPatch, limit: int, lengths: list[int]):
    monkeypatch.setattr(router_text, "SEQUENCE_TOKENS", limit)
    rows = rows_from_text(open_layers(dense, torch.float64), TEXTS[:1], [1], 3, 1.0, seed=5)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    sequences = [TEXTS[0][start : start + length] for start, length in zip(starts, lengths, strict=True)]
    torch.testing.assert_close(rows[1], from_hidden(hooked(dense, sequences, 1), 3, 1.0, generator(5, "router", 1)), atol=1e-4, rtol=0)


def test_cut_texts_stay_with_their_expert(dense: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router_text, "SEQUENCE_TOKENS", 20)
    rows = rows_from_text(open_layers(dense, torch.float32), TEXTS, [3], 4, 1.0, seed=5)
    cut = [[TEXTS[0][:20], TEXTS[0][20:]], [TEXTS[1][:12], TEXTS[1][12:]], [TEXTS[2][:16], TEXTS[2][16:]], [TEXTS[3]]]
    torch.testing.assert_close(rows[3], from_texts([hooked(dense, sequences, 3) for sequences in cut], 1.0), atol=1e-5, rtol=0)


def test_a_sequence_has_at_most_1024_tokens():
    lengths = [len(tokens_T) for tokens_T in router_text._sequences([[1] * 4096, [1] * 1025, [1]], 50)[0]]
    assert lengths == [1024] * 4
    assert [[len(tokens_T) for tokens_T in text] for text in router_text._sequences([[1] * 1025, [1]], 50)] == [[513, 512], [1]]


def test_same_seed_same_bits_whatever_else_is_wanted(dense: Path):
    layers = open_layers(dense, torch.float32)
    rows = rows_from_text(layers, TEXTS[:1], range(4), 5, 0.01, seed=5)
    again = rows_from_text(layers, TEXTS[:1], {3, 1}, 5, 0.01, seed=5)
    assert sorted(again) == [1, 3] and all(torch.equal(again[index], rows[index]) for index in again)
    other = rows_from_text(layers, TEXTS[:1], {3, 1}, 5, 0.01, seed=6)
    assert not torch.equal(other[1], rows[1]) and not torch.equal(other[3], rows[3])


def test_our_folders_give_the_same_rows(dense: Path, tmp_path: Path):
    ours = write_ours(tmp_path / "ours", ours_of(random_tensors(LONG, None), LONG, None), LONG, None)
    rows, other = (rows_from_text(open_layers(folder, torch.float64), TEXTS[:1], [2], 4, 1.0, seed=5) for folder in (dense, ours))
    torch.testing.assert_close(rows[2], other[2], atol=1e-6, rtol=0)


def test_progress(dense: Path):
    lines = io.StringIO()
    rows_from_text(open_layers(dense, torch.float32), TEXTS[:1], [0, 2], 4, 0.01, 5, progress=lines)
    assert lines.getvalue().splitlines() == [
        "router text: layer 1 of 3, rows for 1 of 2 routers", "router text: layer 2 of 3, rows for 1 of 2 routers",
        "router text: layer 3 of 3, rows for 2 of 2 routers",
    ]  # fmt: skip


class Watched:
    """Tensors that are made when they are read: counts readings, and how many matrices of layers are alive at once."""

    def __init__(self, tensors: Tensors):
        self.tensors, self.count, self.alive, self.most = tensors, Counter[str](), weakref.WeakSet[torch.Tensor](), 0

    def read(self, name: str) -> torch.Tensor:
        self.count[name] += 1
        found = self.tensors[name].clone()
        if found.ndim == 2 and "layers" in name:
            self.alive.add(found)
            self.most = max(self.most, len(self.alive))
        return found


def test_the_model_is_read_once_for_all_texts_and_no_further_than_needed():
    watched = Watched(random_tensors(LONG, None))
    rows_from_text(HfLayers(watched, LONG), TEXTS, [0, 2], 4, 0.01, seed=5)
    assert set(watched.count.values()) == {1} and watched.most == 4
    unread = {name for name in watched.tensors if name not in watched.count}
    behind = {name for name in watched.tensors if "layers.3." in name or ("layers.2.mlp" in name)} | {"model.norm.weight", "lm_head.weight"}
    assert unread == behind


# ----------------------------------------------------------------------------------------------------------------------------- refused rows


@pytest.mark.parametrize("number", [0, 2, 3, 5])
def test_other_numbers_of_texts_are_refused(dense: Path, number: int):
    with pytest.raises(ConfigError, match=f"--router-text: {number} texts; give 1, .* or 4, one for each expert"):
        rows_from_text(open_layers(dense, torch.float32), (TEXTS * 2)[:number], [0], 4, 0.01, seed=5)
    assert count_problem(number, 4) and count_problem(1, 4) is None and count_problem(4, 4) is None


def test_all_wrong_settings_are_named_together(dense: Path):
    with pytest.raises(ConfigError) as error:
        rows_from_text(open_layers(dense, torch.float32), TEXTS, [7, 0, -1], 1, math.nan, seed=5)
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["--router-text", "--router-text", "--router-init-std=nan", "--moe-layers"]
    assert "[-1, 7]; the model has layers 0 to 3" in str(error.value) and "at least 2 experts" in str(error.value)


@pytest.mark.parametrize("std", [0.0, -0.01, math.inf])
def test_a_spread_of_nothing_is_refused(dense: Path, std: float):
    with pytest.raises(ConfigError, match="--router-init-std=.*above 0"):
        rows_from_text(open_layers(dense, torch.float32), TEXTS[:1], [0], 4, std, seed=5)


def test_no_layer_is_refused(dense: Path):
    with pytest.raises(ConfigError, match="--moe-layers: none given; the model has layers 0 to 3"):
        rows_from_text(open_layers(dense, torch.float32), TEXTS[:1], [], 4, 0.01, seed=5)


def test_a_mixture_is_refused(tmp_path: Path):
    mixture = write_hf(tmp_path, random_tensors(MODEL, MOE), MODEL, MOE, "skywork_moe")
    with pytest.raises(CheckpointError, match="mixture of experts already"):
        rows_from_text(open_layers(mixture, torch.float32), TEXTS[:1], [0], 4, 0.01, seed=5)


@pytest.mark.parametrize("token", [-1, 50])
def test_tokens_of_another_vocabulary_are_refused(dense: Path, token: int):
    with pytest.raises(CheckpointError, match="the model knows 0 to 49"):
        rows_from_text(open_layers(dense, torch.float32), [[1, 2, token, 4, 5]], [0], 4, 0.01, seed=5)


def test_texts_that_say_too_little_are_refused(dense: Path):
    layers = open_layers(dense, torch.float32)
    with pytest.raises(DataError, match="text number 2, 4 has no tokens"):
        rows_from_text(layers, [TEXTS[0], [], TEXTS[1], []], [0], 4, 0.01, seed=5)
    with pytest.raises(DataError, match="gives 3 different hidden states, and 4 experts"):
        rows_from_text(layers, [[1, 2, 3]], [0], 4, 0.01, seed=5)
    with pytest.raises(DataError, match="4 texts give the router the same hidden state"):
        rows_from_text(layers, [[1, 2, 3]] * 4, [0], 4, 0.01, seed=5)


def test_a_damaged_model_is_refused():
    tensors = random_tensors(LONG, None)
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = math.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        rows_from_text(HfLayers(Watched(tensors), LONG), TEXTS[:1], [1], 4, 0.01, seed=5)


# ---------------------------------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of single bytes that begins every text with one token more, saved by someone who cut texts at 8 tokens and filled them up to 8."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate([*letters, "<s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_files_become_tokens_as_text_does_elsewhere(with_tokenizer: Path):
    texts = ["Plain words,\r\n and a line.\n", "渡轮在早晨", "\ufeffbyte order mark", "x"]
    paths = [with_tokenizer / f"{number}.txt" for number in range(4)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    lists = token_lists_for(with_tokenizer, paths)
    for text, ids in zip(texts, lists, strict=True):
        assert ids == tokens_for(with_tokenizer, 257, text.lstrip("\ufeff")).ids
        assert ids[0] == 256 and len(ids) == 1 + len(text.lstrip("\ufeff").encode()), "neither cut, nor filled up, nor line ends changed"
    assert token_lists_for(with_tokenizer, [str(paths[0])], limit=3) == [lists[0][:3]]


def test_a_long_file_is_not_read_whole(with_tokenizer: Path):
    file = with_tokenizer / "long.txt"
    # Behind what is read the file is no text.
    file.write_bytes(b"abcd" * 100_000 + b"\xff")
    assert [len(ids) for ids in token_lists_for(with_tokenizer, [file])] == [4096]
    assert token_lists_for(with_tokenizer, [file], limit=5)[0][1:] == token_lists_for(with_tokenizer, [file])[0][1:5]


@pytest.mark.parametrize(("content", "says"), [
    (None, "No such file or directory"), (b"", "holds no text"), (b" \n\t\xc2\xa0", "holds no text"), (b"\xef\xbb\xbf", "holds no text"),
    (b"caf\xe9 au lait", "no UTF-8 text"), (b"\xff\xfea\x00b\x00", "no UTF-8 text"),
])  # fmt: skip
def test_a_file_that_is_no_text_is_named(with_tokenizer: Path, content: bytes | None, says: str):
    good, bad = with_tokenizer / "good.txt", with_tokenizer / "bad.txt"
    good.write_text("text")
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        token_lists_for(with_tokenizer, [good, bad])
    assert str(error.value).startswith(f"--router-text {bad}: ")


def test_a_folder_is_no_text(with_tokenizer: Path):
    with pytest.raises(DataError, match=f"--router-text {with_tokenizer}: Is a directory"):
        token_lists_for(with_tokenizer, [with_tokenizer])


def test_what_cannot_be_tokenized_is_refused(tmp_path: Path, with_tokenizer: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor tokenizer.model.*--router-text"):
        token_lists_for(tmp_path / "empty", [tmp_path / "a.txt"])
    with pytest.raises(ConfigError, match="limit of 0 tokens"):
        token_lists_for(with_tokenizer, [tmp_path / "a.txt"], limit=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be used as a tokenizer"):
        token_lists_for(tmp_path, [tmp_path / "a.txt"])
