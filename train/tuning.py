"""What of a module is trained: how it is made trainable, written and read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor
from torch.nn import Module, Parameter

from duet.configs.schema import RunConfig
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import add_adapter, restore_adapter, save_adapter
from duet.inference.parts import Part
from duet.inference.provenance import Provenance
from duet.inference.weights import restore_weights, save_weights
from duet.train.swap import copies


class Tuning(Protocol):
    folder: Literal["adapter", "weights"]  # its place in a checkpoint

    def attach(self, module: Module) -> list[Tensor] | None:
        """Make what is trained require gradients, in float32, and nothing else.

        Returns the values that it begins with, on the CPU: with them the module is the reference
        of the KL. None: it is so with its adapter off, which is fresh.
        """

    def write(self, module: Module, folder: Path) -> None: ...

    def read(self, module: Module, folder: Path) -> None:
        """The very values that were written; `folder`: theirs, or the checkpoint.

        Raises UserError for a damaged one.
        """


@dataclass(frozen=True)
class Lora:
    """A fresh adapter, or the `given` one; the module itself stays as it was loaded."""

    info: AdapterInfo
    given: str | None = None  # of the same settings
    folder = "adapter"

    def attach(self, module: Module) -> list[Tensor] | None:
        lora = self.info.lora
        add_adapter(
            module, self.info.part, lora.rank, lora.alpha, lora.target_modules, lora.dropout
        )
        if self.given is None:
            return None
        restore_adapter(module, self.given)
        return copies([p for p in module.parameters() if p.requires_grad])

    def write(self, module: Module, folder: Path) -> None:
        save_adapter(module, folder, self.info)

    def read(self, module: Module, folder: Path) -> None:
        restore_adapter(module, folder)


@dataclass(frozen=True)
class Full:
    """All parameters that a training forward passes, from their `given` values on. The module is
    float32 then, whatever the dtype of the frozen parts: AdamW needs float32 masters, and mixed
    precision is autocast's.
    """

    info: Provenance
    given: str | None = None
    folder = "weights"

    def attach(self, module: Module) -> list[Tensor]:
        if self.given is not None:
            restore_weights(module, self.given)
        initial = copies(passed(module, self.info.part))
        train_whole(module, self.info.part)
        return initial

    def write(self, module: Module, folder: Path) -> None:
        save_weights(module, folder, self.info)

    def read(self, module: Module, folder: Path) -> None:
        restore_weights(module, folder)


def passed(module: Module, part: Part) -> list[Parameter]:
    """The parameters that a training forward passes."""
    idle = tuple(f"{name}." for name in part.idle)
    return [p for name, p in module.named_parameters() if not name.startswith(idle)]


def train_whole(module: Module, part: Part) -> None:
    """In float32, and all that a training forward passes requires gradients."""
    for parameter in passed(module.float(), part):
        parameter.requires_grad = True


def tuning_of(config: RunConfig, base: str, given: str | None = None) -> Tuning:
    """As a run's config has it; `base`: the fingerprint of its part; `given`: the folder of what it
    begins with."""
    told = config.stage, config.model.path, base, config.arithmetic
    if config.tuning == "full":
        return Full(Provenance(*told), given)
    return Lora(AdapterInfo(*told, config.lora), given)
