"""Text to token ids with the tokenizer that lies in a checkpoint's folder, for the commands that run a checkpoint on text.

`data.tokenizers` does the same for training data, where it needs more of a tokenizer; it lies above the converter, which may not import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_skywork.convert.files.checkpoint_folder import HF_FOLDER
from megatron_skywork.errors import CheckpointError

_NAMES = ("tokenizer.json", "tokenizer.model")


def find_tokenizer(folder: Path | str) -> Path | None:
    """tokenizer.json or tokenizer.model of a folder or of its `hf/`; None where there is neither."""
    places = (Path(folder), Path(folder) / HF_FOLDER)
    return next((place / name for name in _NAMES for place in places if (place / name).is_file()), None)


def encode(tokenizer: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens the tokenizer itself adds to a text.

    Raises:
        CheckpointError: the file is damaged, or the package that reads it is not installed.
    """
    try:
        if tokenizer.suffix == ".json":
            from tokenizers import Tokenizer

            loaded = Tokenizer.from_file(str(tokenizer))
            # A file may carry the truncation and padding of whoever saved it last.
            loaded.no_truncation()
            loaded.no_padding()
            return [loaded.encode(text).ids for text in texts]
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(tokenizer))
        return [list(processor.encode(text)) for text in texts]
    except ImportError as error:
        raise CheckpointError(f"{tokenizer}: needs the package {error.name}; install it") from error
    except Exception as error:  # both libraries raise bare exceptions for a damaged file
        raise CheckpointError(f"{tokenizer}: cannot be used as a tokenizer ({type(error).__name__}: {error})") from error


def ids_tensor(ids: Sequence[int], vocab_size: int) -> torch.Tensor:
    """Ids [T], all of them tokens of a model; a negative one would count from the embedding's end.

    Raises:
        CheckpointError: ids outside the vocabulary.
    """
    tokens_T = torch.tensor(list(ids), dtype=torch.int64)
    if len(tokens_T) and not 0 <= int(tokens_T.min()) <= int(tokens_T.max()) < vocab_size:
        raise CheckpointError(f"token ids lie between {int(tokens_T.min())} and {int(tokens_T.max())}, and the model knows 0 to {vocab_size - 1}")
    return tokens_T
