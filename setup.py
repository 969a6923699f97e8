import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="deebert",
    version=re.search(r'__version__ = "(.+)"', (HERE / "deebert" / "__init__.py").read_text())[1],
    description="Dynamic early exiting for BERT and RoBERTa (DeeBERT, ACL 2020)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["deebert", "deebert.*"]),
    py_modules=["run_glue_deebert"],
    python_requires=">=3.10",
    install_requires=["numpy>=1.26", "tokenizers>=0.20", "filelock>=3.10"],  # with [onnx] all that an export needs
    entry_points={"console_scripts": ["deebert = deebert.__main__:run"]},
    extras_require={
        "train": [
            "torch>=2.6",
            "transformers>=5.19,<6",
            "accelerate>=1.10",
            "scikit-learn>=1.4",
            "scipy>=1.11",
            "tqdm>=4.60",
            "tensorboardX>=2.6",
            "matplotlib>=3.8",
            "pandas>=2.1",
        ],
        "parquet": ["pyarrow>=14"],
        "datasets": ["datasets>=3"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"],
        "onnx": ["onnxruntime>=1.22"],
        "export": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],  # with [train]
    },
)
