"""LoRA dropout: in an update's forward and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Dropout, Module


@contextmanager
def lora_dropout(module: Module) -> Iterator[None]:
    """While open, the adapter's dropout layers drop; all else stays as it is evaluated.

    Sampling, the gate, old log-probs and the reference are scored without it: what is dropped
    is drawn anew in every forward, and the ratio of two thinned policies would be noise upon
    noise. With dropout the ratio's numerator alone is thinned.
    """
    tuned = (m for m in module.modules() if isinstance(m, BaseTunerLayer))
    layers = [d for m in tuned for d in m.modules() if isinstance(d, Dropout)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()
