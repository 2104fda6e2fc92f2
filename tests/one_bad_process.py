"""duet train, with a loss that is not finite in the second process's second update alone, and a
signal to it in its third.

    torchrun --nproc_per_node 2 -m tests.one_bad_process CONFIG OVERRIDES...
"""

import math
import os
import signal
from dataclasses import replace

from duet.configs.errors import exit_on_user_error
from duet.train import __main__ as command
from duet.train import update

_true, _calls = update.policy_loss, []


def _loss(*given):
    made = _true(*given)
    _calls.append(None)
    if os.environ["RANK"] == "1" and len(_calls) == 2:
        # its gradient is finite: only what the processes tell each other says so
        return replace(made, loss=made.loss + math.inf)
    if os.environ["RANK"] == "1" and len(_calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return made


if __name__ == "__main__":
    update.policy_loss = _loss
    exit_on_user_error(command.main)
