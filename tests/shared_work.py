"""Several commands in one start of several processes, which costs seconds.

    torchrun --nproc_per_node 2 -m tests.shared_work COMMANDS.json

COMMANDS.json: [name, arguments] of each. How each ended goes to `ends-RANK.json` beside it: how
many processes there were, and the error or null.
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from duet.inference import generate
from duet.train import evaluate

MAINS = {"generate": generate.main, "evaluate": evaluate.main}


def main(path: Path) -> None:
    ends, commands, destroy = [], json.loads(path.read_text()), PartialState.destroy_process_group
    for i, (name, arguments) in enumerate(commands, 1):
        # the next command needs the group
        PartialState.destroy_process_group = destroy if i == len(commands) else lambda self: None
        try:
            MAINS[name](arguments)
            told = None
        except (ValueError, KeyboardInterrupt) as error:
            told = f"{type(error).__name__}: {error}"
        ends.append({"processes": PartialState().num_processes, "told": told})
    (path.parent / f"ends-{PartialState().process_index}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
