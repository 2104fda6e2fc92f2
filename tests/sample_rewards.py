"""Small rewards that tests name by their dotted path; no torch."""

import math
import random
import threading
import time

import numpy as np


class Constant:
    def __init__(self, value=1.0):
        self.value = value

    def __call__(self, inputs):
        return [self.value for _ in inputs]


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
        return [None if i.picture("source") is None else 1.0 for i in inputs]


class SeesSources:
    """Sizes and pixels of the row's sources, one after the other, as one number."""

    def __call__(self, inputs):
        return [self.score(i.sources) if i.sources else None for i in inputs]

    def score(self, pictures):
        seen = [p.width + p.height / 7 + np.mean(p) / 17 for p in pictures]
        return sum(value * 3**n for n, value in enumerate(seen))


class SeesEdit:
    """All that a reward can read of an edit, as one number."""

    def __call__(self, inputs):
        return [self.number(i) for i in inputs]

    def number(self, item):
        sources = item.sources
        pictures = [*(item.picture(key) for key in ("source", "style", "keep")), *sources]
        sides = [side for box in item.subjects(sources) for side in box.sides]
        return sum(np.mean(p) / (n + 2) for n, p in enumerate(pictures)) + np.dot(sides, sides)


class Seldom:
    """Applies to a quarter of every batch."""

    def __call__(self, inputs):
        return [None if n % 4 else 0.5 for n in range(len(inputs))]


class Rank:
    """The place of each picture among the samples of its prompt, by brightness."""

    whole_groups = True

    def __call__(self, inputs):
        return np.argsort(np.argsort([np.mean(i.image) for i in inputs])).tolist()


class Unsure:
    """Leaves out a share of every batch."""

    def __init__(self, share):
        self.share = share

    def __call__(self, inputs):
        left_out = round(self.share * len(inputs))
        return [math.nan] * left_out + [0.1 * i for i in range(len(inputs) - left_out)]


class Slow:
    """Sleeps 200 ms a batch, then scores the mean brightness."""

    def __init__(self):
        self.spans = []

    def __call__(self, inputs):
        start = time.perf_counter()
        time.sleep(0.2)
        self.spans.append((start, time.perf_counter()))
        return [float(np.asarray(i.image).mean()) for i in inputs]


class Waits:
    """Takes the time that the row says."""

    def __call__(self, inputs):
        time.sleep(inputs[0].row["seconds"])
        return [1.0 for _ in inputs]


class Alone:
    """Raises when two threads score at a time."""

    def __init__(self):
        self.busy = threading.Lock()

    def __call__(self, inputs):
        assert self.busy.acquire(blocking=False)
        time.sleep(0.05)
        self.busy.release()
        return [1.0 for _ in inputs]


class Sometimes:
    """No score of blue cards; does not apply to green ones; 1 for the rest."""

    def __call__(self, inputs):
        answers = {"blue": float("nan"), "green": None}
        return [answers.get(i.prompt.split()[1], 1.0) for i in inputs]


class Never:
    def __call__(self, inputs):
        return [None] * len(inputs)


class Draws:
    """Brightness, with draws from every global random state."""

    def __call__(self, inputs):
        import torch  # its state, which dropout draws from too

        def drawn():
            return random.random() + np.random.random() + float(torch.rand(()))

        return [np.mean(i.image) / 255 + 0.01 * drawn() for i in inputs]
