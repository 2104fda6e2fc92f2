"""Plug-ins that go wrong, for tests/test_commands.py."""


class raises:
    def __call__(self, inputs):
        return [1 / 0 for _ in inputs]


class miscounts:
    def __call__(self, inputs):
        return [0.5]


class infinite:
    def __call__(self, inputs):
        return [float("inf") for _ in inputs]
