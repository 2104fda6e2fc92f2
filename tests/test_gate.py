"""The gate: the right engine passes in both precisions, every broken one is refused."""

import math

import pytest
import torch

from duet.configs.errors import UserError
from duet.inference import autoregressive, decoder, flow
from duet.inference import engine as engine_module
from duet.inference.engine import Engine
from duet.inference.request import Request
from duet.train import gate
from duet.train.checkpoint import complete_checkpoints
from duet.train.gap import Bounds, Gap
from duet.train.stages import sampled_logprobs
from duet.train.tiny.gaps import (
    BREAKAGES,
    PRECISIONS,
    make_bench,
    rescored,
    right,
    verdict,
    wrong_timestep,
)
from tests.conftest import SAMPLING, SIZE, train

CARD = 'a red card with "CAT"'
STAGES = list(BREAKAGES)


@pytest.fixture(scope="module")
def benches():
    made = {}

    def get(stage: str, precision: str):
        if (stage, precision) not in made:
            made[stage, precision] = make_bench(stage, precision, "rollout.prompts_per_step=3")
        return made[stage, precision]

    return get


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_right_engine_passes(benches, stage, precision):
    bench = benches(stage, precision)
    again = rescored(bench)
    assert verdict(bench, right, again) == "passes"
    gap = Gap.of(again, sampled_logprobs(bench.stage, bench.rollouts, again.device))
    assert gap.effective_sample_size > 0.98


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("stage", "breakage"), [(s, b) for s in STAGES for b in BREAKAGES[s]])
def test_a_broken_replay_is_refused(benches, stage, breakage, precision):
    bench = benches(stage, precision)
    told = verdict(bench, breakage, rescored(bench, breakage))
    assert told.startswith("refuses: the ratio is not 1") or breakage is wrong_timestep
    assert told.startswith("refuses")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_timestep_that_is_wrong_everywhere_is_refused(benches, precision):
    """Sampling and scoring agree then: only the stock pipeline tells, and not by its pixels alone."""
    bench = benches("decoder", precision)
    with wrong_timestep(bench), pytest.raises(UserError, match="timestep differs .* by 1 in"):
        gate.check_reference(bench.stage.engine, CARD, SIZE, bench.config.arithmetic.precision)


def test_the_worst_group_is_told_and_nan_as_nan(benches):
    bench = benches("ar", "float32")
    again = rescored(bench)
    size = len(bench.rollouts[0])
    again[size : 2 * size] += 0.01
    again[2 * size :] += 0.02
    worst = bench.rollouts[2].request.prompt
    with pytest.raises(UserError, match=f"the ratio is not 1: .*for prompt {worst!r}"):
        gate.check_gap(bench.stage, bench.rollouts, again, "float32")
    again[size, 3] = torch.nan
    named = bench.rollouts[1].request.prompt
    with pytest.raises(UserError, match=f"NaN or infinite for prompt {named!r}"):
        gate.check_gap(bench.stage, bench.rollouts, again, "float32")


def test_one_token_nats_apart_does_not_decide():
    """In low precision a rare token may part by nats, and the policy be the same."""
    sampler = -torch.rand(2000, dtype=torch.float64)
    trainer = sampler + 0.003 * torch.randn(2000, dtype=torch.float64)
    trainer[7] += 4
    gap = Gap.of(trainer, sampler)
    assert gap.max > 3.9 and abs(gap.mean_ratio - 1) < 1e-3 and abs(gap.sharpness) < 2e-3


def test_a_small_groups_means_may_be_wider():
    """506 tokens instead of 2,024: twice as wide, and no wider."""
    bounds = Bounds(mean=1.0, p99=1.0)
    sampler = -torch.rand(506, dtype=torch.float64)
    ratios = {factor: Gap.of(sampler + factor * 0.006, sampler) for factor in (1.8, 2.2)}
    assert not bounds.broken(ratios[1.8]) and bounds.broken(ratios[2.2])
    whole = -torch.rand(4048, dtype=torch.float64)
    assert bounds.broken(Gap.of(whole + 1.1 * 0.006, whole)), "more tokens: no narrower either"
    assert not bounds.broken(Gap.of(whole + 0.9 * 0.006, whole))


def test_the_figures_of_a_gap_by_hand():
    trainer, sampler = torch.tensor([0.5, 0.3]).log(), torch.tensor([0.4, 0.4]).log()
    gap = Gap.of(trainer, sampler)
    ratios = torch.tensor([1.25, 0.75])
    assert gap.max == pytest.approx(float(ratios.log().abs().max()))
    assert gap.mean == pytest.approx(float(ratios.log().abs().mean()))
    assert gap.effective_sample_size == pytest.approx(4 / (2 * (1.25**2 + 0.75**2)))
    line = torch.linspace(-3, -1, 200)
    assert Gap.of(2 * line, line).sharpness == pytest.approx((4 - 1) / (2 * 1.5**2), rel=1e-5)
    assert Gap.of(line + 0.1, line).mean_ratio == pytest.approx(math.exp(0.1))


def test_an_unshifted_schedule_is_refused(engine, monkeypatch):
    gate.check_schedule(engine, SIZE)
    monkeypatch.setattr(engine_module, "make_schedule", unshifted)
    with pytest.raises(UserError, match="refuses to start: the schedule's sigmas"):
        gate.check_schedule(engine, SIZE)


def test_an_engine_that_is_not_the_reference_is_refused(engine, monkeypatch):
    gate.check_reference(engine, CARD, SIZE, "float32")
    true = decoder.velocity
    with monkeypatch.context() as broken, pytest.raises(UserError, match="runs the DiT 6 times"):
        broken.setattr(decoder, "velocity", lambda d, x, t, g, s: true(d, x, t, g, 1.0))
        gate.check_reference(engine, CARD, SIZE, "float32")
    with monkeypatch.context() as broken, pytest.raises(UserError, match="picture differs from"):
        broken.setattr(decoder, "velocity", lambda d, x, t, g, s: true(d, x, t, g, 1.1 * s))
        gate.check_reference(engine, CARD, SIZE, "float32")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_mean_alone_refuses(benches, stage, precision):
    """Differences of both signs, larger than rounding: ratio and sharpness do not tell."""
    bounds = benches(stage, precision).stage.bounds(precision)
    sampler = -10 * torch.rand(4000, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(2000)
    assert not bounds.broken(Gap.of(sampler + 0.5 * bounds.mean * signs, sampler))
    told = bounds.broken(Gap.of(sampler + 2 * bounds.mean * signs, sampler))
    assert [figure.split()[0] for figure in told] == ["mean"]
    assert (
        bounds.mean
        <= {
            ("ar", "float32"): 2.1e-5,
            ("ar", "bfloat16"): 2.1e-2,
            ("decoder", "float32"): 1e-6,
            ("decoder", "bfloat16"): 1.5e-4,
        }[stage, precision]
    )


def test_in_mixed_precision_of_float32_weights_the_dit_is_told_what_stock_tells(
    pipeline, monkeypatch
):
    engine = Engine(pipeline, SAMPLING, autocast=torch.bfloat16, progress=False)
    given = engine.conditions(Request(CARD, (1,), SIZE), torch.zeros(1, 6).long())
    assert given.glyphs.dtype == given.null_glyphs.dtype == pipeline.transformer.dtype
    gate.check_reference(engine, CARD, SIZE, "bfloat16")
    true = decoder.velocity
    monkeypatch.setattr(decoder, "velocity", lambda d, x, t, g, s: true(d, x, t, g, 1.1 * s))
    with pytest.raises(UserError, match="picture differs from GlmImagePipeline's by 0.0"):
        gate.check_reference(engine, CARD, SIZE, "bfloat16")


def unshifted(steps, tokens, config):
    made = flow.make_schedule(steps, tokens, config)
    return flow.Schedule(made.timesteps, torch.cat([made.timesteps / 1000, torch.zeros(1)]))


def everything_kept(packed, codebook_size):
    return torch.ones(*packed.shape[:-1], codebook_size).bool()


def guided_too_far(true):
    return lambda dit, x, t, given, scale: true(dit, x, t, given, 1.1 * scale)


@pytest.mark.parametrize(
    ("place", "name", "broken", "message"),
    [
        (autoregressive, "unpack_support", everything_kept, "the ratio is not 1"),
        (engine_module, "make_schedule", unshifted, "the schedule's sigmas"),
        (decoder, "velocity", guided_too_far(decoder.velocity), "the engine's picture differs"),
    ],
)
def test_a_run_with_a_broken_engine_does_not_start(
    small_run, tmp_path, monkeypatch, place, name, broken, message
):
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(UserError, match=f"refuses to start: {message}"):
        train(small_run("ar"))
    assert not complete_checkpoints(tmp_path / "run")
