"""metrics.jsonl: what a run measures, one JSON object a line."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from msbreg.errors import MSBRegError
from msbreg.files import whole_file

__all__ = ["MetricsFile", "finite", "read_metrics"]


class MetricsFile:
    """A JSON Lines file of metrics, one object a line, in the order of the steps.

    Args:
        path: the file.
        last: the last step of each kind of event that counts. Later lines are dropped: a killed run may have written
            past its checkpoint. None for a new run.
    """

    def __init__(self, path: Path, last: dict[str, int] | None = None) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= last.get(row["event"], -1)] if last else []
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row: Any) -> None:
        """Appends one line; numbers that are not finite become null, since JSON has none.

        Raises:
            MSBRegError: where the file cannot grow.
        """
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(finite(row)) + "\n")
        except OSError as error:
            raise MSBRegError(
                f"cannot write to {self.path}: {error.strerror}. Once it can be written, run the same command "
                "again to go on from the last checkpoint."
            ) from error


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become None, in containers too."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics file; lines that are none, as a last line cut by a kill, are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "event" in row and isinstance(row.get("step"), int)]
