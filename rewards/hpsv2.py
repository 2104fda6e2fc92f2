"""HPSv2.1 (arXiv 2306.09341): a CLIP model trained on people's choices between pictures."""

from collections.abc import Sequence
from typing import Any

from duet.configs.errors import UserError
from duet.rewards.alignment import Alignment
from duet.rewards.base import RewardInput

_REPOSITORY, _FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


class HpsV2(Alignment):
    """HPSv2.1: cosine of image and prompt embeddings, about 0.2 to 0.35.

    Read by open_clip, whose preparation resizes with Pillow; the authors' package
    resizes the tensor, which differs by rounding and edge smoothing.
    """

    def __init__(self, checkpoint: str | None = None, model: str = "ViT-H-14", **clip: Any) -> None:
        """`checkpoint`: HPS_v2.1_compressed.pt; without one it is had from the hub."""
        super().__init__(model=model, pretrained=checkpoint, **clip)

    def load(self) -> None:
        if self.clip.pretrained is None:
            self.clip.pretrained = _downloaded()
        super().load()

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.load()
        return super().__call__(inputs)


def _downloaded() -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(_REPOSITORY, _FILE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"hpsv2: {_FILE} cannot be had from {_REPOSITORY}: give its path as checkpoint: {error}"
        ) from error
