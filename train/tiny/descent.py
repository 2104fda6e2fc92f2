"""The loop of the tiny parts' pretraining."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm import trange


def descend(
    name: str,
    trained: Iterable[nn.Parameter],
    losses_of: Callable[[], Mapping[str, Tensor]],
    steps: int,
    rate: float,
    weight_decay: float = 0.0,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """`losses_of` draws a batch: of its scalars `loss` is descended, all are shown; `after` is
    called with each step that is made. AdamW, warmed up over a twentieth of the steps.
    """
    parameters = list(trained)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    progress = trange(steps, desc=name)
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
