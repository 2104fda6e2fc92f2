"""`duet COMMAND`: the modules' commands, shorter."""

import importlib
import sys
from importlib.metadata import version

from duet.configs.errors import UserError, exit_on_user_error
from duet.launch.spread import HELP, start, take_options

_COMMANDS = {
    "train": (
        "duet.train.__main__",
        "GRPO on one module",
    ),
    "generate": ("duet.inference.generate", "pictures from prompts"),
    "evaluate": ("duet.train.evaluate", "held-out prompts, every reward, a report"),
    "priors": ("duet.train.priors", "a decoder's prior tokens, made once for its runs"),
    "rewards": ("duet.launch.rewards", "list rewards, score pictures, serve other processes"),
    "plan": ("duet.launch.plan", "memory, seconds and batches of a config, without a GPU"),
    "settings": ("duet.launch.settings", "every setting: type, range, default, meaning"),
}
_SPREAD = ("train", "generate", "evaluate", "priors")  # may run in several processes


def main() -> None:
    exit_on_user_error(_run)


def _run() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: duet COMMAND ... | --version\n")
        for name, (_, purpose) in _COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        print(f"\n{', '.join(_SPREAD)} in several processes: {HELP}")
        return
    if arguments == ["--version"]:
        print(f"duet {version('duet')}")
        return
    name, *rest = arguments
    if name not in _COMMANDS:
        raise UserError(f"command {name!r} is unknown: choose one of {', '.join(_COMMANDS)}")
    module = _COMMANDS[name][0]
    if name in _SPREAD:
        asked, rest = take_options(rest)
        if asked is not None:
            start(asked, module, rest, trains=name == "train")
            return
    importlib.import_module(module).main(rest)


if __name__ == "__main__":
    main()
