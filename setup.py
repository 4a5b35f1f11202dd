"""The package `lit_gpt`. Its version stands in lit_gpt/__init__.py, its dependencies in requirements.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements() -> list[str]:
    """The lines of requirements.txt without their comments."""
    lines = (line.split("#")[0].strip() for line in text("requirements.txt").splitlines())
    return [line for line in lines if line]


setup(
    name="lit_gpt",
    version=re.findall(r'__version__ = "(.+)"', text("lit_gpt/__init__.py"))[0],
    description="LLäMmlein: pretraining of LLaMA models from scratch, with a record of every document and exact resume",
    license="Apache-2.0",
    license_files=["license.md"],
    packages=find_packages(include=["lit_gpt", "lit_gpt.*"]),
    package_data={"lit_gpt.report": ["assets/*"]},
    python_requires=">=3.10,<3.15",
    install_requires=requirements(),
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)],
    extras_require={
        "gpu": [  # for Hopper GPUs; the versions that docs/benchmarks.md was measured with
            "flash-attn-4==4.0.0b36",
            "quack-kernels>=0.6.5,<0.7",
        ],
        # FlashAttention 2 shares its package with flash-attn-4, so not with "gpu". Only a stand-in of it was called.
        "flash-attn": ["flash-attn>=2.8,<3"],
        "xformers": ["xformers>=0.0.33,<0.1"],  # each release wants one torch and CUDA; none has run on a GPU
        "gguf": ["gguf>=0.16,<1"],  # up to 0.13 it brought a package `scripts`, which hid ours
        "llama-cpp": ["xllamacpp>=2026.9.11063"],  # wheels for Linux and macOS; since 2026.9 with the split ufakzeka
        "float8": ["torchao>=0.14,<0.19"],
        "bench": [  # what the benchmarks compare with; litgpt comes apart, see scripts/benchmark_litgpt.py
            "liger-kernel>=0.5,<0.9",
            "cut-cross-entropy>=25.1,<26",
            "psutil>=5.9,<8",
            "tqdm>=4.66,<5",
        ],
        "text": ["resiliparse>=1,<3"],  # scripts/collect_debian_text.py
        "eval": ["lm-eval[hf]>=0.4.9,<0.5"],
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.17,<0.18",  # a formatter's output belongs to its release
            "mypy>=2.4,<2.5",
            "setuptools>=77,<90",  # a test builds a wheel
            "types-PyYAML>=6,<7",
            "mkdocs>=1.6,<2",  # `make docs`; 2 is another program
            "mkdocs-material>=9.7,<10",
            "gguf>=0.16,<1",
            "xllamacpp>=2026.9.11063",
            "torchao>=0.14,<0.19",
            "lm-eval[hf]>=0.4.9,<0.5",
            "resiliparse>=1,<3",
            "sentence-transformers>=6,<7",  # as a user of exports
        ],
    },
)
