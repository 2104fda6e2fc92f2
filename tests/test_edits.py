"""Pictures from source pictures: parity with stock, one distribution, gradients, isolation."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.fsdp._common_utils import collect_grad_tensors
from transformers.models.glm_image.image_processing_glm_image import smart_resize

from duet.configs.errors import UserError
from duet.configs.schema import SamplingConfig, SdeConfig
from duet.inference import source_attention
from duet.inference.adapters import adapter_disabled, add_adapter
from duet.inference.decoding import TokenDecoder, TokenJob
from duet.inference.engine import Engine
from duet.inference.layout import Grid, Size, prompt_positions, upsample_prior
from duet.inference.model import load_pipeline
from duet.inference.parts import AR, DECODER
from duet.inference.request import Request
from duet.inference.samples import join
from duet.inference.sources import source_size
from duet.train.recompute import recompute_blocks
from duet.train.stages import DecoderStage
from duet.train.tiny.gaps import walk
from tests.conftest import MODEL, SIZE
from tests.stock import stock_inputs, stock_logits

EDIT = 'make the background blue and the word "HAT"'
BLEND = "the circle of the first on the second"


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Patches of any colour, so that no two places look alike."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


ONE = (picture(100, 130),)
TWO = (picture(64, 96, 1), picture(40, 150, 2))  # the second becomes 32 x 128
SOURCES = {
    "100 x 130": ONE,
    "257 x 511": (picture(257, 511),),
    "40 x 150": (picture(40, 150),),
    "two unequal": TWO,
}


@pytest.fixture(scope="module")
def tuned():
    """The tiny model with adapters that are not zero on both parts."""
    pipeline = load_pipeline(str(MODEL))
    for part in (AR, DECODER):
        module = part.module(pipeline)
        add_adapter(module, part, 4, 8)
        walk(module, 0.02)
    return pipeline


def engine_of(
    pipeline, guidance: float = 1.5, temperature: float = 1.0, noise: float = 0.8, **more
):
    sampling = SamplingConfig(64, 96, temperature, num_inference_steps=3, guidance_scale=guidance)
    return Engine(pipeline, sampling, SdeConfig(noise_level=noise), progress=False, **more)


def stock_pixels(engine: Engine, request: Request, prior: torch.Tensor) -> np.ndarray:
    """By `GlmImagePipeline`, which encodes the sources itself; the AR gives its tokens of them."""
    grids = [Size(s.height, s.width).grid for s in request.sources]
    inputs = stock_inputs(engine.pipeline.processor, request)
    ar, of_sources = engine.pipeline.vision_language_encoder, inputs["image_grid_thw"][:-1]
    features = ar.get_image_features(inputs["pixel_values"], of_sources).pooler_output
    tokens = ar.get_image_tokens(features).split([grid.count for grid in grids])
    pairs = zip(tokens, grids, strict=True)
    upsampled = [engine.pipeline._upsample_token_ids(t, g.height, g.width)[0] for t, g in pairs]
    return engine.pipeline(
        prompt=request.prompt,
        image=list(request.sources),
        height=request.size.height,
        width=request.size.width,
        num_inference_steps=engine.sampling.num_inference_steps,
        guidance_scale=engine.sampling.guidance_scale,
        prior_token_ids=upsample_prior(prior, request.size.grid),
        prior_token_image_ids=[torch.cat(upsampled)],
        source_image_grid_thw=[of_sources * torch.tensor([1, 2, 2])],
        latents=request.noise[None],
        output_type="np",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("name", SOURCES)
def test_a_picture_equals_the_stock_pipelines(tuned, name, guidance):
    engine = engine_of(tuned, guidance)
    asked = engine.ready(Request(EDIT, (1,), SIZE, SOURCES[name]))
    asked = replace(asked, noise=engine.initial_noise(3, SIZE))
    prior = torch.arange(6)[None]
    ours = engine.decode([asked], [prior])[0].pixels
    assert np.abs(ours - stock_pixels(engine, asked, prior)).max() < 1e-4
    text = replace(asked, sources=(), source_tokens=None)
    assert np.abs(ours - engine.decode([text], [prior])[0].pixels).max() > 0.05
    other = replace(asked, sources=asked.sources[::-1], source_tokens=asked.source_tokens[::-1])
    if len(asked.sources) > 1:  # their order: each has positions of its own, so the DiT sees none
        tokens = [engine.prompt(r).ids for r in (asked, other)]
        assert not torch.equal(*tokens)


def test_without_a_size_a_picture_takes_its_first_sources(tuned):
    engine = engine_of(tuned)
    [rollout] = engine.rollout([Request(EDIT, (1,), None, TWO[::-1])])
    assert rollout.images[0].size == (128, 32) and rollout.request.size == Size(32, 128)
    assert [s.size for s in rollout.request.sources] == [(128, 32), (96, 64)]


@pytest.mark.parametrize("bounds", [(32, 1024), (512, 2048)], ids=["tiny", "released"])
def test_every_source_finds_a_size_that_the_processor_leaves_as_it_is(bounds):
    """Near its bounds too, where rounding to whole tokens leads out of them again."""
    least, most = bounds
    processor = SimpleNamespace(
        patch_size=16, merge_size=1, size={"shortest_edge": least**2, "longest_edge": most**2}
    )
    sides = [16, 17, 31, 33, 40, 63, 100, 130, 257, 511, 513, 1000, 2047, 2500, 4095]
    found = set()
    for height in sides:
        for width in sides:
            if max(height, width) <= 4 * min(height, width):
                size = source_size(processor, Image.new("1", (width, height)))
                again = smart_resize(size.height, size.width, 16, least**2, most**2)
                assert [2 * side for side in again] == [size.height, size.width]
                found.add(size)
    assert len(found) > 30


@pytest.mark.parametrize("name", SOURCES)
def test_positions_are_those_that_the_model_works_out(tuned, name):
    engine = engine_of(tuned)
    asked = engine.ready(Request(EDIT, (1,), SIZE, SOURCES[name]))
    ours, inputs = engine.prompt(asked), stock_inputs(tuned.processor, asked)
    ar = tuned.vision_language_encoder
    positions, _ = ar.model.get_rope_index(inputs["input_ids"], inputs["image_grid_thw"])
    assert torch.equal(ours.positions, positions[:, 0])
    written = ar.model._cached_decode_position_ids[0, :, :-1]
    assert torch.equal(ours.all_positions[:, len(ours.ids) :], written)
    assert ours.grids == (Grid(2, 3),) and int(ours.ids.max()) < len(tuned.processor.tokenizer)
    placeholder = inputs["input_ids"][0] == tuned.processor.image_token_id
    assert torch.equal(ours.ids[placeholder], torch.cat(asked.source_tokens))
    assert torch.equal(ours.ids[~placeholder], inputs["input_ids"][0][~placeholder])


def test_text_goes_on_behind_a_grid_and_not_behind_its_tokens():
    is_source = torch.tensor([False, True, True, True, True, True, True, False, False])
    made = prompt_positions(is_source, [Grid(2, 3)])
    assert made.columns.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]
    assert made.end == 6


@pytest.mark.parametrize("name", ["100 x 130", "two unequal"])
def test_logits_are_stock_generations(tuned, name):
    """The same tokens forced upon both; ours decode beside a prompt of another length."""
    engine, ar = engine_of(tuned), tuned.vision_language_encoder
    asked = engine.ready(Request(EDIT, (1,), SIZE, SOURCES[name]))
    tokens = [7, 200, 31, 5, 90, 255]
    stock = stock_logits(ar, stock_inputs(tuned.processor, asked), tokens)
    other = engine.prompt(engine.ready(Request("a card", (1,), SIZE, ONE + TWO)))
    with torch.no_grad():
        decoder = TokenDecoder(ar, [TokenJob(engine.prompt(asked), 0), TokenJob(other, 0)])
        for n, token in enumerate(tokens):
            assert float((decoder.logits[0] - stock[n]).abs().max()) < 1e-4
            if n + 1 < len(tokens):
                decoder.step(torch.tensor([token, token]))


MIXED = [
    Request(EDIT, (1, 2), SIZE, ONE),
    Request("a card with 'CAT'", (3,), SIZE),
    Request(BLEND, (4, 5), SIZE, TWO),
    Request(EDIT, (6,), None, TWO[1:]),
    Request("a card", (7,), SIZE, ONE, prior=torch.arange(6)),
    Request(EDIT, (8,), SIZE, (picture(100, 130, 5),)),  # of the first one's kind
    Request(EDIT, (9,), SIZE, (picture(64, 64, 6),)),
]


@pytest.fixture(scope="module")
def mixed(tuned):
    """Text and edits, one source and two, source and target sizes, in one call."""
    return engine_of(tuned).rollout(MIXED, range(2))


def test_tokens_are_scored_by_the_distribution_that_sampled_them(tuned, mixed):
    """All in one forward, the edits' few tokens at the end."""
    trajectories = [r.tokens for r in mixed if r.tokens]
    with torch.no_grad():
        scores = engine_of(tuned).score_tokens(trajectories, tuned.vision_language_encoder)
    assert scores.logprobs.shape == scores.entropy.shape == (8, 253)
    rows = scores.logprobs.split([len(t) for t in trajectories])
    for own, trajectory in zip(rows, trajectories, strict=True):
        count = trajectory.prompt.count
        assert float((own[:, -count:] - trajectory.logprobs).abs().max()) < 1e-4
        assert not own[:, :-count].any()


@pytest.mark.parametrize("settings", [{"top_p": 0.7}, {"temperature": 0.0}])
def test_a_cut_distribution_of_unequal_lengths_has_finite_scores_and_gradients(tuned, settings):
    sampling = SamplingConfig(64, 96, num_inference_steps=1, **settings)
    engine = Engine(tuned, sampling, progress=False)
    trajectories = engine.sample_tokens(MIXED[:2])
    scores = engine.score_tokens(trajectories, tuned.vision_language_encoder)
    logprobs = scores.logprobs.detach()
    assert float((logprobs[:2, -6:] - trajectories[0].logprobs).abs().max()) < 1e-4
    assert float((logprobs[2:] - trajectories[1].logprobs).abs().max()) < 1e-4
    assert scores.entropy.isfinite().all()
    if settings.get("temperature") == 0.0:  # the best token is no function of the weights
        return
    trained = [p for p in tuned.vision_language_encoder.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(scores.logprobs.sum(), trained, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_steps_are_scored_by_the_transition_that_sampled_them(tuned, mixed):
    engine = engine_of(tuned)
    for rollout in mixed:
        scores = engine.score_steps(rollout.latents, tuned.transformer)
        assert float((scores.logprobs.detach() - rollout.latents.logprobs).abs().max()) < 1e-5
        for k in range(2):  # step by step: each makes the sources' keys and values again
            part = engine.score_steps(rollout.latents.steps(slice(k, k + 1)), tuned.transformer)
            assert torch.allclose(part.logprobs, scores.logprobs[:, k : k + 1], atol=1e-6)


def test_groups_of_one_kind_are_scored_together(tuned, mixed):
    """Each sample's steps by its own sources."""
    both = join([mixed[0].latents, mixed[5].latents])
    assert len({id(sources) for sources in both.given.sources}) == 2
    with torch.no_grad():
        scores = engine_of(tuned).score_steps(both, tuned.transformer)
    assert float((scores.logprobs - both.logprobs).abs().max()) < 1e-5


def test_the_reference_reads_sources_without_the_adapter(tuned, mixed, pipeline):
    """And scores follow the weights: nothing is kept of a scoring before."""
    engine, trajectory = engine_of(tuned), mixed[2].latents
    own = engine.score_steps(trajectory, tuned.transformer).logprobs.detach()
    with adapter_disabled(tuned.transformer):
        reference = engine.score_steps(trajectory, tuned.transformer).logprobs
    copied = deepcopy(trajectory)
    plain = engine_of(pipeline).score_steps(copied, pipeline.transformer).logprobs
    assert torch.allclose(reference, plain, atol=1e-6)
    assert float((own - reference).abs().max()) > 1e-4


def test_results_do_not_depend_on_the_batch(tuned, mixed):
    """Nor on its order: each is as by itself, in its own size."""
    alone = engine_of(tuned, batch_size=1)
    for asked, rollout in zip(MIXED, mixed, strict=True):
        for n, seed in enumerate(asked.seeds):
            [single] = alone.rollout([replace(asked, seeds=(seed,))], range(2))
            assert torch.equal(single.prior[0], rollout.prior[n])
            assert single.images[0].size == rollout.images[n].size
            latents = single.latents.latents[0], rollout.latents.latents[n]
            assert torch.allclose(*latents, atol=1e-4)
    assert mixed[0].images[0].size == (96, 64) and mixed[3].images[0].size == (128, 32)


def test_a_group_encodes_and_prefills_its_sources_once(tuned, monkeypatch):
    counts = {}

    def counted(owner, name, key=lambda kwargs: True):
        true = getattr(owner, name)

        def count(*args, **kwargs):
            counts[name] = counts.get(name, 0) + bool(key(kwargs))
            return true(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    counted(tuned.vision_language_encoder, "get_image_features")
    counted(tuned.vae, "encode")
    counted(tuned.vision_language_encoder, "forward", lambda k: k["input_ids"].shape[1] > 1)
    counted(tuned.transformer, "forward", lambda k: k["encoder_hidden_states"].shape[1] == 0)
    engine_of(tuned).rollout([Request(EDIT, tuple(range(8)), SIZE, TWO)], range(2))
    assert counts["get_image_features"] == counts["encode"] == 2, "one a source"
    assert counts["forward"] == 1 + 2, "one prefill, one pass of the DiT a source"


@pytest.mark.parametrize(
    ("kind", "settings"), [("ar", {"temperature": 0.0}), ("decoder", {"noise": 0.0})]
)
def test_what_is_no_policys_doing_is_equal_within_a_group(tuned, kind, settings):
    engine = engine_of(tuned, **settings)
    fixed = {"noise": engine.initial_noise(9, SIZE)}
    if kind == "decoder":
        fixed["prior"] = torch.arange(6)
    asked = Request(BLEND, (1, 2, 3), SIZE, TWO, **fixed)
    [rollout] = engine.rollout([asked], range(2) if kind == "decoder" else range(0))
    first, *others = [np.asarray(image) for image in rollout.images]
    assert all(np.array_equal(first, other) for other in others)
    [spread] = engine_of(tuned).rollout([asked], range(2) if kind == "decoder" else range(0))
    assert not np.array_equal(*(np.asarray(image) for image in spread.images[:2]))


def objective(engine: Engine, trajectories, module) -> torch.Tensor:
    """Of the velocities, weighted at random: a mean over latents would be near rounding."""
    total = 0.0
    for trajectory in trajectories:
        mean = engine.score_steps(trajectory, module).gaussian.mean
        weights = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        total = total + (mean * weights).sum()
    return total


def gradient(engine: Engine, trajectories, module, trained) -> list[torch.Tensor]:
    return torch.autograd.grad(objective(engine, trajectories, module), trained)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "computed again"])
def test_the_gradient_is_that_of_finite_differences(tuned, mixed, recomputed):
    """Through keys and values of the sources: without that way it is another one."""
    engine, trajectories = engine_of(tuned, guidance=1.0), [mixed[0].latents, mixed[2].latents]
    trajectories = [replace(t, how=replace(t.how, guidance_scale=1.0)) for t in trajectories]
    if recomputed:
        pipeline = load_pipeline(str(MODEL))
        module = pipeline.transformer
        add_adapter(module, DECODER, 4, 8)
        module.load_state_dict(tuned.transformer.state_dict())
        recompute_blocks(module, DECODER.block)
    else:
        module = tuned.transformer
    layers = dict(module.named_parameters())
    trained = [p for n, p in layers.items() if p.requires_grad and ("to_k" in n or "to_v" in n)]
    own = gradient(engine, trajectories, module, trained)
    norm = torch.sqrt(sum(g.square().sum() for g in own))
    values, step = [], 1e-3
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(trained, own, strict=True):
                p += sign * step * g / norm
            values.append(float(objective(engine, trajectories, module)))
            for p, g in zip(trained, own, strict=True):
                p -= sign * step * g / norm
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(norm), rel=0.01)
    with pytest.MonkeyPatch.context() as patch:
        true = source_attention.see

        def cut(dit, given):
            with torch.no_grad():
                return true(dit, given)

        patch.setattr("duet.inference.decoder.see", cut)
        other = gradient(engine, trajectories, module, trained)
    apart = torch.sqrt(sum((a - b).square().sum() for a, b in zip(own, other, strict=True)))
    assert float(apart / norm) > 0.1


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "computed again"])
def test_scoring_runs_as_many_forwards_as_it_counts_and_as_it_is_asked(small_run, recomputed):
    """Each in the graph by its output, and backward in the reverse order: an engine that keeps
    weights in parts gathers them by that. Those beyond its own change nothing. And FSDP2 finds no
    input in what a layer reads of sources: it would wait for it where there are none."""
    config = small_run("decoder")
    engine = Engine.of(load_pipeline(str(MODEL)), config, progress=False)
    stage, module = DecoderStage(engine, config), engine.pipeline.transformer
    add_adapter(module, DECODER, 4, 8)
    walk(module, 0.02)
    requests = [replace(r, size=SIZE, prior=torch.arange(6)) for r in MIXED]
    rollouts = engine.rollout(requests, range(2))
    if recomputed:
        recompute_blocks(module, DECODER.block)
    trained = [p for p in module.parameters() if p.requires_grad]
    ran: list[int] = []
    back: list[int] = []

    def begun(dit, args, output):
        output[0].register_hook(lambda _, place=len(ran): back.append(place))
        ran.append(len(ran))

    modes: set[str] = set()

    def read(block, args, kwargs):
        for given in (*args, *kwargs.values()):
            if getattr(given, "mode", None) in ("write", "read"):
                modes.add(given.mode)
                assert not collect_grad_tensors(given)

    module.register_forward_hook(begun)
    module.transformer_blocks[1].register_forward_pre_hook(read, with_kwargs=True)
    found = []
    for asked in (0, stage.forwards(rollouts), stage.forwards(rollouts) + 3):
        ran.clear()
        back.clear()
        logprobs = stage.score(rollouts, module, asked).logprobs
        gradients = torch.autograd.grad(logprobs.sum(), trained)
        assert len(ran) == max(asked, stage.forwards(rollouts)) and back == ran[::-1]
        found.append([logprobs, *gradients])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert modes == {"write", "read"}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((Image.new("RGB", (1, 1)),), "a source of 1 x 1 pixels: allowed are sides of at least 16"),
        ((Image.new("RGB", (10_000, 10)),), "10000 x 10 pixels: allowed"),
        ((Image.new("RGB", (320, 64)),), "the longer at most 4 times the shorter"),
        ((Image.new("F", (64, 64)),), "mode F has no known range"),
        (("/nowhere.png",), "'/nowhere.png' cannot be read: No such file"),
    ],
)
def test_a_source_that_cannot_be_served_is_refused(engine, sources, message):
    with pytest.raises(UserError, match=message):
        engine.rollout([Request(EDIT, (1,), SIZE, sources)])


def test_a_template_that_makes_text_of_a_source_is_refused(engine, monkeypatch):
    processor = engine.pipeline.processor
    bare = processor.chat_template.replace("<|image_start|>", "")
    monkeypatch.setattr(processor, "chat_template", bare)
    with pytest.raises(UserError, match="does not put a source between image start and end"):
        engine.rollout([Request(EDIT, (1,), SIZE, ONE)])
