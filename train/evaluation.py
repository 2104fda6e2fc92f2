"""Held-out prompts, fixed seeds: every model's pictures and every reward's scores of them."""

import gc
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState

from duet.configs.errors import UserError
from duet.configs.outputs import make_folder, require_free, staged, write_new
from duet.configs.pictures import read_picture
from duet.configs.row import Row
from duet.configs.rows import Rows, rows_of
from duet.configs.schema import RunConfig
from duet.configs.turns import trained_rewards, turns
from duet.inference.layout import Size
from duet.inference.outline import read_outline
from duet.inference.pictures import to_png
from duet.inference.processes import sharing
from duet.inference.prompt_check import check_prompts
from duet.inference.provenance import Provenance
from duet.inference.together import from_main, together
from duet.rewards.registry import load_rewards
from duet.rewards.resting import Resting
from duet.train.given import checked
from duet.train.labels import labels
from duet.train.lock import locked_for_all
from duet.train.measurement import Judges, measure
from duet.train.results import (
    BASE,
    PAGE,
    RESULTS,
    SOURCES,
    STRIP,
    ModelResult,
    Results,
    write_results,
)
from duet.train.statistics import summarise

_SHOWN = 512, 512  # pixels at most, of a source in the report


def evaluate(
    config: RunConfig, models: Sequence[tuple[str, ...]], output: Path, average: bool = False
) -> Results:
    """Evaluate the base and then each model (a tuple of checkpoints to load together), or with
    `average` the averages of its weights.

    The base is what a run of the config begins with: the model, with its `model.adapters`. Those
    stay under a checkpoint of the other part, which was trained beside them; a checkpoint of
    their own part takes their place.

    With all done, `output` has a folder of pictures a model, and the results. Every model
    gets the same prompts and seeds, so differences to the base are paired. A policy is run in
    the arithmetic of the config, and so in that which training sampled with. Several processes
    share the pictures out, and what they find is the same for any number of them.
    Raises UserError, before weights are read, for rows, checkpoints that do not go together,
    and a folder in which something would be overwritten or that another process writes to.
    """
    with sharing(config.model.device) as state:
        with together(state):
            rows, named = _checked(config, models, average, state.is_local_main_process)
        edits = any(row.sources for row in rows)
        entries = [*named, *([SOURCES] if edits else []), RESULTS]
        from_main(state, lambda: require_free("--output", output, [*entries, PAGE, STRIP]))
        with locked_for_all(state, "--output", output):
            with together(state):
                judges = _judges(config)
            with _staged_for_all(state, output, entries, named) as folder:
                found = _measure_models(config, rows, judges, named, folder, state)
                sources = from_main(state, lambda: _write_sources(rows, folder)) if edits else []
                prompts, stage = [row.prompt for row in rows], "+".join(turns(config))
                results = Results(stage, config.eval.confidence, prompts, found, sources)
                from_main(state, lambda: write_results(results, folder))
    return results


def _checked(
    config: RunConfig, models: Sequence[tuple[str, ...]], average: bool, show: bool
) -> tuple[Rows, dict[str, tuple[str, ...]]]:
    """The held-out rows, and every model's adapters by its name."""
    rows = rows_of(config, "eval", show)
    begun = _by_part(checked("model.adapters", config.model.adapters, config))
    own = [_by_part(checked("--checkpoint", model, config, average)) for model in models]
    adapters = [tuple((begun | each).values()) for each in ({}, *own)]
    check_prompts(read_outline(config.model.path), rows, Size.of(config.sampling), show)
    return rows, dict(zip([BASE, *labels(models)], adapters, strict=True))


def _by_part(infos: Mapping[str, Provenance]) -> dict[str, str]:
    """The folder of each part's."""
    return {info.stage: folder for folder, info in infos.items()}


def _judges(config: RunConfig) -> Judges:
    rewards = load_rewards((*trained_rewards(config), *config.eval.rewards))
    judges = Judges(rewards, Resting(rewards.items(), config.model.offload))
    judges.resting.rest()
    return judges


@contextmanager
def _staged_for_all(
    state: PartialState, output: Path, entries: Sequence[str], models: Iterable[str]
) -> Iterator[Path]:
    """`staged` by the main process, with a folder a model.

    Raises UserError, on all, where one does not see what the main process has made.
    """
    with ExitStack() as held:

        def begin() -> Path:
            folder = held.enter_context(staged("--output", output, entries))
            for name in models:
                make_folder("--output", folder / name)
            return folder

        folder = from_main(state, begin)
        with together(state):
            if not folder.is_dir():
                raise UserError(
                    f"--output = {str(output)!r} is another folder on {socket.gethostname()} than "
                    "on the main process's machine: name one that all machines share"
                )
        yield folder


def _measure_models(
    config: RunConfig,
    rows: Sequence[Row],
    judges: Judges,
    models: Mapping[str, tuple[str, ...]],  # a name's checkpoints
    folder: Path,
    state: PartialState,
) -> list[ModelResult]:
    results: list[ModelResult] = []
    for name, checkpoints in models.items():
        made = measure(config, checkpoints, rows, judges, folder / name, state)
        gc.collect()  # the next model must fit in its place
        scores = {reward: [m.scores[reward] for m in made] for reward in judges.rewards}
        base = results[0].scores if results else None
        metrics = {k: summarise(v, base and base[k], config.eval) for k, v in scores.items()}
        images = [f"{name}/{file}" for measured in made for file in measured.files]
        results.append(ModelResult(name, list(checkpoints), images, scores, metrics))
    return results


def _write_sources(rows: Sequence[Row], folder: Path) -> list[list[str]]:
    """Of each row, as large as a page shows them; paths below the folder."""
    make_folder("--output", folder / SOURCES)
    paths = []
    for place, row in enumerate(rows):
        paths.append([f"{SOURCES}/{place:03d}-{n}.png" for n in range(len(row.sources))])
        for path, stored in zip(paths[-1], row.sources, strict=True):
            picture = read_picture(stored)
            picture.thumbnail(_SHOWN)
            write_new(folder / path, to_png(picture))
    return paths
