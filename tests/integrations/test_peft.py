"""PEFT's adapters around our own models, and the same adapters around transformers' ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import gemma2
from tests.model import factories as F

TASKS = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config() -> gemma2.Gemma2Config:
    return F.config("27b", num_labels=3)


def inputs(kind: str) -> dict[str, Tensor]:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (19, 7)], "right")
    labels = {"sequence": torch.tensor([0, 2]), "token": ids % 3}.get(kind, ids)
    if kind != "sequence":
        labels = labels.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: Any, kind: str, steps: int = 4) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**inputs(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model: Any, kind: str) -> Tensor:
    given = inputs(kind)
    with torch.no_grad():
        out = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    return out if kind == "sequence" else out[given["attention_mask"].bool()]


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_lora_trains_reloads_merges_and_fits_transformers_too(kind: str, tmp_path: Path) -> None:
    base = F.build(config(), kind)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    lora = peft.LoraConfig(r=4, target_modules=PROJECTIONS, task_type=TASKS[kind])
    model = peft.get_peft_model(base, lora)
    losses = train(model, kind)
    assert losses[-1] < 0.9 * losses[0], losses
    for name, weight in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in before and "score" not in name:
            assert torch.equal(weight, before[plain]), name
    want = logits(model, kind)
    with model.disable_adapter():
        assert F.relative_error(logits(model, kind), want) > 1e-2, "the adapter does nothing"

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(F.build(config(), kind), tmp_path)
    assert torch.equal(logits(again, kind), want)
    theirs = peft.PeftModel.from_pretrained(F.twin(config(), kind), tmp_path)
    assert F.relative_error(logits(theirs, kind), want) < 1e-5
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert F.relative_error(logits(merged, kind), want) < 1e-5


def test_an_adapter_of_transformers_fits_our_model(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(F.twin(config()), lora)
    train(theirs, "causal")
    theirs.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(F.build(config()), tmp_path)
    assert F.relative_error(logits(ours, "causal"), logits(theirs, "causal")) < 1e-5
    ids = F.tokens(2, 11)
    made = ours.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    assert torch.equal(made, theirs.generate(input_ids=ids, **settings))


def test_lora_on_the_embedding_is_scaled_as_its_rows_are(tmp_path: Path) -> None:
    cfg = F.config("27b", tie_word_embeddings=False)
    state = F.state_dict(cfg)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].roll(31, dims=0)
    ours, theirs = gemma2.Gemma2ForCausalLM(cfg), F.twin(cfg, state=state)
    F.load(ours, state)
    lora = peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(ours.eval(), lora)
    train(model, "causal", 2)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert F.relative_error(logits(loaded, "causal"), logits(model, "causal")) < 1e-5
    want = logits(model, "causal")
    assert F.relative_error(logits(model.merge_and_unload(), "causal"), want) < 1e-5


def test_adapters_in_place_of_norms_are_used() -> None:
    names = ["input_layernorm", "post_attention_layernorm", "norm"]
    tuning = peft.LNTuningConfig(target_modules=names, task_type="CAUSAL_LM")
    models = [peft.get_peft_model(m, tuning) for m in (F.build(config()), F.twin(config()))]
    before = logits(models[0], "causal")
    for model in models:
        for name, weight in model.named_parameters():
            if "ln_tuning_layers" in name:
                weight.data += 0.5
    after = logits(models[0], "causal")
    assert F.relative_error(after, before) > 0.1, "the adapters are passed by"
    assert F.relative_error(after, logits(models[1], "causal")) < 1e-5


def test_gradient_checkpointing_trains_adapters_alike() -> None:
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        base = F.build(config())
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(train(peft.get_peft_model(base, lora), "causal"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # sums in another order


def test_soft_prompts_are_refused_by_generate() -> None:
    model = F.build(config())
    model.prepare_inputs_for_generation = lambda *_, **inputs: inputs  # as PEFT does for them
    with pytest.raises(ValueError, match="prompt learning, whose prompts would be left out"):
        model.generate(input_ids=F.tokens(1, 5), max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt learning, whose prompts would be left out"):
        model.stream(F.tokens(1, 5), max_new_tokens=2)
    usual = F.build(config())
    model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
    made = [m.generate(F.tokens(1, 5), max_new_tokens=2, do_sample=False) for m in (model, usual)]
    assert torch.equal(*made)
