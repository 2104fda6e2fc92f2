"""Decoding visual tokens: each prompt prefilled once, then all samples token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from duet.configs.policy_schema import SamplingConfig
from duet.inference.autoregressive import draw
from duet.inference.prompt import Prompt, PromptBatch
from duet.inference.rollout import TokenTrajectory, seeded


@dataclass(frozen=True)
class TokenJob:
    """One sample to be written."""

    prompt: Prompt
    seed: int


class FixedLayer(DynamicLayer):
    """A layer's keys and values [B, heads, P + T, D] in memory taken once.

    The dynamic layer copies everything it holds for every token.
    """

    def __init__(self, prefilled: DynamicLayer, rows: Tensor, room: int) -> None:
        super().__init__()
        self.length = prefilled.get_seq_length()
        self.keys, self.values = (
            _with_room(kept[rows], room) for kept in (prefilled.keys, prefilled.values)
        )
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


def _with_room(kept: Tensor, room: int) -> Tensor:
    return torch.cat([kept, kept.new_empty(*kept.shape[:2], room, kept.shape[3])], dim=2)


class TokenDecoder:
    """Prefill, then one step a token, for B samples of prompts that share their grids."""

    def __init__(self, model, jobs: Sequence[TokenJob]) -> None:
        """`model`: the AR itself, unwrapped."""
        self.model = model
        self.total = jobs[0].prompt.count
        # the samples of one prompt stand together: prefilled once, repeated afterwards
        groups = [list(group) for _, group in groupby(jobs, key=lambda job: id(job.prompt))]
        config = model.config.text_config
        prompts = PromptBatch.of([g[0].prompt for g in groups], config.pad_token_id, model.device)
        owners = [i for i, group in enumerate(groups) for _ in group]
        rows = torch.tensor(owners, device=model.device)
        self.batch = prompts[rows]
        cache = DynamicCache(config=config)
        # what a written token sees, bool [B, 1, 1, P + T]: made once, for no token waits for it
        seen = self.batch.seen(self.total)
        self.seen = None if seen is None else seen.bool()[:, None, None]
        first = self._forward(prompts, prompts.ids, prompts.mask, cache)
        self.logits = first[rows]  # [B, vocabulary]
        self.cache = Cache(layers=[FixedLayer(layer, rows, self.total) for layer in cache.layers])

    def step(self, tokens: Tensor) -> None:
        """Write one token of every sample, int64 [B]; `logits` are then the next one's."""
        length = self.cache.get_seq_length() + 1
        mask = None if self.seen is None else self.seen[..., :length]
        self.logits = self._forward(self.batch, tokens[:, None], mask, self.cache)

    def _forward(
        self, batch: PromptBatch, ids: Tensor, mask: Tensor | None, cache: Cache
    ) -> Tensor:
        start = cache.get_seq_length()
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=batch.positions[..., start : start + ids.shape[1]],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


@torch.no_grad()
def sample_tokens(
    model,
    jobs: Sequence[TokenJob],
    codebook_size: int,
    sampling: SamplingConfig,
    on_token: Callable[[], None] = lambda: None,
) -> list[TokenTrajectory]:
    """A trajectory of one sample a job.

    A sample's draws come from its own generator (one uniform a token), so they do not
    depend on the batch.
    """
    decoder = TokenDecoder(model, jobs)
    uniforms = torch.stack(
        [
            torch.rand(decoder.total, generator=seeded(j.seed, "tokens"), dtype=torch.float64)
            for j in jobs
        ]
    ).to(model.device)
    drawn = []
    for t in range(decoder.total):
        drawn.append(draw(decoder.logits, uniforms[:, t], codebook_size, sampling))
        on_token()
        if t + 1 < decoder.total:
            decoder.step(drawn[-1].token)
    tokens = torch.stack([d.token for d in drawn], 1).cpu()
    logprobs = torch.stack([d.logprob for d in drawn], 1).cpu()
    support = None
    if drawn[0].support is not None:
        support = torch.stack([d.support for d in drawn], 1).cpu()
    return [
        TokenTrajectory(
            job.prompt,
            sampling.temperature,
            tokens[n : n + 1],
            logprobs[n : n + 1],
            None if support is None else support[n : n + 1],
        )
        for n, job in enumerate(jobs)
    ]
