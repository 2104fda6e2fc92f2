"""What the stock classes make of a request, for tests of parity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duet.inference.request import Request


def stock_inputs(processor, request: Request) -> dict[str, Tensor]:
    """By the stock processor, of a request with its size and sources at theirs."""
    pictures = [{"type": "image", "image": source} for source in request.sources]
    message = {"role": "user", "content": [*pictures, {"type": "text", "text": request.prompt}]}
    size = {"target_h": request.size.height, "target_w": request.size.width}
    return processor.apply_chat_template(
        [[message]],
        tokenize=True,
        return_dict=True,
        processor_kwargs=size | {"return_tensors": "pt"},
    )


def stock_logits(ar, inputs: dict[str, Tensor], tokens: Sequence[int]) -> Tensor:
    """[T, vocabulary], of `generate` with these tokens forced upon it."""
    forced = iter(tokens)

    def follow(_, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([next(forced)]), 0.0)

    output = ar.generate(
        **inputs,
        max_new_tokens=len(tokens),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[follow],
    )
    return torch.cat(output.logits)
