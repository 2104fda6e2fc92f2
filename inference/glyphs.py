"""What the glyph encoder makes of the text that a prompt asks to be drawn."""

import torch
from diffusers import GlmImagePipeline
from torch import Tensor

from duet.configs.quotes import quoted_spans

MAX_GLYPH_TOKENS = 2048  # of one span: the reference cuts off the rest


@torch.no_grad()
def glyph_embedding(pipeline: GlmImagePipeline, prompt: str) -> Tensor:
    """Glyph embedding [1, L, D] of the prompt's quoted spans, as `_get_glyph_embeds` makes it.

    One prompt at a time: the reference pads unequal lengths of a batch with zeros
    that the DiT then attends to.
    """
    spans = quoted_spans(prompt) or [""]
    pad = pipeline.tokenizer.pad_token_id
    # the reference's rule: an even number of spans gets a leading pad
    lead = [pad] * ((len(spans) + 1) % 2)
    read = pipeline.tokenizer(spans, truncation=True, max_length=MAX_GLYPH_TOKENS)
    ids = [lead + i for i in read.input_ids]
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
    padded = torch.tensor([i + [pad] * (longest - len(i)) for i in ids])
    device = pipeline.text_encoder.device
    output = pipeline.text_encoder(padded.to(device), attention_mask=mask.to(device))
    return output.last_hidden_state[mask.bool().to(device)][None]
