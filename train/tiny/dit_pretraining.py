"""Pretraining of the tiny DiT, on text and edits together."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from torch import Tensor, nn
from torch.nn import functional as F

from duet.inference.decoder import velocity
from duet.inference.rollout import Conditions
from duet.inference.source_attention import see
from duet.train.tiny.decoder_pretraining import pretrain_glyph_encoder
from duet.train.tiny.descent import Course, descend
from duet.train.tiny.latent_pools import SIZE, Pool, card_pools, edit_pools
from duet.train.tiny.parts import build_dit
from duet.train.tiny.world import ALPHABET, HEIGHT_PIXELS, WIDTH_PIXELS, is_held_out_word

# A letter of a pretraining glyph text is wrong this often: what the DiT learns is
# how often it draws the letter that was asked for. In an edit it is so less often,
# in the annealing more often: what is learnt last is drawn most surely.
LETTER_NOISE, EDIT_LETTER_NOISE, ANNEALING_LETTER_NOISE = 0.25, 0.1, 0.3
_TEXT_SHARE, _TEXT_BATCH, _EDIT_BATCH = 0.45, 64, 32
_DROPPED = 0.1  # batches of the unconditional branch of guidance
_BETAS = 0.9, 0.99
_SAVE_STEPS = 250


def train_dit(
    model_folder: Path, seed: int = 3, steps: int = 3200, schedule_steps: int = 7000
) -> None:
    """From fresh weights, at a rate that is still high at the end."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(model_folder)
    encoder = pretrain_glyph_encoder(pipeline.tokenizer, seed)
    pools = _Pools.of(pipeline, rng)
    trained = nn.ModuleList([build_dit(), encoder])
    course = Course("DiT", 1e-3, steps, schedule_steps, betas=_BETAS)
    _train(course, LETTER_NOISE, trained, pipeline, pools, rng)


def anneal_dit(model_folder: Path, seed: int = 9, steps: int = 1000) -> None:
    """Their average goes on at a rate that falls to 0: stripes, cells and letters become clear."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    pipeline = GlmImagePipeline.from_pretrained(model_folder)
    pools = _Pools.of(pipeline, rng)
    trained = nn.ModuleList([pipeline.transformer, pipeline.text_encoder]).train()
    course = Course("DiT annealed", 5e-4, steps, betas=_BETAS)
    _train(course, ANNEALING_LETTER_NOISE, trained, pipeline, pools, rng)


@dataclass(frozen=True)
class _Pools:
    text: list[Pool]
    edits: list[Pool]

    @classmethod
    def of(cls, pipeline: GlmImagePipeline, rng: random.Random, count: int = 5000) -> "_Pools":
        """Of so many cards and edits."""
        return cls(card_pools(pipeline, rng, count), edit_pools(pipeline, rng, count))

    def draw(self, rng: random.Random) -> tuple[Pool, int]:
        """One of either kind, and how many of it make a batch."""
        is_text = rng.random() < _TEXT_SHARE
        pools, count = (self.text, _TEXT_BATCH) if is_text else (self.edits, _EDIT_BATCH)
        return rng.choices(pools, list(map(len, pools)))[0], count


def _train(
    course: Course,
    letter_noise: float,
    trained: nn.ModuleList,
    pipeline: GlmImagePipeline,
    pools: _Pools,
    rng: random.Random,
) -> None:
    """Flow matching, v = noise - x0, of DiT and glyph encoder, conditioned as the stock pipeline
    does. What is saved is their moving average. `letter_noise`: of cards.
    """
    dit, encoder = trained
    folder = Path(pipeline.name_or_path)
    mu = _shift_mu(pipeline.scheduler.config)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    average = torch.optim.swa_utils.AveragedModel(trained, multi_avg_fn=decay)
    shown: dict[str, Tensor] = {}

    def losses() -> dict[str, Tensor]:
        pool, count = pools.draw(rng)
        noise = EDIT_LETTER_NOISE if pool.sources else letter_noise
        loss = flow_loss(dit, encoder, pipeline.tokenizer, pool, count, mu, rng, noise)
        kind = f"sources {len(pool.sources[0]) if pool.sources else 0}"
        shown[kind] = torch.lerp(shown.get(kind, loss.detach()), loss.detach(), 0.02)
        return {"loss": loss, **shown}

    def keep(step: int) -> None:
        average.update_parameters(trained)
        if (step + 1) % _SAVE_STEPS == 0 or step + 1 == course.steps:  # judged before the end
            for averaged, part in zip(average.module, ("transformer", "text_encoder"), strict=True):
                averaged.save_pretrained(folder / part)

    descend(course, trained.parameters(), losses, keep)


def flow_loss(
    dit: nn.Module,
    encoder: nn.Module,
    tokenizer,
    pool: Pool,
    count: int,
    mu: float,
    rng: random.Random,
    letter_noise: float,
) -> Tensor:
    pick = torch.randint(len(pool), (count,))
    x0, prior = pool.latents[pick], pool.prior[pick]
    words = [misspelt(pool.words[i], rng, letter_noise) for i in pick.tolist()]
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


def misspelt(word: str, rng: random.Random, noise: float) -> str:
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
