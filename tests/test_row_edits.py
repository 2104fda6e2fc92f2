"""What rows say of edits: checked before the first step, and brought to every reward whole."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.pictures import fit
from duet.configs.regions import Box
from duet.configs.row import Row
from duet.configs.rows import load_rows, rows_of
from duet.rewards.base import RewardInput, own_copies, score
from duet.rewards.service.wire import decode_request, encode_request
from duet.rewards.view import Viewed, low
from duet.train.row_digest import row_digest
from tests.conftest import ROOT
from tests.edit_pictures import card
from tests.pictures import CLEAN

MASK = Image.new("L", CLEAN.size)
MASK.paste(255, (0, 0, 96, 32))
FILES = {
    "card.png": CLEAN,  # 96 x 64
    "other.png": card(1).resize((130, 100)),
    "mask.png": MASK,
    "small.png": MASK.resize((48, 32)),
    "black.png": Image.new("L", CLEAN.size),
    "ones.png": MASK.point(lambda value: value // 255),
    "clear.png": Image.merge("RGBA", (MASK,) * 4),
    "opaque.png": MASK.convert("RGBA"),
    "wide.png": Image.new("RGB", (240, 80), "white"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("edits")
    for name, picture in FILES.items():
        picture.save(made / name)
    (made / "text.png").write_bytes(b"a letter, and no picture")
    return made


def rows_file(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x"} | row) + "\n" for row in rows))
    return path


ONE, TWO = {"source": "card.png"}, {"sources": ["card.png", "other.png"]}
BAD = {
    "mask of another size": (ONE | {"keep": "small.png"}, "keep has 48 x 32 pixels and the first source 96 x 64: a mask has the first source's size"),
    "mask of the second's size": (TWO | {"keep": "other.png"}, "keep has 130 x 100 pixels and the first source 96 x 64"),
    "unreadable mask": (ONE | {"keep": "text.png"}, "keep: picture '{folder}/text.png' cannot be read: it is none of PNG"),
    "missing mask": (ONE | {"keep": "gone.png"}, "keep '{folder}/gone.png' does not exist, or is no file"),
    "black mask": (ONE | {"keep": "black.png"}, "keep is a mask without white, which is what must stay"),
    "mask of ones": (ONE | {"keep": "ones.png"}, "keep is a mask without white"),
    "clear mask": (ONE | {"keep": "clear.png"}, "keep is a mask with transparent pixels"),
    "keep without sources": ({"keep": "mask.png"}, "keep speaks of sources and the row has none"),
    "keep of an image alone": ({"image": "card.png", "keep": [[0, 0, 9, 9]]}, "keep speaks of sources"),
    "no boxes": (ONE | {"keep": []}, "keep = [] must be a mask picture or its path, or a list of boxes"),
    "keep is a number": (ONE | {"keep": 3}, "keep = 3 must be a mask picture"),
    "a box and no list of boxes": (ONE | {"keep": [0, 0, 9, 9]}, "keep[0] = 0 must be a box [left, top, right, bottom] of whole numbers"),
    "a number among boxes": (ONE | {"keep": [[0, 0, 9, 9], 7]}, "keep[1] = 7 must be a box"),
    "three numbers": (ONE | {"keep": [[0, 0, 9]]}, "keep[0] = [0, 0, 9] must be a box"),
    "parts of pixels": (ONE | {"keep": [[0, 0, 9.5, 9]]}, "keep[0] = [0, 0, 9.5, 9] must be a box"),
    "true and false": (ONE | {"keep": [[False, False, True, True]]}, "must be a box"),
    "left is right": (ONE | {"keep": [[9, 0, 9, 9]]}, "keep[0] = [9, 0, 9, 9] is empty: left < right and top < bottom"),
    "upside down": (ONE | {"keep": [[0, 9, 9, 3]]}, "keep[0] = [0, 9, 9, 3] is empty"),
    "out on the right": (ONE | {"keep": [[0, 0, 97, 9]]}, "keep[0] = [0, 0, 97, 9] reaches out of its picture of 96 x 64 pixels"),
    "out on the left": (ONE | {"keep": [[-1, 0, 9, 9]]}, "reaches out of its picture"),
    "in the second alone": (TWO | {"keep": [[0, 0, 120, 90]]}, "reaches out of its picture of 96 x 64"),
    "unreadable style": (ONE | {"style": "text.png"}, "style: picture '{folder}/text.png' cannot be read"),
    "missing style": ({"style": "gone.png"}, "style '{folder}/gone.png' does not exist"),
    "style of no source": (TWO | {"style": 2}, "style = 2 must be a picture or its path, or 0 to 1 for the place of a source"),
    "style from behind": (TWO | {"style": -1}, "style = -1 must be a picture"),
    "style without sources": ({"style": 0}, "style = 0 must be a picture or its path"),
    "style is true": (TWO | {"style": True}, "style = True must be a picture"),
    "a list of styles": (TWO | {"style": ["card.png"]}, "style = ['card.png'] must be a picture"),
    "five subjects": (TWO | {"subjects": [[0, 0, 9, 9]] * 5}, "must be a list of a box [left, top, right, bottom] a source, null for one without a subject: there are 2 sources"),
    "one subject": (TWO | {"subjects": [[0, 0, 9, 9]]}, "there are 2 sources"),
    "subjects without sources": ({"subjects": [[0, 0, 9, 9]]}, "subjects speaks of sources and the row has none"),
    "no subjects": (ONE | {"subjects": []}, "subjects = [] must be a list"),
    "subjects of nothing": (TWO | {"subjects": [None, None]}, "subjects = [None, None] names none"),
    "a number among subjects": (TWO | {"subjects": [None, 3]}, "subjects[1] = 3 must be a box"),
    "a subject out of its source": (TWO | {"subjects": [[0, 0, 100, 9], None]}, "subjects[0] = [0, 0, 100, 9] reaches out of its picture of 96 x 64"),
    "subjects are a path": (ONE | {"subjects": "mask.png"}, "subjects = 'mask.png' must be a list"),
    "empty target": (ONE | {"target_prompt": " "}, "target_prompt = ' ' must be a non-empty string"),
    "source prompt is a number": (ONE | {"source_prompt": 3}, "source_prompt = 3 must be a non-empty string"),
    "no change asked": (ONE | {"source_prompt": "a", "target_prompt": "a"}, "source_prompt and target_prompt are both 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_column_of_an_edit_is_one_clear_line(folder, name):
    row, message = BAD[name]
    path = rows_file(folder, ONE, row)
    with pytest.raises(UserError) as caught:
        load_rows(path)
    told = str(caught.value)
    assert told.startswith(f"{path}:2") and len(told.splitlines()) == 1
    assert message.format(folder=folder) in told


GOOD = (
    TWO | {"keep": "mask.png", "style": 1, "subjects": [[0, 0, 96, 64], None]},
    TWO | {"keep": [[0, 0, 96, 64], [3, 3, 4, 4]], "subjects": [None, [0, 0, 130, 100]]},
    ONE | {"style": "wide.png", "source_prompt": "a", "target_prompt": "b"},
    {"style": "card.png", "keep": None, "subjects": None},
    ONE | {"keep": "opaque.png"},
)


def test_a_good_row_of_each_kind_is_taken(folder):
    rows = load_rows(rows_file(folder, *GOOD))
    assert rows[0].picture("keep").tobytes() == MASK.tobytes()
    assert rows[0].picture("style").size == (130, 100)
    assert np.asarray(rows[1].picture("keep")).min() == 255
    assert rows[2].picture("style").size == (240, 80)
    assert rows[3].picture("keep") is None and rows[3].sources == ()
    assert rows[4].picture("keep").tobytes() == MASK.tobytes()


def test_pictures_of_edits_may_be_the_datasets_own(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "source": datasets.Image(),
            "keep": datasets.Image(),
            "style": datasets.Image(),
            "subjects": datasets.List(datasets.List(datasets.Value("int32"))),
        }
    )
    table = {"prompt": ["x"], "source": [CLEAN], "keep": [MASK], "style": [card(1)], "subjects": [[[0, 0, 9, 9]]]}  # fmt: skip
    datasets.Dataset.from_dict(table, features).to_parquet(folder / "own.parquet")
    [row] = load_rows(folder / "own.parquet")
    assert row.picture("keep").tobytes() == MASK.tobytes()
    assert row.picture("style").tobytes() == card(1).tobytes() and row["subjects"] == [[0, 0, 9, 9]]


SHAPES = {
    "a first source": ({"sources": ["wide.png", "card.png"]}, "sources[0] has 240 x 80 pixels"),
    "a source": ({"source": "wide.png"}, "source has 240 x 80 pixels, another shape than the run's 96 x 64"),
    "a style": ({"style": "wide.png"}, "style has 240 x 80 pixels"),
    "a source as style": ({"sources": ["card.png", "wide.png"], "style": 1}, "sources[1] has 240 x 80 pixels"),
    "a further source": ({"sources": ["card.png", "wide.png"]}, None),
    "a mask of a first source": ({"source": "card.png", "keep": "mask.png"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_what_would_be_cropped_is_refused_where_that_is_set(folder, name):
    """A further source is whole to the model and to every reward."""
    row, message = SHAPES[name]
    overrides = [f"data.train={rows_file(folder, row)}"]
    tiny = ROOT / "configs" / "tiny" / "ar.yaml"
    assert len(rows_of(load_config(tiny, overrides), "train")) == 1
    config = load_config(tiny, [*overrides, "data.fit=refuse"])
    if message is None:
        assert len(rows_of(config, "train")) == 1
        return
    with pytest.raises(UserError) as caught:
        rows_of(config, "train")
    assert message in str(caught.value)


def test_a_dataset_of_edits_may_be_moved(folder, tmp_path):
    """A checkpoint knows its rows by names of pictures, and by boxes."""
    for name, picture in FILES.items():
        picture.save(tmp_path / name)
    here, there = (row_digest(load_rows(rows_file(place, *GOOD))) for place in (folder, tmp_path))
    assert here == there
    other = [dict(row) for row in GOOD]
    other[1]["keep"] = [[0, 0, 95, 64]]
    assert row_digest(load_rows(rows_file(tmp_path, *other))) != here


# --- what rewards see

ROW = {
    "sources": [CLEAN, card(1).resize((130, 100))],
    "keep": [[0, 0, 96, 32]],
    "style": 1,
    "subjects": [[5, 5, 27, 27], [10, 20, 60, 90]],
}
ITEM = RewardInput(card(2), "an edit", Row(ROW))


def test_a_reward_is_given_each_part_of_an_edit():
    assert ITEM.picture("source").tobytes() == CLEAN.tobytes()
    assert ITEM.picture("style").tobytes() == fit(ROW["sources"][1], 96, 64).tobytes()
    assert ITEM.picture("keep").tobytes() == MASK.tobytes()
    sources = ITEM.sources
    assert [s.tobytes() for s in sources] == [s.tobytes() for s in ROW["sources"]]
    assert ITEM.subjects(sources) == [Box(5, 5, 27, 27), Box(10, 20, 60, 90)]
    bare = replace(ITEM, row={"source": CLEAN})
    assert bare.subjects(bare.sources) == [Box(0, 0, 96, 64)]
    assert bare.picture("style") is None and bare.picture("keep") is None


def test_boxes_follow_a_large_source_that_is_made_smaller():
    large = Image.new("RGB", (2400, 1200))
    item = RewardInput(CLEAN, "x", {"source": large, "subjects": [[1200, 0, 2400, 600]]})
    [seen] = item.sources
    assert seen.width * seen.height <= 2**21 and abs(seen.width - 2 * seen.height) <= 2
    [box] = item.subjects([seen])
    assert box == Box(seen.width // 2, 0, seen.width, seen.height // 2)


def test_views_show_the_parts_of_an_edit():
    seen = []

    def look(inputs):
        seen.extend(inputs)
        return [1.0] * len(inputs)

    Viewed(look, "low")([ITEM])
    [item] = seen
    assert item.picture("source").tobytes() == low(CLEAN).tobytes()
    assert np.asarray(item.picture("keep")).tolist() == [[255] * 12] * 4 + [[0] * 12] * 4
    assert [s.size for s in item.sources] == [(12, 8), (16, 12)]
    assert item.subjects(item.sources) == [Box(0, 0, 4, 4), Box(1, 2, 8, 11)]
    assert item.canvas == (12, 8)
    seen.clear()
    Viewed(look, "high")([ITEM])
    keeps = [np.asarray(i.picture("keep")) for i in seen]
    assert [k.shape for k in keeps] == [(32, 48)] * 4
    assert [int(k.min()) for k in keeps] == [255, 255, 0, 0] and not keeps[2].any()
    assert all(i.canvas == (96, 64) and i.sources[0].size == (96, 64) for i in seen)


def spoil(inputs):
    """Changes all that it is given of an edit; answers for what it found."""
    found = [float(len(i.row["keep"]) + np.mean(i.row["sources"][0])) for i in inputs[:1]] * 2
    row = inputs[0].row  # samples of a prompt share theirs
    row["sources"][0].paste("black", (0, 0, 96, 64))
    row["sources"].clear()
    row["keep"].append([0, 0, 1, 1])
    row["subjects"][0][2] = 6
    return found


def test_what_a_reward_does_to_an_edit_no_other_sees():
    pictures = [CLEAN.copy(), card(1)]
    row = Row({"sources": pictures, "keep": [[0, 0, 9, 9]], "subjects": [[0, 0, 9, 9], None]})
    inputs = [RewardInput(CLEAN.copy(), "a", row)] * 2
    first, again = (score(spoil, "spoil", inputs, [2]) for _ in range(2))
    assert first == again and len(row["sources"]) == 2 and row["subjects"][0] == [0, 0, 9, 9]
    assert pictures[0].tobytes() == CLEAN.tobytes()
    assert own_copies(inputs)[0].picture("keep").tobytes() == inputs[0].picture("keep").tobytes()


def parts(item: RewardInput) -> list:
    """All that a reward may ask of an edit."""
    sources = item.sources
    pictures = [item.picture(key) for key in ("image", "source", "style", "keep")]
    seen = [p and (p.size, p.tobytes()) for p in (*pictures, *sources)]
    return [*seen, item.subjects(sources)]


TRAVELLERS = {
    "all": ROW,
    "a mask": {"source": CLEAN, "keep": MASK, "style": card(3)},
    "another shape": {"sources": [Image.new("RGB", (240, 80), "teal"), CLEAN], "image": card(4)},
    "a style among sources": {"sources": [card(5), card(6)], "style": 0},
    "text": {"text": "CAT"},
}


@pytest.mark.parametrize("view", ["full", "low", "high"])
@pytest.mark.parametrize("name", TRAVELLERS)
def test_a_served_reward_sees_what_a_local_one_would(tmp_path, name, view):
    """And no path, no bytes of this machine beside them."""
    here, there = [], []

    def travel(inputs):
        body = encode_request(inputs, "png")
        [sample] = json.loads(body)["samples"]
        assert not {"keep", "style", "sources", "source"} & set(sample["row"])
        here.extend(map(parts, inputs))
        there.extend(map(parts, decode_request(body, tmp_path)))
        return [1.0]

    item = replace(ITEM, row=Row(TRAVELLERS[name]))
    (travel if view == "full" else Viewed(travel, view))([item])
    assert here == there and len(here) == (4 if view == "high" else 1)
