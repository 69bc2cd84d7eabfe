"""The Python of the README runs as it stands there, on the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from gemma2 import tiny

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    code = "\n".join(blocks)
    tiny.load_sequence_classifier().save_pretrained(tmp_path)
    for written, folder in (("gemma-2-2b-it", tiny.path()), ("classifier", tmp_path)):
        assert f'"path/to/{written}"' in code
        code = code.replace(f'"path/to/{written}"', repr(str(folder)))
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    ids, probabilities = names["ids"], names["probabilities"]
    assert isinstance(ids, torch.Tensor)
    assert ids.dtype == torch.int64
    assert isinstance(probabilities, torch.Tensor)
    torch.testing.assert_close(probabilities.float().sum(), torch.tensor(1.0), rtol=0.02, atol=0)
