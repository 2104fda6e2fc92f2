"""Skipped updates: what they were made of is kept for a look, and too many end the run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from duet.configs.errors import UserError
from duet.train.collect import Collected
from duet.train.learn import Learned
from duet.train.run import Run
from duet.train.stages import sampled_logprobs

FOLDER = "skipped"
_KEPT_STEPS = 10  # of one run: pictures are large, and the first ones tell the most


def keep_samples(
    run: Run, collected: Collected, advantages: Tensor, learned: Learned, step: int
) -> None:
    """Write this process's samples of skipped updates to `skipped/step-N/process-R/`.

    `advantages`: [B], of this process's samples. A picture each, and `samples.json` with what
    the loss was made of; null stands for what is not finite.
    """
    folder = Path(run.config.output_dir) / FOLDER / f"step-{step}"
    if not learned.skipped or _full(folder):
        return
    folder = folder / f"process-{run.accelerator.process_index}"
    folder.mkdir(parents=True, exist_ok=True)
    owners = [(rollout, n) for rollout in collected.rollouts for n in range(len(rollout))]
    sampled = sampled_logprobs(run.stage, collected.rollouts, advantages.device)
    told = []
    for index, trained in sorted(learned.skipped.items()):
        rollout, n = owners[index]
        own = run.stage.sampled(rollout).shape[1]  # actions
        name = f"{index:03d}.png"
        rollout.images[n].save(folder / name)
        told.append(
            {
                "image": name,
                "prompt": rollout.request.prompt,
                "seed": rollout.request.seeds[n],
                "rewards": {
                    key: _plain(column[index])
                    for key, column in collected.sampled.scores.trained.items()
                },
                "advantage": _plain(advantages[index]),
                "sampled_logprobs": _plain(sampled[index][-own:]),
                "trained_logprobs": _plain(trained[-own:]),
            }
        )
    (folder / "samples.json").write_text(json.dumps(told, indent=1, allow_nan=False))


def _full(folder: Path) -> bool:
    return len(set(folder.parent.glob("step-*")) - {folder}) >= _KEPT_STEPS


def _plain(values: Tensor) -> float | list[float] | None:
    """Numbers as JSON has them."""
    listed = values.tolist()
    if isinstance(listed, Sequence):
        return [v if math.isfinite(v) else None for v in listed]
    return listed if math.isfinite(listed) else None


def require_updates(run: Run) -> None:
    """Raises UserError after `train.max_skipped` skipped updates in a row."""
    skipped = run.policy.skipped_in_a_row
    if skipped >= run.config.train.max_skipped:
        raise UserError(
            f"{skipped} updates in a row had a loss or gradient that is not finite "
            f"(train.max_skipped = {run.config.train.max_skipped}): look at "
            f"{Path(run.config.output_dir) / FOLDER}, then lower optim.learning_rate, "
            "grpo.beta or a reward's weight"
        )
