"""The tiny world's reward models: an open_clip model and an aesthetic head on it."""

import json
import random
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from tqdm import trange
from transformers import PreTrainedTokenizerFast

from duet.train.tiny.world import PALETTE, Card, draw, sample_card, training_caption

_CONTEXT, _EMBEDDING = 64, 64
_MODEL_CFG = {
    "embed_dim": _EMBEDDING,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": _CONTEXT, "width": 64, "heads": 4, "layers": 2},
}
_PREPROCESS_CFG = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "squash",  # a card is wider than high: nothing may be cropped away
}


def train(folder: Path, seed: int = 4) -> None:
    """Write `clip/` (open_clip's local-dir layout) and `aesthetic.safetensors` under folder."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    clip_folder = folder / "clip"
    clip_folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(clip_folder, rng)
    text_cfg = _MODEL_CFG["text_cfg"] | {"vocab_size": vocabulary, "hf_tokenizer_name": "local"}
    config = {"model_cfg": _MODEL_CFG | {"text_cfg": text_cfg}, "preprocess_cfg": _PREPROCESS_CFG}
    (clip_folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    name = f"local-dir:{clip_folder}"
    (clip_folder / "open_clip_model.safetensors").unlink(missing_ok=True)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    _train_clip(model, preprocess, tokenizer, rng)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, clip_folder / "open_clip_model.safetensors")
    head = _train_aesthetic(model, preprocess, rng)
    save_file(head.state_dict(), folder / "aesthetic.safetensors")


def _write_tokenizer(folder: Path, rng: random.Random) -> int:
    """Byte-level BPE over captions; the end token has the highest id (argmax pooling)."""
    captions = [sample_card(rng).prompt.split('"')[0] for _ in range(3000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens(["<end>"])
    end = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", end)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)
    return end + 1


def _train_clip(model, preprocess, tokenizer, rng, cards: int = 6000, steps: int = 700) -> None:
    """Contrastive; every card also brings a caption with one colour word changed."""
    pool = [sample_card(rng, any_pair=True) for _ in range(cards)]
    images = torch.stack([preprocess(draw(c)) for c in pool])
    batch = 96
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    model.train()
    progress = trange(steps, desc="CLIP")
    for step in progress:
        pick = rng.sample(range(cards), batch)
        prompts = [training_caption(pool[i], rng) for i in pick]
        wrong = [training_caption(_recoloured(pool[i], rng), rng) for i in pick]
        x = images[pick]
        x = x + torch.rand(batch, 1, 1, 1) * 0.3 * torch.randn_like(
            x
        )  # decoded cards are not clean
        image = F.normalize(model.encode_image(x), dim=-1)
        text = F.normalize(model.encode_text(tokenizer(prompts + wrong)), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # [B, 2B]
        labels = torch.arange(batch)
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :batch].T, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            own, other = logits.diagonal(), logits[labels, labels + batch]
            progress.set_postfix(
                loss=f"{loss.item():.3f}", hard=f"{(own > other).float().mean():.2f}"
            )
    model.eval()


def _recoloured(card: Card, rng: random.Random) -> Card:
    row = card.to_row()
    place = rng.choice([row, *row["shapes"]])
    key = "background" if place is row else "colour"
    place[key] = rng.choice([c for c in PALETTE if c != place[key]])
    return Card.from_row(row)


def _train_aesthetic(model, preprocess, rng, cards: int = 3000, steps: int = 1500) -> nn.Module:
    """LAION's predictor at small widths: 10 for a clean card, less the more it is spoiled."""
    width = _EMBEDDING
    head = nn.Sequential(
        nn.Linear(width, 64),
        nn.Dropout(0.2),
        nn.Linear(64, 32),
        nn.Dropout(0.2),
        nn.Linear(32, 16),
        nn.Dropout(0.1),
        nn.Linear(16, 8),
        nn.Linear(8, 1),
    )
    head = nn.ModuleDict({"layers": head})
    pictures, marks = [], []
    for _ in trange(cards, desc="aesthetic cards"):
        damage = rng.random()
        pictures.append(preprocess(_spoiled(draw(sample_card(rng)), damage, rng)))
        marks.append(10 - 8 * damage)
    with torch.no_grad():
        batches = torch.stack(pictures).split(256)
        embeddings = torch.cat([F.normalize(model.encode_image(b), dim=-1) for b in batches])
    marks = torch.tensor(marks)[:, None]
    head.layers[-1].bias.data.fill_(float(marks.mean()))
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in trange(steps, desc="aesthetic head"):
        pick = torch.randint(cards, (256,))
        loss = F.mse_loss(head["layers"](embeddings[pick]), marks[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def _spoiled(image: Image.Image, damage: float, rng: random.Random) -> Image.Image:
    """Blur, noise, or a grey veil, of strength `damage` in [0, 1]."""
    kind = rng.choice(("blur", "noise", "veil"))
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(4 * damage))
    pixels = np.asarray(image, dtype=float)
    if kind == "noise":
        noise = np.random.default_rng(rng.randrange(2**32)).normal(size=pixels.shape)
        pixels = pixels + 90 * damage * noise
    else:
        pixels = (1 - 0.9 * damage) * pixels + 0.9 * damage * 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
