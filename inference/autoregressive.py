"""The AR: a grid of visual tokens, sampled and scored by one distribution.

The grid is decoded by construction (preview, then large, exactly T tokens), so
there is no end token to sample; ids outside the codebook get no probability.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from duet.inference.layout import Grid, grid_positions, prompt_positions
from duet.inference.rollout import TokenTrajectory, seeded
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache


def policy_logprobs(
    logits: Tensor, codebook_size: int, temperature: float, support: Tensor | None = None
) -> Tensor:
    """log pi over the codebook, [..., vision vocabulary] -> [..., codebook], float32.

    `support` (bool) renormalises over the kept ids. At temperature 0 the policy
    is the arg-max: 0 for the best id, -inf elsewhere.
    """
    logits = logits[..., :codebook_size].float()
    if support is not None:
        logits = logits.masked_fill(~support, -torch.inf)
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    return torch.log_softmax(logits / temperature, dim=-1)


def kept_support(logprobs: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Ids that top-k, then top-p keep: bool [..., V]; None when nothing is cut.

    Top-p keeps the smallest set of most probable ids whose mass reaches top_p.
    """
    if top_k == 0 and top_p >= 1:
        return None
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k:
        keep[..., top_k:] = False
    if top_p < 1:
        probability = ranked.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= probability.cumsum(-1) - probability < top_p
    return torch.zeros_like(keep).scatter(-1, order, keep)


def pack_support(support: Tensor) -> np.ndarray:
    """Bool [..., V] -> uint8 [..., ceil(V / 8)]."""
    return np.packbits(support.cpu().numpy(), axis=-1)


def unpack_support(packed: np.ndarray, codebook_size: int, device: torch.device) -> Tensor:
    bits = np.unpackbits(packed, axis=-1, count=codebook_size)
    return torch.from_numpy(bits).bool().to(device)


def left_pad(prompts: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts [P_i] -> ids and attention mask, both int64 [B, P]."""
    longest = max(len(p) for p in prompts)
    ids = torch.stack([pad(p, (longest - len(p), 0), value=pad_id) for p in prompts])
    mask = torch.stack([pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    return ids, mask


@torch.no_grad()
def prefill(model, prompts: Sequence[Tensor], repeats: Sequence[int]) -> tuple:
    """Run every prompt once, then repeat its cache: the logits that follow it, cache, mask."""
    ids, mask = left_pad(prompts, model.config.text_config.pad_token_id)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=prompt_positions(mask),
        past_key_values=DynamicCache(config=model.config.text_config),
        use_cache=True,
        logits_to_keep=1,
    )
    rows = torch.repeat_interleave(
        torch.arange(len(prompts), device=ids.device), torch.tensor(repeats, device=ids.device)
    )
    output.past_key_values.batch_select_indices(rows)
    return output.logits[rows, -1], output.past_key_values, mask[rows]


@torch.no_grad()
def decode_one(model, tokens: Tensor, mask: Tensor, positions: Tensor, cache) -> Tensor:
    """One step for all samples: tokens [B], positions [3, B, 1] -> logits [B, vocabulary]."""
    output = model(
        input_ids=tokens[:, None],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


@torch.no_grad()
def sample_tokens(
    model,
    prompts: Sequence[Tensor],
    seeds: Sequence[Sequence[int]],
    grids: tuple[Grid, Grid],
    codebook_size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    on_token: Callable[[], None] = lambda: None,
) -> list[TokenTrajectory]:
    """Sample every seed of every prompt, all at once: one trajectory a prompt.

    A sample's draws come from its own generator (inverse CDF of one uniform a
    token), so they do not depend on the batch.
    """
    device = model.device
    counts = [len(s) for s in seeds]
    total = sum(g.count for g in grids)
    draws = [seeded(s, "tokens") for group in seeds for s in group]
    uniforms = torch.stack([torch.rand(total, generator=g, dtype=torch.float64) for g in draws]).to(
        device
    )
    logits, cache, mask = prefill(model, [p.to(device) for p in prompts], counts)
    positions = grid_positions(mask.sum(-1), grids)  # [3, B, T]
    mask = pad(mask, (0, total), value=1)
    prompt_length = mask.shape[1] - total
    tokens, logprobs, supports = [], [], []
    for t in range(total):
        distribution = policy_logprobs(logits, codebook_size, temperature)
        support = kept_support(distribution, top_k, top_p)
        if support is not None:
            distribution = policy_logprobs(logits, codebook_size, temperature, support)
            supports.append(pack_support(support))
        cumulative = distribution.double().exp().cumsum(-1)
        threshold = uniforms[:, t, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True)
        token = token.clamp(max=codebook_size - 1)
        tokens.append(token[:, 0])
        logprobs.append(distribution.gather(-1, token)[:, 0])
        on_token()
        if t + 1 < total:
            seen = mask[:, : prompt_length + t + 1]
            logits = decode_one(model, token[:, 0], seen, positions[:, :, t : t + 1], cache)
    token_groups = torch.stack(tokens, 1).cpu().split(counts)
    logprob_groups = torch.stack(logprobs, 1).cpu().split(counts)
    support_groups = [None] * len(prompts)
    if supports:
        support_groups = np.split(np.stack(supports, 1), np.cumsum(counts)[:-1])
    return [
        TokenTrajectory(prompt.cpu(), grids, *group, temperature, support)
        for prompt, *group, support in zip(
            prompts, token_groups, logprob_groups, support_groups, strict=True
        )
    ]


def token_logprobs(
    model, trajectories: Sequence[TokenTrajectory], codebook_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Teacher-forced log-probs and entropies of sampled tokens, both float32 [sum N, T], nats.

    The positions are explicit: without them the model would read image tokens as
    text. All trajectories must share their grids and temperature.
    """
    first = trajectories[0]
    assert all((t.grids, t.temperature) == (first.grids, first.temperature) for t in trajectories)
    tokens = torch.cat([t.tokens for t in trajectories]).to(device)
    prompts = [t.prompt_ids for t in trajectories for _ in range(len(t))]
    ids, mask = left_pad(prompts, pad_id=0)
    ids, mask = ids.to(device), mask.to(device)
    positions = torch.cat([prompt_positions(mask), grid_positions(mask.sum(-1), first.grids)], -1)
    logits = model(
        input_ids=torch.cat([ids, tokens], -1)[:, :-1],
        attention_mask=torch.cat([mask, torch.ones_like(tokens)], -1)[:, :-1],
        position_ids=positions[..., :-1],
        logits_to_keep=tokens.shape[1],
        use_cache=False,
    ).logits
    support = None
    if first.support is not None:
        packed = np.concatenate([t.support for t in trajectories])
        support = unpack_support(packed, codebook_size, device)
    distribution = policy_logprobs(logits, codebook_size, first.temperature, support)
    logprobs = distribution.gather(-1, tokens[..., None])[..., 0]
    entropy = torch.special.entr(distribution.detach().exp()).sum(-1)
    return logprobs, entropy
