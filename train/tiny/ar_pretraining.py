"""Pretraining of the tiny AR, on text and edits together."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from tqdm import tqdm, trange

from duet.inference.layout import Size
from duet.inference.prompt import Prompt, PromptBatch, edit_prompt, text_grids, text_prompt
from duet.inference.request import Request
from duet.train.tiny.codes import image_codes
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
_SAVE_STEPS = 300


def train_ar(
    model_folder: Path,
    seed: int = 1,
    cards: int = 3000,
    edits: int = 6000,
    steps: int = 1800,
    batch: int = 16,
    edit_batch: int = 48,
) -> None:
    """Teacher forcing: on preview and large grid of cards, with colour words noised, and on the
    one grid of edits.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(model_folder)
    model = pipeline.vision_language_encoder
    pool = _card_pool(pipeline, rng, cards)
    edit_pool = _edit_pool(pipeline, rng, edits)
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    weights = _token_weights()
    model.train()
    progress = trange(steps, desc="AR")
    for step in progress:
        drawn = rng.choices(pool, k=batch)
        captions = [training_caption(card, rng, CAPTION_NOISE) for card, _ in drawn]
        asked = [text_prompt(pipeline.processor, Request(c, (0,), SIZE)) for c in captions]
        losses = token_losses(model, asked, torch.stack([c for _, c in drawn]))
        loss = (losses * weights).sum() / (weights.sum() * batch)
        edited = rng.choices(edit_pool, k=edit_batch)
        of_edits = token_losses(
            model, [e.prompt for e in edited], torch.stack([e.codes for e in edited])
        )
        loss = loss + of_edits.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            first, large = losses[:, 0].mean(), losses[:, -GRIDS[1].count :].mean()
            progress.set_postfix(
                loss=f"{loss:.3f}",
                first=f"{first:.3f}",
                large=f"{large:.3f}",
                edits=f"{of_edits.mean():.3f}",
            )
        if (step + 1) % _SAVE_STEPS == 0:  # what can be judged before the end
            model.save_pretrained(model_folder / "vision_language_encoder")
    # what `duet.inference.generate` takes when nothing else is said
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=0.9)
    model.eval().save_pretrained(model_folder / "vision_language_encoder")


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
    prompt: Prompt
    codes: Tensor  # int64 [h * w]


def _edit_pool(pipeline, rng: random.Random, count: int) -> list[_Edited]:
    """As many of each kind, some of them mistaken."""
    made = []
    for place in trange(count, desc="AR edits"):
        edit = sample_edit(list(KINDS)[place % len(KINDS)], rng, any_pair=True)
        wrong = rng.random() < MISTAKES[edit.kind]
        wanted = mistaken(edit, rng) if wrong else edit.wanted
        sources = tuple(draw_scene(scene) for scene in edit.sources)
        codes = image_codes(pipeline, [*sources, draw_scene(wanted)])
        asked = Request(edit.prompt, (0,), SIZE, sources, source_tokens=tuple(codes[:-1]))
        made.append(_Edited(edit_prompt(pipeline.processor, asked), codes[-1]))
    return made


def _token_weights() -> Tensor:
    """Loss weights [T]: tokens that decide colours count most, the preview's letters least."""
    preview, large = GRIDS
    rows = torch.ones(preview.height, preview.width)
    rows[preview.height // 2 :] = 0.1  # the word stands in the lower half
    weights = torch.cat([rows.flatten(), torch.full((large.count,), 20.0)])
    weights[0] = 20.0  # the first token tells the background
    return weights
