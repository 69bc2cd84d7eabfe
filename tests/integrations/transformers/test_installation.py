"""Where transformers is not installed, and where transformers 5 is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers


@pytest.mark.parametrize(
    "state",
    [
        "import sys; sys.modules['transformers'] = None",
        "from transformers import cache_utils as c; del c.CacheLayerMixin",
    ],
    ids=["none", "too old"],
)
def test_without_transformers_the_import_says_what_is_missing(state: str) -> None:
    code = (
        f"{state}\n"
        "import gemma2\n"
        "try: import gemma2.integrations.transformers\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs transformers 4.57 or newer" in done.stdout, done.stderr
    assert "gemma2[transformers]" in done.stdout


@pytest.mark.slow
def test_all_of_this_holds_with_transformers_5() -> None:
    if transformers.__version__ >= "5":
        return  # this is that run
    place = os.environ.get("GEMMA2_TEST_TRANSFORMERS5")
    if not place:
        pytest.skip("GEMMA2_TEST_TRANSFORMERS5 names no folder with transformers 5")
    folder = Path(__file__).parent
    path = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, str(folder)],
        env=dict(os.environ, PYTHONPATH=path, HF_HUB_OFFLINE="1", GEMMA2_TEST_TRANSFORMERS5=""),
        cwd=folder.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "names no folder" not in done.stdout, (
        f"{place} holds transformers {transformers.__version__}"
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
