"""Options as they stand on a command line and in the files of --config, before they are parsed."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from msbreg.config import Config, option_types, packaged_configs
from msbreg.errors import MSBRegError
from msbreg.files import read_yaml

__all__ = ["EVALUATED_WITH", "configs_first"]

EVALUATED_WITH = {
    "data.path": "labelled images; unset: those of the run",
    "data.eval_path": "held-out images; unset: those of the run, or as in pretrain beside another --data.path",
    "data.backend": "what decodes; unset: as in the run",
    "data.threads": "threads that decode; unset: one a core",
    "data.timeout": "seconds that images are waited for, 0 for ever; unset: as in the run",
    "data.cache": "folder for rendered images and listings of tar shards; unset: as in the run",
    "eval.k": "neighbours in the weighted kNN vote; unset: as in the run",
    "eval.temperature": "temperature of the vote's weights; unset: as in the run",
    "eval.bank": "labelled images that vote and that the probe is fitted to, at the most; unset: as in the run",
    "eval.queries": "held-out images that are classified, at the most; unset: as in the run",
    "run.device": "cpu, cuda, cuda:N or auto; unset: auto",
}
"""Options of pretrain that eval has too."""


def configs_first(arguments: list[str]) -> list[str]:
    """Puts --config before the other options, so that these win, and the file of a packaged config for its name."""
    command, options = arguments[:1], iter(arguments[1:])
    packaged, groups = packaged_configs(), {f"--{name}" for name in vars(Config())}
    known = known_options(command[0]) if command else ()
    configs, rest = [], []
    for option in options:
        flag, separator, name = option.partition("=")
        if flag in groups:
            raise MSBRegError(f"{flag} is a group of options; give {flag}.OPTION VALUE, or --config FILE for a file.")
        if flag != "--config":
            if flag.startswith("--") and known and flag not in known and (meant := meant_by(flag, known)):
                raise MSBRegError(f"there is no option {flag}; did you mean {meant}?")
            rest.append(option)
            continue
        value = name if separator else next(options, None)
        if value in packaged and not os.path.isfile(value):
            value = str(packaged[value])
        elif value is not None and not os.path.exists(value):
            raise MSBRegError(
                f"there is no file {value!r} for --config, and no config of that name: those that come with msbreg are "
                f"{', '.join(packaged)}."
            )
        if value is not None and os.path.isfile(value):  # a pipe can be read once
            require_groups(value)
        configs.append(flag if value is None else f"{flag}={value}")
    return command + configs + rest


def known_options(command: str) -> tuple[str, ...]:
    """Of a command that takes options of a run; none of others."""
    if command == "eval":
        return ("--json", *(f"--{name}" for name in EVALUATED_WITH))
    own = {"pretrain": ("--dry-run", "--json"), "bench": ("--steps", "--json")}
    return ("--config", "--help", *own[command], *(f"--{name}" for name in option_types())) if command in own else ()


def meant_by(flag: str, known: Sequence[str]) -> str | None:
    """The option that was probably meant: of the same last name, else of one that is spelled much alike."""
    last = flag.lstrip("-").replace("-", "_").rpartition(".")[2]
    same = [option for option in known if option.lstrip("-").replace("-", "_").rpartition(".")[2] == last]
    return next(iter(same or difflib.get_close_matches(flag, known, 1, 0.75)), None)


def require_groups(file: str) -> None:
    """Raises MSBRegError where a YAML file is not one of options in groups; those are the parser's to judge."""
    try:
        content = read_yaml(Path(file))
    except yaml.YAMLError:
        return  # the parser says where
    if not isinstance(content, dict):
        what = "no options" if content is None else "something else"
        raise MSBRegError(f"{file} must hold options in groups, as in `optim: {{lr: 0.1}}`, but holds {what}.")
    known = [f"--{name}" for name in option_types()]
    for name in vars(Config()):
        if not isinstance(content.get(name, {}), dict):
            raise MSBRegError(
                f"{name} is {content[name]!r} in {file}, but must be a group of options; give it some, or leave it out."
            )
        for option in content.get(name, {}):
            if f"--{name}.{option}" not in known and (meant := meant_by(f"--{name}.{option}", known)):
                raise MSBRegError(f"{file} has {name}.{option}, which is no option; did you mean {meant[2:]}?")
