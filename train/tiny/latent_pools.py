"""What the tiny DiT is pretrained on: cards and edits as latents, codes and words."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import GlmImagePipeline
from PIL import Image
from torch import Tensor
from tqdm import trange

from duet.configs.quotes import quoted_spans
from duet.inference.layout import Size, upsample_prior
from duet.inference.pictures import encode_pixels
from duet.inference.sources import Source
from duet.train.tiny.codes import image_codes
from duet.train.tiny.decoder_pretraining import pixels_of, scaled
from duet.train.tiny.edits import KINDS, sample_edit
from duet.train.tiny.scenes import draw_scene
from duet.train.tiny.world import HEIGHT_PIXELS, WIDTH_PIXELS, draw, sample_card

SIZE = Size(HEIGHT_PIXELS, WIDTH_PIXELS)
_CHUNK = 500  # pictures held at once


@dataclass(frozen=True)
class Pool:
    """Pictures whose words are of one length, with as many sources each: no padding in a batch."""

    words: list[str]  # N, as the glyph encoder is told them; "" where the prompt quotes none
    latents: Tensor  # [N, C, h, w], standardised
    prior: Tensor  # int64 [N, 2h' * 2w']
    sources: list[tuple[Source, ...]] | None  # N; None: of text alone

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class _Example:
    word: str
    picture: Image.Image
    other: Image.Image  # what its codes are taken of
    sources: tuple[Image.Image, ...] = ()


def card_pools(pipeline: GlmImagePipeline, rng: random.Random, count: int) -> list[Pool]:
    """The codes are those of the same card with another word: they tell colours and shapes, and
    only the glyph encoder tells letters.
    """
    examples = []
    for _ in trange(count, desc="DiT cards"):
        card = sample_card(rng, any_pair=True)
        other = replace(card, word=sample_card(rng).word)
        examples.append(_Example(card.word, draw(card), draw(other)))
    return _pools(pipeline, examples)


def edit_pools(pipeline: GlmImagePipeline, rng: random.Random, count: int) -> list[Pool]:
    """Codes as of cards; a word that the prompt does not quote stands in a source alone."""
    examples = []
    for place in trange(count, desc="DiT edits"):
        edit = sample_edit(list(KINDS)[place % len(KINDS)], rng, any_pair=True)
        card = replace(edit.wanted.card, word=sample_card(rng).word)
        other = draw_scene(replace(edit.wanted, card=card))
        sources = tuple(map(draw_scene, edit.sources))
        said = (quoted_spans(edit.prompt) or [""])[0]
        examples.append(_Example(said, draw_scene(edit.wanted), other, sources))
    return _pools(pipeline, examples)


def _pools(pipeline: GlmImagePipeline, examples: Sequence[_Example]) -> list[Pool]:
    groups = defaultdict(list)
    for example in examples:
        groups[len(example.sources), len(example.word)].append(example)
    return [_pool(pipeline, group) for group in groups.values()]


def _pool(pipeline: GlmImagePipeline, group: Sequence[_Example]) -> Pool:
    latents = _latents(pipeline, [e.picture for e in group])
    prior = upsample_prior(image_codes(pipeline, [e.other for e in group]), SIZE.grid)
    columns = []
    for pictures in zip(*(e.sources for e in group), strict=True):
        tokens = upsample_prior(image_codes(pipeline, pictures), SIZE.grid)
        pairs = zip(_latents(pipeline, pictures), tokens, strict=True)
        columns.append([Source(*pair) for pair in pairs])
    sources = list(zip(*columns, strict=True)) or None
    return Pool([e.word for e in group], latents, prior, sources)


def _latents(pipeline: GlmImagePipeline, pictures: Sequence[Image.Image]) -> Tensor:
    parts = []
    for start in range(0, len(pictures), _CHUNK):
        images = torch.stack([pixels_of(p) for p in pictures[start : start + _CHUNK]])
        parts += [encode_pixels(pipeline.vae, scaled(b)) for b in images.split(64)]
    return torch.cat(parts)
