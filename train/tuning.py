"""What of a module is trained: how it is made trainable, compared with, written and read."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.nn import Module

from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import (
    adapter_disabled,
    add_adapter,
    restore_adapter,
    save_adapter,
)


class Tuning(Protocol):
    def attach(self, module: Module) -> None:
        """Make what is trained require gradients, in float32, and nothing else."""

    def reference(self, module: Module) -> AbstractContextManager[None]:
        """While open, the module is what it was before training."""

    def write(self, module: Module, folder: Path) -> None: ...

    def read(self, module: Module, folder: Path) -> None:
        """The very values that were written. Raises UserError for a damaged folder."""


@dataclass(frozen=True)
class Lora:
    info: AdapterInfo

    def attach(self, module: Module) -> None:
        lora = self.info.lora
        add_adapter(
            module, self.info.part, lora.rank, lora.alpha, lora.target_modules, lora.dropout
        )

    def reference(self, module: Module) -> AbstractContextManager[None]:
        return adapter_disabled(module)

    def write(self, module: Module, folder: Path) -> None:
        save_adapter(module, folder / "adapter", self.info)

    def read(self, module: Module, folder: Path) -> None:
        restore_adapter(module, folder)
