"""Small tokenizers, document files and datasets that the data tests make on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megatron_skywork.config.schema import Config
from megatron_skywork.data.preprocess import PreprocessOptions, preprocess

WORDS = [
    "the", "a", "router", "expert", "gate", "token", "layer", "norm", "loss", "drop", "learns", "routes", "keeps", "every", "some", "many", "small", "large",
    "模型", "训练", "naïve", "été", "1", "2", "3", "42"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of a few to sixty words."""
    random_state = random.Random(seed)
    return [" ".join(random_state.choices(WORDS, k=random_state.randint(3, 60))) + f" #{number}." for number in range(count)]


def make_bpe_folder(folder: Path, seed: int = 0, vocab_size: int = 400) -> Path:
    """A Hugging Face folder: byte-level BPE tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(sentences(200, seed), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}))
    return folder


def make_sentencepiece(folder: Path) -> Path:
    """A sentencepiece tokenizer.model with byte fallback, unk/bos/eos 0/1/2 as LLaMA has them."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences(200)), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return folder / "tokenizer.model"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One document a line."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def make_dataset(folder: Path, name: str, tokenizer: Path, count: int = 60, seed: int = 0, **options: Any) -> str:
    """A dataset of `count` documents; returns its prefix."""
    source = write_jsonl(folder / f"{name}.jsonl", sentences(count, seed))
    preprocess(PreprocessOptions(inputs=[str(source)], tokenizer=str(tokenizer), output=str(folder / name), **options))
    return str(folder / name)


def data_config(folder: Path, data: dict[str, Any], train: dict[str, Any] | None = None, vocab_size: int = 512) -> Config:
    """A whole config around the data settings of a test."""
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": vocab_size}
    defaults: dict[str, Any] = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "seed": 7, "eval_samples": 10}
    sections = {"model": model, "data": {"seq_length": 32, "num_workers": 0, **data}, "train": {**defaults, **(train or {})}}
    return Config.model_validate({"run_dir": str(folder / "run"), **sections})
