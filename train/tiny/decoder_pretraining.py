"""Pretraining of the tiny VAE and glyph encoder."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from duet.train.tiny.descent import Course, descend
from duet.train.tiny.edits import sample_styled
from duet.train.tiny.parts import build_glyph_encoder, build_vae
from duet.train.tiny.scenes import draw_scene
from duet.train.tiny.world import ALPHABET, WORD_LENGTHS, draw, is_held_out_word, sample_card

_SAVE_STEPS = 250
_BATCH = 8


def pixels_of(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def scaled(batch: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return batch.float() / 127.5 - 1


def train_vae(model_folder: Path, seed: int = 2, cards: int = 3000, steps: int = 3000) -> None:
    """On cards alone; then the latents' statistics go into the config."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    images = torch.stack([pixels_of(draw(sample_card(rng))) for _ in range(cards)])
    vae = build_vae()

    def losses() -> dict[str, Tensor]:
        return {"loss": _vae_loss(vae, scaled(images[torch.randint(cards, (_BATCH,))]))}

    descend(Course("VAE", 2e-3, steps), vae.parameters(), losses)
    _save_with_statistics(vae, images[:512], model_folder)


def refine_vae_decoder(
    model_folder: Path, seed: int = 6, cards: int = 4000, steps: int = 3000
) -> None:
    """The VAE's decoder alone, on cards of any pair and slightly noised latents.

    The latents stay as they are, so it may run beside or after the DiT's training.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKL.from_pretrained(model_folder / "vae").eval()
    drawn = [pixels_of(draw(sample_card(rng, any_pair=True))) for _ in range(cards)]
    images = torch.stack(drawn)
    with torch.no_grad():
        latents = torch.cat([vae.encode(scaled(b)).latent_dist.mode() for b in images.split(64)])
    spread = latents.std((0, 2, 3), keepdim=True)

    def losses() -> dict[str, Tensor]:
        pick = torch.randint(cards, (_BATCH,))
        z = latents[pick] + 0.05 * spread * torch.randn_like(latents[pick])
        return {"loss": _difference(vae.decode(z).sample, scaled(images[pick]))}

    descend(Course("VAE decoder", 1e-3, steps), vae.decoder.parameters(), losses)
    vae.save_pretrained(model_folder / "vae")


def train_vae_styles(
    model_folder: Path, seed: int = 8, cards: int = 2000, styled: int = 3000, steps: int = 2000
) -> None:
    """The VAE goes on, on cards and on pictures in styles and with emblems, both of any pair.

    From fresh weights on all of that at once it needs far more steps.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKL.from_pretrained(model_folder / "vae")
    drawn = [draw(sample_card(rng, any_pair=True)) for _ in range(cards)]
    drawn += [draw_scene(sample_styled(rng)) for _ in range(styled)]
    images = torch.stack([pixels_of(picture) for picture in drawn])
    images = images[torch.randperm(len(images))]

    def losses() -> dict[str, Tensor]:
        batch = scaled(images[torch.randint(len(images), (_BATCH,))])
        return {"loss": _vae_loss(vae, batch, 0.05)}

    def save(step: int) -> None:
        if (step + 1) % _SAVE_STEPS == 0 or step + 1 == steps:  # can be judged before the end
            _save_with_statistics(vae, images[:768], model_folder)

    descend(Course("VAE styles", 1.5e-3, steps), vae.parameters(), losses, save)


def _vae_loss(vae: AutoencoderKL, x: Tensor, noise: float = 0.0) -> Tensor:
    """`noise`: of the latents, as a share of their deviation, so that the decoder bears it."""
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    if noise:
        z = z + noise * z.detach().std() * torch.randn_like(z)
    y = vae.decode(z).sample
    kl = 1e-5 * posterior.kl().mean() / x[0].numel()
    return _difference(y, x) + kl


def _difference(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).abs().mean() + (y - x).square().mean()


@torch.no_grad()
def _save_with_statistics(vae: AutoencoderKL, images: Tensor, model_folder: Path) -> None:
    """With the latents' mean and deviation over uint8 pictures in the config."""
    vae.eval()
    latents = torch.cat([vae.encode(scaled(b)).latent_dist.mode() for b in images.split(64)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3)).tolist(), latents_std=latents.std((0, 2, 3)).tolist()
    )
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
