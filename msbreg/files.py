"""Files that are whole or not there, where msbreg keeps what it can make again, and what a run's folder is known by."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msbreg.errors import MSBRegError

__all__ = [
    "LOCK", "METRICS", "cache_folder", "expanded", "read_json", "read_yaml", "reason", "sync_folder", "whole_file",
    "write_json",
]  # fmt: skip

LOCK, METRICS = ".lock", "metrics.jsonl"
"""What every run has in its folder, and no folder of images has."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; what is there at the end takes the place of `path`, unless there is an error.

    Raises:
        MSBRegError: where it cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        raise MSBRegError(f"cannot write {path}: {reason(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):  # from file systems that cannot do that to folders
            raise
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The operating system's words where an error carries them."""
    last, cause = error, error  # type: BaseException, BaseException | None
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        last, cause = cause, cause.__cause__ or cause.__context__
    return (str(last).splitlines() or [type(last).__name__])[0]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty where the file is missing, damaged or of something else."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, in which no key may stand twice: YAML takes the last one, and whoever wrote it may not.

    Raises:
        MSBRegError: a key stands twice.
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not text.
        yaml.YAMLError: it is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    again = key.start_mark.line + 1
                    raise MSBRegError(f"{path} has {key.value} twice, again in line {again}; leave one of them out.")
                seen.add(key.value)
            return node

    return yaml.load(path.read_text(encoding="utf-8"), Loader)


def expanded(path: str) -> Path:
    """A path as users write it, ~ included; that of somebody unknown stays as it is, and is not found then."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where rendered images and listings of shards are kept unless told otherwise: in the user's cache.

    Raises:
        MSBRegError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "msbreg").expanduser()
    except RuntimeError as error:
        raise MSBRegError("there is no home folder for a cache; set --data.cache or XDG_CACHE_HOME.") from error
