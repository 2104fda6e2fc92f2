"""Small rewards for tests/test_service.py to serve; no torch."""

import threading
import time

import numpy as np


class Sees:
    """All that a reward can read of a sample, as one number."""

    def __call__(self, inputs):
        return [
            np.mean(i.image) + np.mean(i.picture("image")) / 7 + len(i.prompt) + len(i.row["text"])
            for i in inputs
        ]


class HasSource:
    """1 where the row has a `source` picture that a file can be opened from."""

    def __call__(self, inputs):
        return [float("nan") if i.picture("source") is None else 1.0 for i in inputs]


class Rank:
    """The place of each picture among the samples of its prompt, by brightness."""

    whole_groups = True

    def __call__(self, inputs):
        return np.argsort(np.argsort([np.mean(i.image) for i in inputs])).tolist()


class Alone:
    """Raises when two threads score at a time."""

    def __init__(self):
        self.busy = threading.Lock()

    def __call__(self, inputs):
        assert self.busy.acquire(blocking=False)
        time.sleep(0.05)
        self.busy.release()
        return [1.0 for _ in inputs]


class Waits:
    """Takes the time that the row says."""

    def __call__(self, inputs):
        time.sleep(inputs[0].row["seconds"])
        return [1.0 for _ in inputs]


class Raises:
    def __call__(self, inputs):
        raise KeyError("no\nweights")


class NoWeights:
    def load(self):
        from duet.configs.errors import UserError

        time.sleep(0.5)
        raise UserError("weights 'gone.pt' are missing")

    def __call__(self, inputs):
        return []
