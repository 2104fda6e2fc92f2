"""Aesthetic score: an MLP on CLIP image embeddings, in the form of LAION's predictor.

https://github.com/christophschuhmann/improved-aesthetic-predictor
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from configs.errors import UserError
from rewards.base import RewardInput
from rewards.clip import load_clip


class Aesthetic:
    """The predictor's mark, about 1 to 10, divided by 10."""

    def __init__(
        self,
        head: str,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        device: str = "auto",
    ) -> None:
        """`head`: the MLP's weights, .safetensors or LAION's .pth."""
        self.clip = load_clip(model, pretrained, device)
        self.head = load_head(head).to(self.clip.device)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        marks = self.head(self.clip.embed_images([i.image for i in inputs]))
        return (marks[:, 0] / 10).tolist()


def load_head(path: str) -> nn.Sequential:
    """The MLP (linear layers; dropout is idle here) with the widths its weights have.

    Raises UserError for a missing file or one that holds no such MLP.
    """
    if not Path(path).is_file():
        raise UserError(f"aesthetic head {path!r}: no such file")
    if path.endswith(".safetensors"):
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
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
