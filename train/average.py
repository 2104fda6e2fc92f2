"""An exponential moving average of the trained weights (`average` of the settings)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from duet.configs.update_schema import AverageConfig

_STATE = "duet_average.json"


class Average:
    """Of float32 weights, on their device; the first values are those they begin with."""

    def __init__(self, config: AverageConfig, trained: Sequence[Tensor]) -> None:
        self.model = EMAModel(trained, decay=config.decay, update_after_step=config.start)

    @property
    def values(self) -> list[Tensor]:
        return self.model.shadow_params

    @property
    def updates(self) -> int:
        """How many it has seen, those before `start` too."""
        return self.model.optimization_step

    def decay(self, update: int) -> float:
        """The share that it keeps in the update of that number, from 1."""
        return self.model.get_decay(update)

    def step(self, trained: Sequence[Tensor]) -> None:
        """After an update of the weights."""
        self.model.step(trained)

    def write(self, folder: Path) -> None:
        """The count of updates; the values are the tuning's to write."""
        folder.mkdir()
        (folder / _STATE).write_text(json.dumps({"updates": self.updates}))

    @torch.no_grad()
    def read(self, folder: Path, trained: Sequence[Tensor]) -> None:
        """`trained`: which hold the values that were written. What was written is whole."""
        self.model.optimization_step = json.loads((folder / _STATE).read_text())["updates"]
        for value, parameter in zip(self.values, trained, strict=True):
            value.copy_(parameter)
