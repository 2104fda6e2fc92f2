"""Rewards for edits: what must score higher scores higher, on drawn cards by the tiny judges."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from duet.configs.row import Row
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput
from duet.rewards.clip import Clip
from duet.rewards.colour import lab
from duet.rewards.registry import load_reward
from duet.train.tiny.specimens import CARD, noisy
from duet.train.tiny.world import Card, Shape, draw
from tests.conftest import CLIP
from tests.edit_pictures import (
    STYLES,
    box_at,
    card,
    emblem,
    plain,
    put,
    shuffled,
)
from tests.pictures import CLEAN, PICTURES

TINY = {"model": CLIP, "pretrained": None}
EDITS = ("source_consistency", "identity", "style", "edit_direction")


@pytest.fixture(scope="module")
def scores():
    """A function: what a reward says of pictures, all of one row."""

    def score_all(name, pictures, view="full", **row):
        reward = load_reward(RewardConfig(name, args=TINY, view=view))
        return reward([RewardInput(p, "an edit", Row(row)) for p in pictures])

    return score_all


@pytest.mark.parametrize(
    ("colour", "expected"),
    [("white", (100, 0, 0)), ("black", (0, 0, 0)), ("red", (53.24, 80.09, 67.20)), ("blue", (32.30, 79.19, -107.86)), ("#777777", (50.03, 0, 0))],
)  # fmt: skip
def test_colours_are_those_of_the_cie(colour, expected):
    """Values as Lindbloom's calculator and scikit-image give them."""
    found = lab(Image.new("RGB", (1, 1), ImageColor.getrgb(colour)))
    assert found[0, 0] == pytest.approx(expected, abs=0.02)


# --- source_consistency

UPPER = [[0, 0, 96, 32]]  # the shape's half of a card; the word stands in the other


def test_what_must_stay_is_compared_there_alone(scores):
    """A change outside of it is not seen, however large; one inside is, however small."""
    outside = [PICTURES["wrong word"], PICTURES["missing word"], put(CLEAN, card(5).crop((0, 32, 96, 64)), 0, 32)]  # fmt: skip
    assert scores("source_consistency", outside, source=CLEAN, keep=UPPER) == [1, 1, 1]
    dot = put(CLEAN, Image.new("RGB", (2, 2), "white"), 60, 10)
    shade = put(CLEAN, Image.new("RGB", (30, 8), (205, 44, 44)), 60, 10)
    few, faint, colour = scores("source_consistency", [dot, shade, PICTURES["wrong shape colour"]], source=CLEAN, keep=UPPER)  # fmt: skip
    assert 0.8 < few < 0.99 and few < faint < 0.999 and colour < few - 0.1


def test_what_must_stay_falls_with_every_step_of_damage(scores):
    steps = scores("source_consistency", [noisy(CLEAN, n) for n in (0, 5, 15, 60)], source=CLEAN, keep=UPPER)  # fmt: skip
    assert steps[0] == 1 and steps == sorted(steps, reverse=True) and steps[-1] < 0.5


def test_a_mask_and_its_boxes_are_one(scores):
    mask = Image.new("RGB", CLEAN.size)
    mask.paste("white", (0, 0, 96, 20))
    mask.paste("white", (40, 10, 70, 32))
    boxes = [[0, 0, 96, 20], [40, 10, 70, 32]]
    pictures = [PICTURES["wrong shape colour"], card(3), noisy(CLEAN, 20)]
    by_mask, by_boxes = (
        scores("source_consistency", pictures, sources=[CLEAN], keep=keep) for keep in (mask, boxes)
    )
    assert by_mask == by_boxes and len(set(by_mask)) == 3


def test_keep_follows_its_source_to_the_runs_size(scores):
    """A source of twice the size with a border that is cropped away; boxes in its own pixels."""
    source = Image.new("RGB", (232, 128), "black")
    source.paste(draw(CARD, scale=2.0), (20, 0))
    keep = [[20, 0, 212, 64]]
    edge = put(CLEAN, Image.new("RGB", (4, 20), "white"), 0, 5)
    pictures = [PICTURES["wrong word"], CLEAN, edge, PICTURES["wrong shape colour"]]
    word, same, *changed = scores("source_consistency", pictures, sources=[source], keep=keep)
    assert word == same > 0.8 and max(changed) < same - 0.2


@pytest.mark.parametrize("view", ["low", "high"])
def test_keep_is_seen_through_a_view(scores, view):
    """In `low` a pixel is compared where all of its block must stay."""
    keep = [[0, 0, 96, 29]]
    below = put(CLEAN, Image.new("RGB", (96, 35), "teal"), 0, 29)
    assert scores("source_consistency", [CLEAN, below], view, source=CLEAN, keep=keep) == [1, 1]
    [recoloured] = scores("source_consistency", [PICTURES["wrong shape colour"]], view, source=CLEAN, keep=keep)  # fmt: skip
    assert recoloured < 0.9
    if view == "low":
        narrow = [[3, 3, 9, 9]]
        assert scores("source_consistency", [below], view, source=CLEAN, keep=narrow) == [None]


def joined() -> tuple[Image.Image, Image.Image, Image.Image]:
    """Two sources, and the shape of the first over the word of the second."""
    shape = Shape("circle", "blue", "on the left")
    first = draw(Card("red", (shape,), "white", "CHAP"))
    second = draw(Card("green", (), "black", "NOTE"))
    return first, second, draw(Card("green", (shape,), "black", "NOTE"))


def test_of_several_sources_a_copy_of_one_is_not_best(scores):
    first, second, both = joined()
    united, one, other, noise = scores(
        "source_consistency", [both, first, second, PICTURES["pure noise"]], sources=[first, second]
    )
    assert united > max(one, other) > noise
    assert scores("source_consistency", [both], sources=[first])[0] > united - 1e-6


def test_the_first_of_several_sources_is_the_one_that_a_row_of_one_has(scores):
    pictures = [PICTURES[n] for n in ("clean", "wrong word", "wrong background colour")]
    assert scores("source_consistency", pictures, source=CLEAN) == scores(
        "source_consistency", pictures, sources=[CLEAN]
    )


# --- identity

A, B = ("purple", "teal", "orange", "orange"), ("green", "orange", "blue", "green")
SWAPPED = (A[1], A[0], *A[2:])  # to an embedding nearly the same


def carried(cells: tuple[str, ...], *places: tuple[int, int]) -> Image.Image:
    picture = plain()
    for place in places:
        picture = put(picture, emblem(*cells), *place)
    return picture


def test_the_right_emblem_wherever_it_stands(scores):
    """The source is another card; places are those of no grid."""
    source = put(card(11), emblem(*A), 40, 5)
    right = [carried(A, place) for place in ((5, 5), (37, 5), (61, 23))]
    larger = put(plain(), emblem(*A).resize((30, 30)), 33, 1)
    wrong = [carried(cells, (5, 5)) for cells in (B, SWAPPED)] + [plain()]
    found = scores("identity", [*right, larger, *wrong], source=source, subjects=[box_at(40, 5)])
    assert min(found[:4]) > 0.9 and max(found[:4]) - min(found[:4]) < 0.1
    assert max(found[4:]) < min(found[:4]) - 0.1
    assert found[6] < 0.7  # no emblem at all


def test_a_second_subject_may_not_be_forgotten(scores):
    sources = [put(plain("teal"), emblem(*A), 5, 5), put(plain("purple"), emblem(*B), 69, 5)]
    both = put(carried(A, (5, 5)), emblem(*B), 69, 5)
    twice = carried(A, (5, 5), (69, 5))
    boxes = [box_at(5, 5), box_at(69, 5)]
    found = scores("identity", [both, twice, carried(B, (69, 5))], sources=sources, subjects=boxes)
    assert found[0] > 0.9 and max(found[1:]) < found[0] - 0.1
    [first] = scores("identity", [twice], sources=sources, subjects=[boxes[0], None])
    assert first > 0.9  # nothing of the second source is asked for


def test_without_boxes_each_source_is_one_whole(scores):
    first, second, _ = joined()
    same, other = scores("identity", [first, second], sources=[first])
    assert same == pytest.approx(1, abs=1e-5) and other < 0.8
    [styled] = scores("identity", [first], sources=[first, second], style=1)
    assert styled == pytest.approx(1, abs=1e-5)  # a source of the style is no subject


def test_a_subject_is_sought_at_its_size_in_the_picture(scores):
    """Of a source three times as large; and a whole one through a view."""
    large = put(plain("teal"), emblem(*A), 40, 5).resize((288, 192))
    box = [3 * side for side in box_at(40, 5)]
    pictures = [carried(A, (5, 5)), carried(B, (5, 5))]
    right, wrong = scores("identity", pictures, sources=[large], subjects=[box])
    assert right > 0.9 and wrong < right - 0.1
    same, other = scores("identity", [CLEAN, card(3)], "low", source=CLEAN)
    assert same == pytest.approx(1, abs=1e-5) and other < 0.8


# --- style


@pytest.mark.parametrize("style", ["outline", "stripes", "night"])
def test_the_right_style_scores_above_every_other_one(scores, style):
    """Whatever the cards show, and of whatever colours."""
    drawn = {name: [paint(card(seed)) for seed in range(8)] for name, paint in STYLES.items()}
    for seed in (50, 51):
        given = {n: scores("style", p, style=STYLES[style](card(seed))) for n, p in drawn.items()}
        for right, *others in zip(given.pop(style), *given.values(), strict=True):
            assert right > max(others) + 0.01


def test_a_style_does_not_mind_where_things_stand(scores):
    for paint in STYLES.values():
        picture = paint(CLEAN)
        same, mirrored, *moved = scores(
            "style", [picture, picture.transpose(0), *(shuffled(picture, n) for n in range(4))], style=picture
        )  # fmt: skip
        assert same == pytest.approx(1, abs=1e-5) and mirrored == pytest.approx(1, abs=1e-4)
        assert min(moved) > 0.85


def test_a_style_may_be_named_among_the_sources(scores):
    night = STYLES["night"](card(7))
    pictures = [card(1), STYLES["night"](card(1))]
    by_place = scores("style", pictures, sources=[card(1), night], style=1)
    assert by_place == scores("style", pictures, style=night) and by_place[1] > by_place[0] + 0.1


# --- edit_direction

PROMPTS = {"source_prompt": CARD.prompt, "target_prompt": replace(CARD, background="green").prompt}


def test_a_picture_that_moves_as_the_words_do_scores_high(scores):
    names = ["wrong background colour", "clean", "wrong shape colour", "wrong word"]
    pictures = [PICTURES[n] for n in names]
    asked, nothing, shape, word = scores("edit_direction", pictures, source=CLEAN, **PROMPTS)
    assert asked > 0.5 and asked > max(shape, word) + 0.3 and nothing == 0
    back = {"source_prompt": PROMPTS["target_prompt"], "target_prompt": PROMPTS["source_prompt"]}
    assert scores("edit_direction", pictures[:1], source=CLEAN, **back) == [pytest.approx(-asked)]


def test_a_trace_of_the_edit_is_paid_as_a_trace(scores):
    """And noise for what it moves, not for where to."""
    faint = Image.blend(CLEAN, PICTURES["wrong background colour"], 0.02)
    trace, noise = scores("edit_direction", [faint, noisy(CLEAN, 1)], source=CLEAN, **PROMPTS)
    assert 0 < trace < 0.03 and abs(noise) < 0.03  # their cosines are 0.08 and -0.09


def test_prompts_that_are_one_to_the_tower_are_not_scored(scores):
    long = {"source_prompt": "a card", "target_prompt": "a card"}
    assert math.isnan(scores("edit_direction", [card(1)], source=CLEAN, **long)[0])


# --- all of them


@pytest.mark.parametrize("view", ["full", "low", "high"])
@pytest.mark.parametrize("name", EDITS)
def test_none_where_a_row_asks_for_none(scores, name, view):
    for row in ({}, {"target_prompt": "a card", "image": CLEAN}):
        assert scores(name, [CLEAN, card(1)], view, **row) == [None, None]


@pytest.mark.parametrize("name", EDITS)
def test_rows_may_be_mixed_and_batches_change_nothing(name):
    row = {"sources": [CLEAN, card(2)], "style": 1, **PROMPTS}
    kept = row | {"keep": UPPER, "subjects": [box_at(5, 5), None]}
    rows = [row, {}, kept, {"source": card(4), "style": card(5), **PROMPTS}, row]
    inputs = [RewardInput(card(i), "x", Row(each)) for i, each in enumerate(rows)]
    whole, small = (
        load_reward(RewardConfig(name, args=TINY | {"batch_size": n}))(inputs) for n in (32, 2)
    )
    assert whole[1] is None and None not in (whole[0], *whole[2:])
    assert [w for w in whole if w is not None] == pytest.approx(
        [s for s in small if s is not None], abs=1e-5
    )


def test_one_forward_gives_what_two_would():
    clip, pictures = Clip(**TINY), [card(1), card(2)]
    embeddings, stages = clip.embeddings_and_stages(pictures)
    assert torch.allclose(embeddings, clip.embed_images(pictures), atol=1e-6)
    assert all(map(torch.equal, stages, clip.stages(pictures)))
    assert np.isfinite(embeddings.numpy()).all()
