"""The engine: parity with the stock pipeline, one distribution, no batch effects."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from duet.configs.errors import UserError
from duet.configs.schema import SamplingConfig, SdeConfig
from duet.inference import autoregressive
from duet.inference.engine import Engine
from duet.inference.layout import (
    Grid,
    generation_grids,
    grid_positions,
    large_grid,
    prompt_positions,
    upsample_prior,
)
from duet.inference.rollout import Request

from tests.conftest import SAMPLING

CARD = 'a red card with the white word "CAT"'
LONG = 'a blue card with a red circle on the left and the black word "HELLO"'
TWO = 'a card with "CAT" and "PEN"'


def request(prompt=CARD, seeds=(1,), **fixed):
    return Request(prompt, tuple(seeds), 64, 96, **fixed)


def test_grids_and_positions_are_those_of_the_processor_and_the_model(pipeline):
    inputs = pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": p}]}] for p in (CARD, LONG)],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"target_h": 64, "target_w": 96, "padding": True, "return_tensors": "pt"},
    )
    preview, large = generation_grids(64, 96)
    assert inputs["image_grid_thw"][:2].tolist() == [
        [1, large.height, large.width],
        [1, preview.height, preview.width],
    ]
    model = pipeline.vision_language_encoder.model
    mask = inputs["attention_mask"]
    assert int(mask.sum(-1).min()) < mask.shape[1], "the batch must be padded"
    positions, _ = model.get_rope_index(
        inputs["input_ids"], inputs["image_grid_thw"], inputs["images_per_sample"], mask
    )
    ours, valid = prompt_positions(mask), mask.bool().expand(3, -1, -1)
    assert torch.equal(ours[valid], positions[valid])
    decode = model._cached_decode_position_ids
    made = grid_positions(mask.sum(-1), (preview, large))
    assert torch.equal(made, decode.permute(1, 0, 2)[..., : made.shape[-1]].to(made.dtype))


def test_upsampling_is_the_pipelines(pipeline):
    tokens = torch.arange(6)
    ours = upsample_prior(tokens[None], Grid(2, 3))
    assert torch.equal(ours, pipeline._upsample_token_ids(tokens, 2, 3))


@pytest.mark.parametrize("prompt", [CARD, TWO, "a plain red card"])
def test_picture_equals_the_stock_pipelines(engine, prompt):
    noise = engine.initial_noise(3, 64, 96)
    prior = engine.sample_priors([request(prompt)])[0]
    asked = request(prompt, prior_tokens=prior, noise=noise)
    difference = np.abs(engine.final_pixels(asked) - engine.reference_pixels(asked)).max()
    assert difference < 1e-4


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.7}, {"top_k": 5, "temperature": 0.8}])
def test_tokens_are_scored_by_the_distribution_that_sampled_them(pipeline, sampling):
    engine = Engine(
        pipeline, SamplingConfig(64, 96, num_inference_steps=2, **sampling), progress=False
    )
    rollouts = engine.rollout([request(seeds=(1, 2, 3)), request(LONG, seeds=(4, 5))])
    trajectories = [r.token_trajectory for r in rollouts]
    logprobs, entropy = engine.token_logprobs(trajectories)
    sampled = torch.cat([t.logprobs for t in trajectories])
    assert float((logprobs - sampled).abs().max()) < 1e-4
    assert float(sampled.min()) < -0.1, "some token must have been uncertain"
    assert logprobs.shape == entropy.shape == (5, 253)
    if sampling:
        kept = autoregressive.unpack_support(trajectories[0].support, 256, torch.device("cpu"))
        assert kept.gather(-1, trajectories[0].tokens[..., None]).all()
        assert kept.sum() < kept.numel() / 2


def test_a_full_rollout_is_scored_as_it_was_sampled(pipeline, rows):
    """16,192 tokens: the rare ones on which float32 attention kernels differ by 1e-4 are among them."""
    engine = Engine(
        pipeline, replace(SAMPLING, num_inference_steps=1), batch_size=64, progress=False
    )
    asked = [request(r["prompt"], range(8 * i, 8 * i + 8)) for i, r in enumerate(rows[:8])]
    trajectories = [r.token_trajectory for r in engine.rollout(asked)]
    logprobs = torch.cat([engine.token_logprobs([t])[0] for t in trajectories])
    difference = logprobs - torch.cat([t.logprobs for t in trajectories])
    assert logprobs.numel() == 16192
    assert float(difference.abs().max()) < 1e-5


def test_our_replay_equals_stock_generation_logits(pipeline):
    """Greedy tokens of transformers' own `generate` score as its own logits say."""
    model, engine = pipeline.vision_language_encoder, Engine(pipeline, SAMPLING, progress=False)
    trajectory = engine.rollout([request()])[0].token_trajectory
    content = [{"type": "text", "text": CARD}]
    inputs = pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"target_h": 64, "target_w": 96, "return_tensors": "pt"},
    )
    forced = iter(trajectory.tokens[0].tolist())

    def follow(_, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([next(forced)]), 0.0)

    output = model.generate(
        **inputs,
        max_new_tokens=253,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[follow],
    )
    logits = torch.stack(output.logits, 1)[..., :256].float()
    expected = logits.log_softmax(-1).gather(-1, trajectory.tokens[..., None])[..., 0]
    assert float((trajectory.logprobs - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_steps_are_scored_by_the_transition_that_sampled_them(pipeline, kind):
    engine = Engine(pipeline, SAMPLING, SdeConfig(kind=kind, noise_level=0.6), progress=False)
    rollouts = engine.rollout(
        [request(seeds=(1, 2)), request(LONG, seeds=(3,))], window=range(1, 4)
    )
    for rollout in rollouts:
        trajectory = rollout.latent_trajectory
        difference = engine.step_logprobs(trajectory) - trajectory.logprobs
        assert float(difference.abs().max()) < 1e-5
        assert trajectory.latents.shape == (len(rollout.seeds), 4, 16, 8, 12)


def test_results_do_not_depend_on_the_batch(pipeline):
    """Unequal prompts, unequal glyph lengths, any batch size: the same as single calls."""
    asked = [
        request(CARD, (1, 2)),
        request(LONG, (3,)),
        request(TWO, (4,)),
        request("a card", (5,)),
    ]
    together = Engine(pipeline, SAMPLING, batch_size=64, progress=False).rollout(asked, range(2))
    for one, rollout in zip(asked, together, strict=True):
        for n, seed in enumerate(one.seeds):
            alone = Engine(pipeline, SAMPLING, batch_size=1, progress=False).rollout(
                [request(one.prompt, (seed,))], range(2)
            )[0]
            assert torch.equal(alone.prior_tokens[0], rollout.prior_tokens[n])
            pictures = (np.asarray(i, dtype=int) for i in (alone.images[0], rollout.images[n]))
            assert np.abs(np.subtract(*pictures)).max() <= 1  # one grey level of rounding


def test_the_grid_is_decoded_by_construction(engine):
    trajectory = engine.rollout([request(seeds=range(8))])[0].token_trajectory
    preview, large = trajectory.grids
    assert (preview, large) == (Grid(13, 19), Grid(2, 3))
    assert trajectory.tokens.shape == (8, preview.count + large.count)
    assert int(trajectory.tokens.min()) >= 0 and int(trajectory.tokens.max()) < 256


def test_ids_outside_the_codebook_have_no_probability():
    logits = torch.zeros(1, 264)
    logits[:, 256:] = 100.0
    logprobs = autoregressive.policy_logprobs(logits, 256, 1.0)
    assert logprobs.shape == (1, 256)
    assert float(logprobs.exp().sum()) == pytest.approx(1)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert autoregressive.kept_support(logprobs, 0, 0.7)[0].tolist() == [True, True, False, False]
    assert autoregressive.kept_support(logprobs, 3, 0.99)[0].tolist() == [True, True, True, False]
    assert autoregressive.kept_support(logprobs, 0, 1.0) is None
    packed = autoregressive.pack_support(torch.tensor([[True, False, True]]))
    assert autoregressive.unpack_support(packed, 3, torch.device("cpu"))[0].tolist() == [
        True,
        False,
        True,
    ]


def test_noise_is_the_pipelines_for_the_same_seed(engine):
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(
        engine.initial_noise(11, 64, 96), torch.randn(16, 8, 12, generator=generator)
    )


def test_a_reference_picture_becomes_its_tokens(engine, rows):
    from PIL import Image

    tokens = engine.encode_prior(Image.open(rows[0]["image"]), 64, 96)
    assert tokens.shape == (6,) and len(set(tokens.tolist())) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 70}, "height = 70 is no positive multiple of 32: try 64"),
        ({"prompt": " "}, "is empty"),
        ({"seeds": ()}, "no seeds"),
        ({"source_images": ("picture",)}, "image-to-image is not served yet"),
        ({"prior_tokens": torch.zeros(5).long()}, r"allowed is \(6,\)"),
        ({"prior_tokens": torch.full((6,), 256)}, "ids from 0 to 255"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(engine, change, message):
    arguments = {"prompt": CARD, "seeds": (1,), "height": 64, "width": 96} | change
    with pytest.raises(UserError, match=message):
        engine.rollout([Request(**arguments)])


def test_large_grid_wants_multiples_of_32():
    with pytest.raises(ValueError, match="width = 0"):
        large_grid(32, 0)
