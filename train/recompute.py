"""Gradient checkpointing: blocks keep their inputs alone and are computed again in backward."""

from functools import partial

import torch
from torch.nn import Module
from torch.utils.checkpoint import checkpoint


def recompute_blocks(module: Module, block: type[Module]) -> None:
    """Every `block` inside the module is computed twice where gradients are wanted
    (Chen et al., arXiv 1604.06174); elsewhere nothing changes.

    transformers' own switch works in train mode alone, and then there is no cache to sample with.
    """
    found = [layer for layer in module.modules() if isinstance(layer, block)]
    assert found, f"no {block.__name__} to compute again"
    for layer in found:
        layer.forward = partial(_forward, layer.forward)


def is_recomputed(module: Module) -> bool:
    """Are blocks inside the module computed again in backward?"""
    forwards = (layer.forward for layer in module.modules())
    return any(isinstance(f, partial) and f.func is _forward for f in forwards)


def _forward(forward, *args, **kwargs):
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)
