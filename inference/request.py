"""What is asked of the engine."""

from dataclasses import dataclass

from torch import Tensor

from duet.configs.errors import UserError
from duet.configs.pictures import Stored
from duet.inference.layout import Size


@dataclass(frozen=True)
class Request:
    """One group: a prompt and a seed for every sample of it, and for an edit its sources.

    Raises UserError for what no engine can serve.
    """

    prompt: str
    seeds: tuple[int, ...]  # N; each drives that sample's tokens, noise and SDE steps
    size: Size | None = None  # None: the first source's
    sources: tuple[Stored, ...] = ()  # in order, of any size and mode
    prior: Tensor | None = None  # int64 [h * w], the large grid, for all samples
    noise: Tensor | None = None  # float32 [C, h, w], the initial noise, for all samples
    source_tokens: tuple[Tensor, ...] | None = None  # int64 [h' * w'] each; None: the AR is asked

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("prompt = '' is empty: say what to draw")
        if not self.seeds:
            raise UserError(f"request {self.prompt!r} has no seeds: give one a sample")
        if self.size is None and not self.sources:
            raise UserError(f"request {self.prompt!r} has no size and no source to take it from")
        if self.prior is None or self.size is None:
            return
        tokens = self.size.grid.count
        if tuple(self.prior.shape) != (tokens,):
            raise UserError(f"prior of shape {tuple(self.prior.shape)}: allowed is {(tokens,)}")

    def __len__(self) -> int:
        return len(self.seeds)
