"""Build and pretrain `configs/tiny/model`: python -m duet.train.tiny.pretrain [STAGE ...]

Seeded. Without arguments every stage runs in order; a stage reads what the
stages before it wrote, so any one can be repeated by name.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from torch.nn import functional as F
from tqdm import trange

from duet.inference.layout import Size
from duet.inference.prompt import PromptBatch, text_grids, text_prompt
from duet.inference.request import Request
from duet.train.tiny import decoder_pretraining, judges
from duet.train.tiny.parts import CODEBOOK_SIZE, build_pipeline, size_mib
from duet.train.tiny.world import (
    HEIGHT_PIXELS,
    WIDTH_PIXELS,
    Card,
    draw,
    sample_card,
    training_caption,
)

ROOT = Path(__file__).resolve().parents[2] / "configs" / "tiny"
MODEL, PROMPTS, JUDGES = ROOT / "model", ROOT / "prompts", ROOT / "judges"
SIZE = Size(HEIGHT_PIXELS, WIDTH_PIXELS)
GRIDS = text_grids(SIZE)
_PREVIEW_SIZE = GRIDS[0].width * 32, GRIDS[0].height * 32

# A colour word of a pretraining caption is wrong this often, as captions of the
# web are: what the AR learns is the share of colours that it obeys.
CAPTION_NOISE = 0.35


def build_codebook(seed: int = 0, cards: int = 1500, iterations: int = 25) -> None:
    """Fresh parts; the codebook is k-means over the vision tower's random features."""
    torch.manual_seed(seed)
    pipeline = build_pipeline()
    model = pipeline.vision_language_encoder.eval()
    rng = random.Random(seed)
    features = []
    for _ in trange(cards, desc="codebook features"):
        card = sample_card(rng, any_pair=True)
        large = vision_features(pipeline, draw(card), model)
        preview = vision_features(pipeline, draw_preview(card), model)
        # shapes stand in the upper row: they need codes of their own
        lower = large[3:][torch.rand(3) < 0.5]
        features += [large[:3], lower, preview[torch.randint(len(preview), (2,))]]
    points = F.normalize(
        model.model.vqmodel.quant_conv(_as_map(torch.cat(features)))[0].flatten(1).T
    )
    model.model.vqmodel.quantize.embedding.weight.data = _spherical_k_means(points, iterations)
    pipeline.save_pretrained(MODEL)


def _as_map(features):
    return features.T[None, :, :, None]  # [N, C] -> [1, C, N, 1]


@torch.no_grad()
def vision_features(pipeline, image, model):
    inputs = pipeline.processor.image_processor(images=[image], return_tensors="pt")
    output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    return output.pooler_output[0].flatten(1).T  # [tokens, C]


@torch.no_grad()
def _spherical_k_means(points, iterations: int):
    """k-means++ start, then Lloyd's steps on the unit sphere; [N, C] -> [CODEBOOK_SIZE, C]."""
    centres = points[:1]
    distance = 1 - points @ centres[0]
    for _ in range(CODEBOOK_SIZE - 1):
        pick = torch.multinomial(distance.clamp(min=0) + 1e-12, 1)
        centres = torch.cat([centres, points[pick]])
        distance = torch.minimum(distance, 1 - points @ centres[-1])
    for _ in range(iterations):
        nearest = (points @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        used = torch.bincount(nearest, minlength=CODEBOOK_SIZE) > 0
        centres = torch.where(used[:, None], F.normalize(sums), centres)
    return centres.contiguous()


def draw_preview(card: Card):
    return draw(card, _PREVIEW_SIZE[0] / WIDTH_PIXELS / 2).resize(_PREVIEW_SIZE)


@torch.no_grad()
def image_codes(pipeline, image) -> torch.Tensor:
    inputs = pipeline.processor.image_processor(images=[image], return_tensors="pt")
    model = pipeline.vision_language_encoder
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    return model.get_image_tokens(features.pooler_output, inputs["image_grid_thw"])


def train_ar(seed: int = 1, cards: int = 4000, steps: int = 2000, batch: int = 32) -> None:
    """Teacher forcing on preview and large grid, with colour words noised."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(MODEL)
    model = pipeline.vision_language_encoder
    pool = []
    for _ in trange(cards, desc="AR cards"):
        card = sample_card(rng, any_pair=True)
        pool.append(
            (
                card,
                torch.cat(
                    [image_codes(pipeline, draw_preview(card)), image_codes(pipeline, draw(card))]
                ),
            )
        )
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    weights = _token_weights()
    large = GRIDS[1].count
    model.train()
    progress = trange(steps, desc="AR")
    for step in progress:
        drawn = rng.choices(pool, k=batch)
        prompts = [training_caption(card, rng, CAPTION_NOISE) for card, _ in drawn]
        codes = torch.stack([c for _, c in drawn])  # [B, T]
        asked = [text_prompt(pipeline.processor, Request(p, (0,), SIZE)) for p in prompts]
        read = PromptBatch.of(asked, model.config.text_config.pad_token_id, codes.device)
        output = model(
            input_ids=torch.cat([read.ids, codes], dim=-1)[:, :-1],
            attention_mask=read.seen(codes.shape[1] - 1),
            position_ids=read.positions[..., :-1],
            logits_to_keep=codes.shape[1],
        )
        losses = F.cross_entropy(output.logits.transpose(1, 2), codes, reduction="none")
        loss = (losses * weights).sum() / (weights.sum() * batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            first, last = losses[:, 0].mean(), losses[:, -large:].mean()
            progress.set_postfix(loss=f"{loss:.3f}", first=f"{first:.3f}", large=f"{last:.3f}")
    # what `duet.inference.generate` takes when nothing else is said
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=0.9)
    model.eval().save_pretrained(MODEL / "vision_language_encoder")


def _token_weights() -> torch.Tensor:
    """Loss weights [T]: tokens that decide colours count most, the preview's letters least."""
    preview, large = GRIDS
    rows = torch.ones(preview.height, preview.width)
    rows[preview.height // 2 :] = 0.1  # the word stands in the lower half
    weights = torch.cat([rows.flatten(), torch.full((large.count,), 20.0)])
    weights[0] = 20.0  # the first token tells the background
    return weights


def write_prompts(seed: int = 5, train: int = 256, evaluation: int = 96) -> None:
    """Prompt rows with their reference pictures; evaluation words and pairs are held out."""
    for name, count, held_out in (("train", train, False), ("eval", evaluation, True)):
        rng = random.Random(f"{seed}/{name}")
        (PROMPTS / name).mkdir(parents=True, exist_ok=True)
        rows = []
        while len(rows) < count:
            card = sample_card(rng, held_out)
            if not card.shapes:
                continue
            image = f"{name}/{len(rows):03d}.png"
            draw(card).save(PROMPTS / image, optimize=True)
            rows.append(
                {"prompt": card.prompt, "text": card.word, "image": image, "card": card.to_row()}
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (PROMPTS / f"{name}.jsonl").write_text(lines)


STAGES = {
    "codebook": build_codebook,
    "vae": lambda: decoder_pretraining.train_vae(MODEL),
    "dit": lambda: decoder_pretraining.train_dit(MODEL, image_codes),
    "vae_decoder": lambda: decoder_pretraining.refine_vae_decoder(MODEL),
    "ar": train_ar,
    "judges": lambda: judges.train(JUDGES),
    "prompts": write_prompts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all in order if none")
    names = parser.parse_args().stages or list(STAGES)
    unknown = set(names) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {sorted(unknown)}: allowed are {', '.join(STAGES)}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    for name in names:
        start = time.perf_counter()
        STAGES[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} seconds")
    print(f"{MODEL}: {size_mib(MODEL):.1f} MiB; judges {size_mib(JUDGES):.1f} MiB")


if __name__ == "__main__":
    main()
