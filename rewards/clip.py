"""The open_clip towers that several rewards share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from configs.errors import UserError


@dataclass(frozen=True)
class Clip:
    model: torch.nn.Module
    preprocess: Any
    tokenizer: Any
    device: torch.device

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self.preprocess(i.convert("RGB")) for i in images]).to(self.device)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """L2-normalised embeddings [B, D], float32."""
        return F.normalize(self.model.encode_image(self.pixels(images)).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings [B, D], float32."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


@cache
def load_clip(model: str, pretrained: str | None, device: str) -> Clip:
    """`model`: an open_clip name or `local-dir:FOLDER`; `pretrained`: a tag or a path.

    Raises UserError when open_clip knows no such model or weights.
    """
    picked = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(model)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"open_clip model {model!r} with pretrained {pretrained!r} cannot be loaded: {error}"
        ) from error
    return Clip(clip.eval().requires_grad_(False).to(picked), preprocess, tokenizer, picked)
