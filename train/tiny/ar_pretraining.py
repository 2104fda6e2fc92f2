"""Pretraining of the tiny AR, on text and edits together."""

import random
from dataclasses import dataclass
from functools import cache
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
CAPTION_NOISE = 0.35
# So often an edit of pretraining is not what its prompt says.
MISTAKES = {"edit": 0.4, "style": 0.4, "subjects": 0.35, "identity": 0.35}
# Of an edit's tokens those of the word count less: the decoder reads letters off its sources.
_EDIT_WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 0.3, 0.3, 0.3])
_SAVE_STEPS = 300


def train_ar(
    model_folder: Path,
    seed: int = 1,
    cards: int = 4000,
    edits: int = 6000,
    steps: tuple[int, int] = (3000, 2000),
) -> None:
    """Teacher forcing: on edits alone, which are right, then on cards and edits with mistakes.

    Where a token's source stands is learnt slowly, for its distance varies with the prompt's
    length; an edit has a seventh of a card's tokens, so that many steps of them are cheap.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(model_folder)
    model = pipeline.vision_language_encoder
    edit_pool = _edit_pool(pipeline, rng, edits)
    card_pool = _card_pool(pipeline, rng, cards)
    folder = model_folder / "vision_language_encoder"

    def of_edits() -> dict[str, Tensor]:
        return {"loss": _edit_loss(model, rng.choices(edit_pool, k=64), rng, noised=False)}

    def of_both() -> dict[str, Tensor]:
        cards = _card_loss(pipeline, rng.choices(card_pool, k=32), rng)
        edited = _edit_loss(model, rng.choices(edit_pool, k=16), rng, noised=True)
        return {"loss": cards + edited, "cards": cards, "edits": edited}

    def save(step: int) -> None:
        if (step + 1) % _SAVE_STEPS == 0:  # what can be judged before the end
            model.save_pretrained(folder)

    model.train()
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    descend(Course("AR edits", 2e-3, steps[0], weight_decay=0.01), trained, of_edits, save)
    descend(Course("AR", 2e-3, steps[1], weight_decay=0.01), trained, of_both, save)
    # what `duet.inference.generate` takes when nothing else is said
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=0.9)
    model.eval().save_pretrained(folder)


def _card_loss(
    pipeline: GlmImagePipeline, drawn: list[tuple[Card, Tensor]], rng: random.Random
) -> Tensor:
    """On preview and large grid, with colour words noised."""
    captions = [training_caption(card, rng, CAPTION_NOISE) for card, _ in drawn]
    asked = [text_prompt(pipeline.processor, Request(c, (0,), SIZE)) for c in captions]
    codes = torch.stack([codes for _, codes in drawn])
    losses = token_losses(pipeline.vision_language_encoder, asked, codes)
    return _weighed(losses, _card_weights())


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
    """Cross-entropy of visual tokens [B, T] behind prompts of the same grids: [B, T]."""
    read = PromptBatch.of(prompts, model.config.text_config.pad_token_id, codes.device)
    output = model(
        input_ids=torch.cat([read.ids, codes], dim=-1)[:, :-1],
        attention_mask=read.seen(codes.shape[1] - 1),
        position_ids=read.positions[..., :-1],
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
    rows[preview.height // 2 :] = 0.1  # the word stands in the lower half
    weights = torch.cat([rows.flatten(), torch.full((large.count,), 20.0)])
    weights[0] = 20.0  # the first token tells the background
    return weights
