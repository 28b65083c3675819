"""The commands that run language models: `qfunc generate` and `qfunc eval`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

PATH = Annotated[str, typer.Argument(help="checkpoint folder, .gguf file or hub id")]
DTYPE = Annotated[str | None, typer.Option(help="of the activations: float32, bfloat16, float16 [default: the checkpoint's]")]
QUANTIZE = Annotated[str | None, typer.Option(help="quantize a float checkpoint by this scheme while loading")]
CACHE = Annotated[str | None, typer.Option(help="format of the key/value cache, such as int8_token or fp8_e4m3")]


def generate(
    path: PATH,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    tokens: Annotated[int, typer.Option(help="at most so many new tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="draw from the most likely tokens of this probability mass", min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: DTYPE = None,
    quantize: QUANTIZE = None,
    cache: CACHE = None,
) -> None:
    """Continue a text with a model, quantized or not, as the tokens come."""
    from .interop.model import load_model
    model = load_model(path, dtype=dtype, quantize=quantize, cache=cache)
    typer.echo(repr(model), err=True)
    for piece in model.generate(prompt, max_new_tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, stream=True):
        typer.echo(piece, nl=False)
    typer.echo()


def evaluate(
    path: PATH,
    text: Annotated[Path, typer.Option(help="text file")],
    against: Annotated[str | None, typer.Option(help="second checkpoint: its perplexity, KL divergence from it, top-1 agreement")] = None,
    length: Annotated[int, typer.Option(help="tokens of a window", min=2)] = 512,
    stride: Annotated[int | None, typer.Option(help="tokens between windows [default: the length, no overlap]", min=1)] = None,
    split: Annotated[str | None, typer.Option(help=r"what separates documents, such as '\n\n\n'; each is then followed by the "
                                              "id that ends a text")] = None,
    limit: Annotated[int | None, typer.Option(help="use only so many tokens of the text", min=1)] = None,
    schemes: Annotated[str | None, typer.Option(help="comma-separated: a table of the model quantized by each")] = None,
    calibration: Annotated[Path | None, typer.Option(help="text for schemes that need statistics: its first 16 windows")] = None,
    batch: Annotated[int, typer.Option(help="windows at a time", min=1)] = 8,
    dtype: DTYPE = None,
    quantize: QUANTIZE = None,
    cache: CACHE = None,
) -> None:
    """Perplexity of a text, and how a second checkpoint compares."""
    from .interop.model import load_model
    from .layers.evaluate import evaluate as run
    from .layers.evaluate import token_stream
    model = load_model(path, dtype=dtype, quantize=quantize, cache=cache)
    if model.tokenizer is None:
        raise ValueError(f"{path}: expected a tokenizer.json beside the weights (and the tokenizers package), found none")
    other = None if against is None else load_model(against, dtype=dtype, cache=None)
    separator = None if split is None else split.encode().decode("unicode_escape")
    end = model.config.eos[0] if separator is not None and model.config.eos else None
    ids = token_stream(model.tokenizer, text.read_text(encoding="utf-8"), separator, end)[:limit]
    if schemes is not None:
        statistics = None
        if calibration is not None:
            stream = token_stream(model.tokenizer, calibration.read_text(encoding="utf-8"), separator, end)[:16 * length]
            statistics = [stream[i:i + length][None] for i in range(0, len(stream) - length + 1, length)]
        _table(model, ids, schemes.split(","), statistics, length=length, stride=stride, batch=batch)
        return
    start = time.perf_counter()
    found = run(model, ids, length=length, stride=stride, against=other, batch=batch)
    seconds = time.perf_counter() - start
    typer.echo(f"{text}: {found.tokens} tokens, length {found.length}, stride {found.stride}, {seconds:.1f} s")
    typer.echo(f"perplexity {found.perplexity:.4f}  {model!r}")
    if other is not None:
        typer.echo(f"perplexity {found.other_perplexity:.4f}  {other!r}")
        typer.echo(f"KL divergence {found.divergence:.6f} nats, top-1 agreement {100 * found.agreement:.2f} %")


def _table(model, ids, schemes, statistics, **options) -> None:
    """One row per scheme: bits per quantized weight, perplexity, KL divergence from the float model, top-1 agreement with it."""
    import jax

    from ._qtensor import QTensor
    from .layers.evaluate import evaluate as run
    typer.echo(f"{'scheme':24s} {'bits':>6s} {'perplexity':>10s} {'KL':>9s} {'top-1':>7s}")
    for index, scheme in enumerate(schemes):
        packed = model.quantize(scheme.strip(), calibration=statistics, progress=False)
        leaves = [leaf for leaf in jax.tree.leaves(packed.params, is_leaf=lambda x: isinstance(x, QTensor)) if isinstance(leaf, QTensor)]
        bits = 8 * sum(leaf.nbytes for leaf in leaves) / max(sum(leaf.size for leaf in leaves), 1)
        found = run(packed, ids, against=model, **options)
        if not index:
            typer.echo(f"{model.config.dtype:24s} {'':6s} {found.other_perplexity:10.4f} {'':9s} {'':7s}"
                       f"  ({found.tokens} tokens, length {found.length}, stride {found.stride})")
        typer.echo(f"{scheme.strip():24s} {bits:6.2f} {found.perplexity:10.4f} {found.divergence:9.5f} {100 * found.agreement:6.2f}%")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application of `qfunc.cli`."""
    app.command("generate")(generate)
    app.command("eval")(evaluate)
