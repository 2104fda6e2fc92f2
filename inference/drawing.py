"""A model's pictures of prompts as files, shared out over processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from accelerate import PartialState

from duet.configs.outputs import write_new
from duet.configs.row import Row
from duet.configs.schema import Arithmetic, SamplingConfig
from duet.inference import model
from duet.inference.batching import pack
from duet.inference.engine import Engine, autocast_dtype
from duet.inference.layout import Size
from duet.inference.pictures import to_png
from duet.inference.processes import sharing
from duet.inference.request import Request
from duet.inference.together import in_rounds, together
from duet.inference.trained import load_trained


@dataclass(frozen=True)
class Drawing:
    """What draws, and how."""

    model: str
    adapters: Sequence[str]
    sampling: SamplingConfig
    arithmetic: Arithmetic
    batch_size: int
    source_sized: bool  # an edit is drawn at its first source's size

    def engine(self, state: PartialState) -> Engine:
        pipeline = model.load_pipeline(self.model, self.arithmetic.dtype, str(state.device))
        for adapter in self.adapters:
            load_trained(pipeline, adapter)
        return Engine(
            pipeline,
            self.sampling,
            batch_size=self.batch_size,
            autocast=autocast_dtype(self.arithmetic),
            progress=state.is_local_main_process,
        )


def draw(
    drawing: Drawing, rows: Sequence[Row], seeds: Sequence[int], folder: Path
) -> Iterator[Path]:
    """Write a PNG for each row and seed, yielding the paths as batches are made.

    Of several processes each yields its own. What ends one ends all.
    """
    with sharing() as state:
        with together(state):
            engine = drawing.engine(state)
        asked = _requests(drawing, rows, seeds)
        for paths in in_rounds(state, _files(engine, asked, folder, state)):
            yield from paths


@dataclass(frozen=True)
class _Asked:
    prompt: int  # its place
    request: Request


def _requests(drawing: Drawing, rows: Sequence[Row], seeds: Sequence[int]) -> list[_Asked]:
    """A prompt with more pictures than a batch holds is asked for by shares."""
    size = Size.of(drawing.sampling)
    sizes = [None if row.sources and drawing.source_sized else size for row in rows]
    shares = [tuple(seeds[i] for i in share) for share in pack(seeds, drawing.batch_size)]
    return [
        _Asked(n, Request(row.prompt, share, sizes[n], row.sources))
        for n, row in enumerate(rows)
        for share in shares
    ]


def _files(
    engine: Engine, asked: Sequence[_Asked], folder: Path, state: PartialState
) -> Iterator[list[Path]]:
    """Those of each part that is this process's."""
    requests = [a.request for a in asked]
    for part in engine.in_parts(requests, state.process_index, state.num_processes):
        yield [
            _write(to_png(image), folder, f"{asked[place].prompt:03d}-seed{seed}")
            for place, rollout in part
            for seed, image in zip(rollout.request.seeds, rollout.images, strict=True)
        ]


def _write(content: bytes, folder: Path, stem: str) -> Path:
    """Under the first name that is free, whoever else writes there."""
    for copy in count():
        path = folder / (f"{stem}-{copy}.png" if copy else f"{stem}.png")
        try:
            write_new(path, content)
        except FileExistsError:
            continue
        return path
