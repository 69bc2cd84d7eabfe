"""Train the embedded model: a small Gemma 2 that writes dictionary definitions.

    apt-get install wordnet-base
    pip install '.[train]'
    python examples/train_tiny.py --out gemma2/tiny

One body with three heads is trained from scratch on the glosses of WordNet 3.0: the next token,
the lexicographer class of a gloss, and what each token is (definition, example sentence or
headword). Same seed and machine: same model. Files appear in --out only after training, one by
one and whole; then the model is loaded from there and scored against the baselines, which gives
README.md and figures.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_data
import torch
import torch.nn.functional as F
import wordnet
from safetensors.torch import save as serialized
from tiny_data import BOS, EOS, IGNORE, PAD, Batch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from gemma2 import Gemma2Config, Gemma2ForCausalLM, GenerationConfig

VOCAB_SIZE = 6144
BATCH_TOKENS = 2048
WARMUP_STEPS = 100
CLASS_WEIGHT, TOKEN_WEIGHT = 0.5, 0.2  # of the two smaller losses


def tiny_config(vocab_size: int) -> Gemma2Config:
    """Small, with everything on that makes Gemma 2 what it is."""
    return Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=48,
        max_position_embeddings=1024,
        sliding_window=32,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        num_labels=len(wordnet.CLASSES),
        id2label=dict(enumerate(wordnet.CLASSES)),
        label2id={name: number for number, name in enumerate(wordnet.CLASSES)},
    )


class Muon:
    """Momentum whose update is orthogonalised, for the matrices inside the layers (Jordan, 2024).

    In float32 (torch.optim.Muon multiplies bfloat16 matrices, which is slow on processors without
    instructions for them), and all matrices of one shape at once.
    """

    MOMENTUM = 0.95

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameters, momentum in self.groups:
            grads = torch.stack(
                [parameter.grad for parameter in parameters if parameter.grad is not None]
            )
            momentum.lerp_(grads, 1 - self.MOMENTUM)
            updates = orthogonalised(grads.lerp(momentum, self.MOMENTUM))
            # An orthogonal matrix times this has entries as large as an update of AdamW has.
            size = 0.2 * math.sqrt(max(updates.shape[1:]))
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * size)


def orthogonalised(x: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T of x [N, A, B], roughly: five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class CappedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of cap tanh(states @ weight^T / cap), a few rows at a time.

    A capped logit is at most `cap`, so exp() needs no maximum to be safe. The gradients are made
    on the way, while a chunk's logits are in the processor's cache: nothing of size [tokens,
    vocabulary] is kept.
    """

    ROWS = 256

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        """states [N, H], weight [V, H], targets int64 [N] -> scalar."""
        loss = states.new_zeros(())
        d_states, d_weight = torch.empty_like(states), torch.zeros_like(weight)
        chunks = (x.split(CappedCrossEntropy.ROWS) for x in (states, targets, d_states))
        for rows, wanted, d_rows in zip(*chunks, strict=True):
            tanh = (rows @ weight.T).mul_(1 / cap).tanh_()
            probabilities = (tanh * cap).exp_()
            total = probabilities.sum(1, keepdim=True)
            loss += (total.log() - cap * tanh.gather(1, wanted[:, None])).sum()
            gradient = probabilities.div_(total)
            gradient.scatter_add_(1, wanted[:, None], gradient.new_full((len(rows), 1), -1.0))
            gradient.mul_(tanh.square_().neg_().add_(1.0)).div_(len(states))
            torch.mm(gradient, weight, out=d_rows)
            d_weight.addmm_(gradient.T, rows)
        ctx.save_for_backward(d_states, d_weight)
        return loss / len(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_states, d_weight = ctx.saved_tensors
        return d_states * grads[0], d_weight * grads[0], None, None


@dataclass
class Heads:
    """The body with its language head, and the two other heads on it."""

    lm: Gemma2ForCausalLM
    sequence: nn.Linear
    token: nn.Linear

    @classmethod
    def new(cls, config: Gemma2Config) -> Heads:
        sequence = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        token = nn.Linear(config.hidden_size, len(wordnet.TOKEN_LABELS))
        for head in (sequence, token):
            nn.init.normal_(head.weight, std=config.initializer_range)
        nn.init.zeros_(token.bias)
        return cls(Gemma2ForCausalLM(config), sequence, token)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.lm.parameters(), *self.sequence.parameters(), *self.token.parameters()]

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(next token, class, token label): cross entropies.

        The class is asked for at every token of the definition, half of the weight being on the
        last: the answer at "a large wild ..." is a guess, but it tells the body early what to
        look for.
        """
        states = self.lm.model(batch.ids, batch.mask, use_cache=False).last_hidden_state
        asked = batch.next_ids != IGNORE
        cap = self.lm.config.final_logit_softcapping
        embedding = self.lm.model.embed_tokens.weight
        language = CappedCrossEntropy.apply(states[asked], embedding, batch.next_ids[asked], cap)

        asked = batch.class_weights > 0
        classes = batch.classes[:, None].expand_as(asked)[asked]
        each = F.cross_entropy(self.sequence(states[asked]), classes, reduction="none")
        sequence = (each * batch.class_weights[asked]).sum() / len(batch.classes)

        token = F.cross_entropy(self.token(states).flatten(0, 1), batch.token_labels.flatten())
        return language, sequence, token


def schedule(step: int, progress: float) -> float:
    """Warm-up, then a cosine to zero over the whole run."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(
    heads: Heads,
    epoch_batches: Callable[[int], Iterator[Batch]],
    steps_per_epoch: int,
    args: argparse.Namespace,
) -> str:
    """Train for --epochs or --minutes; gives what was done, in words."""
    inner = [p for p in heads.lm.model.layers.parameters() if p.dim() == 2]
    outer = [p for p in heads.parameters() if not any(p is q for q in inner)]
    muon = Muon(inner, weight_decay=0.1)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in outer if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in outer if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    planned = math.ceil(args.epochs * steps_per_epoch)
    start, step, tokens, epoch = time.monotonic(), 0, 0, 0
    bar = tqdm(
        total=None if args.minutes else planned, unit="step", desc="training", dynamic_ncols=True
    )
    average: float | None = None
    done = False
    while not done:
        for batch in epoch_batches(epoch):
            elapsed = time.monotonic() - start
            progress = elapsed / (60 * args.minutes) if args.minutes else step / planned
            done = progress >= 1
            if done:
                break
            language, sequence, token = heads.losses(batch)
            (language + CLASS_WEIGHT * sequence + TOKEN_WEIGHT * token).backward()
            nn.utils.clip_grad_norm_(outer, 1.0)
            factor = schedule(step, progress)
            for group in adam.param_groups:
                group["lr"] = args.lr * factor
            adam.step()
            muon.step(args.muon_lr * factor)
            adam.zero_grad()
            for parameter in inner:
                parameter.grad = None
            step += 1
            tokens += int(batch.mask.sum())
            average = (
                language.item() if average is None else 0.98 * average + 0.02 * language.item()
            )
            bar.update()
            bar.set_postfix_str(
                f"loss {average:.3f}, class {sequence.item():.2f}, token {token.item():.3f}, "
                f"{tokens / max(elapsed, 1e-9):,.0f} tokens/s",
                refresh=False,
            )
        epoch += 1
    bar.close()
    minutes = (time.monotonic() - start) / 60
    return f"{step:,} steps, {tokens / 1e6:.1f} million tokens, {minutes:.0f} minutes"


def save(heads: Heads, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights in bfloat16, settings and tokenizer; each file appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    # so small a model, written greedily, repeats itself without end ("-shaped-shaped-shaped")
    heads.lm.generation_config = GenerationConfig(
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_new_tokens=64,
        repetition_penalty=1.2,
    )
    heads.lm.to(torch.bfloat16).save_pretrained(out)
    tensors = {
        "sequence.score.weight": heads.sequence.weight,
        "token.score.weight": heads.token.weight,
        "token.score.bias": heads.token.bias,
    }
    stored = {name: tensor.detach().to(torch.bfloat16) for name, tensor in tensors.items()}
    part = out / ".heads.safetensors.part"
    part.write_bytes(serialized(stored))
    part.replace(out / "heads.safetensors")
    write_text(out / "tokenizer.json", tokenizer.to_str(pretty=False))


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def command(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that repeats this run: options that are not defaults."""
    given = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if name in ("epochs", "minutes", "threads", "seed", "lr", "muon_lr")
        and value != parser.get_default(name)
    ]
    return " ".join(["python examples/train_tiny.py --out gemma2/tiny", *given])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of the data files"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into")
    parser.add_argument(
        "--epochs", type=float, default=3.0, help="passes over the synsets (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many minutes instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="of AdamW, for embedding, norms and heads"
    )
    parser.add_argument(
        "--muon-lr", type=float, default=1e-2, help="of Muon, for the layers' matrices"
    )
    parser.add_argument(
        "--no-report", action="store_true", help="write no README.md and figures.json"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="do not train: score what is in --out"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.monotonic()

    synsets = wordnet.read_synsets(args.wordnet)
    training, held_out = wordnet.split(synsets)
    documents = wordnet.Documents(synsets, wordnet.read_exceptions(args.wordnet))
    print(
        f"{len(synsets):,} synsets: {len(training):,} to train on, {len(held_out):,} held out",
        flush=True,
    )
    run_file = args.out / "training.json"

    if not args.report_only:
        drawn: dict[int, list[wordnet.Document]] = {}

        def draw(epoch: int) -> list[wordnet.Document]:
            rng = random.Random(f"{args.seed} documents {epoch}")
            return [documents.training_document(synset, rng) for synset in training]

        drawn[0] = draw(0)
        tokenizer = tiny_data.train_tokenizer((document.text for document in drawn[0]), VOCAB_SIZE)

        def epoch_batches(epoch: int) -> Iterator[Batch]:
            rows = tiny_data.encode(tokenizer, drawn.pop(epoch, None) or draw(epoch))
            rng = random.Random(f"{args.seed} batches {epoch}")
            for group in tiny_data.batches(rows, BATCH_TOKENS, rng):
                yield tiny_data.collate(group)

        steps_per_epoch = len(
            tiny_data.batches(tiny_data.encode(tokenizer, drawn[0]), BATCH_TOKENS)
        )
        heads = Heads.new(tiny_config(tokenizer.get_vocab_size()))
        count = sum(p.numel() for p in heads.parameters())
        print(f"{count:,} parameters, {steps_per_epoch:,} steps an epoch", flush=True)
        done = train(heads, epoch_batches, steps_per_epoch, args)
        save(heads, tokenizer, args.out)
        run = {"command": command(parser, args), "run": done}
        write_text(run_file, json.dumps(run, indent=2) + "\n")
        print(f"{done}; written to {args.out}", flush=True)

    if not args.no_report:
        import tiny_report  # needs scikit-learn, which training does not

        run = json.loads(run_file.read_text(encoding="utf-8"))
        tiny_report.write(args.out, documents, training, held_out, run)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing of this run was left in --out")
