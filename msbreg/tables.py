"""Markdown tables, padded so that they read well in a terminal too."""

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, text: int = 1) -> str:
    """A table whose columns after the first `text` ones are numbers, and stand to the right."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if column < text else ">" for column in range(len(header))]
    lines.insert(1, [f"{':' if side == '>' else '-':->{width}}" for side, width in zip(sides, widths, strict=True)])
    return "\n".join(
        "| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)) + " |"
        for line in lines
    )
