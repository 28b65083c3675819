"""The command line: `qfunc demo`, `qfunc schemes`, `qfunc inspect`, `qfunc quantize`.

Errors are one line on stderr. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import _commands

app = typer.Typer(name="qfunc", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Quantization for JAX: try it on a model, look at the schemes, look into checkpoints, quantize them.")

BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "modules.json",
          "sentence_bert_config.json", "config_sentence_transformers.json")
"""Small files that a quantized model keeps from the original."""


def main() -> None:
    """Entry point of the `qfunc` command."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        print(f"qfunc: {error}", file=sys.stderr)
        sys.exit(1)


@app.callback()
def _root() -> None:
    # Errors of the commands reach `main` only if typer is told that there are several commands.
    pass


@app.command()
def demo(
    model: Annotated[str | None, typer.Argument(help="folder, installed package, or hub id; default: all-MiniLM-L6-v2")] = None,
    out: Annotated[Path, typer.Option(help="where the HTML report goes")] = Path("report.html"),
    schemes: Annotated[str | None, typer.Option(help="comma-separated; NAME+table also quantizes the word embeddings")] = None,
    sentences: Annotated[Path | None, typer.Option(help="text file, one sentence a line")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch size to time; may be repeated [default: 1 and 16]", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="timings of each scheme, of which the median counts", min=1)] = 15,
) -> None:
    """Quantize a sentence encoder with every scheme that makes sense and measure each against float32."""
    from ._demo import measure, read_sentences
    from ._demo_page import page
    from ._progress import track
    from .interop.encoder import load_encoder
    names = [name.strip() for name in schemes.split(",") if name.strip()] if schemes else None
    found = measure(load_encoder(model), names, read_sentences(sentences), batches=sorted(set(batch or (1, 16))), rounds=rounds,
                    progress=lambda items, what: track(items, what, None, lambda item: ""))
    rows = [found.float_row, *sorted(found.rows, key=lambda row: (row.error, row.bits))]
    heads = ["scheme", "bits", "MB", "cosine", "worst", "neighbour", *(f"ms @{size}" for size in found.batches)]
    share = f"{found.quantized / 1e6:.1f} of {found.parameters / 1e6:.1f} million weights quantized"
    typer.echo(f"{found.model}: {found.sentences} sentences, {share}")
    _table(heads, [[row.name, f"{row.bits:.2f}", f"{row.nbytes / 1e6:.1f}", f"{row.cosines.mean():.5f}", f"{row.cosines.min():.4f}",
                    f"{100 * row.agreement:.1f} %", *(f"{row.milliseconds[size]:.1f}" for size in found.batches)] for row in rows])
    for name, reason in found.refused.items():
        typer.echo(f"not possible: {name}: {reason}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(found), encoding="utf-8")
    typer.echo(f"report: {out.resolve()} ({found.machine}; {found.seconds:.0f} s)")


@app.command("schemes")
def list_schemes(name: Annotated[str | None, typer.Argument(help="only names that contain this")] = None) -> None:
    """The table of schemes: name, stored bits per weight of a 4096 x 4096 matrix, meaning, aliases."""
    from ._display import describe_scheme, nominal_bits
    from ._schemes import scheme
    from ._schemes import schemes as table
    aliases: dict[str, list[str]] = {}
    for alias, target in table.aliases.items():
        aliases.setdefault(target, []).append(alias)
    rows = [[row, f"{nominal_bits(scheme(row)):.2f}", describe_scheme(scheme(row)), ", ".join(aliases.get(row, []))] for row in table]
    if name is not None:
        rows = [row for row in rows if name in row[0] or name in row[3]] or [
            [scheme(name).name, f"{nominal_bits(scheme(name)):.2f}", describe_scheme(scheme(name)), ""]]
    _table(["scheme", "bits", "meaning", "also called"], rows, left=(0, 2, 3))


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="checkpoint folder or file")]) -> None:
    """What lies in a checkpoint, from its headers; nothing is loaded."""
    from .interop import inspect as look
    typer.echo(str(look(path)))


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="folder of a float model: safetensors and config.json")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; a model there is replaced")],
    scheme: Annotated[str, typer.Option(help="scheme of all weights but embeddings, norms, routers and the output layer")],
    rule: Annotated[list[str] | None, typer.Option(help="PATTERN=SCHEME, first match wins; SCHEME none keeps float; repeatable")] = None,
) -> None:
    """Quantize a float model into a folder in qfunc's own layout (read it back with qfunc.interop.load_native)."""
    from ._quantize import quantize as run
    from ._report import report
    from .interop._refuse import read_json
    from .interop.floats import load_floats
    from .interop.native import save_native
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: IN and OUT are the same folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: expected a folder to write, found a file")
    rules: dict[str, str | None] = {}
    for pattern, name in map(_rule, rule or ()):
        if pattern in rules:
            raise ValueError(f"--rule {pattern!r} is given twice; the first match wins, so the second would do nothing")
        rules[pattern] = name
    rules.setdefault("*", scheme)
    params = load_floats(source)
    packed = run(params, rules)
    config = source / "config.json"
    save_native(target, packed, read_json(config) if config.exists() else None)
    for beside in BESIDE:
        for file in source.glob(beside):
            shutil.copyfile(file, target / file.name)
    typer.echo(report(params, packed).summary())
    typer.echo(f"written: {target.resolve()}")


def _rule(text: str) -> tuple[str, str | None]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern or not name:
        raise ValueError(f"--rule {text!r}: expected PATTERN=SCHEME")
    return pattern, None if name.lower() == "none" else name


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Print a table: with rich in a terminal where it is installed, else plain text for pipes and files."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(box=None, header_style="bold", pad_edge=False)
            for i, head in enumerate(heads):
                table.add_column(head, justify="left" if i in left else "right", no_wrap=i == 0)
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    for line in [heads, *rows]:
        cells = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        typer.echo("  ".join(cells).rstrip())


_commands.add_to(app)

if __name__ == "__main__":
    main()
