"""duet train, in which something happens on the second process alone, in its second update.

torchrun --nproc_per_node 2 -m tests.one_bad_process inf|signal CONFIG OVERRIDES...
"""

import math
import os
import signal
import sys
from dataclasses import replace

from duet.configs.errors import exit_on_user_error
from duet.train import __main__ as command
from duet.train import update

_true, _calls = update.policy_loss, []


def _loss(*given):
    made = _true(*given)
    _calls.append(None)
    if os.environ["RANK"] != "1" or len(_calls) != 2:
        return made
    if sys.argv[1] == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
        return made
    # a finite gradient with it: only what is told between processes says so
    return replace(made, loss=made.loss + math.inf)


if __name__ == "__main__":
    update.policy_loss = _loss
    exit_on_user_error(lambda: command.main(sys.argv[2:]))
