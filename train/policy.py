"""What is trained: sampled from, compared with its reference, updated, saved."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from duet.configs.errors import UserError
from duet.configs.update_schema import AverageConfig, OptimConfig
from duet.inference.adapters import adapter_disabled
from duet.inference.together import together
from duet.inference.trained import AVERAGE
from duet.inference.weights import fill_weights
from duet.train.average import Average
from duet.train.dropout import lora_dropout
from duet.train.engines import chosen_sharding
from duet.train.schedule import make_schedule
from duet.train.swap import copies, swapped
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
        source: str | Path | None = None,
        compared: bool = True,
    ) -> None:
        """`module`: the part itself, frozen; `updates`: of the whole run, for the learning
        rate's schedule; `source`: the folder of the weights of a module that has none yet;
        `compared`: whether there is to be a `reference`.
        """
        self.accelerator, self.inner, self.tuning, self.optim = accelerator, module, tuning, optim
        tuning.attach(module)
        self.sharding = chosen_sharding()(accelerator, module, tuning.info.part.block)
        self.trained = self.sharding.trained
        optimizer = AdamW(
            self.trained,
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
        )
        scheduler = make_schedule(optimizer, optim, updates)
        self.sharding.prepare(optimizer, scheduler, optim.max_grad_norm)
        if source is not None:
            fill_weights(module, source, self.sharding)
            self.sharding.settle()
        self.compared = compared
        self.initial = copies(self.held) if compared and not tuning.fresh else None  # as it began
        self.average = None if average is None else Average(average, self.held)
        self.skipped_in_a_row = 0  # updates
        self._losses: list[Tensor] = []  # of the micro-batches since the last update

    @property
    def module(self) -> Module:
        """What training forwards go through."""
        return self.sharding.module

    @property
    def optimizer(self) -> Optimizer:
        return self.sharding.optimizer

    @property
    def scheduler(self) -> LRScheduler:
        return self.sharding.scheduler

    @property
    def held(self) -> list[Tensor]:
        """What this process holds of the trained weights."""
        return [self.sharding.held(p) for p in self.trained]

    @property
    def size(self) -> int:
        """Trained weights, on all processes together."""
        return sum(self.sharding.shape(p).numel() for p in self.trained)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """While open, the pipeline's own module is the policy to sample with, unwrapped.

        Collective, on entry alone.
        """
        with torch.no_grad(), self.sharding.gathered():
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
        assert self.compared, "no reference was asked for"
        if self.initial is None:
            began = adapter_disabled(self.inner)
        else:
            began = self._swapped(self.initial)
        with torch.no_grad(), began:
            yield self.inner

    def averaged(self) -> AbstractContextManager[None]:
        """While open, the module is the average of its updates (`average` of the settings)."""
        assert self.average is not None, "nothing is averaged"
        return self._swapped(self.average.values)

    @contextmanager
    def _swapped(self, values: Sequence[Tensor]) -> Iterator[None]:
        self.sharding.settle()
        with swapped(self.held, values):
            yield
            self.sharding.settle()

    def step(self, loss: Tensor) -> Update | None:
        """After a micro-batch's backward: on the last one of an update clip and step.

        `loss`: of the micro-batch.

        Call it inside `sharding.accumulating()`. Where a loss or the gradient is
        not finite on any process, the update is skipped on all, with all its micro-batches:
        weights, moments and learning rate stay (as transformers does in fp16).
        """
        accelerator = self.accelerator
        self._losses.append(loss.detach().float())
        if not accelerator.sync_gradients:
            return None
        norm = self.sharding.clip().to(loss.device)
        made = self._sound(norm)
        self.sharding.step(made)
        if made and self.average is not None:
            self.average.step(self.held)
        return Update(norm, norm / math.sqrt(self.size), made)

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
        """Raises UserError, on all processes, where a weight or a moment of the optimizer is
        not finite on any."""
        finite = all(bool(v.isfinite().all()) for v in [*self.held, *self.sharding.moments()])
        broken = torch.tensor(float(not finite), device=self.accelerator.device)
        if self.accelerator.reduce(broken, "sum") > 0:
            raise UserError(
                "the trained weights are no longer finite: begin again with a smaller "
                f"optim.learning_rate than {self.optim.learning_rate:g}"
            )

    def save(self, folder: Path) -> None:
        """The trained weights. Collective: every process calls it, one writes.

        Raises UserError where one is not finite.
        """
        self.require_finite()
        self._write(folder / self.tuning.folder)
        if self.average is not None:
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    self.average.write(folder / AVERAGE)
            with self.averaged():
                self._write(folder / AVERAGE)

    def _write(self, folder: Path) -> None:
        written = self.tuning.written(self.inner)
        with self.sharding.laid_out(written) as module, together(self.accelerator):
            if self.accelerator.is_main_process:
                self.tuning.write(module, folder)

    def load(self, folder: Path) -> None:
        """The very weights, and their average, that were saved.

        Raises UserError for damaged ones.
        """
        if self.average is not None:
            self.tuning.read(self.inner, folder / AVERAGE, self.sharding)
            self.average.read(folder / AVERAGE, self.held)
        self.tuning.read(self.inner, folder, self.sharding)
        self.sharding.settle()
