"""Identity of subjects: what an edit carries over from its sources is still itself.

A subject is compared with windows of the picture, as CLIP-I compares whole pictures (DreamBooth,
Ruiz et al., arXiv 2208.12242, section 4.1): wherever it has gone, it has a best place. Windows are
seen at the tower's full resolution, which a subject's few patches in a map of the whole picture
would not have. An embedding alone hardly tells parts that have changed places, so the feature maps
are compared patch by patch, too, in LPIPS's form (Zhang et al., arXiv 1801.03924).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from duet.configs.regions import Box
from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward, batches
from duet.rewards.windows import Window, fitting, grid

# of a search: how many windows it goes on from, steps as shares of the sides, growth of the sides
_STEPS = ((2, 0.2, 1.25), (1, 0.1, 1.12), (1, 0.05, 1.05))


class Identity(ClipReward):
    """Likeness of each subject to its best place in the picture, in [0, 1]; of several the least.

    The row's `subjects` has a box in each source, or null; without it each source is one whole,
    save one that `style` names. The least, so that none may be forgotten or blended away.

    Likeness is the mean of two cosines of subject and window: of the embeddings, and of the
    features of every stage patch by patch. The search begins at windows of the subject's own size,
    half a window apart, and where its colours fit best in five sizes (`fitting`); it goes on around
    the best two in ever smaller steps of place and size. That is about a hundred and fifty windows
    a subject that takes a tenth of the picture. It does not apply without sources. `view: high`
    looks for the whole subject in each quarter of the picture.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        return [self._least(item) for item in inputs]

    def _least(self, item: RewardInput) -> float | None:
        sources = item.sources
        found = [
            self._likeness(source, box, item)
            for source, box in zip(sources, item.subjects(sources), strict=True)
            if box
        ]
        return min(found) if found else None

    def _likeness(self, source: Image.Image, box: Box, item: RewardInput) -> float:
        image, (width, height) = item.image, item.canvas
        factor = max(width / source.width, height / source.height)
        whole = Window(*box.sides)
        subject = self._features(source, [whole])
        sides = (box.right - box.left) * factor, (box.bottom - box.top) * factor
        known: dict[Window, float] = {}

        def look(windows: Sequence[Window]) -> list[Window]:
            """All that were looked at, the most alike first."""
            new = sorted({w for w in windows if w not in known}, key=lambda w: w.sides)
            for part in batches(new, self.clip.batch_size):
                alike = _alike(self._features(image, part), subject)
                known.update(zip(part, alike.tolist(), strict=True))
            return sorted(known, key=lambda w: -known[w])

        best = look([*grid(image.size, sides), *fitting(image, whole.of(source), sides)])
        for count, step, growth in _STEPS:
            best = look([n for w in best[:count] for n in w.neighbours(image.size, step, growth)])
        return max(known.values())

    def _features(self, picture: Image.Image, windows: Sequence[Window]) -> "_Features":
        return _Features(*self.clip.embeddings_and_stages([w.of(picture) for w in windows]))


@dataclass(frozen=True)
class _Features:
    embeddings: Tensor  # [B, D] of length 1
    stages: list[Tensor]  # [B, C, H, W] each, of length 1 along C


def _alike(windows: _Features, subject: _Features) -> Tensor:
    """[B] in [0, 1]."""
    whole = (windows.embeddings * subject.embeddings).sum(-1).clamp(min=0)
    stages = zip(windows.stages, subject.stages, strict=True)
    patches = torch.stack([(a * b).sum(1).clamp(min=0).mean((1, 2)) for a, b in stages]).mean(0)
    return (whole + patches) / 2
