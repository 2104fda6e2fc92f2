"""The AR's policy: one distribution over the codebook, which samples and which scores.

The grid is decoded by construction (exactly T tokens), so there is no end token to
sample; ids outside the codebook get no probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from duet.configs.policy_schema import SamplingConfig
from duet.inference.prompt import left_padded, not_padding, positions_of
from duet.inference.rollout import TokenTrajectory


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


_BITS = 8  # of a byte


def pack_support(support: Tensor) -> Tensor:
    """Bool [..., V] -> uint8 [..., ceil(V / 8)], bit i of byte b for id 8 b + i."""
    whole = torch.nn.functional.pad(support, (0, -support.shape[-1] % _BITS))
    weights = 2 ** torch.arange(_BITS, device=support.device)
    return (whole.unflatten(-1, (-1, _BITS)) * weights).sum(-1).to(torch.uint8)


def unpack_support(packed: Tensor, codebook_size: int) -> Tensor:
    """The reverse of `pack_support`: bool [..., V]."""
    shifts = torch.arange(_BITS, device=packed.device, dtype=torch.uint8)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :codebook_size].bool()


@dataclass(frozen=True)
class Draw:
    """One token of B samples."""

    token: Tensor  # int64 [B]
    logprob: Tensor  # float32 [B], nats
    support: Tensor | None  # uint8 [B, ceil(V / 8)]


def draw(logits: Tensor, uniform: Tensor, codebook_size: int, sampling: SamplingConfig) -> Draw:
    """Inverse CDF of one uniform a sample: logits [B, vocabulary], uniform float64 [B]."""
    distribution = policy_logprobs(logits, codebook_size, sampling.temperature)
    support = kept_support(distribution, sampling.top_k, sampling.top_p)
    if support is not None:
        distribution = policy_logprobs(logits, codebook_size, sampling.temperature, support)
        support = pack_support(support)
    cumulative = distribution.double().exp().cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=codebook_size - 1)
    return Draw(token[:, 0], distribution.gather(-1, token)[:, 0], support)


@dataclass(frozen=True)
class TokenScores:
    """Sampled tokens under the weights of the moment, nats."""

    logprobs: Tensor  # float32 [B, T]; a sample with fewer tokens has them last
    entropy: Tensor  # float32 [B, T], detached


def score_tokens(
    model: Module, trajectories: Sequence[TokenTrajectory], codebook_size: int, device: torch.device
) -> TokenScores:
    """Teacher-forced scores of all samples of the trajectories, in their order.

    The positions are explicit: without them the model would read image tokens as
    text. All trajectories must share their temperature. Text and edits, which write unequal
    numbers of tokens, are one forward: whatever a rank has drawn, its forwards are as many.
    """
    first = trajectories[0]
    assert all(t.temperature == first.temperature for t in trajectories)
    samples = [sample for t in trajectories for sample in t.split()]
    written = [s.tokens[0] for s in samples]
    tokens, taken = left_padded(written, 0).to(device), not_padding(written, device)
    ids = [torch.cat([s.prompt.ids, s.tokens[0]])[:-1] for s in samples]
    whole = positions_of([s.prompt for s in samples])
    positions = left_padded([each[:, :-1] for each in whole], 0)
    logits = model(
        input_ids=left_padded(ids, 0).to(device),
        attention_mask=not_padding(ids, device),
        position_ids=positions.transpose(0, 1).to(device),
        logits_to_keep=tokens.shape[1],
        use_cache=False,
    ).logits
    support = None
    if first.support is not None:  # where a sample has no token, all ids are kept
        kept = left_padded([s.support[0].T for s in samples], 255)
        support = kept.transpose(1, 2).to(device)

    def score(part: slice) -> tuple[Tensor, Tensor]:
        kept = None if support is None else unpack_support(support[:, part], codebook_size)
        distribution = policy_logprobs(logits[:, part], codebook_size, first.temperature, kept)
        logprobs = distribution.gather(-1, tokens[:, part, None])[..., 0]
        entropy = torch.special.entr(distribution.detach().exp()).sum(-1)
        if taken is None:
            return logprobs, entropy
        own = taken[:, part].bool()
        return logprobs.where(own, 0.0), entropy.where(own, 0.0)

    # float32 over the codebook stands for one part of the positions; backward makes it again
    parts = [slice(i, i + POSITIONS) for i in range(0, tokens.shape[1], POSITIONS)]
    scores = [checkpoint(score, part, use_reentrant=False) for part in parts]
    return TokenScores(*(torch.cat(columns, 1) for columns in zip(*scores, strict=True)))


POSITIONS = 256  # of float32 [B, positions, V] at once: 16 MiB a sample
