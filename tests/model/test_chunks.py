"""A prompt of many chunks takes the memory of one chunk beside the cache."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The peak of what is resident, above what the model and a cache with memory take; run apart, since a
# process does not give memory back. Large activations: they are what must not add up.
SCRIPT = """
import re, sys, torch
from pathlib import Path
from gemma2 import Gemma2Config, Gemma2ForCausalLM, HybridCache

chunk, chunks = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=97, hidden_size=256, intermediate_size=16384, num_hidden_layers=2, head_dim=64,
    num_attention_heads=4, num_key_value_heads=1, query_pre_attn_scalar=64, sliding_window=256,
    max_position_embeddings=65536,
)
model = Gemma2ForCausalLM(config).eval()
length = chunk * chunks
cache = HybridCache(config, 1, length + 1, "cpu", torch.float32)
for k, v in cache:
    k.fill_(0), v.fill_(0)
ids = torch.randint(3, 97, (1, length))
options = {"max_new_tokens": 1, "eos_token_id": [], "prefill_chunk_size": chunk}
model.generate(ids[:, :8], **options)


def most():  # KiB; ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


before = most()
model.generate(ids, past_key_values=cache, **options)
print(most() - before, end="")
"""


def peak(chunk: int, chunks: int) -> float:
    """MiB that reading a prompt adds to what was the most before."""
    words = [sys.executable, "-c", SCRIPT, str(chunk), str(chunks)]
    # what is freed goes back to the system at once, not to malloc's heap
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, env=exact, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory was taken")
def test_a_prompt_of_many_chunks_takes_the_activations_of_one() -> None:
    one, many, whole = peak(256, 1), peak(256, 12), peak(3072, 1)
    assert many < 1.1 * one + 4, f"{many:.0f} MiB for 12 chunks, {one:.0f} for one, {whole:.0f}"
    assert whole > 4 * many, f"{whole:.0f} MiB in one chunk: the measure sees what chunks save"
