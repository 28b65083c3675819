"""The part of `docs/formats.md` that lists every field of every configuration, made from the readers' own tables.

    python docs/format_fields.py        # rewrites it in place
"""

from __future__ import annotations

from pathlib import Path

from qfunc.interop._detect import METHODS, family
from qfunc.interop._fields import SECTIONS

DOCUMENT = Path(__file__).parent / "formats.md"
BEGIN, END = "## Fields of the configurations\n", "### GGUF\n"
INTRODUCTION = """
Anything else that is set, at the top or inside of a section listed here, is read by nobody and is a note of the checkpoint.
"""


def table(fields: dict[str, str], head: str = "field") -> str:
    """Rows of one table."""
    rows = (f"| `{key}` | {' '.join(text.split())} |" for key, text in fields.items())
    return "\n".join([f"| {head} | what happens |", "|---|---|", *rows])


def sections(name: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The sections of a family; those of one table together."""
    out: dict[tuple[str, ...], dict[str, str]] = {}
    for path, fields in SECTIONS.get(name, {}).items():
        same = next((paths for paths, known in out.items() if known == fields), ())
        out[(*same, path)] = out.pop(same, fields)
    return out


def text() -> str:
    """All of it."""
    parts = [BEGIN + INTRODUCTION]
    for module in sorted(set(METHODS.values())):
        found = family(module)
        methods = ", ".join(f"`{method}`" for method, name in METHODS.items() if name == module)
        told = "`quant_model_description*.json`" if module == "modelslim" else f"`quant_method`: {methods}"
        parts.append(f"### {found.name}\n\n{told}\n\n{table(found.fields)}\n")
        parts += [f"In {', '.join(f'`{path}`' for path in paths)}:\n\n{table(fields)}\n" for paths, fields in sections(found.name).items()]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write it."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + text() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
