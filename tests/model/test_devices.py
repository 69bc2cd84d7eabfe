"""The model on devices other than the CPU: nothing waits for them, and each layer may have its own.

What only a GPU can show is in tests/cuda/test_device.py. Here devices are stand-ins (gpus.py): no
numbers come out, but a value that is read, or tensors of two devices that meet, are errors.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

import gemma2
from gemma2 import HybridCache, checkpoint, cli
from gemma2.weights import Weights
from tests.model import factories as F
from tests.model.gpus import Watch, gpus, move

__all__ = ["gpus"]  # a fixture

A, B, CPU = "cuda:0", "cuda:1", "cpu"
ROWS = 2


def model_on(device: str = A, kind: str = "causal", **overrides: Any) -> Any:
    """A model of two layers, a sliding one (window 8) and a full one."""
    with torch.device(device):
        return getattr(gemma2, F.HEADS[kind])(F.config("three", **overrides)).eval()


def ids(columns: int, device: str = A) -> Tensor:
    return torch.zeros(ROWS, columns, dtype=torch.int64, device=device)


def run_all(model: Any, cache: HybridCache, first: dict[str, Any]) -> None:
    """Prefill, decode steps, chunks that wrap the ring and that do not, with masks and without."""
    model(ids(20), past_key_values=cache, **first)
    for columns in (1, 1, 5, 300):
        model(ids(columns), past_key_values=cache)
    for columns in (1, 5, 300):
        model(ids(columns), past_key_values=cache, attention_mask=ids(columns))


def inputs(name: str) -> dict[str, Any]:
    if name == "mask of all columns":
        return {"attention_mask": ids(20)}
    if name == "documents by position":
        return {"position_ids": ids(20)}
    if name == "documents by bounds":
        return {"cu_seqlens": torch.zeros(4, dtype=torch.int64, device=A)}
    if name == "documents and a mask":
        return {"position_ids": ids(20), "attention_mask": ids(20)}
    return {}


FIRST = (
    "tokens only",
    "mask of all columns",
    "documents by position",
    "documents by bounds",
    "documents and a mask",
)


# ---- nothing waits -------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_a_gpu_would_wait_for(gpus: Watch) -> None:
    x = torch.zeros(3, device=A)
    for wait in (bool, int, Tensor.item, Tensor.nonzero):
        with pytest.raises(Exception, match=r"aten\.(_local_scalar_dense|nonzero)"):
            wait(x[:1])
    with pytest.raises(Exception, match="same device"):
        x + torch.zeros(3, device=B)
    with pytest.raises((AssertionError, ValueError), match=r"gemma2::softcap|rms_norm"):
        gemma2.ops.rms_norm(x, torch.zeros(3, device=B))
    assert x.cpu().device.type == CPU
    assert gpus.transfers == [(A, CPU)]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("length", [700, None], ids=["of a length", "growing"])
@torch.no_grad()
def test_no_call_waits_for_the_device(gpus: Watch, first: str, length: int | None) -> None:
    model = model_on()
    gpus.transfers.clear()
    run_all(model, HybridCache(model.config, ROWS, length), inputs(first))
    assert gpus.transfers == []
    assert "gemma2::rope_cache" in gpus.calls  # what decodes
    assert "gemma2::cache_write" in gpus.calls  # what reads long chunks


@torch.no_grad()
def test_a_plain_call_that_makes_its_cache_does_not_wait(gpus: Watch) -> None:
    out = model_on()(ids(20), attention_mask=ids(20), output_hidden_states=True)
    assert out.past_key_values.lengths.device == torch.device(A)
    assert out.logits.device == torch.device(A)


@pytest.mark.parametrize("kind", ["causal", "token", "sequence"])
def test_a_loss_does_not_wait(gpus: Watch, kind: str) -> None:
    model = model_on(kind=kind, pad_token_id=0).train()
    labels = ids(20) if kind != "sequence" else ids(1)[:, 0]
    gpus.transfers.clear()
    assert model(ids(20), attention_mask=ids(20), labels=labels).loss.requires_grad
    assert gpus.transfers == []


@torch.no_grad()
def test_what_goes_back_in_a_cache_waits_only_where_it_must(gpus: Watch) -> None:
    model = model_on()
    cache = HybridCache(model.config, ROWS, 700)
    model(ids(20), past_key_values=cache)
    cache.reorder(ids(1)[:, 0])
    taken = cache.snapshot()
    model(ids(1), past_key_values=cache)
    assert taken.lengths.device == torch.device(A)
    assert cache.get_seq_length() == 21


# ---- weights -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    F.build(F.config("three", tie_word_embeddings=True)).save_pretrained(tmp_path)
    return tmp_path


def loaded(folder: Path, gpus: Watch, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The folder's model, read onto a device that is not there."""
    real = Weights.read

    def read(weights: Weights, name: str) -> Tensor:
        with unset_fake_temporarily():
            tensor = real(weights, name)
        return gpus.mode.from_tensor(tensor)

    monkeypatch.setattr(Weights, "read", read)
    monkeypatch.setattr(checkpoint, "checked_device", torch.device)
    return gemma2.Gemma2ForCausalLM.from_pretrained(folder, device=A, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_cross_once_in_the_files_dtype_and_are_converted_there(
    folder: Path, gpus: Watch, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(FakeTensor, "tolist", lambda flags: [False] * len(flags))  # none overflows
    model = loaded(folder, gpus, monkeypatch, dtype=dtype)
    parameters = list(model.parameters())
    assert {(str(p.device), p.dtype) for p in parameters} == {(A, dtype)}
    assert gpus.transfers == [(CPU, A)] * len(parameters)
    assert gpus.dtypes_changed_on == ([] if dtype == torch.float32 else [A] * len(parameters))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrowing_conversion_waits_for_the_device_once(
    folder: Path, gpus: Watch, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    waits = []

    def read_back(flags: Tensor) -> list[bool]:
        waits.append((str(flags.device), len(flags)))
        return [False] * len(flags)

    monkeypatch.setattr(FakeTensor, "tolist", read_back)
    model = loaded(folder, gpus, monkeypatch, dtype=dtype)
    assert waits == [(A, len(list(model.parameters())))]


# Loads onto meta as onto a GPU, whose driver reads what is mapped and keeps no copy on the host.
PEAK = """
import sys
from pathlib import Path
import torch
from gemma2 import Gemma2Config, Gemma2ForCausalLM, checkpoint
from gemma2.weights import Weights

mapped = Weights.read
def read(weights, name):
    tensor = mapped(weights, name)
    tensor.view(torch.uint8).flatten()[::512].sum()
    return tensor
Weights.read = read
checkpoint.checked_device = torch.device
checkpoint._check_overflow = lambda *_: None

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def load(dtype):
    try:
        Gemma2ForCausalLM.from_pretrained(sys.argv[1], device="meta", dtype=dtype)
    except RuntimeError as error:
        assert "still on the meta device" in str(error)

sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4,
             head_dim=64)
model = Gemma2ForCausalLM(Gemma2Config(vocab_size=16000, num_hidden_layers=8, **sizes)).bfloat16()
model.save_pretrained(sys.argv[1])
weights = list(model.parameters())
print(sum(p.numel() for p in weights) * 2, max(p.numel() for p in weights) * 2)
del model, weights
for dtype in ("float32", "bfloat16", "float16"):
    load(dtype)  # what torch imports at the first use of the meta device is not what is measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = status("VmRSS")
    load(dtype)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc"
)
def test_the_host_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    size, tensor, *peaks = map(int, done.stdout.split())
    slack = 8 * 2**20
    assert size > 3 * (tensor + slack)
    assert max(peaks) < tensor + slack, peaks


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_told_before_any_work(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = gemma2.Gemma2ForCausalLM.from_pretrained
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        ValueError, match=r"from_pretrained: device is .*, but torch .* was built without"
    ):
        load("no such folder", device=device)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"from_pretrained: device is .*, but torch sees no GPU"):
        load("no such folder", device=device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FileNotFoundError):
        load("no such folder", device=device)
    with pytest.raises(ValueError, match="is 'cuda:1', but torch sees only 1 of them"):
        load("no such folder", device="cuda:1")


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", -1, "cuda:x"])
def test_a_device_of_another_kind_is_refused(device: Any) -> None:
    with pytest.raises(
        ValueError, match=r"from_pretrained: device is .*: it must be \"cpu\", \"cuda\""
    ):
        gemma2.Gemma2ForCausalLM.from_pretrained("no such folder", device=device)
    with pytest.raises(TypeError, match="device is a bool"):
        gemma2.Gemma2ForCausalLM.from_pretrained("no such folder", device=True)


@pytest.mark.parametrize("command", ["generate", "classify"])
def test_the_command_says_that_a_device_is_not_there(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main([command, "--device", "cuda:2", "a bird"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "device is 'cuda:2', but torch sees only 2 of them" in said.err


@pytest.mark.parametrize("move_it", [nn.Module.half, lambda m: m.to_empty(device=CPU)])
@pytest.mark.parametrize("device", [CPU, "meta"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_tied_wherever_the_model_goes(
    move_it: Any, device: str, tied: bool
) -> None:
    with torch.device(device):
        model = gemma2.Gemma2ForCausalLM(F.config("three", tie_word_embeddings=tied))
    move_it(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


# ---- layers on several devices -------------------------------------------------------------------


def spread(model: Any, device: str = B) -> Any:
    """Put the last half of the layers and the final norm on another device than the rest."""
    layers = model.model.layers
    for part in (*layers[len(layers) // 2 :], model.model.norm):
        move(part, device)
    return model


@pytest.mark.parametrize("first", FIRST)
@torch.no_grad()
def test_what_a_call_shares_is_copied_once_to_each_device(gpus: Watch, first: str) -> None:
    model = spread(model_on(num_hidden_layers=4))
    cache = HybridCache(model.config, ROWS, 700)
    documents = first.startswith("documents")
    gpus.transfers.clear()
    model(ids(20), past_key_values=cache, **inputs(first))
    # the stream, cos, sin, q_start, kv_len and, of documents, kv_start go there; the states come back
    assert Counter(gpus.transfers) == {(A, B): 5 + documents, (B, A): 1}
    gpus.transfers.clear()
    model(ids(1), past_key_values=cache)
    assert Counter(gpus.transfers) == {(A, B): 5 + documents, (B, A): 1}


@pytest.mark.parametrize("first", FIRST)
@torch.no_grad()
def test_keys_and_values_live_where_their_layer_does(gpus: Watch, first: str) -> None:
    model = spread(model_on(num_hidden_layers=4))
    cache = HybridCache(model.config, ROWS)
    run_all(model, cache, inputs(first))
    devices = [str(k.device) for k, _ in cache]
    assert devices == [A, A, B, B]
    cache.reorder(ids(1)[:, 0])
    cache.snapshot()
    cache.grow(2000)
    assert [str(v.device) for _, v in cache] == devices
    assert str(cache.lengths.device) == A
    out = model(ids(3), past_key_values=cache)
    assert str(out.logits.device) == A


@torch.no_grad()
def test_a_cache_for_one_device_is_refused_by_a_layer_elsewhere(gpus: Watch) -> None:
    model = spread(model_on(num_hidden_layers=4))
    cache = HybridCache(model.config, ROWS, 100, device=A)
    with pytest.raises(ValueError, match="has layer 2 on cuda:0, the model on cuda:1: make a new"):
        model(ids(3), past_key_values=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_cache_of_another_device_than_the_input_is_refused(gpus: Watch) -> None:
    model = model_on()
    cache = HybridCache(model.config, ROWS, 100)
    model(ids(3), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache is on cuda:0, the model's input on cuda:1"):
        model(ids(3, B), past_key_values=cache)


@torch.no_grad()
def test_attentions_masks_and_states_of_layers_elsewhere(gpus: Watch) -> None:
    model = spread(model_on(num_hidden_layers=4))
    cache = HybridCache(model.config, ROWS, 700)
    out = model(ids(20), past_key_values=cache, output_attentions=True, output_hidden_states=True)
    assert [str(w.device) for w in out.attentions] == [A, A, B, B]
    assert [str(h.device) for h in out.hidden_states] == [A, A, A, B, B]
    # with a past and a mask rows are packed, and the results put back into the caller's columns
    out = model(ids(5), past_key_values=cache, attention_mask=ids(5), output_attentions=True)
    assert [w.shape[-1] for w in out.attentions] == [25] * 4
    mask = torch.zeros(1, 1, 5, 30, dtype=torch.bool, device=A)
    with pytest.warns(UserWarning, match="4-D attention masks"):
        out = model(ids(5), past_key_values=cache, attention_mask=mask)
    assert str(out.logits.device) == A


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_come_back_to_every_device(gpus: Watch, checkpointing: bool) -> None:
    # autograd has no threads for GPUs that are not there, hence two devices that need none
    model = spread(model_on("meta"), CPU).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(ids(20, "meta"), labels=ids(20, "meta")).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.device == parameter.device, name
    assert model.model.layers[1].mlp.up_proj.weight.grad.device == torch.device(CPU)


class Hook:
    """What accelerate's device_map puts on a block: its inputs are moved, nothing else is."""

    def __init__(self, module: nn.Module, device: str) -> None:
        forward = module.forward
        module._hf_hook = self  # type: ignore[assignment]
        module.forward = lambda *args, **kwargs: forward(  # type: ignore[method-assign]
            *(x.to(device) if isinstance(x, Tensor) else x for x in args), **kwargs
        )


@torch.no_grad()
def test_hooks_that_move_the_stream_are_followed(gpus: Watch) -> None:
    model = model_on(num_hidden_layers=4)
    body = model.model
    for i, layer in enumerate(body.layers):
        move(layer, A if i % 2 else B)
        Hook(layer, A if i % 2 else B)
    for module in (body.embed_tokens, body.norm, model.lm_head):
        Hook(module, A)
    cache = HybridCache(model.config, ROWS)
    run_all(model, cache, {})
    assert [str(k.device) for k, _ in cache] == [B, A, B, A]
    gpus.transfers.clear()
    model(ids(1), past_key_values=cache)
    # the stream at each of four borders; cos, sin, q_start and kv_len once
    assert Counter(gpus.transfers) == {(A, B): 2 + 4, (B, A): 2}


@torch.no_grad()
def test_on_one_device_a_layer_costs_the_same_operators_as_ever(gpus: Watch) -> None:
    counts = []
    for layers in (2, 4):
        model = model_on(num_hidden_layers=layers)
        cache = HybridCache(model.config, ROWS, 100)
        model(ids(5), past_key_values=cache)
        gpus.calls.clear()
        model(ids(1), past_key_values=cache)
        counts.append(Counter(gpus.calls))
    per_layer = {name: n // 2 for name, n in (counts[1] - counts[0]).items()}
    views = {"aten::view", "aten::transpose", "aten::t", "aten::_unsafe_view", "aten::detach"}
    assert {name: n for name, n in per_layer.items() if name not in views} == {
        "aten::mm": 7,
        "gemma2::rope_cache": 1,
        "gemma2::attention": 1,
        "gemma2::geglu": 1,
        "gemma2::add_rms_norm_": 2,
    }
