"""Edit direction: does the picture move from its source as the words move?

CLIP directional similarity, StyleGAN-NADA (Gal et al., arXiv 2108.00946, section 3.2) and
InstructPix2Pix (Brooks et al., arXiv 2211.09800, section 4).
"""

from collections.abc import Sequence

import torch

from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward, batches

_LEAST = 0.1  # length of a move that counts in full: between embeddings of cosine 0.995
_SAME = 1e-4  # length below which two prompts are one


class EditDirection(ClipReward):
    """Cosine of the picture's move from its source and the move of the row's prompts, in [-1, 1].

    Moves are differences of embeddings: of the picture and the first source, of `target_prompt` and
    `source_prompt`. A picture that is the source makes no move, and scores 0: nothing of the edit
    was done, nothing against it. So that a trace of noise, which has a direction too, is not paid
    for it, a move shorter than 0.1 counts by its length.

    It does not apply to a row that lacks a source or one of the prompts. Prompts that the tower
    does not tell apart have no direction: not scored.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        sources = [item.picture("source") if _has_prompts(item) else None for item in inputs]
        asked = [(i, s) for i, s in zip(inputs, sources, strict=True) if s]
        scores = iter(s for part in batches(asked, self.clip.batch_size) for s in self._score(part))
        return [None if source is None else next(scores) for source in sources]

    def _score(self, asked: Sequence[tuple[RewardInput, object]]) -> list[float]:
        items, sources = zip(*asked, strict=True)
        images, texts = self.clip.embed_images, self.clip.embed_texts
        seen = images([i.image for i in items]) - images(sources)
        said = texts([i.row["target_prompt"] for i in items]) - texts(
            [i.row["source_prompt"] for i in items]
        )
        lengths = said.norm(dim=-1)
        cosines = (seen * said).sum(-1) / lengths / seen.norm(dim=-1).clamp(min=_LEAST)
        return torch.where(lengths > _SAME, cosines, torch.nan).tolist()


def _has_prompts(item: RewardInput) -> bool:
    return all(item.row.get(key) for key in ("source_prompt", "target_prompt"))
