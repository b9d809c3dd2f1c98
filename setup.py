"""Packaging. Reads the version from the package's text, so that building a wheel imports nothing but setuptools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "megatron_skywork" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE).group(1)

EXTRAS = {
    "te": ["transformer-engine[pytorch]>=2.0"],
    "wandb": ["wandb>=0.17"],
    "tensorboard": ["tensorboard>=2.15"],
    "hf": ["transformers>=4.48", "gguf>=0.10", "accelerate>=0.30"],
    "plot": ["matplotlib>=3.8"],
    "dev": ["pytest>=8", "ruff>=0.6", "mypy>=1.10", "types-PyYAML"],
}

setup(
    name="megatron_skywork",
    version=VERSION,
    description="Upcycling dense language models to mixtures of experts, and training them on megatron-core.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_skywork", "megatron_skywork.*"]),
    package_data={"megatron_skywork": ["convert/skywork_moe_hf/*", "plan/machines.yaml"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "packaging",
        "psutil>=5.9",
        "pydantic>=2.7",
        "PyYAML>=6.0",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "zstandard>=0.22",
    ],
    extras_require=EXTRAS,
)
