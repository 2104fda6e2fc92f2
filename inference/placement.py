"""Where the parts of a pipeline are: on the device, or on the CPU until a phase needs them."""

import torch
from diffusers import GlmImagePipeline
from torch.distributed import is_initialized
from torch.nn import Module

from duet.configs.policy_schema import ModelConfig
from duet.inference.model import components, pick_device


class Placement:
    """With `offload` none the parts stay where they are; with `phase` those that the phase at
    hand does not need wait on the CPU.

    Parameters keep their identity, so an optimizer goes on with them. DDP would not: a parameter
    that changes its device loses the hook that shares its gradient. So on several processes what
    is trained stays.
    """

    def __init__(self, pipeline: GlmImagePipeline, config: ModelConfig | None = None) -> None:
        """`config`: None leaves the parts where they are."""
        self.pipeline, self.moves = pipeline, config is not None and config.offload == "phase"
        self.device = pick_device(config.device) if self.moves else _device(pipeline)
        self.fixed: set[str] = set()  # components that stay on the device

    def bring(self, *needed: str) -> None:
        """Before a phase: first the others leave, so that the two are never there together."""
        if not self.moves:
            return
        parts = components(self.pipeline)
        for name, part in parts.items():
            if name not in needed and name not in self.fixed:
                _send(part, "cpu")
        for name in needed:
            if name not in self.fixed:
                _send(parts[name], self.device)


def _send(part: Module, device: torch.device | str) -> None:
    if is_initialized():
        part._apply(lambda tensor: tensor if tensor.requires_grad else tensor.to(device))
    else:
        part.to(device)


def _device(pipeline: GlmImagePipeline) -> torch.device:
    """Where its weights are, of those that it has already."""
    weights = (p for part in components(pipeline).values() for p in part.parameters())
    return next(p.device for p in weights if not p.is_meta)
