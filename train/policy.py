"""What is trained: sampled from, compared with its reference, updated, saved."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import load
from torch import Tensor
from torch.nn import Module
from torch.optim import AdamW

from duet.configs.errors import UserError, first_line
from duet.configs.schema import OptimConfig
from duet.train.dropout import lora_dropout
from duet.train.schedule import make_schedule
from duet.train.tuning import Tuning

_STATE = "state"  # optimizer, scheduler and RNG, as accelerate writes them


class Policy:
    """A part's module with its optimizer. `module` is what training forwards go through."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: Module,
        tuning: Tuning,
        optim: OptimConfig,
        updates: int,
    ) -> None:
        """`module`: the part itself, frozen; `updates`: of the whole run, for the learning
        rate's schedule.
        """
        self.accelerator, self.inner, self.tuning, self.optim = accelerator, module, tuning, optim
        tuning.attach(module)
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
        # `save_state` must not write, nor `load_state` read, the frozen base
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

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
        """The module as it was before training, for the KL."""
        with torch.no_grad(), self.tuning.reference(self.inner):
            yield self.inner

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """While open, a backward pass; the `last` of a micro-batch shares gradients where an
        update is due."""
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def step(self) -> Tensor | None:
        """After a micro-batch's backward: on the last one of an update clip and step.

        Call it inside `accelerator.accumulate(policy.module)`. Returns the gradient's norm
        before clipping where a step was made.
        """
        accelerator, norm = self.accelerator, None
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(self.trained, self.optim.max_grad_norm)
        self.optimizer.step()
        if accelerator.sync_gradients:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return norm if norm is None else torch.as_tensor(norm)

    def save(self, folder: Path) -> None:
        """Collective: every process calls it, one writes."""
        self.accelerator.save_state(str(folder / _STATE))
        if self.accelerator.is_main_process:
            self.tuning.write(self.inner, folder)

    def load(self, folder: Path) -> None:
        """The very weights, optimizer, schedule and RNG that were saved.

        Raises UserError for a damaged checkpoint.
        """
        self.tuning.read(self.inner, folder)
        try:
            state = folder / _STATE
            # load_state passes over random states that it cannot read
            load(state / f"random_states_{self.accelerator.process_index}.pkl")
            self.accelerator.load_state(str(state))
        except Exception as error:  # torch, pickle and zip readers each raise their own kinds
            raise UserError(
                f"checkpoint {str(folder)!r} is damaged ({first_line(error)}): resume from another"
            ) from error
