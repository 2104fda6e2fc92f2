"""Edits of the tiny world: what is held out stays out, and the measure says what pixels show."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from duet.configs.quotes import quoted_spans
from duet.configs.rows import load_rows
from duet.inference import pictures
from duet.rewards.base import RewardInput
from duet.train.tiny import dit_pretraining
from duet.train.tiny.edit_measure import measure_edit
from duet.train.tiny.edit_rows import kept_boxes, subject_boxes
from duet.train.tiny.edits import (
    BACKGROUND,
    KINDS,
    WORD,
    Edit,
    is_held_out_sources,
    mistaken,
    sample_edit,
)
from duet.train.tiny.latent_pools import Pool, edit_pools
from duet.train.tiny.obedience import EditKept, EditSuccess
from duet.train.tiny.parts import build_dit, build_glyph_encoder, build_tokenizer
from duet.train.tiny.scenes import Emblem, Scene, draw_scene, is_held_out_emblem
from duet.train.tiny.world import (
    Card,
    Shape,
    draw,
    is_held_out_pair,
    is_held_out_word,
    sample_card,
)
from tests.conftest import ROOT

PROMPTS = ROOT / "configs/tiny/prompts"
CIRCLE = Shape("circle", "blue", "on the left")
SQUARE = Shape("square", "green", "on the right")
CARD = Card("red", (CIRCLE, SQUARE), "white", "CHAP")
EMBLEM = Emblem(("green", "blue", "teal", "green"), "in the middle")


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    rng = random.Random(0)
    return [sample_edit(kind, rng, held_out) for kind in KINDS for held_out in (0, 1) for _ in "12"]


@pytest.fixture(scope="module")
def edit_rows():
    return {name: load_rows(PROMPTS / f"edits_{name}.jsonl") for name in ("train", "words", "eval")}


def scored(picture, edit: Edit):
    return measure_edit(picture, edit.wanted, edit.asked)


def wanted_of(row) -> Scene:
    return Scene.from_row(row["edit"]["wanted"])


def pairs(card: Card) -> list[tuple[str, str]]:
    return [(card.background, shape.colour) for shape in card.shapes]


def test_words_pairs_emblems_and_sources_of_evaluation_never_occur_in_training(edit_rows):
    rng = random.Random(1)
    pretraining = [sample_edit(kind, rng, any_pair=True) for kind in KINDS for _ in range(400)]
    prompts = [edit.prompt for edit in pretraining] + [
        row.prompt for name in ("train", "words") for row in edit_rows[name]
    ]
    assert not any(is_held_out_word(word) for p in prompts for word in quoted_spans(p))
    training = [sample_edit(kind, rng) for kind in KINDS for _ in range(100)]
    held_out = [sample_edit(kind, rng, held_out=True) for kind in KINDS for _ in range(100)]
    for edits, out in ((training, False), (held_out, True)):
        for edit in edits:
            assert is_held_out_word(edit.wanted.card.word) == out
            assert all(is_held_out_pair(*pair) == out for pair in pairs(edit.wanted.card))
    for edits, out in ((pretraining, False), (training, False), (held_out, True)):
        for edit in edits:
            assert edit.kind != "subjects" or is_held_out_sources(*edit.sources) == out
            assert edit.kind != "identity" or is_held_out_emblem(edit.wanted.emblem.cells) == out
    for name, out in (("train", False), ("words", False), ("eval", True)):
        for row in edit_rows[name]:
            wanted = wanted_of(row)
            assert is_held_out_word(wanted.card.word) == out == is_held_out_word(row["text"])
            assert all(is_held_out_pair(*pair) == out for pair in pairs(wanted.card))
            assert wanted.emblem is None or is_held_out_emblem(wanted.emblem.cells) == out


def test_the_rows_hold_as_many_of_each_kind_and_show_what_they_say(edit_rows):
    assert all(row["edit"]["asked"] == [WORD] for row in edit_rows["words"][1::2])
    counts = {"train": [40] * 4, "words": [60, 12, 12, 12], "eval": [24] * 4}
    for name, rows in edit_rows.items():
        assert [sum(row["kind"] == kind for row in rows) for kind in KINDS] == counts[name]
        for row in rows[:12]:
            shown = draw_scene(wanted_of(row))
            assert np.array_equal(np.asarray(shown), np.asarray(row.picture("image")))
            assert len(row.sources) == (2 if row["kind"] == "subjects" else 1)
            assert ("style" in row) == (row["kind"] == "style")
            item = RewardInput(row.picture("image"), row.prompt, row)
            assert EditSuccess()([item]) == EditKept()([item]) == [1.0]
            assert EditSuccess()([replace(item, image=Image.open(row.sources[0]))]) == [0.0]
    text = RewardInput(draw(CARD), CARD.prompt, {"card": CARD.to_row()})
    assert EditSuccess()([text]) == EditKept()([text]) == [None]


def test_what_is_to_stay_equals_the_first_source_pixel_by_pixel(edits):
    for edit in edits:
        before, after = (np.asarray(draw_scene(s)) for s in (edit.sources[0], edit.wanted))
        for left, top, right, bottom in kept_boxes(edit):
            inside = np.s_[top:bottom, left:right]
            assert np.abs(before[inside].astype(int) - after[inside]).max() <= 8
        same = [s for s in edit.sources if np.array_equal(np.asarray(draw_scene(s)), after)]
        assert not same
        boxes = subject_boxes(edit)
        assert len(boxes) == (len(edit.sources) if edit.kind in ("subjects", "identity") else 0)
    assert any(kept_boxes(edit) for edit in edits)


def test_the_measure_tells_the_wanted_result_from_sources_and_mistakes(edits):
    rng = random.Random(2)
    for edit in edits:
        wanted = scored(draw_scene(edit.wanted), edit)
        assert wanted.success == wanted.kept == 1
        assert not any(scored(draw_scene(s), edit).success for s in edit.sources)
        assert scored(draw_scene(mistaken(edit, rng)), edit).success == 0
        if edit.kind in ("edit", "style"):  # nothing was done, so all has stayed
            assert scored(draw_scene(edit.sources[0]), edit).kept == 1


def test_the_measure_says_one_through_the_vae(edits, pipeline):
    """Of plain cards: the shipped VAE need not draw a style."""
    plain = [e for e in edits if e.kind in ("edit", "subjects")]
    images = [draw_scene(e.wanted) for e in plain]
    latents = torch.stack([pictures.encode(pipeline.vae, image) for image in images])
    made = pictures.to_images(pictures.decode_pixels(pipeline.vae, latents))
    assert [scored(m, e).success for m, e in zip(made, plain, strict=True)] == [1.0] * len(plain)


def recoloured(shape: Shape) -> Shape:
    return replace(shape, colour="orange")


CHANGES = {
    "another ground": lambda s: replace(s, card=replace(s.card, background="purple")),
    "stripes": lambda s: replace(s, style="striped"),
    "outlines": lambda s: replace(s, style="outline"),
    "a shape's colour": lambda s: replace(
        s, card=replace(s.card, shapes=(recoloured(CIRCLE), SQUARE))
    ),
    "a shape's kind": lambda s: replace(
        s, card=replace(s.card, shapes=(replace(CIRCLE, kind="square"), SQUARE))
    ),
    "a shape's place": lambda s: replace(
        s, card=replace(s.card, shapes=(replace(CIRCLE, place="in the middle"), SQUARE))
    ),
    "a shape gone": lambda s: replace(s, card=replace(s.card, shapes=(SQUARE,))),
    "a shape more": lambda s: replace(
        s, card=replace(s.card, shapes=(*s.card.shapes, Shape("circle", "teal", "in the middle")))
    ),
    "a letter": lambda s: replace(s, card=replace(s.card, word="CHAT")),
    "a letter more": lambda s: replace(s, card=replace(s.card, word="CHAPE")),
    "a letter gone": lambda s: replace(s, card=replace(s.card, word="CHA")),
    "the word's colour": lambda s: replace(s, card=replace(s.card, text_colour="black")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_that_changes_is_seen(name):
    """Whatever was asked: here, nothing."""
    wanted = Scene(CARD)
    assert measure_edit(draw_scene(wanted), wanted, ()).kept == 1
    found = measure_edit(draw_scene(CHANGES[name](wanted)), wanted, ())
    assert found.success == 0 and 0.4 < found.kept < 1


def test_each_cell_of_an_emblem_counts_and_noise_is_no_card():
    wanted = Scene(replace(CARD, shapes=()), emblem=EMBLEM)
    asked = BACKGROUND, WORD, "on the left", "on the right"
    for cell in range(4):
        cells = [*EMBLEM.cells]
        cells[cell] = "orange"
        other = replace(wanted, emblem=Emblem(tuple(cells), EMBLEM.place))
        assert measure_edit(draw_scene(other), wanted, asked).kept == 0.75
    moved = replace(wanted, emblem=replace(EMBLEM, place="on the left"))
    assert measure_edit(draw_scene(moved), wanted, asked).success == 0
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    assert not any(measure_edit(Image.fromarray(noise), wanted, asked).regions.values())


def test_a_plain_scene_is_the_card_and_styles_differ():
    rng = random.Random(3)
    for _ in range(4):
        card = sample_card(rng)
        assert np.array_equal(np.asarray(draw(card)), np.asarray(draw_scene(Scene(card))))
    seen = {
        draw_scene(Scene(CARD, style)).tobytes()
        for style in ("plain", "outline", "striped", "night")
    }
    assert len(seen) == 4
    scene = Scene(CARD, "night", EMBLEM)
    assert Scene.from_row(scene.to_row()) == scene


def test_letters_of_a_word_are_tokens_of_their_own():
    tokenizer = build_tokenizer()
    for edit in (sample_edit(kind, random.Random(4)) for kind in KINDS):
        for word in quoted_spans(edit.prompt):
            around = len(tokenizer(edit.prompt.replace(word, "")).input_ids)
            assert len(tokenizer(edit.prompt).input_ids) >= around + len(word) - 1
    assert len(tokenizer('change the word to "HAT"').input_ids) <= 12


def test_the_dit_learns_of_sources_by_the_path_that_samples(pipeline):
    """A loss on edits reaches the sources' keys and values; words of no quote are not told."""
    rng = random.Random(5)
    pools = edit_pools(pipeline, rng, 12)
    assert {len(pool.sources[0]) for pool in pools} == {1, 2}
    assert all(word == "" or not is_held_out_word(word) for p in pools for word in p.words)
    two = next(pool for pool in pools if len(pool.sources[0]) == 2)
    assert set(two.words) == {""}
    dit, encoder = build_dit(), build_glyph_encoder()

    def loss(pool: Pool) -> torch.Tensor:
        torch.manual_seed(0)
        rng = random.Random(1)  # of the conditional branch
        tokenizer, noise = pipeline.tokenizer, dit_pretraining.EDIT_LETTER_NOISE
        return dit_pretraining.flow_loss(dit, encoder, tokenizer, pool, 2, 1.5, rng, noise)

    kept = loss(two)
    swapped = replace(two, sources=[sources[::-1] for sources in two.sources])
    assert torch.allclose(kept, loss(swapped), atol=1e-5)  # the DiT sees no order
    others = replace(two, sources=[*two.sources[1:], two.sources[0]])
    assert not torch.allclose(kept, loss(others), atol=1e-6)
