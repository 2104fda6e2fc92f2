"""Filling a cache of prior tokens, part by part, on one process or several."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from duet.configs.digests import Damaged, write_digests
from duet.configs.errors import UserError, tell
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import RunConfig
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.model import COMPONENTS, base_fingerprint, load_pipeline
from duet.inference.outline import read_outline
from duet.inference.parts import AR
from duet.inference.processes import sharing
from duet.inference.prompt_check import check_prompts
from duet.inference.together import from_main, in_rounds, together
from duet.train.checkpoint import sync_tree
from duet.train.given import Given, given, load_given
from duet.train.lock import locked_for_all
from duet.train.prior_cache import ROWS, PriorCache, check_cache, require_same
from duet.train.prior_stamp import Stamp, make_stamp
from duet.train.prior_tokens import make_priors, require_references
from duet.train.prompts import fixed_seeds


def fill_cache(config: RunConfig) -> Path:
    """The finished cache's folder: priors of every training row, for the seeds that its groups
    have in the first epochs. What is there already is not made again.

    Raises UserError where another cache stands.
    """
    name, folder = "rollout.prior_cache", Path(config.rollout.prior_cache)
    with (
        sharing(config.model.device) as state,
        locked_for_all(state, name, folder),
    ):
        return _filled(config, state)


def _filled(config: RunConfig, state: PartialState) -> Path:
    show, cache = state.is_local_main_process, PriorCache.of(config)
    with together(state):
        rows = rows_of(config, "train", show)
        require_references(config, rows)
        check_prompts(read_outline(config.model.path), rows, Size.of(config.sampling), show)
        begun = given(config)
        ar = base_fingerprint(config.model.path, AR.component)
        stamp = make_stamp(config, rows, ar, begun.get(AR.name))
    if from_main(state, lambda: _stands(config, cache, stamp, rows)):
        if state.is_main_process:
            tell("the prior tokens are there already")
        return cache.folder
    partial = PriorCache(cache.folder.with_name(f".{cache.folder.name}.partial"))
    parts = from_main(state, lambda: _begin(config, partial, stamp, rows))
    own = parts[state.process_index :: state.num_processes]
    for _ in in_rounds(state, _make(config, partial, rows, own, begun, state)):
        pass

    def finish() -> None:
        write_digests(partial.folder)
        sync_tree(partial.folder)
        partial.folder.rename(cache.folder)

    from_main(state, finish)
    return cache.folder


def _stands(config: RunConfig, cache: PriorCache, stamp: Stamp, rows: Sequence[Row]) -> bool:
    if not cache.folder.exists():
        return False
    check_cache(config, stamp, rows)
    return True


def _begin(config: RunConfig, cache: PriorCache, stamp: Stamp, rows: Sequence[Row]) -> list[int]:
    """The parts that are still to be made. Raises UserError where others were begun."""
    if any(cache.folder.glob("*.safetensors")):
        name = f"rollout.prior_cache = {config.rollout.prior_cache!r}, which was begun,"
        try:
            require_same(name, cache.stamp(), stamp, config, rows)
        except Damaged as error:
            raise UserError(f"{name} is damaged ({error}): remove {str(cache.folder)!r}") from error
    else:
        cache.folder.mkdir(exist_ok=True)
        cache.write_stamp(stamp)
    return [part for part in range(ceil(len(rows) / ROWS)) if not _holds(cache, part, rows)]


def _holds(cache: PriorCache, part: int, rows: Sequence[Row]) -> bool:
    try:
        for row in range(len(rows))[part * ROWS : (part + 1) * ROWS]:
            cache.read(row)
    except Damaged:
        return False
    return True


def _make(
    config: RunConfig,
    cache: PriorCache,
    rows: Sequence[Row],
    parts: Sequence[int],
    begun: Mapping[str, Given],
    state: PartialState,
) -> Iterator[int]:
    """Each part when it is written."""
    if not parts:
        return
    model, rollout, show = config.model, config.rollout, state.is_local_main_process
    others = [name for name in COMPONENTS if name != AR.component]
    pipeline = load_pipeline(model.path, model.dtype, str(state.device), model.offload, others)
    load_given(pipeline, begun, [AR.name])
    size = Size.of(config.sampling)
    engine = Engine.of(pipeline, config, show)
    epochs = [fixed_seeds(len(rows), config.seed, e) for e in range(rollout.priors_per_prompt)]
    seeds = list(zip(*epochs, strict=True))  # by the row, then by the epoch
    with tqdm(parts, "priors", disable=None if show else True) as bar:
        for part in bar:
            its = slice(part * ROWS, (part + 1) * ROWS)
            cache.write(part, make_priors(engine, size, rollout.priors, rows[its], seeds[its]))
            yield part
