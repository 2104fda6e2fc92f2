"""What of a module is trained: how it is made trainable, written and read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch.nn import Module, Parameter

from duet.configs.schema import RunConfig
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import add_adapter, restore_adapter, save_adapter
from duet.inference.filling import Filling
from duet.inference.parts import Part
from duet.inference.provenance import Provenance
from duet.inference.weights import restore_weights, save_weights


class Tuning(Protocol):
    folder: Literal["adapter", "weights"]  # its place in a checkpoint

    @property
    def fresh(self) -> bool:
        """Whether it begins as an adapter that changes nothing: the module with it off is the
        reference of the KL. Else the module is so with the values that it begins with.
        """

    def attach(self, module: Module) -> None:
        """Make what is trained require gradients, in float32, and nothing else."""

    def write(self, module: Module, folder: Path) -> None: ...

    def written(self, module: Module) -> dict[str, Parameter]:
        """What `write` reads, by name."""

    def read(self, module: Module, folder: Path, into: Filling) -> None:
        """The very values that were written; `folder`: theirs, or the checkpoint.

        Raises UserError for a damaged one.
        """


@dataclass(frozen=True)
class Lora:
    """A fresh adapter, or the `given` one; the module itself stays as it was loaded."""

    info: AdapterInfo
    given: str | None = None  # of the same settings
    folder = "adapter"

    @property
    def fresh(self) -> bool:
        return self.given is None

    def attach(self, module: Module) -> None:
        lora = self.info.lora
        add_adapter(
            module, self.info.part, lora.rank, lora.alpha, lora.target_modules, lora.dropout
        )
        if self.given is not None:
            restore_adapter(module, self.given)

    def write(self, module: Module, folder: Path) -> None:
        save_adapter(module, folder, self.info)

    def written(self, module: Module) -> dict[str, Parameter]:
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    def read(self, module: Module, folder: Path, into: Filling) -> None:
        restore_adapter(module, folder, into)


@dataclass(frozen=True)
class Full:
    """All parameters that a training forward passes, from their `given` values on. The module is
    float32 then, whatever the dtype of the frozen parts: AdamW needs float32 masters, and mixed
    precision is autocast's.
    """

    info: Provenance
    given: str | None = None
    folder = "weights"
    fresh = False

    def attach(self, module: Module) -> None:
        if self.given is not None:
            restore_weights(module, self.given)
        train_whole(module, self.info.part)

    def write(self, module: Module, folder: Path) -> None:
        save_weights(module, folder, self.info)

    def written(self, module: Module) -> dict[str, Parameter]:
        return dict(module.named_parameters())

    def read(self, module: Module, folder: Path, into: Filling) -> None:
        restore_weights(module, folder, into)


def train_whole(module: Module, part: Part) -> None:
    """In float32, and all that a training forward passes requires gradients."""
    idle = tuple(f"{name}." for name in part.idle)
    for name, parameter in module.float().named_parameters():
        parameter.requires_grad = not name.startswith(idle)


def tuning_of(config: RunConfig, base: str, given: str | None = None) -> Tuning:
    """As a run's config has it; `base`: the fingerprint of its part; `given`: the folder of what it
    begins with."""
    told = config.stage, config.model.path, base, config.arithmetic
    if config.tuning == "full":
        return Full(Provenance(*told), given)
    return Lora(AdapterInfo(*told, config.lora), given)
