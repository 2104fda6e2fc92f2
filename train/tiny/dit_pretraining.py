"""Pretraining of the tiny DiT, on text and edits together."""

import random
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from duet.inference.decoder import velocity
from duet.inference.rollout import Conditions
from duet.inference.source_attention import see
from duet.train.tiny.decoder_pretraining import pretrain_glyph_encoder
from duet.train.tiny.latent_pools import SIZE, Pool, card_pools, edit_pools
from duet.train.tiny.parts import build_dit
from duet.train.tiny.world import ALPHABET, HEIGHT_PIXELS, WIDTH_PIXELS, is_held_out_word

# A letter of a pretraining glyph text is wrong this often: what the DiT learns is
# how often it draws the letter that was asked for. In an edit it is so less often.
LETTER_NOISE, EDIT_LETTER_NOISE = 0.25, 0.1
_DROPPED = 0.1  # batches of the unconditional branch of guidance
_SAVE_STEPS = 500


def train_dit(
    model_folder: Path,
    seed: int = 3,
    cards: int = 5000,
    edits: int = 5000,
    steps: int = 3200,
    schedule_steps: int = 7000,
    text_share: float = 0.45,
    batch: int = 64,
    edit_batch: int = 32,
) -> None:
    """Flow matching, v = noise - x0, conditioned as the stock pipeline does.

    Stops before the learning rate's schedule ends: by then it reads too well to
    have much left for GRPO to improve.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(model_folder)
    encoder = pretrain_glyph_encoder(pipeline.tokenizer, seed)
    of_text = card_pools(pipeline, rng, cards)
    of_edits = edit_pools(pipeline, rng, edits)
    dit = build_dit()
    parameters = [*dit.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, schedule_steps, pct_start=0.05)
    mu = _shift_mu(pipeline.scheduler.config)
    average = torch.optim.swa_utils.AveragedModel(
        nn.ModuleList([dit, encoder]),
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995),
    )
    shown = {}
    progress = trange(steps, desc="DiT")
    for step in progress:
        is_text = rng.random() < text_share
        pools, count = (of_text, batch) if is_text else (of_edits, edit_batch)
        pool = rng.choices(pools, list(map(len, pools)))[0]
        loss = flow_loss(dit, encoder, pipeline.tokenizer, pool, count, mu, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(nn.ModuleList([dit, encoder]))
        name = f"sources {len(pool.sources[0]) if pool.sources else 0}"
        shown[name] = 0.98 * shown.get(name, loss.item()) + 0.02 * loss.item()
        if step % 20 == 0:
            progress.set_postfix({k: f"{v:.4f}" for k, v in sorted(shown.items())})
        if (step + 1) % _SAVE_STEPS == 0 or step + 1 == steps:  # can be judged before the end
            for averaged, folder in zip(
                average.module, ("transformer", "text_encoder"), strict=True
            ):
                averaged.save_pretrained(model_folder / folder)


def flow_loss(
    dit: nn.Module,
    encoder: nn.Module,
    tokenizer,
    pool: Pool,
    count: int,
    mu: float,
    rng: random.Random,
) -> Tensor:
    pick = torch.randint(len(pool), (count,))
    x0, prior = pool.latents[pick], pool.prior[pick]
    noise_rate = LETTER_NOISE if pool.sources is None else EDIT_LETTER_NOISE
    words = [misspelt(pool.words[i], rng, noise_rate) for i in pick.tolist()]
    t = torch.randint(1, 1001, (count,)).float()
    sigma = mu / (mu + (1000 / t - 1))
    noise = torch.randn_like(x0)
    x = torch.lerp(x0, noise, sigma[:, None, None, None])
    if rng.random() < _DROPPED:
        v = _unconditional(dit, _glyphs(encoder, tokenizer, [""]), x, prior, t)
    else:
        glyphs = _glyphs(encoder, tokenizer, words)
        sources = pool.sources and [pool.sources[i] for i in pick.tolist()]
        given = Conditions(glyphs, prior, glyphs[:1], SIZE, sources)
        v = velocity(dit, x, t, see(dit, given), 1.0)
    return F.mse_loss(v, noise - x0)


def _glyphs(encoder: nn.Module, tokenizer, words: list[str]) -> Tensor:
    return encoder(torch.tensor(tokenizer(words).input_ids)).last_hidden_state


def _unconditional(dit: nn.Module, null: Tensor, x: Tensor, prior: Tensor, t: Tensor) -> Tensor:
    """As `velocity` has it for guidance: no glyphs, no prior, no sources."""
    count = len(x)
    return dit(
        hidden_states=x,
        encoder_hidden_states=null.expand(count, -1, -1),
        prior_token_id=prior,
        prior_token_drop=torch.ones_like(prior, dtype=torch.bool),
        timestep=t - 1,
        target_size=torch.tensor([[HEIGHT_PIXELS, WIDTH_PIXELS]]).float().expand(count, -1),
        crop_coords=torch.zeros(count, 2),
    ).sample


def misspelt(word: str, rng: random.Random, noise: float = LETTER_NOISE) -> str:
    """Each letter replaced with that probability, never by a held-out word."""
    while True:
        said = "".join(rng.choice(ALPHABET) if rng.random() < noise else c for c in word)
        if not is_held_out_word(said):
            return said


def _shift_mu(config) -> float:
    """diffusers' calculate_shift for GLM-Image at the world's size."""
    tokens = (HEIGHT_PIXELS // 16) * (WIDTH_PIXELS // 16)
    base = config.get("base_image_seq_len", 256)
    return (tokens / base) ** 0.5 * config["max_shift"] + config["base_shift"]
