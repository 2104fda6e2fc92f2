"""One model's pictures of the held-out prompts and every reward's scores of them, shared out over
processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from duet.configs.outputs import write_new
from duet.configs.row import Row
from duet.configs.schema import RunConfig
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.model import load_pipeline
from duet.inference.pictures import to_png
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.inference.together import in_rounds, together
from duet.inference.trained import load_trained
from duet.rewards.answers import Answer
from duet.rewards.base import Reward, RewardInput, score
from duet.rewards.resting import Resting
from duet.train.prompts import derive_seed

_SEED = 2**31  # far from any training seed; the same for every model


@dataclass(frozen=True)
class Judges:
    """What pictures are measured by."""

    rewards: Mapping[str, Reward]
    resting: Resting

    def __call__(
        self, rows: Sequence[Row], made: Sequence[tuple[int, Rollout]]
    ) -> dict[int, dict[str, list[Answer]]]:
        """The scores of each row's pictures by its place: NaN where a reward failed, None where
        it does not apply."""
        with self.resting.awake():
            scores = _score(self.rewards, [(rows[place], rollout) for place, rollout in made])
        return {
            place: {name: own[n] for name, own in scores.items()}
            for n, (place, _) in enumerate(made)
        }


@dataclass(frozen=True)
class Measured:
    """One prompt's pictures."""

    place: int  # the prompt's
    files: list[str]
    scores: dict[str, list[Answer]]  # by reward; NaN where it failed, None: does not apply


def measure(
    config: RunConfig,
    checkpoints: Sequence[str],
    rows: Sequence[Row],
    judges: Judges,
    folder: Path,
    state: PartialState,
) -> list[Measured]:
    """Of the model with the checkpoints, in the order of the rows; on all processes.

    Each writes and scores its own share of the pictures as they are made: memory holds those of
    one batch. What ends one process ends all.
    """
    with together(state):
        engine = _engine(config, checkpoints, state)
    parts = in_rounds(state, _parts(engine, config, rows, judges, folder, state))
    own = [measured for part in parts for measured in part]
    made = sorted(gather_object(own), key=lambda measured: measured.place)
    assert [measured.place for measured in made] == list(range(len(rows))), "each prompt once"
    return made


def _engine(config: RunConfig, checkpoints: Sequence[str], state: PartialState) -> Engine:
    model = config.model
    pipeline = load_pipeline(model.path, model.dtype, str(state.device), model.offload)
    for checkpoint in checkpoints:
        load_trained(pipeline, checkpoint)
    return Engine.of(pipeline, config, state.is_local_main_process)


def _parts(
    engine: Engine,
    config: RunConfig,
    rows: Sequence[Row],
    judges: Judges,
    folder: Path,
    state: PartialState,
) -> Iterator[list[Measured]]:
    """Those of this process."""
    requests = held_out_requests(config, rows)
    for part in engine.in_parts(requests, state.process_index, state.num_processes):
        files = {place: list(_write_pictures(rollout, folder, place)) for place, rollout in part}
        scores = judges(rows, part)
        yield [Measured(place, own, scores[place]) for place, own in files.items()]


def held_out_requests(config: RunConfig, rows: Sequence[Row]) -> list[Request]:
    """With the same seeds for every model, whoever draws them."""
    size, count = Size.of(config.sampling), config.eval.images_per_prompt
    return [
        Request(
            row.prompt, tuple(derive_seed(_SEED, i, n) for n in range(count)), size, row.sources
        )
        for i, row in enumerate(rows)
    ]


def _write_pictures(rollout: Rollout, folder: Path, place: int) -> Iterator[str]:
    for n, image in enumerate(rollout.images):
        write_new(folder / f"{place:03d}-{n}.png", to_png(image))
        yield f"{place:03d}-{n}.png"


def _score(
    rewards: Mapping[str, Reward], part: Sequence[tuple[Row, Rollout]]
) -> dict[str, list[list[Answer]]]:
    """Per reward [prompts, images]."""
    inputs = [
        RewardInput(image, row.prompt, row) for row, rollout in part for image in rollout.images
    ]
    sizes = [len(rollout) for _, rollout in part]
    answers = {name: iter(score(reward, name, inputs, sizes)) for name, reward in rewards.items()}
    return {name: [[next(own) for _ in range(n)] for n in sizes] for name, own in answers.items()}
