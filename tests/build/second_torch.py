"""Runs this build's operators on another torch than the one it was built against.

``python -m tests.build.second_torch --torch torch==2.14.1 --venv .venv-second``

The library in gemma2/ is used as it lies there: nothing is compiled. The other torch lives in a
virtual environment of its own, made when it is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ["numpy", "safetensors", "tokenizers", "tqdm", "pytest", "hypothesis", "expecttest"]
TESTS = ["tests/ops", "tests/model/test_model.py", "tests/model/test_tiny.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", required=True, help="a requirement, such as torch==2.14.1")
    parser.add_argument("--venv", type=Path, required=True, help="where the other torch lives")
    options = parser.parse_args()

    python = options.venv / "bin" / "python"
    if not python.exists():
        venv.create(options.venv, with_pip=True)
    # The requirement is resolved by pip alone, so that torch's own dependencies come with it.
    install = [str(python), "-m", "pip", "install", "-q", options.torch, *REQUIREMENTS]
    subprocess.run(install, check=True)

    version = "import torch; print(torch.__version__)"
    second = subprocess.check_output([str(python), "-c", version], text=True).strip()
    first = subprocess.check_output(
        [sys.executable, "-c", "from gemma2 import _C; print(_C.build_info()['built_with_torch'])"],
        text=True,
        cwd=ROOT,
    ).strip()
    if second.split("+")[0] == first:
        print(
            f"second torch: {second} is the torch of the build: nothing is shown", file=sys.stderr
        )
        return 1
    print(f"built against torch {first}, tested on torch {second}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.call(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        env=environment,
    )


if __name__ == "__main__":
    sys.exit(main())
