"""A run: what a step of one part needs, and the parts that are trained in turns."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from duet.configs.row import Row
from duet.configs.schema import RunConfig
from duet.configs.turns import part_at
from duet.train.geometry import Geometry
from duet.train.held_out import HeldOut
from duet.train.policy import Policy
from duet.train.resume import Start
from duet.train.scoring import Scorer
from duet.train.signals import Signals
from duet.train.stages import Stage


@dataclass(frozen=True)
class Run:
    """Everything a step of one part needs."""

    config: RunConfig  # as the part's turn has it
    accelerator: Accelerator
    geometry: Geometry
    stage: Stage
    policy: Policy
    policies: Mapping[str, Policy]  # of all parts that the run trains, this one's too
    scorer: Scorer
    weights: Tensor  # [R], of the trained rewards
    rows: Sequence[Row]
    signals: Signals

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """While open, all parts are those to sample with. Collective, on entry alone."""
        with ExitStack() as opened:
            for policy in self.policies.values():
                opened.enter_context(policy.sampling())
            yield

    @property
    def shows(self) -> bool:
        """Progress bars come from one process a machine, and go to a terminal alone."""
        return self.accelerator.is_local_main_process and sys.stderr.isatty()


@dataclass(frozen=True)
class Training:
    """One part, or both in turns: each with its own policy, optimizer and rewards, on one model."""

    config: RunConfig
    accelerator: Accelerator
    runs: Mapping[str, Run]  # by part
    start: Start
    signals: Signals
    held_out: HeldOut

    def at(self, step: int) -> Run:
        """Whose rollout the step is, counted from 0."""
        return self.runs[part_at(self.config, step)]

    @property
    def policies(self) -> dict[str, Policy]:
        return dict(next(iter(self.runs.values())).policies)

    @property
    def shows(self) -> bool:
        return next(iter(self.runs.values())).shows
