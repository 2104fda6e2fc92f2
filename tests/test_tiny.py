"""The tiny world and model: what is held out stays out, and the folder is what it claims."""

import json
import random

import numpy as np
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from transformers import (
    ByT5Tokenizer,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    T5EncoderModel,
)

from duet.configs.quotes import quoted_spans
from duet.configs.rows import load_rows
from duet.rewards.base import RewardInput
from duet.rewards.ocr import Ocr
from duet.train.tiny import ar_pretraining, dit_pretraining, pretrain, world
from duet.train.tiny.parts import size_mib
from duet.train.tiny.world import Card, Shape, colour_obedience, draw, sample_card, training_caption
from tests.conftest import MODEL, ROOT

PROMPTS = ROOT / "configs/tiny/prompts"


def named_pairs(caption: str) -> set[tuple[str, str]]:
    """(background, shape colour) pairs that the words of a caption tell."""
    words = caption.split('"')[0].replace(",", "").split()
    background = words[1] if words[2] == "card" else None
    shapes = [
        a
        for a, b in zip(words, words[1:], strict=False)
        if b in world.SHAPES and a in world.PALETTE
    ]
    return {(background, s) for s in shapes if background}


def test_the_stock_pipeline_opens_the_folder():
    pipeline = GlmImagePipeline.from_pretrained(MODEL)
    kinds = {
        "tokenizer": ByT5Tokenizer,
        "processor": GlmImageProcessor,
        "text_encoder": T5EncoderModel,
        "vision_language_encoder": GlmImageForConditionalGeneration,
        "vae": AutoencoderKL,
        "transformer": GlmImageTransformer2DModel,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    assert {k: type(v) for k, v in pipeline.components.items()} == kinds
    assert pipeline.vae.config.latent_channels == 16 and pipeline.vae_scale_factor == 8


def test_model_and_reward_models_take_at_most_16_mib():
    assert size_mib(MODEL) + size_mib(ROOT / "configs/tiny/judges") <= 16


def test_held_out_words_and_pairs_never_occur_in_a_training_prompt():
    rng = random.Random(1)
    captions = [r["prompt"] for r in load_rows(PROMPTS / "train.jsonl")]
    captions += [
        training_caption(sample_card(rng, any_pair=True), rng, noise=0.35) for _ in range(5000)
    ]
    words = {quoted_spans(c)[0] for c in captions}
    words |= {dit_pretraining.misspelt(w, rng, dit_pretraining.LETTER_NOISE) for w in sorted(words)}
    pairs = set().union(*(named_pairs(c) for c in captions))
    assert not any(world.is_held_out_word(w) for w in words)
    assert len(pairs) > 15 and not any(world.is_held_out_pair(*p) for p in pairs)
    evaluation = load_rows(PROMPTS / "eval.jsonl")
    for row in evaluation:
        told = named_pairs(row["prompt"])
        assert row["text"] not in words and told and not told & pairs


def test_prompt_files_show_what_they_say(rows):
    ocr = Ocr(limit_side_len=192, enlarge_to=192, threads=2)
    from PIL import Image

    items = [RewardInput(Image.open(r["image"]), r["prompt"], r) for r in rows[:24]]
    assert np.mean(ocr(items)) > 0.99
    assert all(colour_obedience(i.image, Card.from_row(i.row["card"])) == 1 for i in items)


def test_colour_obedience_counts_background_and_shapes():
    shape = Shape("triangle", "green", "on the right")
    card = Card("red", (shape,), "white", "CAT")
    picture = draw(card)
    assert colour_obedience(picture, card) == 1
    assert colour_obedience(picture, Card("blue", (shape,), "white", "CAT")) == 0.5
    other = Shape("triangle", "teal", "on the right")
    assert colour_obedience(picture, Card("blue", (other,), "white", "CAT")) == 0


def test_rows_round_trip():
    card = sample_card(random.Random(2))
    assert Card.from_row(json.loads(json.dumps(card.to_row()))) == card


def test_the_first_and_the_last_stage_of_the_model_run_on_fresh_parts(tmp_path, monkeypatch):
    """What a rebuild meets, and no shipped file: parts that nothing has been saved of."""
    monkeypatch.setattr(pretrain, "MODEL", tmp_path)
    pretrain.build_codebook(cards=80, styled=40, iterations=1)
    ar_pretraining.train_ar(tmp_path, cards=4, edits=8, steps=(2,) * 3)
    rebuilt = GlmImagePipeline.from_pretrained(tmp_path)
    config = rebuilt.vision_language_encoder.generation_config
    assert (config.do_sample, config.temperature, config.top_p) == (True, 1.0, 0.9)
