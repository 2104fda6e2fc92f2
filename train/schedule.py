"""The learning rate over a run's updates, by transformers' own schedules."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from duet.configs.update_schema import OptimConfig

# transformers' own `constant` would leave out a warm-up that is set
_NAMES = {"constant": "constant_with_warmup"}


def make_schedule(optimizer: Optimizer, optim: OptimConfig, updates: int) -> LRScheduler:
    """`updates`: of the whole run. The first update of a warm-up has a learning rate of 0."""
    warmup = optim.warmup_steps or math.ceil(optim.warmup_ratio * updates)
    name = _NAMES.get(optim.lr_scheduler_type, optim.lr_scheduler_type)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=updates)
