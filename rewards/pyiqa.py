"""Any metric of pyiqa (IQA-PyTorch), with or without a reference.

pyiqa's own code is under PolyForm Noncommercial 1.0.0, parts of it under the S-Lab
licence: no commercial use. Most metrics fetch their weights from the hub.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.clip import picked_device


class PyIqa:
    """Any metric of pyiqa, negated where lower is better.

    Metrics that compare need the row's `image`; they do not apply without one. Pictures
    go one by one and in float32: many of the metrics take neither batches nor less.
    """

    def __init__(self, metric: str, device: str = "auto") -> None:
        """`metric`: a name of `pyiqa.list_models()`, such as musiq, niqe, psnr."""
        self.name, self.device = metric, picked_device(device)

    def load(self) -> None:
        _ = self.metric

    def to(self, device: torch.device | str) -> None:
        self.metric.to(device)

    @cached_property
    def metric(self) -> Any:
        try:
            import pyiqa
        except ImportError as error:
            raise UserError(
                f"reward pyiqa needs its package: pip install 'duet[pyiqa]' ({error})"
            ) from error
        if self.name not in pyiqa.list_models():
            raise UserError(f"pyiqa metric {self.name!r}: allowed are {pyiqa.list_models()}")
        try:
            return pyiqa.create_metric(self.name, device=self.device)
        except OSError as error:
            raise UserError(f"pyiqa metric {self.name!r}: no weights: {error}") from error

    @torch.no_grad()
    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        return [self._score(item) for item in inputs]

    def _score(self, item: RewardInput) -> float | None:
        pictures = [item.image]
        if self.metric.metric_mode == "FR":
            reference = item.picture("image")
            if reference is None:
                return None
            pictures.append(reference)
        score = self.metric(*(_tensor(p).to(self.device) for p in pictures)).item()
        return -score if self.metric.lower_better else score


def _tensor(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
