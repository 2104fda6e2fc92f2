"""Aesthetic score: an MLP on CLIP image embeddings, in the form of LAION's predictor.

https://github.com/christophschuhmann/improved-aesthetic-predictor
"""

import pickle
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward


class Aesthetic(ClipReward):
    """LAION's aesthetic mark of the picture, about 1 to 10, divided by 10."""

    def __init__(self, head: str, **clip: Any) -> None:
        """`head`: the MLP's weights, .safetensors or LAION's .pth (for ViT-L-14, openai)."""
        super().__init__(**clip)
        self.path = head

    @cached_property
    def head(self) -> nn.Sequential:
        return load_head(self.path).to(self.device)

    def to(self, device: torch.device | str) -> None:
        self.head.to(device)  # a missing head is told before the tower is read
        super().to(device)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        marks = self.head(self.clip.embed_images([i.image for i in inputs]))
        return (marks[:, 0] / 10).tolist()


def load_head(path: str) -> nn.Sequential:
    """The MLP (linear layers; dropout is idle here) with the widths its weights have, float32.

    Raises UserError for a missing file or one that holds no such MLP.
    """
    state = _read_state(path)
    indices = sorted(int(k.split(".")[1]) for k in state if k.endswith(".weight"))
    if not indices or any(not k.startswith("layers.") for k in state):
        raise UserError(f"aesthetic head {path!r} has no keys layers.N.weight: not LAION's form")
    layers = []
    for i in indices:
        weight = state[f"layers.{i}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"layers.{i}.bias"]})
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _read_state(path: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise UserError(f"aesthetic head {path!r}: no such file")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"aesthetic head {path!r} cannot be read: {error}") from error
