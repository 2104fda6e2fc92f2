"""Attention that gives one answer for any shape.

A token is sampled from a cache, one query at a time, and scored with all queries at
once. In float32 the kernels for the two shapes round differently, and sharp attention
makes that 1e-4 nats a token; summed in float64 the two agree to the bit.
"""

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT64_SUMS = "sdpa_float64"


def _sdpa_float64(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' `sdpa` on queries, keys and values [B, heads, L, D] in float64."""
    output, _ = sdpa_attention_forward(
        module, query.double(), key.double(), value.double(), attention_mask, **kwargs
    )
    return output.to(query.dtype), None


AttentionInterface.register(FLOAT64_SUMS, _sdpa_float64)
AttentionMaskInterface.register(FLOAT64_SUMS, sdpa_mask)  # boolean: it fits any dtype
