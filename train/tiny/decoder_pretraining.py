"""Pretraining of the tiny VAE, glyph encoder and DiT."""

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, GlmImagePipeline
from torch import nn
from torch.nn import functional as F
from tqdm import trange

from duet.train.tiny.parts import build_dit, build_glyph_encoder, build_vae
from duet.train.tiny.world import (
    ALPHABET,
    HEIGHT_PIXELS,
    WIDTH_PIXELS,
    WORD_LENGTHS,
    draw,
    is_held_out_word,
    sample_card,
)

# A letter of a pretraining glyph text is wrong this often: what the DiT learns is
# how often it draws the letter that was asked for.
LETTER_NOISE = 0.25
_GRID_SHAPE = HEIGHT_PIXELS // 32, WIDTH_PIXELS // 32


def _pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)  # uint8 [3, H, W]


def _scaled(batch: torch.Tensor) -> torch.Tensor:
    return batch.float() / 127.5 - 1


def train_vae(model_folder: Path, seed: int = 2, cards: int = 3000, steps: int = 3000) -> None:
    """L1 + a little L2 and KL; then the latents' statistics go into the config."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    images = torch.stack([_pixels(draw(sample_card(rng))) for _ in range(cards)])
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    progress = trange(steps, desc="VAE")
    for step in progress:
        x = _scaled(images[torch.randint(cards, (8,))])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = (
            (y - x).abs().mean()
            + (y - x).square().mean()
            + 1e-5 * posterior.kl().mean() / x[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(_scaled(b)).latent_dist.mode() for b in images[:512].split(64)]
        )
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3)).tolist(), latents_std=latents.std((0, 2, 3)).tolist()
    )
    vae.save_pretrained(model_folder / "vae")


def refine_vae_decoder(
    model_folder: Path, seed: int = 6, cards: int = 4000, steps: int = 3000
) -> None:
    """The VAE's decoder alone, on cards of any pair and slightly noised latents.

    The latents stay as they are, so it may run beside or after the DiT's training.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKL.from_pretrained(model_folder / "vae").eval()
    drawn = [_pixels(draw(sample_card(rng, any_pair=True))) for _ in range(cards)]
    images = torch.stack(drawn)
    with torch.no_grad():
        latents = torch.cat([vae.encode(_scaled(b)).latent_dist.mode() for b in images.split(64)])
    spread = latents.std((0, 2, 3), keepdim=True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    progress = trange(steps, desc="VAE decoder")
    for step in progress:
        pick = torch.randint(cards, (8,))
        z = latents[pick] + 0.05 * spread * torch.randn_like(latents[pick])
        y, x = vae.decode(z).sample, _scaled(images[pick])
        loss = (y - x).abs().mean() + (y - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.save_pretrained(model_folder / "vae")


def pretrain_glyph_encoder(tokenizer, seed: int, steps: int = 1500):
    """Each letter's output must tell the letter and its index: what the DiT needs to bind them."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    encoder = build_glyph_encoder()
    heads = nn.Linear(encoder.config.d_model, len(ALPHABET) + max(WORD_LENGTHS))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    progress = trange(steps, desc="glyph encoder")
    for step in progress:
        length = rng.choice(WORD_LENGTHS)
        words = ["".join(rng.choices(ALPHABET, k=length)) for _ in range(128)]
        words = [w for w in words if not is_held_out_word(w)]
        output = encoder(torch.tensor(tokenizer(words).input_ids)).last_hidden_state[:, :length]
        letter, index = heads(output).split([len(ALPHABET), max(WORD_LENGTHS)], dim=-1)
        wanted = torch.tensor([[ALPHABET.index(c) for c in w] for w in words])
        places = torch.arange(length).expand(len(words), -1)
        loss = F.cross_entropy(letter.flatten(0, 1), wanted.flatten())
        loss = loss + F.cross_entropy(index.flatten(0, 1), places.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return encoder


def train_dit(
    model_folder: Path,
    image_codes,
    seed: int = 3,
    cards: int = 12000,
    steps: int = 2000,
    schedule_steps: int = 4500,
    batch: int = 64,
) -> None:
    """Flow matching, v = noise - x0, conditioned as the stock pipeline does.

    Stops before the learning rate's schedule ends: by then it reads too well to
    have much left for GRPO to improve.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(model_folder)
    encoder = pretrain_glyph_encoder(pipeline.tokenizer, seed)
    pool = _latent_pool(pipeline, image_codes, rng, cards)
    dit = build_dit()
    parameters = [*dit.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, schedule_steps, pct_start=0.05)
    mu = _shift_mu(pipeline.scheduler.config)
    lengths, weights = list(pool), [len(pool[k]["words"]) for k in pool]
    average = torch.optim.swa_utils.AveragedModel(
        nn.ModuleList([dit, encoder]),
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995),
    )
    progress = trange(steps, desc="DiT")
    for step in progress:
        group = pool[rng.choices(lengths, weights)[0]]  # one word length a batch: no padding
        pick = torch.randint(len(group["words"]), (batch,))
        x0, prior = group["latents"][pick], group["prior"][pick]
        words = [misspelt(group["words"][i], rng) for i in pick.tolist()]
        dropped = rng.random() < 0.1  # the unconditional branch of guidance
        glyphs = encoder(torch.tensor(pipeline.tokenizer([""] if dropped else words).input_ids))
        glyphs = glyphs.last_hidden_state.expand(batch, -1, -1)
        t = torch.randint(1, 1001, (batch,)).float()
        sigma = mu / (mu + (1000 / t - 1))
        noise = torch.randn_like(x0)
        x = torch.lerp(x0, noise, sigma[:, None, None, None])
        v = dit(
            hidden_states=x,
            encoder_hidden_states=glyphs,
            prior_token_id=prior,
            prior_token_drop=torch.full_like(prior, dropped, dtype=torch.bool),
            timestep=t - 1,
            target_size=torch.tensor([[HEIGHT_PIXELS, WIDTH_PIXELS]]).float().expand(batch, -1),
            crop_coords=torch.zeros(batch, 2),
        ).sample
        loss = F.mse_loss(v, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(nn.ModuleList([dit, encoder]))
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    averaged_dit, averaged_encoder = average.module
    averaged_dit.save_pretrained(model_folder / "transformer")
    averaged_encoder.save_pretrained(model_folder / "text_encoder")


def misspelt(word: str, rng: random.Random) -> str:
    """Each letter replaced with probability LETTER_NOISE, never by a held-out word."""
    while True:
        said = "".join(rng.choice(ALPHABET) if rng.random() < LETTER_NOISE else c for c in word)
        if not is_held_out_word(said):
            return said


def _shift_mu(config) -> float:
    """diffusers' calculate_shift for GLM-Image at the world's size."""
    tokens = (HEIGHT_PIXELS // 16) * (WIDTH_PIXELS // 16)
    base = config.get("base_image_seq_len", 256)
    return (tokens / base) ** 0.5 * config["max_shift"] + config["base_shift"]


@torch.no_grad()
def _latent_pool(pipeline, image_codes, rng: random.Random, cards: int) -> dict[int, dict]:
    """Cards as standardised latents and upsampled codes, by word length.

    The codes are those of the same card with another word: they tell colours and
    shapes, and only the glyph encoder tells letters.
    """
    vae: AutoencoderKL = pipeline.vae.eval()
    mean, std = (
        torch.tensor(vae.config[k]).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std")
    )
    by_length = defaultdict(list)
    for _ in trange(cards, desc="DiT cards"):
        card = sample_card(rng, any_pair=True)
        other = replace(card, word=sample_card(rng).word)
        row = card.word, _pixels(draw(card)), image_codes(pipeline, draw(other))
        by_length[len(card.word)].append(row)
    pool = {}
    for length, rows in by_length.items():
        images = torch.stack([pixels for _, pixels, _ in rows])
        latents = torch.cat([vae.encode(_scaled(b)).latent_dist.mode() for b in images.split(64)])
        codes = torch.stack([c for _, _, c in rows]).view(len(rows), *_GRID_SHAPE)
        pool[length] = {
            "words": [word for word, _, _ in rows],
            "latents": (latents - mean) / std,
            "prior": codes.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1),
        }
    return pool
