"""What is asked of the engine."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from duet.configs.errors import UserError
from duet.inference.layout import Size


@dataclass(frozen=True)
class Request:
    """One group: a prompt and a seed for every sample of it.

    Raises UserError for what no engine can serve.
    """

    prompt: str
    seeds: tuple[int, ...]  # N; each drives that sample's tokens, noise and SDE steps
    size: Size
    sources: tuple[Image.Image, ...] = ()
    prior: Tensor | None = None  # int64 [h * w], the large grid, for all samples
    noise: Tensor | None = None  # float32 [C, h, w], the initial noise, for all samples

    def __post_init__(self) -> None:
        if self.sources:
            raise UserError(
                f"request {self.prompt!r} carries {len(self.sources)} source images: "
                "image-to-image is not served yet, give none"
            )
        if not self.prompt.strip():
            raise UserError("prompt = '' is empty: say what to draw")
        if not self.seeds:
            raise UserError(f"request {self.prompt!r} has no seeds: give one a sample")
        tokens = self.size.grid.count
        if self.prior is not None and tuple(self.prior.shape) != (tokens,):
            raise UserError(f"prior of shape {tuple(self.prior.shape)}: allowed is {(tokens,)}")

    def __len__(self) -> int:
        return len(self.seeds)
