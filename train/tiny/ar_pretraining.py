"""Pretraining of the tiny AR, on text and edits together."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
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
from duet.train.tiny.descent import descend
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
# So many visual tokens of a card are read as another card's: what a model that draws its own does
# not do as it has learnt must not lead it astray.
_STRAY = 0.1
_TOP = 4 * GRIDS[0].width  # tokens of the preview's first rows, where shapes begin
_SAVE_STEPS = 300


def train_ar(
    model_folder: Path,
    seed: int = 1,
    cards: int = 10000,
    edits: int = 6000,
    steps: tuple[int, int, int] = (3000, 1000, 800),
) -> None:
    """Teacher forcing in three legs: from what is cheap and clean to what data from the web is.

    Edits alone: where a token's source stands is learnt slowly, for its distance varies with the
    prompt's length, and an edit has a seventh of a card's tokens. Captions in the form of edits
    beside them, since of a card's 253 tokens few tell whether its words were understood. At last
    cards in their own form, and edits, with mistakes.
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

    def of_captions() -> dict[str, Tensor]:
        short = _short_loss(pipeline, rng.choices(card_pool, k=12), rng)
        tops = _card_loss(pipeline, rng.choices(card_pool, k=40), rng, noise=0.0, written=_TOP)
        cards = _card_loss(pipeline, rng.choices(card_pool, k=6), rng, noise=0.0)
        edited = _edit_loss(model, rng.choices(edit_pool, k=8), rng, noised=False)
        shown = {"short": short, "tops": tops, "cards": cards, "edits": edited}
        return {"loss": sum(shown.values()), **shown}

    def of_all() -> dict[str, Tensor]:
        cards = _card_loss(pipeline, rng.choices(card_pool, k=20), rng, CAPTION_NOISE)
        edited = _edit_loss(model, rng.choices(edit_pool, k=32), rng, noised=True)
        return {"loss": cards + edited, "cards": cards, "edits": edited}

    def save(step: int) -> None:
        if (step + 1) % _SAVE_STEPS == 0:  # what can be judged before the end
            model.save_pretrained(folder)

    model.train()
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    descend("AR edits", trained, of_edits, steps[0], 2e-3, 0.01, save)
    descend("AR captions", trained, of_captions, steps[1], 2e-3, 0.01, save)
    descend("AR", trained, of_all, steps[2], 2e-3, 0.01, save)
    # what `duet.inference.generate` takes when nothing else is said
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=0.9)
    model.eval().save_pretrained(folder)


def _captioned(
    pipeline: GlmImagePipeline, drawn: list[tuple[Card, Tensor]], rng: random.Random, noise: float
) -> tuple[list[Prompt], Tensor]:
    """Prompts, a colour word wrong with probability `noise`; codes of preview and large grid."""
    captions = [training_caption(card, rng, noise) for card, _ in drawn]
    asked = [text_prompt(pipeline.processor, Request(c, (0,), SIZE)) for c in captions]
    return asked, torch.stack([codes for _, codes in drawn])


def _card_loss(
    pipeline: GlmImagePipeline,
    drawn: list[tuple[Card, Tensor]],
    rng: random.Random,
    noise: float,
    written: int | None = None,
) -> Tensor:
    """On preview and large grid, or the first so many tokens of them."""
    prompts, codes = _captioned(pipeline, drawn, rng, noise)
    weights = _token_weights(codes)[:, :written]
    seen = torch.where(torch.rand(codes.shape) < _STRAY, codes.roll(1, 0), codes)
    model = pipeline.vision_language_encoder
    losses = token_losses(model, prompts, codes[:, :written], seen[:, :written])
    return (losses * weights).sum() / weights.sum()


def _short_loss(
    pipeline: GlmImagePipeline, drawn: list[tuple[Card, Tensor]], rng: random.Random
) -> Tensor:
    """On the large grid alone, as an edit's: the prompt announces no preview."""
    prompts, codes = _captioned(pipeline, drawn, rng, noise=0.0)
    announcement = pipeline.processor.tokenizer.convert_tokens_to_ids("<|grid_begin|>")
    short = []
    for prompt in prompts:
        preview = int((prompt.ids == announcement).nonzero().max())
        ids = torch.cat([prompt.ids[:preview], prompt.ids[-1:]])
        short.append(Prompt(ids, prompt.positions[:, : len(ids)], len(ids), GRIDS[1:]))
    model = pipeline.vision_language_encoder
    return _weighed(token_losses(model, short, codes[:, -GRIDS[1].count :]))


def _edit_loss(model: Module, drawn: list["_Edited"], rng: random.Random, noised: bool) -> Tensor:
    """On the one grid of edits; `noised`: some are mistaken."""
    wrong = [noised and rng.random() < MISTAKES[edited.kind] for edited in drawn]
    pairs = zip(drawn, wrong, strict=True)
    codes = torch.stack([e.mistaken if is_wrong else e.wanted for e, is_wrong in pairs])
    return _weighed(token_losses(model, [e.prompt for e in drawn], codes))


def _weighed(losses: Tensor) -> Tensor:
    """Of the large grid alone, [B, T]."""
    return (losses * _EDIT_WEIGHTS).sum() / (_EDIT_WEIGHTS.sum() * len(losses))


def token_losses(
    model: Module, prompts: Sequence[Prompt], codes: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the first visual tokens [B, T] behind prompts of the same grids: [B, T].

    `seen`: what is read in their place.
    """
    read = PromptBatch.of(prompts, model.config.text_config.pad_token_id, codes.device)
    ids = torch.cat([read.ids, codes if seen is None else seen], dim=-1)[:, :-1]
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
    scenes = [[*e.sources, e.wanted, mistaken(e, rng)] for e in edits]
    pictures = (draw_scene(scene) for own in tqdm(scenes, "AR edits") for scene in own)
    codes = iter(image_codes(pipeline, pictures))
    made = []
    for edit, own in zip(edits, scenes, strict=True):
        *sources, wanted, wrong = (next(codes) for _ in own)
        pictures = tuple(map(draw_scene, edit.sources))
        asked = Request(edit.prompt, (0,), SIZE, pictures, source_tokens=tuple(sources))
        made.append(_Edited(edit.kind, edit_prompt(pipeline.processor, asked), wanted, wrong))
    return made


def _token_weights(codes: Tensor) -> Tensor:
    """Loss weights [B, T]: tokens that decide colours count most, the preview's letters least."""
    preview, large = GRIDS
    shown = codes[:, : preview.count].view(-1, preview.height, preview.width)
    weights = torch.ones(shown.shape)
    # where another block begins the caption tells the token, elsewhere its neighbour does
    weights[:, :, 1:][shown[:, :, 1:] != shown[:, :, :-1]] = 5.0
    weights[:, preview.height // 2 :] = 0.1  # the word stands in the lower half
    weights[:, 0, 0] = 20.0  # the background
    return torch.cat([weights.flatten(1), torch.full((len(codes), large.count), 20.0)], 1)
