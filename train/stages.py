"""The two stages: which module is the policy, what it did, and how likely that was."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from duet.configs.rows import read_picture
from duet.configs.schema import RunConfig
from duet.inference.decoder import step_kl
from duet.inference.engine import Engine
from duet.inference.model import adapter_disabled, module_of
from duet.inference.rollout import Request, Rollout
from duet.train.loss import k3_kl
from duet.train.prompts import Group, derive_seed
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """Actions of B samples under the current weights."""

    logprobs: Tensor  # [B, T], nats
    old: Tensor  # [B, T], as the rollout recorded them
    kl: Tensor | None  # [B, T]
    entropy: Tensor | None  # [B, T], nats


class ArStage:
    """Policy: the AR. Fixed within a group: the initial noise, and so every decoder step."""

    name = "ar"
    tolerance_nats = 1e-4

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self.engine, self.config = engine, config

    def requests(self, groups: Sequence[Group]) -> list[Request]:
        height, width = self.config.sampling.height, self.config.sampling.width
        return [
            Request(
                group.row["prompt"],
                group.seeds,
                height,
                width,
                noise=self.engine.initial_noise(group.fixed_seed, height, width),
            )
            for group in groups
        ]

    def rollout(self, groups: Sequence[Group], step: int) -> list[Rollout]:
        return self.engine.rollout(self.requests(groups))

    def score(self, rollouts: Sequence[Rollout], model, with_kl: bool) -> Scored:
        """Log-probs of the rollouts' tokens; `model` is the wrapped policy."""
        trajectories = [r.token_trajectory for r in rollouts]
        logprobs, entropy = self.engine.token_logprobs(trajectories, model)
        old = torch.cat([t.logprobs for t in trajectories]).to(logprobs.device)
        kl = None
        if with_kl:
            policy = module_of(self.engine.pipeline, self.name)
            with torch.no_grad(), adapter_disabled(policy):
                reference, _ = self.engine.token_logprobs(trajectories)
            kl = k3_kl(logprobs, reference)
        return Scored(logprobs, old, kl, entropy)


class DecoderStage:
    """Policy: the DiT. Fixed within a group: prior tokens and initial noise.

    Prior tokens are encoded from the row's reference image where there is one,
    else sampled once a prompt by the AR.
    """

    name = "decoder"
    tolerance_nats = 1e-5

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self.engine, self.config = engine, config

    def requests(self, groups: Sequence[Group]) -> list[Request]:
        height, width = self.config.sampling.height, self.config.sampling.width
        return [
            Request(
                group.row["prompt"],
                group.seeds,
                height,
                width,
                prior_tokens=prior,
                noise=self.engine.initial_noise(group.fixed_seed, height, width),
            )
            for group, prior in zip(groups, self._priors(groups), strict=True)
        ]

    def _priors(self, groups: Sequence[Group]) -> list[Tensor]:
        height, width = self.config.sampling.height, self.config.sampling.width
        priors: list[Tensor | None] = [
            self.engine.encode_prior(read_picture(g.row["image"]), height, width)
            if g.row.get("image")
            else None
            for g in groups
        ]
        open_groups = [i for i, prior in enumerate(priors) if prior is None]
        asked = [
            Request(groups[i].row["prompt"], (groups[i].fixed_seed,), height, width)
            for i in open_groups
        ]
        for i, prior in zip(open_groups, self.engine.sample_priors(asked), strict=True):
            priors[i] = prior
        return priors

    def window(self, step: int) -> range:
        """The SDE steps of this rollout: one window for all, so within each group too."""
        sde = self.config.sde
        draw = np.random.default_rng(derive_seed(self.config.seed, step, 1))
        start = int(draw.integers(sde.window_start_max + 1))
        return range(start, start + sde.window_size)

    def rollout(self, groups: Sequence[Group], step: int) -> list[Rollout]:
        return self.engine.rollout(self.requests(groups), self.window(step))

    def score(self, rollouts: Sequence[Rollout], model, with_kl: bool) -> Scored:
        """Log-probs of the rollouts' SDE steps; `model` is the wrapped policy."""
        logprobs, old, kls = [], [], []
        for rollout in rollouts:
            trajectory = rollout.latent_trajectory
            new, mean, std = self.engine.step_transitions(trajectory, model)
            logprobs.append(new)
            old.append(trajectory.logprobs.to(new.device))
            if with_kl:
                policy = module_of(self.engine.pipeline, self.name)
                with torch.no_grad(), adapter_disabled(policy):
                    _, mean_ref, _ = self.engine.step_transitions(trajectory)
                kls.append(step_kl(mean, mean_ref, std, new.shape[1]))
        kl = torch.cat(kls) if with_kl else None
        return Scored(torch.cat(logprobs), torch.cat(old), kl, None)


def select_samples(rollout: Rollout, index: Sequence[int]) -> Rollout:
    """Some samples of a rollout."""
    tokens, latents = rollout.token_trajectory, rollout.latent_trajectory
    return Rollout(
        request=rollout.request,
        images=[rollout.images[i] for i in index],
        prior_tokens=rollout.prior_tokens[list(index)],
        token_trajectory=tokens and tokens.select(index),
        latent_trajectory=latents and latents.select(index),
    )


STAGES = {"ar": ArStage, "decoder": DecoderStage}
