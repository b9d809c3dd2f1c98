"""Which backend `auto` means and what is fused, on a machine that is said to have a GPU, Transformer Engine or a compiler."""

from __future__ import annotations

import importlib.util

import pytest
from training_bodies import BASE, merged

from megatron_skywork import device
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.model.transformer_config import choose_backend, transformer_config


def _config(backend: str, apart: bool) -> Config:
    return Config(**merged(BASE, {"model": {"backend": backend}, "data": {"reset_attention_mask": apart}}))


def test_documents_go_to_attention_that_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(_config("auto", False)) == "torch"
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [choose_backend(_config("auto", apart)) for apart in (False, True)] == ["te", "torch"]
    with pytest.raises(ConfigError, match="reset_attention_mask"):
        choose_backend(_config("te", True))


def test_activations_are_compiled_where_that_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("torch", False)
    assert not transformer_config(config, "torch").bias_activation_fusion
    monkeypatch.setattr(device, "has_compiler", lambda: True)
    assert transformer_config(config, "torch").bias_activation_fusion and transformer_config(config, "torch").apply_rope_fusion
    as_written = Config(**merged(BASE, {"model": {"compile": False}}))
    assert not transformer_config(as_written, "torch").bias_activation_fusion
