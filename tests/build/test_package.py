"""What is installed: light imports, types, and a library that asks for no particular torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gemma2
from gemma2 import _C

PACKAGE = Path(gemma2.__file__).parent


def run(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )


def test_import_brings_in_neither_transformers_nor_torch():
    done = run("import gemma2, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_resolves_without_transformers():
    done = run(
        "import gemma2, sys\n"
        "for name in gemma2.__all__: getattr(gemma2, name)\n"
        "print('transformers' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_C.pyi").exists()


def test_version_is_one():
    assert _C.build_info()["version"] == gemma2.__version__


def test_unbuilt_source_says_how_to_build_it(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "gemma2", ignore=shutil.ignore_patterns("*.so", "tiny"))
    # An editable install finds its own files before any path.
    done = run(
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from gemma2 import ops",
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )
    assert "the package was not built. Run `pip install .`" in done.stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_the_library_names_no_path_and_only_the_cpu_half_of_torch():
    import gemma2.ops._library as loader

    library = Path(loader.__file__).parent.parent / "_ops.so"
    dynamic = subprocess.check_output(["readelf", "-d", str(library)], text=True)
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert [n for n in needed if "torch" in n or "c10" in n] == ["libtorch_cpu.so"], needed
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_operators_are_listed_on_one_page():
    import torch

    import gemma2.ops

    listed = {
        "embed", "rms_norm", "add_rms_norm", "add_rms_norm_", "rope", "cache_write", "rope_cache",
        "attention", "attention_backward", "geglu", "softcap", "linear", "sample",
    }  # fmt: skip
    assert {name for name in listed if hasattr(torch.ops.gemma2, name)} == listed
    assert set(gemma2.ops.__all__) - {"rope_table"} == listed - {"attention_backward"}
