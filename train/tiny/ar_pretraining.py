"""Pretraining of the tiny AR, on text and edits together."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from tqdm import tqdm

from duet.inference.layout import Size
from duet.inference.prompt import Prompt, PromptBatch, edit_prompt, text_grids, text_prompt
from duet.inference.request import Request
from duet.train.tiny.codes import image_codes
from duet.train.tiny.descent import Course, descend
from duet.train.tiny.edits import KINDS, mistaken, sample_edit
from duet.train.tiny.parts import replace_weights
from duet.train.tiny.scenes import draw_scene
from duet.train.tiny.world import (
    HEIGHT_PIXELS,
    WIDTH_PIXELS,
    Card,
    draw,
    sample_card,
    training_caption,
)

SIZE = Size(HEIGHT_PIXELS, WIDTH_PIXELS)
GRIDS = text_grids(SIZE)
_PREVIEW_SIZE = GRIDS[0].width * 32, GRIDS[0].height * 32

# A colour word of a pretraining caption is wrong this often, as captions of the
# web are: what the AR learns is the share of colours that it obeys.
CAPTION_NOISE = 0.3
# So often an edit of pretraining is not what its prompt says.
MISTAKES = {"edit": 0.4, "style": 0.4, "subjects": 0.35, "identity": 0.35}
# Of an edit's tokens those of the word count less: the decoder reads letters off its sources.
_EDIT_WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 0.3, 0.3, 0.3])
# The rows of a preview that tell where its shapes stand and their colours.
_FIRST_ROWS = 4


def train_ar(
    model_folder: Path,
    seed: int = 1,
    cards: int = 12000,
    edits: int = 8000,
    steps: tuple[int, int, int] = (700, 2000, 1500),
) -> None:
    """Teacher forcing, by three courses of so many `steps`: beginnings of previews, then edits that
    are right with some beginnings, then whole cards and edits with mistakes.

    A beginning has a third of a card's tokens, an edit a seventh: what captions say and where a
    source's tokens stand is learnt from many of them, before the long sequences. Others may read
    the folder meanwhile.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(model_folder)
    model = pipeline.vision_language_encoder
    card_pool = _card_pool(pipeline, rng, cards)
    edit_pool = _edit_pool(pipeline, rng, edits)

    def of_cards(count: int, codes: int) -> Tensor:
        return _card_loss(pipeline, rng.choices(card_pool, k=count), rng, codes)

    def of_edits(count: int, noised: bool) -> Tensor:
        return _edit_loss(model, rng.choices(edit_pool, k=count), rng, noised)

    first, whole = _FIRST_ROWS * GRIDS[0].width, sum(grid.count for grid in GRIDS)
    courses = (
        lambda: {"cards": of_cards(48, first)},
        lambda: {"cards": of_cards(12, first), "edits": of_edits(56, noised=False)},
        lambda: {
            "cards": of_cards(24, first) + of_cards(16, whole),
            "edits": 0.3 * of_edits(16, noised=True),  # of a few tokens, each weighs much
        },
    )
    model.train()
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    for count, parts_of in zip(steps, courses, strict=True):
        descend(Course("AR", 2e-3, count, weight_decay=0.01), trained, partial(_summed, parts_of))
    # what `duet.inference.generate` takes when nothing else is said
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=0.9)
    replace_weights(model.eval(), model_folder / "vision_language_encoder")


def _summed(parts_of: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = parts_of()
    return {"loss": sum(parts.values())} | parts


def _card_loss(
    pipeline: GlmImagePipeline, drawn: list[tuple[Card, Tensor]], rng: random.Random, count: int
) -> Tensor:
    """On the first codes of preview and large grid, with colour words noised."""
    captions = [training_caption(card, rng, CAPTION_NOISE) for card, _ in drawn]
    asked = [text_prompt(pipeline.processor, Request(c, (0,), SIZE)) for c in captions]
    codes = torch.stack([codes[:count] for _, codes in drawn])
    losses = token_losses(pipeline.vision_language_encoder, asked, codes)
    return _weighed(losses, _card_weights()[:count])


def _edit_loss(model: Module, drawn: list["_Edited"], rng: random.Random, noised: bool) -> Tensor:
    """On the one grid of edits; `noised`: some are mistaken."""
    wrong = [noised and rng.random() < MISTAKES[edited.kind] for edited in drawn]
    pairs = zip(drawn, wrong, strict=True)
    codes = torch.stack([e.mistaken if is_wrong else e.wanted for e, is_wrong in pairs])
    losses = token_losses(model, [e.prompt for e in drawn], codes)
    return _weighed(losses, _EDIT_WEIGHTS)


def _weighed(losses: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of [B, T] by [T]."""
    return (losses * weights).sum() / (weights.sum() * len(losses))


def token_losses(model: Module, prompts: list[Prompt], codes: Tensor) -> Tensor:
    """Cross-entropy of the first visual tokens [B, T] behind prompts of the same grids: [B, T]."""
    read = PromptBatch.of(prompts, model.config.text_config.pad_token_id, codes.device)
    ids = torch.cat([read.ids, codes], dim=-1)[:, :-1]
    output = model(
        input_ids=ids,
        attention_mask=read.seen(codes.shape[1] - 1),
        position_ids=read.positions[..., : ids.shape[1]],
        logits_to_keep=codes.shape[1],
    )
    return F.cross_entropy(output.logits.transpose(1, 2), codes, reduction="none")


def draw_preview(card: Card):
    return draw(card, _PREVIEW_SIZE[0] / WIDTH_PIXELS / 2).resize(_PREVIEW_SIZE)


def _card_pool(pipeline, rng: random.Random, count: int) -> list[tuple[Card, Tensor]]:
    """Cards with the tokens of preview and picture."""
    cards = [sample_card(rng, any_pair=True) for _ in range(count)]
    previews = image_codes(pipeline, (draw_preview(card) for card in tqdm(cards, "AR cards")))
    large = image_codes(pipeline, map(draw, cards))
    return list(zip(cards, torch.cat([previews, large], 1), strict=True))


@dataclass(frozen=True)
class _Edited:
    kind: str
    prompt: Prompt
    wanted: Tensor  # int64 [h * w]
    mistaken: Tensor


def _edit_pool(pipeline: GlmImagePipeline, rng: random.Random, count: int) -> list[_Edited]:
    """As many of each kind, with their codes when done rightly and when mistaken."""
    kinds = list(KINDS)
    edits = [sample_edit(kinds[i % len(kinds)], rng, any_pair=True) for i in range(count)]
    sources = [tuple(map(draw_scene, edit.sources)) for edit in tqdm(edits, "AR edits")]
    drawn = chain.from_iterable(
        (*own, draw_scene(edit.wanted), draw_scene(mistaken(edit, rng)))
        for edit, own in zip(edits, sources, strict=True)
    )
    codes = iter(image_codes(pipeline, drawn))
    made = []
    for edit, own in zip(edits, sources, strict=True):
        tokens, wanted, wrong = tuple(islice(codes, len(own))), next(codes), next(codes)
        asked = Request(edit.prompt, (0,), SIZE, own, source_tokens=tokens)
        made.append(_Edited(edit.kind, edit_prompt(pipeline.processor, asked), wanted, wrong))
    return made


@cache
def _card_weights() -> Tensor:
    """Loss weights [T]: tokens that decide colours count most, the preview's letters least."""
    preview, large = GRIDS
    rows = torch.ones(preview.height, preview.width)
    rows[:_FIRST_ROWS] = 4.0
    rows[preview.height // 2 :] = 0.1  # the word stands in the lower half
    return torch.cat([rows.flatten(), torch.full((large.count,), 20.0)])
