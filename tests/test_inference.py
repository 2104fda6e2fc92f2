"""The engine: parity with the stock pipeline, one distribution, no batch effects."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from duet.configs.errors import UserError
from duet.configs.policy_schema import SamplingConfig, SdeConfig
from duet.inference import autoregressive
from duet.inference.engine import Engine
from duet.inference.layout import Grid, Size, grid_positions, upsample_prior
from duet.inference.pictures import encode_prior
from duet.inference.prompt import PromptBatch, text_grids, text_prompt
from duet.inference.rollout import Request
from tests.conftest import SAMPLING, SIZE
from tests.stock import stock_inputs, stock_logits

CARD = 'a red card with the white word "CAT"'
LONG = 'a blue card with a red circle on the left and the black word "HELLO"'
TWO = 'a card with "CAT" and "PEN"'


def request(prompt=CARD, seeds=(1,), **fixed):
    return Request(prompt, tuple(seeds), SIZE, **fixed)


def logprobs_of(engine, trajectories):
    return engine.score_tokens(trajectories, engine.pipeline.vision_language_encoder).logprobs


def test_grids_and_positions_are_those_of_the_processor_and_the_model(pipeline):
    inputs = pipeline.processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": p}]}] for p in (CARD, LONG)],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"target_h": 64, "target_w": 96, "padding": True, "return_tensors": "pt"},
    )
    prompts = [text_prompt(pipeline.processor, request(p)) for p in (CARD, LONG)]
    preview, large = prompts[0].grids
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
    pad_id = pipeline.vision_language_encoder.config.text_config.pad_token_id
    batch = PromptBatch.of(prompts, pad_id, torch.device("cpu"))
    assert torch.equal(batch.ids, inputs["input_ids"]) and torch.equal(batch.mask, mask)
    length, valid = mask.shape[1], mask.bool().expand(3, -1, -1)
    assert torch.equal(batch.positions[..., :length][valid], positions[valid])
    decode = model._cached_decode_position_ids.permute(1, 0, 2)
    written = batch.positions[..., length:]
    assert torch.equal(written, decode[..., : written.shape[-1]].to(written.dtype))
    assert torch.equal(written[:, 0] - prompts[0].start, grid_positions(prompts[0].grids))


def test_prompts_of_one_length_need_no_mask(pipeline):
    """A mask takes sdpa's slower kernels, and on a GPU asks the device whether it hides anything."""
    prompt = text_prompt(pipeline.processor, request(CARD))
    batch = PromptBatch.of([prompt, prompt], 0, torch.device("cpu"))
    assert batch.mask is None and batch.seen(5) is None


def test_upsampling_is_the_pipelines(pipeline):
    tokens = torch.arange(6)
    ours = upsample_prior(tokens[None], Grid(2, 3))
    assert torch.equal(ours, pipeline._upsample_token_ids(tokens, 2, 3))


@pytest.mark.parametrize("prompt", [CARD, TWO, "a plain red card"])
def test_picture_equals_the_stock_pipelines(engine, prompt):
    noise = engine.initial_noise(3, SIZE)
    prior = engine.priors([request(prompt)])[0]
    asked = request(prompt, prior=prior[0], noise=noise)
    stock = engine.pipeline(
        prompt=prompt,
        height=64,
        width=96,
        num_inference_steps=SAMPLING.num_inference_steps,
        guidance_scale=SAMPLING.guidance_scale,
        prior_token_ids=upsample_prior(prior, SIZE.grid),
        latents=noise[None],
        output_type="np",
    ).images
    assert np.abs(engine.decode([asked], [prior])[0].pixels - stock).max() < 1e-4


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.7}, {"top_k": 5, "temperature": 0.8}])
def test_tokens_are_scored_by_the_distribution_that_sampled_them(pipeline, sampling):
    engine = Engine(
        pipeline, SamplingConfig(64, 96, num_inference_steps=2, **sampling), progress=False
    )
    rollouts = engine.rollout([request(seeds=(1, 2, 3)), request(LONG, seeds=(4, 5))])
    trajectories = [r.tokens for r in rollouts]
    scores = engine.score_tokens(trajectories, pipeline.vision_language_encoder)
    sampled = torch.cat([t.logprobs for t in trajectories])
    assert float((scores.logprobs - sampled).abs().max()) < 1e-4
    assert float(sampled.min()) < -0.1, "some token must have been uncertain"
    assert scores.logprobs.shape == scores.entropy.shape == (5, 253)
    if sampling:
        kept = autoregressive.unpack_support(trajectories[0].support, engine.codebook_size)
        assert kept.gather(-1, trajectories[0].tokens[..., None]).all()
        assert kept.sum() < kept.numel() / 2


def test_our_replay_equals_stock_generation_logits(pipeline):
    """Greedy tokens of transformers' own `generate` score as its own logits say."""
    model, engine = pipeline.vision_language_encoder, Engine(pipeline, SAMPLING, progress=False)
    trajectory = engine.rollout([request()])[0].tokens
    inputs = stock_inputs(pipeline.processor, request())
    logits = stock_logits(model, inputs, trajectory.tokens[0].tolist())[
        None, :, : engine.codebook_size
    ].float()
    expected = logits.log_softmax(-1).gather(-1, trajectory.tokens[..., None])[..., 0]
    assert float((trajectory.logprobs - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_steps_are_scored_by_the_transition_that_sampled_them(pipeline, kind):
    engine = Engine(pipeline, SAMPLING, SdeConfig(kind=kind, noise_level=0.6), progress=False)
    rollouts = engine.rollout(
        [request(seeds=(1, 2)), request(LONG, seeds=(3,))], window=range(1, 4)
    )
    for rollout in rollouts:
        trajectory = rollout.latents
        scores = engine.score_steps(trajectory, pipeline.transformer)
        difference = scores.logprobs - trajectory.logprobs
        assert float(difference.abs().max()) < 1e-5
        assert trajectory.latents.shape == (len(rollout), 4, 16, 8, 12)


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
            assert torch.equal(alone.prior[0], rollout.prior[n])
            pictures = (np.asarray(i, dtype=int) for i in (alone.images[0], rollout.images[n]))
            assert np.abs(np.subtract(*pictures)).max() <= 1  # one grey level of rounding


def test_one_call_may_mix_sizes_and_given_priors(pipeline):
    """Two sizes and a request with its prior, interleaved: each as by itself, in order."""
    other = Size(96, 64)
    asked = [
        request(CARD, (1, 2)),
        Request(LONG, (3,), other),
        request(TWO, (4,), prior=torch.arange(6)),
        Request(CARD, (5, 6), other),
        request(LONG, (7,)),
    ]
    engine = Engine(pipeline, SAMPLING, batch_size=3, progress=False)
    together = engine.rollout(asked, range(1, 3))
    for one, rollout in zip(asked, together, strict=True):
        alone = engine.rollout([one], range(1, 3))[0]
        assert rollout.request is one and len(rollout) == len(one)
        assert rollout.images[0].size == (one.size.width, one.size.height)
        assert torch.equal(rollout.prior, alone.prior)
        assert (rollout.tokens is None) == (one.prior is not None)
        assert torch.allclose(rollout.latents.latents, alone.latents.latents, atol=1e-4)
    assert together[1].prior.shape == (1, 6) and together[1].tokens.prompt.grids[1] == Grid(3, 2)


def test_the_batch_cap_holds_for_the_ar_too(pipeline, monkeypatch):
    """A group larger than the cap is split, and comes out in one piece."""
    sizes = []
    forward = type(pipeline.vision_language_encoder).forward

    def count(self, *args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.vision_language_encoder), "forward", count)
    seeds = range(7)
    engine = Engine(
        pipeline, replace(SAMPLING, num_inference_steps=1), batch_size=3, progress=False
    )
    rollout = engine.rollout([request(seeds=seeds)])[0]
    assert max(sizes) == 3 and min(sizes[1:]) >= 1 and len(rollout) == 7
    assert sizes.count(1) == 3, "each of three batches prefills the prompt once"
    assert sizes.count(3) == 252 and sizes.count(2) == 504, "7 = 3 + 2 + 2: none is left with one"


def test_the_grid_is_decoded_by_construction(engine):
    trajectory = engine.rollout([request(seeds=range(8))])[0].tokens
    preview, large = trajectory.prompt.grids
    assert (preview, large) == (Grid(13, 19), Grid(2, 3))
    assert trajectory.tokens.shape == (8, preview.count + large.count)
    assert int(trajectory.tokens.min()) >= 0 and int(trajectory.tokens.max()) < engine.codebook_size


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


@pytest.mark.parametrize("size", [3, 16, 257])
def test_a_support_survives_packing(size):
    support = torch.rand(2, 5, size) < 0.3
    packed = autoregressive.pack_support(support)
    assert packed.shape == (2, 5, -(-size // 8)) and packed.dtype == torch.uint8
    assert torch.equal(autoregressive.unpack_support(packed, size), support)


def test_noise_is_the_pipelines_for_the_same_seed(engine):
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(engine.initial_noise(11, SIZE), torch.randn(16, 8, 12, generator=generator))


def test_a_reference_picture_becomes_its_tokens(engine, rows):
    from PIL import Image

    tokens = encode_prior(engine.pipeline, Image.open(rows[0]["image"]), SIZE)
    assert tokens.shape == (6,) and len(set(tokens.tolist())) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "is empty"),
        ({"seeds": ()}, "no seeds"),
        ({"size": None}, "no size and no source"),
        ({"prior": torch.zeros(5).long()}, r"allowed is \(6,\)"),
        ({"prior": torch.full((6,), 10_000)}, r"ids from 0 to \d+$"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(engine, change, message):
    arguments = {"prompt": CARD, "seeds": (1,), "size": SIZE} | change
    with pytest.raises(UserError, match=message):
        engine.rollout([Request(**arguments)])


@pytest.mark.parametrize(
    ("sides", "message"),
    [((70, 96), "height = 70 is no positive multiple of 32: try 64"), ((32, 0), "width = 0")],
)
def test_a_size_is_of_whole_tokens(sides, message):
    with pytest.raises(UserError, match=message):
        Size(*sides)


def test_the_preview_keeps_the_aspect_ratio():
    assert text_grids(Size(64, 96)) == (Grid(13, 19), Grid(2, 3))
    assert text_grids(Size(1024, 1024)) == (Grid(16, 16), Grid(32, 32))


def test_every_forward_runs_in_the_engines_autocast(pipeline):
    parts = {
        "ar": pipeline.vision_language_encoder,
        "dit": pipeline.transformer,
        "glyphs": pipeline.text_encoder,
        "vae": pipeline.vae.decoder,
    }
    seen = {}

    def listener(name):
        def listen(*_):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))

        return listen

    with ExitStack() as stack:
        for name, part in parts.items():
            stack.callback(part.register_forward_pre_hook(listener(name)).remove)
        engine = Engine(pipeline, SAMPLING, autocast=torch.bfloat16, progress=False)
        assert engine.null_glyphs.shape[0] == 1 and seen == {"glyphs": {True}}
        rollout = engine.rollout([Request(CARD, (1,), SIZE)], range(1, 2))[0]
        assert seen == {name: {True} for name in parts}
        seen.clear()
        engine.score_tokens([rollout.tokens], parts["ar"])
        engine.score_steps(rollout.latents, parts["dit"])
        assert seen == {"ar": {True}, "dit": {True}}


def test_the_cut_is_stock_generations():
    """Temperature first, then top-k, then top-p, as transformers has it."""
    logits = 3 * torch.randn(16, 256)
    stock = LogitsProcessorList(
        [TemperatureLogitsWarper(0.5), TopKLogitsWarper(40), TopPLogitsWarper(0.9)]
    )
    sampling = SamplingConfig(64, 96, temperature=0.5, top_k=40, top_p=0.9)
    made = autoregressive.draw(logits, torch.rand(16).double(), 256, sampling)
    kept = autoregressive.unpack_support(made.support, 256)
    assert torch.equal(kept, stock(None, logits).isfinite())


def test_the_grid_written_last_reaches_the_dit(engine):
    [rollout] = engine.rollout([Request(CARD, (1, 2), SIZE)])
    assert torch.equal(rollout.prior, rollout.tokens.tokens[:, -SIZE.grid.count :])
