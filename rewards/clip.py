"""The open_clip towers that several rewards share, read when first needed."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from duet.configs.environment import on_cpu_alone, require_gpus_allowed
from duet.configs.errors import UserError
from duet.rewards.long_prompts import embed_long

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Tower:
    """Weights on their device, with what prepares pictures and texts for them."""

    model: torch.nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[..., Tensor]  # texts, context_length
    device: torch.device
    dtype: torch.dtype


class Clip:
    """Embeddings and features by an open_clip model; equal models share one copy."""

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        device: str = "auto",
        dtype: Dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """`model`: an open_clip name, `hf-hub:ID` or `local-dir:FOLDER`.

        `pretrained`: a tag or a weights file; null with `hf-hub:` and `local-dir:`.
        """
        self.model, self.pretrained = model, pretrained
        self.device, self.dtype = picked_device(device), picked_dtype(dtype)
        self.batch_size = checked_batch_size(batch_size)

    @property
    def tower(self) -> Tower:
        return _read(self.model, self.pretrained, self.device, self.dtype)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """L2-normalised embeddings [B, D], float32."""
        return self._embed(self.tower.model.encode_image, self.pixels, images)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings [B, D], float32; long texts as `embed_long` has them."""
        encode = self.tower.model.encode_text
        return embed_long(texts, self._fits, lambda t: self._embed(encode, self._tokens, t))

    def _fits(self, text: str) -> bool:
        """Whether room for one more token changes nothing."""
        tokenizer = self.tower.tokenizer
        cut = tokenizer([text])
        whole = tokenizer([text], context_length=cut.shape[1] + 1)
        return torch.equal(whole[:, :-1], cut)

    @torch.no_grad()
    def stages(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Channel-normalised features [B, C, H, W] of every stage of the image tower, float32."""
        output = self.tower.model.visual.forward_intermediates(
            self.pixels(images), intermediates_only=True, output_fmt="NCHW"
        )
        return [F.normalize(f.float(), dim=1) for f in output["image_intermediates"]]

    @torch.no_grad()
    def embeddings_and_stages(self, images: Sequence[Image.Image]) -> tuple[Tensor, list[Tensor]]:
        """What `embed_images` and `stages` give, by one forward."""
        output = self.tower.model.visual.forward_intermediates(
            self.pixels(images), output_fmt="NCHW"
        )
        stages = [F.normalize(f.float(), dim=1) for f in output["image_intermediates"]]
        return F.normalize(output["image_features"].float(), dim=-1), stages

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """[B, 3, S, S] as the tower wants them."""
        tower = self.tower
        pixels = torch.stack([tower.preprocess(i.convert("RGB")) for i in images])
        return pixels.to(tower.device, tower.dtype)

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        return self.tower.tokenizer(list(texts)).to(self.tower.device)

    def _embed(self, encode: Callable, prepare: Callable, items: Sequence) -> Tensor:
        parts = [encode(prepare(part)).float() for part in batches(items, self.batch_size)]
        return F.normalize(torch.cat(parts), dim=-1)


class ClipReward:
    """What every reward on an open_clip model has: `Clip`'s arguments, and weights read by load."""

    def __init__(self, **clip: Any) -> None:
        self.clip = Clip(**clip)

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def load(self) -> None:
        self.to(self.device)

    def to(self, device: torch.device | str) -> None:
        self.clip.tower.model.to(device)


@cache
def _read(model: str, pretrained: str | None, device: torch.device, dtype: torch.dtype) -> Tower:
    """Raises UserError when open_clip knows no such model or weights."""
    if not pretrained and ":" not in model:
        raise UserError(f"open_clip model {model!r} needs pretrained: a tag or a weights file")
    import open_clip  # seconds: only for those who use it

    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(model)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"open_clip model {model!r} with pretrained {pretrained!r} cannot be loaded: {error}"
        ) from error
    clip = clip.eval().requires_grad_(False).to(device, dtype)
    return Tower(clip, preprocess, tokenizer, device, dtype)


def tower_bytes(clip: Clip) -> int | None:
    """What the tower's weights take, without reading them; None: only the hub knows."""
    return None if clip.model.startswith("hf-hub:") else _size(clip.model) * clip.dtype.itemsize


@cache
def _size(model: str) -> int:
    """Parameters."""
    import open_clip

    logging.disable(logging.WARNING)  # that it has no weights is meant
    try:
        with torch.device("meta"):
            tower = open_clip.create_model(model, load_weights=False, device="meta")
    finally:
        logging.disable(logging.NOTSET)
    return sum(p.numel() for p in tower.parameters())


def picked_device(name: str) -> torch.device:
    """`auto` is this process's GPU, or the CPU where there is none or accelerate's environment
    asks for the CPU; `cuda` is the same GPU.

    Never a GPU without its number: that would be another one in another thread.

    Raises UserError for what is no device, and for a GPU where torch sees none or none is allowed.
    """
    if name == "auto":
        gpu = not on_cpu_alone(os.environ) and torch.cuda.is_available()
        name = "cuda" if gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: allowed are auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda":
        require_gpus_allowed(os.environ, f"device {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: torch sees no GPU here: use auto or cpu")
    if device == torch.device("cuda"):
        return torch.device("cuda", own_gpu())
    return device


def own_gpu() -> int:
    """The number of this process's GPU among those that it sees, as accelerate has it."""
    rank = max(0, int(os.environ.get("LOCAL_RANK", 0)))  # -1: no launcher
    return rank % max(1, torch.cuda.device_count())


def picked_dtype(name: Dtype) -> torch.dtype:
    """Raises UserError for one that is not offered."""
    if name not in get_args(Dtype):
        raise UserError(f"dtype {name!r}: allowed are {', '.join(get_args(Dtype))}")
    return getattr(torch, name)


def checked_batch_size(size: int) -> int:
    """Raises UserError for one below 1."""
    if not isinstance(size, int) or size < 1:
        raise UserError(f"batch_size {size!r}: give a whole number >= 1")
    return size


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive parts of at most `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))
