"""The loop of the tiny parts' pretraining."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import trange


@dataclass(frozen=True)
class Course:
    """AdamW, its rate warmed up over a twentieth of the schedule."""

    name: str
    rate: float
    steps: int
    schedule_steps: int | None = None  # the rate would be 0 behind them; None: `steps`
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


def descend(
    course: Course,
    trained: Iterable[nn.Parameter],
    losses_of: Callable[[], Mapping[str, Tensor]],
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """`losses_of` draws a batch: of its scalars `loss` is descended, all are shown; `after` is
    called with each step that is made.
    """
    parameters, rate = list(trained), course.rate
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=course.betas, weight_decay=course.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, course.schedule_steps or course.steps, pct_start=0.05
    )
    progress = trange(course.steps, desc=course.name)
    for step in progress:
        losses = losses_of()
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix({key: f"{value.item():.4f}" for key, value in losses.items()})
        after(step)
