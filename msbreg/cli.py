"""The command line: pretrain, eval, export, bench, doctor."""

import argparse
import functools
import sys
import tempfile
import warnings
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

import msbreg
from msbreg.config import Config, option_types, packaged_configs, require_text
from msbreg.console import say
from msbreg.errors import MSBRegError
from msbreg.files import expanded
from msbreg.options import EVALUATED_WITH, configs_first
from msbreg.signals import StopSignals

__all__ = ["main"]


def main(arguments: list[str] | None = None, signals: StopSignals | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; None takes this process's.
        signals: what has noted signals for `pretrain` since this process began; None: a run notes its own.

    Returns:
        The exit status: 0 (also after a signal that let the run save itself), 1 where nobody reads what the command
        prints, 2 for what the user can mend, 130 after a second Ctrl-C.
    """
    show_each_warning_once()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if options.command == "pretrain":
            return run_pretrain(options.pretrain, signals)
        return COMMANDS[options.command](options[options.command])
    except MSBRegError as error:
        say(f"error: {error}", sys.stderr)
    except BrokenPipeError:  # as under `| head`
        return 1
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        say(f"error: {place}{error.strerror}", sys.stderr)
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130
    return 2


def parse(arguments: list[str]) -> Namespace:
    """The command and its options; ends the process where they are not of their types."""
    try:
        return build_parser().parse_args(configs_first(arguments))
    except UnicodeDecodeError as error:
        raise MSBRegError(f"the file of --config is not text: {error}.") from error


def show_each_warning_once() -> None:
    """Warnings as one line each, however many loaders come across the same bad image."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            say(f"warning: {message}", sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]  # takes more than it is given


Parser = functools.partial(ArgumentParser, allow_abbrev=False)  # a part of a name is a mistake, not an option


def build_parser() -> ArgumentParser:
    """The parser of all commands; every option's help shows its type, default, unit and meaning."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="msbreg", description=msbreg.__doc__.splitlines()[0], version=msbreg.__version__)
    commands = parser.add_subcommands(dest="command", required=True)

    pretrain = Parser(
        usage="msbreg pretrain [--dry-run [--json FILE]] [--config NAME_OR_FILE] [--GROUP.OPTION VALUE ...]",
        description="Train a backbone without labels. With no option it trains on images that msbreg renders, in a few "
        "minutes on a CPU.",
    )
    pretrain.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,  # for --print_config to leave it out, as no option of a run
        help="take a few steps, on rendered images without --data.path; print memory, step time and the run's hours",
    )
    add_json(pretrain)
    add_config(pretrain)
    commands.add_subcommand("pretrain", pretrain, help="train a backbone without labels")

    evaluate = Parser(
        usage="msbreg eval RUN [--json FILE] [--GROUP.OPTION VALUE ...]",
        description="kNN and linear probe accuracy of the frozen backbone of a run.",
    )
    evaluate.add_argument("path", nargs="?", metavar="RUN", help="run folder, or a checkpoint file")
    add_json(evaluate)
    kinds = option_types()
    for name, meaning in EVALUATED_WITH.items():
        evaluate.add_argument(f"--{name}", type=kinds[name], default=None, help=meaning)
    commands.add_subcommand("eval", evaluate, help="kNN and linear probe of a trained backbone")

    export = Parser(
        usage="msbreg export RUN [--out FOLDER]",
        description="Write the backbone of a run as backbone.safetensors and backbone.pt.",
    )
    export.add_argument("run", nargs="?", metavar="RUN", help="run folder, or a checkpoint file")
    export.add_argument("--out", type=str | None, default=None, help="folder to write to; unset: the run folder")
    commands.add_subcommand("export", export, help="write a trained backbone for other software")

    bench = Parser(
        usage="msbreg bench [--steps N] [--json FILE] [--config NAME_OR_FILE] [--GROUP.OPTION VALUE ...]",
        description="Time the loader, the training step, both together and the step's parts. Options as of pretrain.",
    )
    bench.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="how many of each are timed (default: 20)")
    add_json(bench)
    add_config(bench)
    commands.add_subcommand("bench", bench, help="how fast this machine trains, and what bounds it")

    doctor = Parser(
        usage="msbreg doctor", description="Versions, devices, what is usable here, and why what is not is not."
    )
    commands.add_subcommand("doctor", doctor, help="what works on this machine, and what does not and why")
    return parser


def add_json(parser: ArgumentParser) -> None:
    """Adds --json."""
    meaning = "write the figures to that file, too, as JSON"
    parser.add_argument("--json", type=str, default=argparse.SUPPRESS, metavar="FILE", help=meaning)


def add_config(parser: ArgumentParser) -> None:
    """Adds the options of a run, and --config."""
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file of options, or the name of one that comes with msbreg: {', '.join(packaged_configs())}. May "
        "be given again: the later file wins, and options given by themselves win over files.",
    )
    parser.add_class_arguments(Config, None)
    for action in parser._actions:
        if action.dest in vars(Config()):  # as --run: jsonargparse reads a file there, `configs_first` refuses it
            action.help = argparse.SUPPRESS


def config_from(options: Namespace) -> Config:
    """The typed config that parsed options describe."""
    return Config(**{name: type(group)(**vars(options[name])) for name, group in vars(Config()).items()})


def run_pretrain(options: Namespace, signals: StopSignals | None = None) -> int:
    if options.get("json") is not None and not options.get("dry_run", False):
        raise MSBRegError("--json is for --dry-run; a run leaves its figures in metrics.jsonl and summary.json.")
    if options.get("dry_run", False):
        if signals is not None:
            signals.deliver()
        from msbreg.dry_run import dry_run

        show(dry_run(config_from(options), file=json_file(options)))
    else:
        from msbreg.trainer import pretrain

        pretrain(config_from(options), signals)
    return 0


def show(table: str | None) -> None:
    """Prints what a command is for, and one of several processes alone may have."""
    if table is not None:
        print(table, flush=True)


def json_file(options: Namespace) -> Path | None:
    """Where the figures of a command are to be written, if anywhere; refused before they are made."""
    text = options.get("json")
    require_text("--json", text)
    if text is None:
        return None
    file = expanded(text).resolve()
    if file.exists() and not file.is_file():  # a device would be replaced by a file
        raise MSBRegError(f"--json {text} is a folder or a device; name a file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise MSBRegError(f"--json {text} cannot be written: {error.strerror}.") from error
    return file


def run_eval(options: Namespace) -> int:
    refuse_peers("eval")
    run = run_of(options.path, "eval")
    from msbreg.eval_run import evaluate

    changes = {name: options[name] for name in EVALUATED_WITH if options[name] is not None}
    show(evaluate(run, changes, file=json_file(options)))
    return 0


def run_export(options: Namespace) -> int:
    from msbreg.checkpoint import read_run
    from msbreg.export import backbone_of, export_backbone

    refuse_peers("export")
    require_text("--out", options.out)
    run = run_of(options.run, "export")
    state = read_run(run)
    folder = expanded(options.out) if options.out else (run if run.is_dir() else run.parent)
    for file in export_backbone(backbone_of(state), folder):
        say(str(file), sys.stdout)
    return 0


def run_bench(options: Namespace) -> int:
    from msbreg.benchmark import benchmark

    show(benchmark(config_from(options), steps=options.get("steps", 20), file=json_file(options)))
    return 0


def run_doctor(options: Namespace) -> int:
    from msbreg.doctor import report

    show(report())
    return 0


def refuse_peers(command: str) -> None:
    """Raises MSBRegError where torchrun has started several processes, which would all do the same."""
    from msbreg.machine import number_from

    if number_from("WORLD_SIZE", 1) > 1:
        raise MSBRegError(f"{command} is for one process, but torchrun has started several; run it without torchrun.")


def run_of(text: str | None, command: str) -> Path:
    """The run folder or checkpoint that a command was given."""
    if not text:
        raise MSBRegError(f"{command} needs a run folder or a checkpoint file: msbreg {command} runs/default.")
    return expanded(text)


COMMANDS = {"eval": run_eval, "export": run_export, "bench": run_bench, "doctor": run_doctor}
"""What runs each command but pretrain."""
