"""The command `gemma2`: write text, classify text, show what a model needs, measure.

Exit codes: 0 all well, 1 it failed (one line on stderr says why), 2 wrong usage, 130 interrupted.
Results go to stdout, everything else to stderr. torch is imported only once there is work for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import gemma2

if TYPE_CHECKING:
    import torch

    from gemma2 import Gemma2Config, Gemma2ForCausalLM, Tokenizer

__all__ = ["main"]

DTYPES = ("auto", "bfloat16", "float16", "float32")
SIZES = ("2b", "9b", "27b")
DEFAULT_NEW_TOKENS = 128

DESCRIPTION = """\
Gemma 2 on hand-written kernels. Without --model, the small embedded model is used,
which was trained on WordNet's definitions; with it, any Gemma 2 in the layout of the hub.
"""
EXAMPLES = """\
examples:
  gemma2 generate "a small bird"                  the embedded model writes a definition
  gemma2 generate --model gemma-2-2b-it --chat "Why is the sky blue?"
  gemma2 classify "a large wild cat with stripes" one of WordNet's 45 classes
  gemma2 info --size 9b                           what a model of this size needs
  gemma2 bench                                    tokens per second on this machine

`gemma2 COMMAND --help` explains a command.
"""
GENERATE_EXAMPLES = """\
The most probable text is written, unless one of the sampling options is given.

examples:
  gemma2 generate "a small bird"
  gemma2 generate --seed 1 --temperature 0.8 "a small bird" "a tall tree"
  gemma2 generate --model gemma-2-2b --max-new-tokens 50 "Once upon a time"
  gemma2 generate --model gemma-2-2b-it --chat "Why is the sky blue?"
  gemma2 generate --model gemma-2-9b --device cuda "Once upon a time"
  echo "a kind of boat" | gemma2 generate --json -
"""
CLASSIFY_EXAMPLES = """\
The embedded model tells which of WordNet's 45 lexicographer classes a definition belongs to.

examples:
  gemma2 classify "a large wild cat with stripes"
  gemma2 classify --top 3 --json "move very fast on foot"
  gemma2 classify --tokens "bird: a small animal that flies; the bird sang"
  gemma2 classify --model my-classifier "I liked this film"
"""
INFO_EXAMPLES = """\
examples:
  gemma2 info                       the embedded model, this build, this machine
  gemma2 info --size 27b            a published size; no weights are needed
  gemma2 info --model gemma-2-2b --json
"""
BENCH_EXAMPLES = """\
examples:
  gemma2 bench                                    the embedded model
  gemma2 bench --size 2b --layers 4               random weights, fewer layers than published
  gemma2 bench --model gemma-2-2b --prompt-tokens 512 --new-tokens 32
  gemma2 bench attention linear                   single operators at the 2B's shapes
  gemma2 bench all --dtype float32                all of them

Comparisons with other libraries are in the source tree: python -m benchmarks.runner
"""


class CommandError(Exception):
    """What the user can do something about; its text is the one line on stderr."""


# ---- options ------------------------------------------------------------------------------------


def _number(kind: type, least: float, most: float, wanted: str) -> Callable[[str], Any]:
    """Give a converter for argparse that refuses what is out of range."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {wanted}")
        return value

    return convert


_INF = float("inf")
_count = _number(int, 1, _INF, "a whole number of at least 1")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("general")
    group.add_argument("--json", action="store_true", help="machine-readable output")
    group.add_argument("--threads", type=_count, metavar="N", help="threads to use (all cores)")
    group.add_argument("--debug", action="store_true", help="show where an error comes from")

    weights = argparse.ArgumentParser(add_help=False)
    group = weights.add_argument_group("model")
    group.add_argument(
        "--model", metavar="FOLDER", help="folder with config.json, weights, tokenizer"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="to compute in (auto: as stored)"
    )
    group.add_argument("--device", default="cpu", help="to compute on: cpu, cuda, cuda:1 ... (cpu)")

    parser = argparse.ArgumentParser(
        prog="gemma2",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gemma2 {gemma2.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], help: str, epilog: str, *parents: Any
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            parents=[*parents, common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, parser=made)
        return made

    generate = command(
        "generate", _generate, "write text, streaming it as it comes", GENERATE_EXAMPLES, weights
    )
    generate.add_argument(
        "text", nargs="+", metavar="TEXT", help="what to continue, each on its own; - reads stdin"
    )
    generate.add_argument(
        "--chat", action="store_true", help="TEXT is a message to an instruction-tuned model"
    )
    generate.add_argument(
        "--raw",
        action="store_true",
        help="continue TEXT itself, not a definition of it (embedded model)",
    )
    generate.add_argument(
        "--max-new-tokens", type=_count, metavar="N",
        help=f"at most so many (the model's own setting, or {DEFAULT_NEW_TOKENS})",
    )  # fmt: skip
    generate.add_argument(
        "--no-stream", action="store_true", help="print each text when it is complete"
    )
    generate.add_argument("--stats", action="store_true", help="speed on stderr")
    sampling = generate.add_argument_group("sampling (any of these but --greedy turns it on)")
    sampling.add_argument("--greedy", action="store_true", help="the most probable token each time")
    sampling.add_argument(
        "--sample", action="store_true", help="sample with the model's own settings"
    )
    sampling.add_argument(
        "--temperature", type=_number(float, 0, 1e9, "a number of at least 0"), metavar="T",
        help="below 1: safer, above 1: wilder; 0 is greedy",
    )  # fmt: skip
    sampling.add_argument(
        "--top-k", type=_number(int, 0, _INF, "a whole number of at least 0"), metavar="K",
        help="choose among the K most probable tokens (50); 0: among all",
    )  # fmt: skip
    sampling.add_argument(
        "--top-p", type=_number(float, 1e-300, 1, "a number in (0, 1]"), metavar="P",
        help="choose among the most probable tokens that have P of the probability together",
    )  # fmt: skip
    sampling.add_argument(
        "--min-p", type=_number(float, 0, 1, "a number in [0, 1]"), metavar="P",
        help="choose among tokens at least P times as probable as the most probable one",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=_number(int, 0, 2**63 - 1, "a whole number in [0, 2**63)"), metavar="N",
        help="the same seed gives the same text",
    )  # fmt: skip
    generate.add_argument(
        "--repetition-penalty", type=_number(float, 1e-300, 1e9, "a number above 0"), metavar="R",
        help="above 1: avoid what has occurred (also when greedy)",
    )  # fmt: skip

    classify = command(
        "classify", _classify, "tell which class a text belongs to", CLASSIFY_EXAMPLES, weights
    )
    classify.add_argument("text", nargs="+", metavar="TEXT", help="texts; - reads stdin")
    classify.add_argument(
        "--top", type=_count, default=5, metavar="N", help="show the N most probable classes (5)"
    )
    classify.add_argument("--tokens", action="store_true", help="classify every token of the text")

    info = command(
        "info", _info, "show a model's size and memory, this build and this machine", INFO_EXAMPLES
    )
    which = info.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="FOLDER", help="folder with a config.json")
    which.add_argument("--size", choices=SIZES, help="a published size")

    bench = command(
        "bench", _bench, "measure tokens per second, or single operators", BENCH_EXAMPLES
    )
    bench.add_argument(
        "what",
        nargs="*",
        metavar="OP",
        help="operators to measure, or all; the whole model if none",
    )
    which = bench.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="FOLDER", help="a model to measure")
    which.add_argument("--size", choices=SIZES, help="a published size, with random weights")
    bench.add_argument("--layers", type=_count, metavar="N", help="with --size: only N layers")
    bench.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="(auto: as stored, bfloat16)"
    )
    bench.add_argument("--prompt-tokens", type=_count, default=128, metavar="N", help="(128)")
    bench.add_argument("--new-tokens", type=_count, default=32, metavar="N", help="(32)")
    bench.add_argument("--runs", type=_count, default=3, metavar="N", help="(3)")
    bench.add_argument(
        "--context", type=_number(int, 128, _INF, "a whole number of at least 128"), default=2048,
        metavar="N", help="keys that the operator attention looks at (2048)",
    )  # fmt: skip
    return parser


# ---- what the commands share --------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _texts(arguments: Sequence[str]) -> list[str]:
    """Give the texts of the command line, stdin for each `-`."""
    texts = []
    for argument in arguments:
        text = argument
        if argument == "-":
            data = sys.stdin.buffer.read()
            try:
                text = data.decode("utf-8").rstrip("\n")
            except UnicodeDecodeError as error:
                raise CommandError(
                    f"stdin is not UTF-8: byte {error.start}: {error.reason}"
                ) from error
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # what is not UTF-8 comes as surrogates
            raise CommandError(f"TEXT is not UTF-8, at character {error.start}") from error
        if not text.strip():
            raise CommandError("TEXT is empty" if argument != "-" else "stdin is empty")
        texts.append(text)
    return texts


def _folder(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CommandError(f"--model {name}: {what}: give a folder with config.json and weights")
    return path


def _embedded() -> Path:
    """Give the folder of the embedded model."""
    from gemma2 import tiny

    folder = tiny.path()
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"this installation has no embedded model in {folder}: use --model FOLDER"
        )
    return folder


def _set_threads(args: argparse.Namespace) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def _dtype(args: argparse.Namespace) -> str | None:
    return None if args.dtype == "auto" else args.dtype


def _device(args: argparse.Namespace) -> torch.device:
    from gemma2.checkpoint import checked_device

    return checked_device(args.device)


def _load_causal_lm(
    args: argparse.Namespace, device: torch.device | str = "cpu"
) -> tuple[Gemma2ForCausalLM, Tokenizer]:
    if args.model is None:
        _embedded()
        from gemma2 import tiny

        return tiny.load_causal_lm(_dtype(args)).to(device), tiny.load_tokenizer()
    folder = _folder(args.model)
    # the tokenizer first, since weights take long to read
    tokenizer = gemma2.Tokenizer.from_pretrained(folder)
    load = gemma2.Gemma2ForCausalLM.from_pretrained
    return load(folder, dtype=_dtype(args), device=device), tokenizer


def _per_second(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


# ---- generate -----------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    wants_sampling = args.sample or any(
        getattr(args, name) is not None
        for name in ("temperature", "top_k", "top_p", "min_p", "seed")
    )
    if args.greedy and wants_sampling:
        args.parser.error("--greedy takes no other sampling option")
    if args.raw and args.model is not None:
        args.parser.error(
            "--raw is for the embedded model: with --model, TEXT is continued as it is"
        )
    if args.chat and args.model is None:
        args.parser.error("--chat needs --model: the embedded model writes definitions only")
    texts = _texts(args.text)
    _set_threads(args)
    start = time.perf_counter()
    model, tokenizer = _load_causal_lm(args, _device(args))
    load_seconds = time.perf_counter() - start

    options: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    if args.greedy or wants_sampling:
        options["do_sample"] = not args.greedy
    settings = model.generation_config
    options["max_new_tokens"] = args.max_new_tokens or settings.max_new_tokens or DEFAULT_NEW_TOKENS
    seed = args.seed
    if seed is None and (wants_sampling or (settings.do_sample and not args.greedy)):
        # named in the output, so that a text that somebody likes can be had again
        seed = int.from_bytes(os.urandom(4), "little")
    for number, text in enumerate(texts):
        ids = _prompt_ids(args, tokenizer, text)
        shown = not (args.json or args.no_stream)
        if len(texts) > 1 and not args.json:
            print(f"{'' if number == 0 else chr(10)}> {text}", flush=True)
        result = _write(model, tokenizer, ids, options, seed, print_text=shown)
        if args.json:
            print(json.dumps({"prompt": text, **result, "load_seconds": load_seconds}), flush=True)
        elif args.no_stream:
            print(result["text"], flush=True)
        if args.stats and not args.json:
            _say(
                f"prompt {result['prompt_tokens']} tokens, {result['prefill_tokens_per_s']:.0f} "
                f"tokens/s; text {result['new_tokens']} tokens, "
                f"{result['decode_tokens_per_s']:.1f} tokens/s; loaded in {load_seconds:.1f} s"
                + ("" if seed is None else f"; seed {seed}")
            )


def _prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer, text: str) -> list[int]:
    if args.chat:
        return tokenizer.encode_chat([{"role": "user", "content": text}])
    if args.model is None and not args.raw:
        from gemma2 import tiny

        text = tiny.prompt(text)
    return tokenizer.encode(text)


def _write(
    model: Gemma2ForCausalLM,
    tokenizer: Tokenizer,
    ids: list[int],
    options: dict[str, Any],
    seed: int | None,
    print_text: bool,
) -> dict[str, Any]:
    """Continue one prompt, printing the text as it comes if asked to; give it with its figures."""
    import torch

    decoder = tokenizer.decode_stream()
    ends = set(model.generation_config.eos_token_ids)
    pieces: list[str] = []
    new: list[int] = []
    started = False

    def show(piece: str) -> None:
        # the space between prompt and text is of no use at the beginning of a line
        nonlocal started
        piece = piece if started else piece.lstrip()
        if not piece:
            return
        started = True
        pieces.append(piece)
        if print_text:
            print(piece, end="", flush=True)

    prompt = torch.tensor([ids], device=model.device)
    start = time.perf_counter()
    first = start
    try:
        for step in model.stream(prompt, seed=seed, **options):
            if not new:
                first = time.perf_counter()
            new.append(int(step))
            show(decoder.put(new[-1]))
        show(decoder.end())
    finally:
        if print_text:
            print(flush=True)
    end = time.perf_counter()
    return {
        "text": "".join(pieces),
        "tokens": new,
        "finish_reason": "eos" if new[-1] in ends else "length",
        "seed": seed,
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "prefill_tokens_per_s": _per_second(len(ids), first - start),
        "decode_tokens_per_s": _per_second(len(new) - 1, end - first),
    }


# ---- classify -----------------------------------------------------------------------------------


def _classify(args: argparse.Namespace) -> None:
    texts = _texts(args.text)
    _set_threads(args)
    model, tokenizer = _load_classifier(args)
    if args.tokens:
        _classify_tokens(args, model, tokenizer, texts)
    else:
        _classify_texts(args, model, tokenizer, texts)


def _load_classifier(args: argparse.Namespace) -> tuple[Any, Tokenizer]:
    if args.model is None:
        _embedded()
        from gemma2 import tiny

        load = tiny.load_token_classifier if args.tokens else tiny.load_sequence_classifier
        return load(_dtype(args)).to(_device(args)), tiny.load_tokenizer()
    folder = _folder(args.model)
    tokenizer = gemma2.Tokenizer.from_pretrained(folder)
    head = (
        gemma2.Gemma2ForTokenClassification
        if args.tokens
        else gemma2.Gemma2ForSequenceClassification
    )
    return head.from_pretrained(folder, dtype=_dtype(args), device=_device(args)), tokenizer


def _scores(config: Gemma2Config, logits: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Give what the logits [.., num_labels] mean, and what to call it."""
    logits = logits.float()
    if config.problem_type == "regression" or config.num_labels == 1:
        return logits, "value"
    if config.problem_type == "multi_label_classification":
        return logits.sigmoid(), "probability"
    return logits.softmax(-1), "probability"


def _label(config: Gemma2Config, number: int) -> str:
    return str((config.id2label or {}).get(number, f"LABEL_{number}"))


def _classify_texts(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer, texts: list[str]
) -> None:
    import torch

    read = texts
    if args.model is None:
        from gemma2 import tiny

        read = [tiny.classify_prompt(text) for text in texts]
    with torch.inference_mode():
        # one by one: without padding, and without a pad token being needed
        logits = torch.cat(
            [model(tokenizer(text)["input_ids"].to(model.device)).logits for text in read]
        )
    scores, name = _scores(model.config, logits)
    for number, (text, row) in enumerate(zip(texts, scores, strict=True)):
        best = row.topk(min(args.top, len(row)))
        found = [
            {"label": _label(model.config, int(i)), name: float(v)}
            for v, i in zip(best.values, best.indices, strict=True)
        ]
        if args.json:
            print(json.dumps({"text": text, "classes": found}), flush=True)
            continue
        if len(texts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {text}")
        for item in found:
            print(f"{item[name]:7.4f}  {item['label']}", flush=True)


def _classify_tokens(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer, texts: list[str]
) -> None:
    import torch

    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        with torch.inference_mode():
            logits = model(torch.tensor([ids], device=model.device)).logits[0]
        scores, name = _scores(model.config, logits)
        found = []
        for token, row in zip(ids, scores, strict=True):
            if token == tokenizer.bos_id:
                continue
            best = int(row.argmax())
            found.append(
                {
                    "token": tokenizer.decode([token], skip_special_tokens=False),
                    "id": token,
                    "label": _label(model.config, best),
                    name: float(row[best]),
                }
            )
        if args.json:
            print(json.dumps({"text": text, "tokens": found}), flush=True)
            continue
        if len(texts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {text}")
        width = max((len(repr(item["token"])) for item in found), default=0)
        for item in found:
            print(f"{item['token']!r:{width}}  {item[name]:.4f}  {item['label']}", flush=True)


# ---- info ---------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    _set_threads(args)
    report: dict[str, Any] = {"model": None, "build": _build(), "machine": _machine()}
    if args.model or args.size or _has_embedded():
        report["model"] = _describe(args)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for title, section in report.items():
        if section is None:
            continue
        print(title)
        for name, value in section.items():
            if value is None:
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{k}: {v}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            print(f"  {name.replace('_', ' '):22} {value}")


def _has_embedded() -> bool:
    from gemma2 import tiny

    return (tiny.path() / "config.json").is_file()


def _config(args: argparse.Namespace) -> tuple[Gemma2Config, str]:
    """Give the config that --model or --size names, else the embedded one, and its name."""
    if args.size:
        return getattr(gemma2.Gemma2Config, f"gemma2_{args.size}")(), f"Gemma 2 {args.size.upper()}"
    folder = _folder(args.model) if args.model else _embedded()
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"{folder} holds no config.json: it is no model in the layout of the hub"
        )
    name = str(folder) if args.model else "the embedded model"
    return gemma2.Gemma2Config.from_json_file(folder / "config.json"), name


def _describe(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from gemma2.bench import cache_bytes

    config, name = _config(args)
    with torch.device("meta"):
        parameters = gemma2.Gemma2ForCausalLM(config).num_parameters()
    lengths = {512, 2048, 4096, 8192, 32768, config.max_position_embeddings}
    cache = {
        str(length): _bytes(args, cache_bytes(config, length, torch.bfloat16))
        for length in sorted(lengths)
        if length <= config.max_position_embeddings
    }
    window = config.sliding_window
    return {
        "name": name,
        "parameters": parameters if args.json else f"{parameters:,}",
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_attention_heads} of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values",
        "vocabulary": config.vocab_size,
        "window": f"{window} tokens on {config.layer_types.count('sliding_attention')} layers",
        "context": config.max_position_embeddings,
        "stored_as": config.dtype,
        "weights": {
            "float32": _bytes(args, parameters * 4),
            "bfloat16, float16": _bytes(args, parameters * 2),
        },
        "cache_by_tokens": cache,
        "cache_dtype": "bfloat16, one row",
    }


def _bytes(args: argparse.Namespace, count: int) -> Any:
    if args.json:
        return count
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.0f} kB"


def _build() -> dict[str, Any]:
    import torch

    from gemma2 import _C
    from gemma2.ops._library import cuda_status

    built = _C.build_info()
    return {
        "gemma2": gemma2.__version__,
        "compiler": built["compiler"],
        "built_with_torch": built["built_with_torch"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction_sets": _C.compiled_isas(),
        "cuda": cuda_status,
    }


def _machine() -> dict[str, Any]:
    import torch

    from gemma2 import _C
    from gemma2.bench import cpu_name

    return {
        "cpu": cpu_name(),
        "runs": _C.supported_isas(),
        "in_use": _C.isa(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *map(torch.cuda.get_device_name, range(torch.cuda.device_count()))],
    }


# ---- bench --------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> None:
    if args.layers and not args.size:
        args.parser.error("--layers goes with --size")
    _set_threads(args)
    import torch

    from gemma2 import bench

    dtype = getattr(torch, _dtype(args) or "bfloat16")
    here = bench.machine()
    if args.what:
        config = gemma2.Gemma2Config.gemma2_2b()
        if args.size or args.model:
            config, _ = _config(args)
        names = [] if "all" in args.what else args.what
        for name in names:
            if name not in bench.OPERATORS:
                known = ", ".join(bench.OPERATORS)
                args.parser.error(f"there is no operator {name!r}: there are {known}, all")
        rows = bench.bench_operators(config, dtype, names, args.context, progress=_say)
    else:
        if args.size:
            config, name = _config(args)
            if args.layers:
                config = gemma2.Gemma2Config.from_dict(
                    config.to_dict(),
                    num_hidden_layers=args.layers,
                    layer_types=config.layer_types[: args.layers],
                )
                name += f", {args.layers} layers"
            _say(f"{name}, random weights, {str(dtype).removeprefix('torch.')}")
            model = bench.random_model(config, dtype)
        else:
            name = args.model or "the embedded model"
            model, _ = _load_causal_lm(args)
        rows = [
            {
                "model": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                **bench.bench_model(
                    model, args.prompt_tokens, args.new_tokens, args.runs, progress=_say
                ),
            }
        ]
    if args.json:
        print(json.dumps({"machine": here, "results": rows}, indent=2))
        return
    print(", ".join(f"{name}: {value}" for name, value in here.items()))
    print(bench.markdown(rows))


# ---- the command --------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Say warnings of the library in one line each, without the place in its source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _say(f"gemma2: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _fail(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = str(error).strip() or type(error).__name__
    ours = (CommandError, ValueError, TypeError, OSError, ImportError, RuntimeError)
    if not isinstance(error, ours):
        text = f"{type(error).__name__}: {text}"
    _say(f"gemma2: error: {text}")
    return 1


def _leave_pipe() -> NoReturn:
    """End quietly after the reader of our output has gone, as in `gemma2 ... | head`."""
    # Python flushes stdout when it ends, which would fail again
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code.

    Raises:
        SystemExit: wrong usage (2), --help and --version (0), a closed pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a letter shows a question mark instead of ending us
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    args = _parser().parse_args(argv)
    try:
        with _plain_warnings():
            args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _leave_pipe()
    except Exception as error:
        return _fail(error, args.debug)
    return 0
