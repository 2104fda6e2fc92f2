"""Small rewards that go wrong; no torch."""

import os
import signal
import time

from duet.configs.errors import UserError


class Raises:
    def __call__(self, inputs):
        raise KeyError("no\nweights")


class Miscounts:
    def __call__(self, inputs):
        return [0.5]


class Infinite:
    def __call__(self, inputs):
        return [float("inf") for _ in inputs]


class Weightless:
    """Its weights' reading raises what no user can read."""

    def load(self):
        raise KeyError("layers.0")

    def __call__(self, inputs):
        return [0.0 for _ in inputs]


class NoWeights:
    """Tells after a while that its weights are missing."""

    def load(self):
        time.sleep(0.5)
        raise UserError("weights 'gone.pt' are missing")

    def __call__(self, inputs):
        return []


class RaisesOnOne:
    """On the second process only."""

    def __call__(self, inputs):
        if os.environ.get("RANK") == "1":
            raise KeyError("only here")
        return [0.1 * n for n in range(len(inputs))]


class InterruptsOnOne:
    """Ctrl-C on process 1 alone, while the others score."""

    def __call__(self, inputs):
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return [0.5 for _ in inputs]


class Unanswered:
    """Half of its scores are there; its servers have given none to this process."""

    def silence(self):
        return "http://here:1: gone"

    def __call__(self, inputs):
        return [0.1 * n if n % 2 else float("nan") for n in range(len(inputs))]
