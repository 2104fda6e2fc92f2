"""Sampler mathematics against independent formulas and numbers worked out by hand."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from duet.inference import flow


@pytest.mark.parametrize("kind", ["linear", "exponential"])
@pytest.mark.parametrize(("steps", "tokens"), [(6, 24), (50, 4096)])
def test_schedule_is_the_schedulers(kind, steps, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, base_shift=0.25, max_shift=0.75
    )
    ours = flow.make_schedule(steps, tokens, scheduler.config)
    mu = flow.shift_mu(tokens, scheduler.config)
    scheduler.set_timesteps(
        timesteps=ours.timesteps.numpy(), sigmas=ours.timesteps.numpy() / 1000, mu=mu
    )
    assert torch.allclose(ours.sigmas, scheduler.sigmas, atol=1e-6)
    assert torch.equal(ours.timesteps, scheduler.timesteps)


def test_measured_point_of_the_real_schedule():
    """1024 px, step 10 of 50: t = 800 stays unshifted, sigma = 0.929."""
    config = {
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
    }
    schedule = flow.make_schedule(50, 4096, config)
    assert float(schedule.timesteps[10]) == 800
    assert float(schedule.sigmas[10]) == pytest.approx(0.929, abs=5e-4)


def test_ode_step_follows_the_straight_line():
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    x = 0.2 * x0 + 0.8 * noise
    there = flow.ode_step(x, noise - x0, torch.tensor(0.8), torch.tensor(0.5))
    assert torch.allclose(there, 0.5 * x0 + 0.5 * noise, atol=1e-6)


def test_flow_sde_step_by_hand():
    """sigma .5 -> .4, a = .7, x = 1, v = 2: s = .7, mean = .951 + 2 * -.12450 / ..."""
    sigma, sigma_next, a, x, v = 0.5, 0.4, 0.7, 1.0, 2.0
    s, dt = a * math.sqrt(sigma / (1 - sigma)), sigma_next - sigma
    # the reverse SDE dx = [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dt + s dw, one Euler step
    drift = v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)
    made = flow.flow_sde_step(*map(torch.tensor, (x, v, sigma, sigma_next)), a)
    assert (
        float(made.mean)
        == pytest.approx(x + drift * dt, abs=1e-6)
        == pytest.approx(0.702, abs=1e-6)
    )
    assert float(made.std) == pytest.approx(0.7 * math.sqrt(0.1), abs=1e-6)


def test_flow_sde_first_step_uses_the_next_sigma():
    made = flow.flow_sde_step(*map(torch.tensor, (1.0, 1.0, 1.0, 0.8)), 0.5)
    assert float(made.std) == pytest.approx(0.5 * math.sqrt(1 / 0.2) * math.sqrt(0.2))


def test_cps_preserves_the_coefficients():
    """With the true velocity, x' has signal 1 - sigma' and total noise sigma'."""
    sigma, sigma_next, eta = torch.tensor(0.7), torch.tensor(0.5), 0.6
    x0, noise = torch.tensor(3.0), torch.tensor(1.0)
    made = flow.cps_step((1 - sigma) * x0 + sigma * noise, noise - x0, sigma, sigma_next, eta)
    kept = made.mean - (1 - sigma_next) * x0
    assert float(kept**2 + made.std**2) == pytest.approx(0.25, abs=1e-6)
    assert float(made.std) == pytest.approx(0.5 * math.sin(0.3 * math.pi), abs=1e-6)


@pytest.mark.parametrize("step", list(flow.SDE_STEPS.values()))
def test_without_noise_every_sde_is_the_ode(step):
    x, v = torch.randn(2, 4), torch.randn(2, 4)
    sigma, sigma_next = torch.tensor(0.6), torch.tensor(0.4)
    made = step(x, v, sigma, sigma_next, 0.0)
    assert torch.allclose(made.mean, flow.ode_step(x, v, sigma, sigma_next), atol=1e-6)
    assert float(made.std) == 0


def test_gaussians_against_torch_distributions():
    x, mean, ref = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    std = torch.tensor([0.3, 0.5, 2.0]).view(3, 1, 1, 1)
    expected = Normal(mean, std).log_prob(x).mean((1, 2, 3))
    assert torch.allclose(flow.Gaussian(mean, std).logprob(x), expected, atol=1e-5)
    expected = kl_divergence(Normal(mean, std), Normal(ref, std)).mean((1, 2, 3))
    assert torch.allclose(flow.Gaussian(mean, std).kl(flow.Gaussian(ref, std)), expected, atol=1e-5)
