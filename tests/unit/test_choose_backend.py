"""Which backend `auto` means, on a machine that is said to have a GPU and Transformer Engine."""

from __future__ import annotations

import importlib.util

import pytest
from training_bodies import BASE, merged

from megatron_skywork import device
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.model.transformer_config import choose_backend


def _config(backend: str, apart: bool) -> Config:
    return Config(**merged(BASE, {"model": {"backend": backend}, "data": {"reset_attention_mask": apart}}))


def test_documents_go_to_attention_that_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(_config("auto", False)) == "torch"
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [choose_backend(_config("auto", apart)) for apart in (False, True)] == ["te", "torch"]
    with pytest.raises(ConfigError, match="reset_attention_mask"):
        choose_backend(_config("te", True))
