"""duet COMMAND ... --accelerate NAME: the command in several processes, started by accelerate.

`python -m duet.launch.spread` is `accelerate launch`, with the exit status of its processes.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError

from duet.configs.environment import require_deepspeed
from duet.configs.errors import UserError, exit_on_user_error

FOLDER = Path(__file__).with_name("accelerate")
HELP = "--accelerate NAME [--num-processes N], NAME one of launch/accelerate/ or a file"
_STARTED = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")  # by accelerate on GPUs and CPUs
_SHARDED = {"DEEPSPEED": "deepspeed_config", "FSDP": "fsdp_config"}  # with a section of the file
_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
_PATIENCE_SECONDS = "120"  # from a signal to a process's end, else it is killed


@dataclass(frozen=True)
class Spread:
    file: Path  # of accelerate
    processes: int | None  # None: as the file says


def take_options(arguments: Sequence[str]) -> tuple[Spread | None, list[str]]:
    """What --accelerate and --num-processes ask for, and the arguments that are the command's.

    Raises UserError for a name or file that is none.
    """
    parser = argparse.ArgumentParser(prog="duet", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate")
    parser.add_argument("--num-processes", type=int)
    options, rest = parser.parse_known_args(arguments)
    if options.accelerate is None:
        if options.num_processes is not None:
            raise UserError("--num-processes goes with --accelerate NAME")
        return None, rest
    if options.num_processes is not None and options.num_processes < 1:
        raise UserError(f"--num-processes = {options.num_processes}: allowed is >= 1")
    return Spread(_file(options.accelerate), options.num_processes), rest


def _file(name: str) -> Path:
    packaged = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    if name in packaged:
        return packaged[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--accelerate = {name!r}: allowed is {', '.join(packaged)}, or a file of accelerate's"
        )
    return path


def start(asked: Spread, module: str, arguments: Sequence[str], trains: bool) -> None:
    """Run the module in the processes, to their end. Raises UserError with their exit status."""
    use_cpu = _require_startable(asked.file, trains)
    if use_cpu:  # accelerate tells it to a single process alone
        os.environ["ACCELERATE_USE_CPU"] = "true"
    own = ["--config_file", str(asked.file)]
    if asked.processes is not None:
        own += ["--num_processes", str(asked.processes)]
    launch([*own, "-m", module, *arguments])


def _require_startable(file: Path, trains: bool) -> bool:
    """Whether the file is of processes on the CPU.

    Raises UserError for one that accelerate would not start as it reads, or not for this command.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    name = f"--accelerate = {str(file)!r}"
    try:
        config = load_config_from_file(str(file))
    except Exception as error:  # of whatever kind: accelerate's reader, YAML's, an enum's
        raise UserError(f"{name}: accelerate does not read it: {error}") from error
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if kind not in _STARTED:
        raise UserError(
            f"{name}: distributed_type = {kind}: allowed is {', '.join(_STARTED)} (MULTI_GPU with "
            "use_cpu: true for several processes on the CPU)"
        )
    own = _SHARDED.get(kind)
    if own and not trains:
        raise UserError(
            f"{name}: distributed_type = {kind} shards what is trained, and this command trains "
            "nothing: take ddp, whose processes share the pictures"
        )
    if kind == "DEEPSPEED":
        require_deepspeed(name)
    known = vars(launch_command_parser().parse_args(["--config_file", str(file), "script"]))
    for section in (n for n, given in vars(config).items() if n.endswith("_config") and given):
        if section not in (own, "dynamo_config"):  # a compiler is refused by the processes
            raise UserError(
                f"{name}: {section} goes against distributed_type = {kind}: take it out"
            )
        for key in getattr(config, section):
            if not {key, f"fsdp_{key}", f"dynamo_{key}"} & set(known):
                raise UserError(f"{name}: accelerate passes over {section}.{key}: take it out")
    return config.use_cpu


def launch(arguments: Sequence[str]) -> None:
    """`accelerate launch` with these arguments. Raises UserError with its processes' status."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(_PASSED_ON))  # torchrun's own settings
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _PATIENCE_SECONDS)
    for name in _PASSED_ON:
        signal.signal(getattr(signal, name), _pass_on)
    try:
        launch_command(launch_command_parser().parse_args(list(arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _ended(f"process {rank}", failure.exitcode) from error
    except CalledProcessError as error:
        raise _ended("the process", error.returncode) from error
    except SignalException as error:
        number = signal.Signals(error.sigval)
        raise UserError(f"{number.name} ended the processes", 128 + number) from error
    except (ValueError, OSError) as error:  # of the file, and of ports
        raise UserError(f"accelerate: {error}") from error


def _pass_on(number: int, frame: object) -> None:
    """To the one process of a launcher that has none of torchrun's handlers."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def _ended(process: str, status: int) -> UserError:
    if status < 0:
        return UserError(f"{process} was ended by {signal.Signals(-status).name}", 128 - status)
    return UserError(f"{process} ended with exit status {status}", status)


if __name__ == "__main__":
    exit_on_user_error(lambda: launch(sys.argv[1:]))
