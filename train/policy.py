"""What is trained: sampled from, compared with its reference, updated, saved."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.optim import AdamW

from duet.configs.errors import UserError
from duet.configs.schema import AverageConfig, OptimConfig
from duet.inference.adapters import adapter_disabled
from duet.inference.trained import AVERAGE
from duet.train.average import Average
from duet.train.dropout import lora_dropout
from duet.train.schedule import make_schedule
from duet.train.swap import swapped
from duet.train.tuning import Tuning


@dataclass(frozen=True)
class Update:
    """One update of the weights, made or skipped."""

    grad_norm: Tensor  # scalar, before clipping
    grad_rms: Tensor  # scalar, root mean square of the gradient's elements
    made: bool  # False: a loss or the gradient was not finite, on any process


class Policy:
    """A part's module with its optimizer. `module` is what training forwards go through."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: Module,
        tuning: Tuning,
        optim: OptimConfig,
        updates: int,
        average: AverageConfig | None = None,
    ) -> None:
        """`module`: the part itself, frozen; `updates`: of the whole run, for the learning
        rate's schedule.
        """
        self.accelerator, self.inner, self.tuning, self.optim = accelerator, module, tuning, optim
        self.initial = tuning.attach(module)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = AdamW(
            self.trained,
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
        )
        scheduler = make_schedule(optimizer, optim, updates)
        self.module, self.optimizer, self.scheduler = accelerator.prepare(
            module, optimizer, scheduler
        )
        self.average = None if average is None else Average(average, self.trained)
        self.skipped_in_a_row = 0  # updates
        self._losses: list[Tensor] = []  # of the micro-batches since the last update

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """While open, the pipeline's own module is the policy to sample with, unwrapped."""
        with torch.no_grad():
            yield

    @contextmanager
    def training(self) -> Iterator[Module]:
        """The module to run an update's forward through, its adapter's dropout on."""
        with lora_dropout(self.inner):
            yield self.module

    @contextmanager
    def reference(self) -> Iterator[Module]:
        """The module as the run began with it, before a resume too, for the KL.

        Full weights are swapped, so no graph that waits for its backward may stand open.
        """
        if self.initial is None:
            began = adapter_disabled(self.inner)
        else:
            began = swapped(self.trained, self.initial)
        with torch.no_grad(), began:
            yield self.inner

    def averaged(self) -> AbstractContextManager[None]:
        """While open, the module is the average of its updates (`average` of the settings)."""
        assert self.average is not None, "nothing is averaged"
        return swapped(self.trained, self.average.values)

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """While open, a backward pass; the `last` of a micro-batch shares gradients where an
        update is due."""
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def step(self, loss: Tensor) -> Update | None:
        """After a micro-batch's backward: on the last one of an update clip and step.

        `loss`: of the micro-batch.

        Call it inside `accelerator.accumulate(policy.module)`. Where a loss or the gradient is
        not finite on any process, the update is skipped on all, with all its micro-batches:
        weights, moments and learning rate stay (as transformers does in fp16).
        """
        accelerator = self.accelerator
        self._losses.append(loss.detach().float())
        if not accelerator.sync_gradients:
            return None
        norm = accelerator.clip_grad_norm_(self.trained, self.optim.max_grad_norm)
        norm = torch.as_tensor(norm, device=loss.device)
        made = self._sound(norm)
        if not made:
            self.optimizer.zero_grad()
        if made or accelerator.scaler is not None:  # the scaler lowers its scale
            self.optimizer.step()
        if made:
            self.scheduler.step()
            if self.average is not None:
                self.average.step(self.trained)
        self.optimizer.zero_grad()
        return Update(norm, norm / math.sqrt(sum(p.numel() for p in self.trained)), made)

    def _sound(self, norm: Tensor) -> bool:
        """Whether the update is finite, the same on all processes; counts those that are not."""
        accelerator, losses = self.accelerator, torch.stack(self._losses)
        self._losses = []
        broken = torch.stack([~losses.isfinite().all(), ~norm.isfinite()]).float()
        loss, gradient = accelerator.reduce(broken, "sum").tolist()
        scaler = accelerator.scaler
        # an overflow in fp16 is how the scaler finds its scale, as long as it can lower it
        searching = not loss and scaler is not None and scaler.get_scale() > 1
        if not loss and not gradient:
            self.skipped_in_a_row = 0
        elif not searching:
            self.skipped_in_a_row += 1
        return not loss and not gradient

    def require_finite(self) -> None:
        """Raises UserError where a weight or a moment of the optimizer is not finite."""
        states = (s for p in self.trained for s in self.optimizer.state[p].values())
        values = [*self.trained, *(s for s in states if isinstance(s, Tensor))]
        if not all(bool(v.isfinite().all()) for v in values):
            raise UserError(
                "the trained weights are no longer finite: begin again with a smaller "
                f"optim.learning_rate than {self.optim.learning_rate:g}"
            )

    def save(self, folder: Path) -> None:
        """The trained weights. Collective: every process calls it, one writes.

        Raises UserError where one is not finite.
        """
        self.require_finite()
        if self.accelerator.is_main_process:
            self.tuning.write(self.inner, folder / self.tuning.folder)
            self._write_average(folder / AVERAGE)

    def _write_average(self, folder: Path) -> None:
        if self.average is not None:
            self.average.write(folder)
            with self.averaged():
                self.tuning.write(self.inner, folder)

    def load(self, folder: Path) -> None:
        """The very weights, and their average, that were saved.

        Raises UserError for damaged ones.
        """
        if self.average is not None:
            self.tuning.read(self.inner, folder / AVERAGE)
            self.average.read(folder / AVERAGE, self.trained)
        self.tuning.read(self.inner, folder)
