"""Which layers the names of a LoRA bind to."""

import difflib
from collections.abc import Sequence

from torch.nn import Linear, Module

from duet.configs.errors import UserError
from duet.inference.parts import Part


def is_target(layer: str, name: str) -> bool:
    """PEFT's rule: a name is the layer's whole name or its end, from a dot on."""
    return layer == name or layer.endswith(f".{name}")


def bind(module: Module, part: Part, names: Sequence[str]) -> list[str]:
    """The linear layers that bear one of the names.

    Raises UserError, alike on all processes, for a name that none bears, and for one that
    reaches what cannot be trained: other kinds of layers, and layers that no training forward
    passes, whose gradients several processes would wait for.
    """
    modules = dict(module.named_modules())
    passed = {
        layer
        for layer, kind in modules.items()
        if isinstance(kind, Linear) and not any(layer.startswith(f"{i}.") for i in part.idle)
    }
    bound = []
    for name in names:
        layers = [layer for layer in modules if layer and is_target(layer, name)]
        strange = [layer for layer in layers if layer not in passed]
        if not layers or strange:
            why = f"fits {strange[0]}, which is not trained" if strange else "fits no layer"
            raise UserError(
                f"lora.target_modules: {name!r} {why}; near it are {_near(name, passed, part)}"
            )
        bound += layers
    return sorted(set(bound))


def _near(name: str, layers: set[str], part: Part) -> str:
    ends = {layer.rpartition(".")[2] for layer in layers}
    known = [*part.lora_targets, *sorted(end for end in ends if not end.isdigit())]
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.0)
    return ", ".join(map(repr, near))
