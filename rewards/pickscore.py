"""PickScore (arXiv 2305.01569): a CLIP model trained on people's choices between pictures."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.clip import Dtype, batches, checked_batch_size, picked_device, picked_dtype
from duet.rewards.long_prompts import embed_long


class PickScore:
    """Scale times cosine of image and prompt embeddings, about 15 to 25."""

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "auto",
        dtype: Dtype = "float32",
        batch_size: int = 32,
    ) -> None:
        """`model`, `processor`: an id on the hub or a local folder (transformers' CLIP)."""
        self.source, self.processor_source = model, processor
        self.device, self.dtype = picked_device(device), picked_dtype(dtype)
        self.batch_size = checked_batch_size(batch_size)

    def load(self) -> None:
        _ = self.model, self.processor

    def to(self, device: torch.device | str) -> None:
        self.model.to(device)

    @cached_property
    def model(self) -> torch.nn.Module:
        from transformers import CLIPModel

        model = _from_pretrained(CLIPModel, "model", self.source)
        return model.eval().requires_grad_(False).to(self.device, self.dtype)

    @cached_property
    def processor(self) -> Any:
        from transformers import CLIPProcessor

        return _from_pretrained(CLIPProcessor, "processor", self.processor_source)

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [s for part in batches(inputs, self.batch_size) for s in self._score(part)]

    @torch.no_grad()
    def _score(self, inputs: Sequence[RewardInput]) -> list[float]:
        pictures = self.processor(
            images=[i.image.convert("RGB") for i in inputs], return_tensors="pt"
        )
        pixels = pictures["pixel_values"].to(self.device, self.dtype)
        images = _unit(self.model.get_image_features(pixels))
        prompts = embed_long([i.prompt for i in inputs], self._fits, self._embed)
        return (self.model.logit_scale.float().exp() * (images * prompts).sum(-1)).tolist()

    def _fits(self, text: str) -> bool:
        tokens = self.processor.tokenizer(text, verbose=False).input_ids
        return len(tokens) <= self.model.config.text_config.max_position_embeddings

    def _embed(self, texts: list[str]) -> Tensor:
        tokens = self.processor(text=texts, padding=True, return_tensors="pt").to(self.device)
        return _unit(self.model.get_text_features(**tokens))


def _unit(output: Any) -> Tensor:
    """transformers 5 answers an object: its pooler_output is the projected embedding [B, D]."""
    return F.normalize(output.pooler_output.float(), dim=-1)


def _from_pretrained(kind: Any, what: str, source: str) -> Any:
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"pickscore {what} {source!r} cannot be loaded, give a local folder or an id on the "
            f"hub: {error}"
        ) from error
