"""Trains a model: `torchrun --nproc-per-node N launch/pretrain_moe.py --config configs/X.yaml section.field=value ...` (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.cli import pretrain  # noqa: E402

if __name__ == "__main__":
    pretrain(sys.argv[1:])
