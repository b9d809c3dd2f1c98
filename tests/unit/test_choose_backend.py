"""Which backend `auto` means, on a machine that is said to have a GPU and Transformer Engine."""

from __future__ import annotations

import importlib.util

import pytest
from training_bodies import BASE, merged

from megatron_skywork import device
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.model.transformer_config import choose_backend


def _config(backend: str, own_mask: bool) -> Config:
    return Config(**merged(BASE, {"model": {"backend": backend}, "data": {"reset_attention_mask": own_mask}}))


def test_a_mask_per_document_goes_to_attention_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(_config("auto", False)) == "torch"
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [choose_backend(_config("auto", own_mask)) for own_mask in (False, True)] == ["te", "torch"]
    with pytest.raises(ConfigError, match="reset_attention_mask"):
        choose_backend(_config("te", True))
