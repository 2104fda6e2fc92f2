"""Flow matching as pure functions, in the papers' symbols.

x_sigma = (1 - sigma) x_0 + sigma * noise, v = noise - x_0, dt = sigma' - sigma < 0.
Flow-SDE: Flow-GRPO, arXiv 2505.05470. CPS: Coefficients-Preserving Sampling,
arXiv 2509.05952. Everything runs in float32.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duet.inference.samples import Samples


@dataclass(frozen=True)
class Schedule:
    """n denoising steps. The model sees `timesteps - 1`; `sigmas` are shifted, timesteps not."""

    timesteps: Tensor  # float32 [n], 1000 -> about 1
    sigmas: Tensor  # float32 [n + 1], 1 -> 0

    def __len__(self) -> int:
        return len(self.timesteps)


def shift_mu(image_tokens: int, config: dict) -> float:
    """diffusers' `calculate_shift` of GlmImagePipeline."""
    m = (image_tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return m * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)


def make_schedule(num_inference_steps: int, image_tokens: int, config: dict) -> Schedule:
    """The reference's timesteps and sigmas for `image_tokens` DiT tokens.

    `config` is a FlowMatchEulerDiscreteScheduler's; linear: s' = mu / (mu + 1/s - 1),
    exponential: s' = e^mu / (e^mu + 1/s - 1).
    """
    train_steps = config["num_train_timesteps"]
    timesteps = np.linspace(train_steps, 1.0, num_inference_steps + 1)[:-1]
    timesteps = timesteps.astype(np.int64).astype(np.float32)
    sigmas = timesteps / train_steps
    if config.get("use_dynamic_shifting"):
        mu = shift_mu(image_tokens, config)
        shift = math.exp(mu) if config.get("time_shift_type") == "exponential" else mu
    else:
        shift = config.get("shift", 1.0)
    sigmas = shift / (shift + (1 / sigmas - 1))
    sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    return Schedule(torch.from_numpy(timesteps), sigmas)


def ode_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x' = x + v dt."""
    return x + v * (sigma_next - sigma)


@dataclass(frozen=True)
class Gaussian(Samples):
    """An SDE step's N(mean, std^2), independent a latent dimension."""

    per_sample = ("mean", "std")

    mean: Tensor  # float32 [..., C, h, w]
    std: Tensor  # float32 [..., 1, 1, 1], in front the same dimensions or ones

    def draw(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def logprob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2), averaged over the latent dimensions: [..., C, h, w] -> [...]."""
        z = (x - self.mean) / self.std
        density = -0.5 * z**2 - torch.log(self.std) - 0.5 * math.log(2 * math.pi)
        return density.mean((-3, -2, -1))

    def kl(self, reference: "Gaussian") -> Tensor:
        """KL(self || reference) of one std: (mean - mean_ref)^2 / (2 s^2 |dt|), averaged."""
        return ((self.mean - reference.mean) ** 2 / (2 * self.std**2)).mean((-3, -2, -1))

    def unflatten(self, count: int) -> "Gaussian":
        """Leading [N * K] -> [N, K]."""
        return Gaussian(self.mean.unflatten(0, (-1, count)), self.std.unflatten(0, (-1, count)))


def flow_sde_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, a: float) -> Gaussian:
    """The Flow-SDE transition.

    s = a sqrt(sigma / (1 - sigma)), at sigma = 1 with the next sigma in the denominator;
    mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt;
    std = s sqrt(-dt).
    """
    dt = sigma_next - sigma
    s = a * torch.sqrt(sigma / (1 - torch.where(sigma >= 1, sigma_next, sigma)))
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return Gaussian(mean, s * torch.sqrt(-dt))


def cps_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> Gaussian:
    """The CPS transition.

    std = sigma' sin(eta pi / 2);
    mean = (1 - sigma') (x - sigma v) + sqrt(sigma'^2 - std^2) (x + (1 - sigma) v).
    """
    std = sigma_next * math.sin(eta * math.pi / 2)
    noise_weight = torch.sqrt((sigma_next**2 - std**2).clamp(min=0))
    mean = (1 - sigma_next) * (x - sigma * v) + noise_weight * (x + (1 - sigma) * v)
    return Gaussian(mean, std)


SDE_STEPS = {"flow_sde": flow_sde_step, "cps": cps_step}
