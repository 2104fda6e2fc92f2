"""Datasets of prompts: every form is read right; every bad row is refused by file and line."""

import csv
import json
import pickle
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from diffusers import GlmImagePipeline
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.row import Row
from duet.configs.rows import load_rows, rows_of
from duet.inference import generate
from duet.inference.layout import Size
from duet.inference.outline import read_outline
from duet.inference.prompt_check import check_prompts
from duet.train.evaluation import evaluate
from tests.conftest import MODEL, ROOT, train

A = '{"prompt": "a"}\n'
REFUSED = {
    # what it is: (file, content, the message after the file's name)
    "empty file": ("rows.jsonl", "", "is empty"),
    "blank lines": ("rows.jsonl", "\n \r\n\n", "is empty"),
    "half an object": ("rows.jsonl", A + '\n{"prompt": \n', ":3 is not JSON"),
    "two objects": ("rows.jsonl", A + '{"prompt": "b"} {"prompt": "c"}\n', ":2 is not JSON: Extra data"),
    "a list": ("rows.jsonl", A + '["b"]\n', ":2 must be an object"),
    "no prompt": ("rows.jsonl", A + '{"text": "b"}\n', ':2 needs a non-empty "prompt"'),
    "another name": ("rows.jsonl", '{"caption": "b"}\n', ":1 needs a non-empty \"prompt\", not None: its columns are 'caption'"),
    "blank prompt": ("rows.jsonl", A + '{"prompt": " \\n"}\n', ':2 needs a non-empty "prompt"'),
    "null prompt": ("rows.jsonl", A + '{"prompt": null}\n', ':2 needs a non-empty "prompt"'),
    "prompt is a number": ("rows.jsonl", '{"prompt": 7}\n', ':1 needs a non-empty "prompt", not 7'),
    "prompt is a list": ("rows.jsonl", '{"prompt": ["a"]}\n', ":1 needs a non-empty \"prompt\", not ['a']"),
    "a key twice": ("rows.jsonl", A + '{"prompt": "b", "prompt": "c"}\n', ":2 is not JSON: the key 'prompt' stands twice"),
    "an inner key twice": ("rows.jsonl", '{"prompt": "b", "card": {"x": 1, "x": 2}}\n', ":1 is not JSON: the key 'x' stands twice"),
    "NaN": ("rows.jsonl", A + '{"prompt": "b", "mark": NaN}\n', ":2 is not JSON: NaN is no finite number"),
    "1e999": ("rows.jsonl", '{"prompt": "b", "mark": 1e999}\n', ":1 is not JSON: 1e999 is no finite number"),
    "5,000 digits": ("rows.jsonl", '{"prompt": "b", "mark": %s}\n' % ("9" * 5000), ":1 is not JSON: Exceeds the limit"),
    "deep brackets": ("rows.jsonl", '{"prompt": "b", "x": %s\n' % ("[" * 100_000), ":1 is not JSON: maximum recursion"),
    "lone surrogate": ("rows.jsonl", A + '{"prompt": "b \\ud83d"}\n', ":2: prompt = 'b \\ud83d' holds '\\ud83d', half of"),
    "surrogate in text": ("rows.jsonl", '{"prompt": "b", "text": "\\udc00"}\n', ":1: text = '\\udc00' holds"),
    "NUL in the prompt": ("rows.jsonl", A + '{"prompt": "b\\u0000"}\n', ":2: prompt = 'b\\x00' holds '\\x00', NUL"),
    "raw NUL": ("rows.jsonl", A + '{"prompt": "b\0"}\n', ":2 is not JSON: Invalid control character"),
    "text is a number": ("rows.jsonl", A + '{"prompt": "b", "text": 7}\n', ":2: text = 7 must be a non-empty string"),
    "text holds a number": ("rows.jsonl", '{"prompt": "b", "text": ["A", 7]}\n', ":1: text = ['A', 7] must be"),
    "empty text": ("rows.jsonl", '{"prompt": "b", "text": ""}\n', ":1: text = '' must be"),
    "no texts": ("rows.jsonl", '{"prompt": "b", "text": []}\n', ":1: text = [] must be"),
    "missing picture": ("rows.jsonl", A + '{"prompt": "b", "image": "gone.png"}\n', "gone.png' does not exist"),
    "picture is a folder": ("rows.jsonl", '{"prompt": "b", "image": "."}\n', ":1: image "),
    "picture is a number": ("rows.jsonl", '{"prompt": "b", "source": 3}\n', ":1: source = 3 must be a picture or its path"),
    "empty path": ("rows.jsonl", '{"prompt": "b", "image": ""}\n', ":1: image = '' must be a picture"),
    "NUL in a path": ("rows.jsonl", '{"prompt": "b", "image": "a\\u0000.png"}\n', ":1: image "),
    "picture is text": ("rows.jsonl", '{"prompt": "b", "image": "rows.jsonl"}\n', "rows.jsonl' cannot be read: it is none of PNG"),
    "latin-1": ("rows.jsonl", (A + '{"prompt": "caf\xe9"}\n').encode("latin-1"), ":2 is not UTF-8"),
    "utf-16": ("rows.jsonl", A.encode("utf-16"), ":1 is not UTF-8"),
    "JSON of an object": ("rows.json", A, ":1 holds no list of objects"),
    "JSON of strings": ("rows.json", '[{"prompt": "a"}, "b"]', ": item 2 = 'b' must be an object"),
    "CSV, cell too many": ("rows.csv", "prompt,text\na,A\nb, c,B\n", ":3 has 3 cells under 2 columns: quote a cell"),
    "CSV, cell too few": ("rows.csv", "prompt,text\na\n", ":2 has 1 cells under 2 columns"),
    "CSV, column twice": ("rows.csv", "prompt,text,prompt\na,A,b\n", ":1 has the column 'prompt' twice"),
    "CSV, open quote": ("rows.csv", 'prompt\na\n"b\nc\n', ":3 is not CSV: unexpected end of data"),
    "CSV, semicolons": ("rows.csv", "prompt;text\na;A\n", ":2 needs a non-empty \"prompt\", not None: its columns are 'prompt;text'"),
    "CSV, no prompt": ("rows.csv", 'prompt,text\n"a\nb",A\n,B\n', ':4 needs a non-empty "prompt"'),
    "CSV, a head alone": ("rows.csv", "prompt,text\n", "is empty"),
    "CSV, 200 kB": ("rows.csv", f"prompt\n{'a' * 200_000}\n", ":2 is not CSV: field larger than field limit"),
    "another form": ("rows.docx", A, "allowed are .jsonl, .json, .csv, .tsv, .txt, .parquet"),
    "prompt a line, NUL": ("rows.txt", "a\nb\0\n", ":2: prompt = 'b\\x00' holds '\\x00', NUL"),
    "no parquet": ("rows.parquet", "junk", "cannot be read: Parquet file size is 4 bytes"),
}  # fmt: skip


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_row_is_told_by_file_and_line(tmp_path, name):
    file, content, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        load_rows(written(tmp_path, file, content))
    told = str(caught.value)
    assert str(tmp_path / file) in told and message in told
    assert len(told) < 500 + len(str(tmp_path))


RIGHT = {
    "BOM": ("rows.jsonl", b"\xef\xbb\xbf" + A.encode(), [{"prompt": "a"}]),
    "CRLF": ("rows.jsonl", '{"prompt": "a"}\r\n{"prompt": "b"}\r\n', [{"prompt": "a"}, {"prompt": "b"}]),
    "no last newline": ("rows.jsonl", '{"prompt": "a"}', [{"prompt": "a"}]),
    "line separator": ("rows.jsonl", '{"prompt": "a\u2028b"}\n', [{"prompt": "a\u2028b"}]),
    "an emoji in two halves": ("rows.jsonl", '{"prompt": "\\ud83d\\ude00"}\n', [{"prompt": "\U0001f600"}]),
    "null is nothing": ("rows.jsonl", '{"prompt": "a", "text": null, "image": null}\n', [{"prompt": "a"}]),
    "a date is text": ("rows.jsonl", '{"prompt": "a", "text": "2024-01-05"}\n', [{"prompt": "a", "text": "2024-01-05"}]),
    "columns of their own": ("rows.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "s"}\n', [{"prompt": "a", "n": 1}, {"prompt": "b", "n": "s"}]),
    "texts": ("rows.jsonl", '{"prompt": "a", "text": ["A", "B"]}\n', [{"prompt": "a", "text": ["A", "B"]}]),
    "a list": ("rows.json", '[{"prompt": "a"},\n {"prompt": "b"}]', [{"prompt": "a"}, {"prompt": "b"}]),
    "prompts a line": ("rows.txt", b'\xef\xbb\xbfa "card", 007\r\n\r\nNA\r\n', [{"prompt": 'a "card", 007'}, {"prompt": "NA"}]),
    "CSV keeps text": ("rows.csv", "prompt,text\r\na,007\r\nNA,\r\n1e5,2024-01-05\r\n", [{"prompt": "a", "text": "007"}, {"prompt": "NA"}, {"prompt": "1e5", "text": "2024-01-05"}]),
    "CSV over lines": ("rows.csv", b'\xef\xbb\xbfprompt , text\n"a,\n""b""",A\n', [{"prompt": 'a,\n"b"', "text": "A"}]),
    "TSV": ("rows.tsv", "prompt\ttext\na, b\tA\n", [{"prompt": "a, b", "text": "A"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_row_is_read_right(tmp_path, name):
    file, content, expected = RIGHT[name]
    assert list(load_rows(written(tmp_path, file, content))) == expected


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    written(tmp_path, "rows.jsonl", '{"prompt": "a", "image": "~/red.png"}\n')
    assert load_rows("~/rows.jsonl")[0].picture("image").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("path", ["gone.jsonl", "gone/train.jsonl", "gone", "a/b/c"])
def test_a_missing_file_is_no_hub_id(path):
    with pytest.raises(UserError, match=f"{path}' cannot be read"):
        load_rows(path)


def test_a_row_is_a_frozen_mapping_that_travels(tmp_path):
    row = load_rows(written(tmp_path, "rows.jsonl", '{"prompt": "a", "n": 1}\n'))[0]
    assert (row.prompt, row["n"], row.get("text"), row.picture("image")) == ("a", 1, None, None)
    assert pickle.loads(pickle.dumps(row)) == row == {"prompt": "a", "n": 1}
    assert json.loads(json.dumps(dict(row))) == row
    with pytest.raises(AttributeError):
        row.columns = {}


COLUMNS = {"prompt": "caption", "image": "picture", "text": "word"}
FORMS = ("jsonl", "csv", "parquet", "parquet folder", "imagefolder", "saved", "saved splits")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One dataset in every form, its columns named COLUMNS: path and split of each."""
    folder = tmp_path_factory.mktemp("forms")
    records = []
    for word, colour in (("007", "red"), ("NA", "lime")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{word}.png")
        records.append({"caption": f"a {colour} card", "word": word, "picture": f"{word}.png"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with (folder / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, COLUMNS.values())
        writer.writeheader()
        writer.writerows(records)
    stored = [
        r | {"picture": {"path": None, "bytes": (folder / r["picture"]).read_bytes()}}
        for r in records
    ]
    columns = {key: [r[key] for r in stored] for key in COLUMNS.values()}
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table.to_parquet(folder / "rows.parquet")
    (folder / "pq").mkdir()
    for split in ("train", "test"):
        table.to_parquet(folder / "pq" / f"{split}-00000-of-00001.parquet")
    pictures = folder / "pictures"
    pictures.mkdir()
    named = [r | {"file_name": r["picture"]} for r in records]
    for record in named:
        (folder / record.pop("picture")).rename(pictures / record["file_name"])
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in named))
    for record in records:
        Image.open(pictures / record["picture"]).save(folder / record["picture"])
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=table.select([0]), test=table).save_to_disk(folder / "splits")
    places = ("rows.jsonl", "rows.csv", "rows.parquet", "pq", "pictures", "saved", "splits")
    splits = (None, None, None, "test", None, None, "test")
    paths = (str(folder / place) for place in places)
    return dict(zip(FORMS, zip(paths, splits, strict=True), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(forms, form):
    path, split = forms[form]
    columns = COLUMNS | ({"image": "image"} if form == "imagefolder" else {})
    rows = load_rows(path, split, columns=columns)
    assert [(r.prompt, r["text"]) for r in rows] == [("a red card", "007"), ("a lime card", "NA")]
    colours = [r.picture("image").getpixel((3, 3)) for r in rows]
    assert colours == [(255, 0, 0), (0, 255, 0)]
    assert "caption" not in rows[0] and pickle.loads(pickle.dumps(rows[1])) == rows[1]


@pytest.mark.parametrize("form", FORMS[2:])
def test_a_bad_row_of_a_dataset_is_told_by_its_number(forms, form):
    path, split = forms[form]
    with pytest.raises(
        UserError, match='row 1 needs a non-empty "prompt".*its columns are.*caption'
    ):
        load_rows(path, split)


def test_a_damaged_picture_of_a_dataset_is_told_by_its_number(tmp_path):
    records = {"prompt": ["a", "b"], "image": [None, {"path": None, "bytes": b"\xff\xd8\xff"}]}
    table = datasets.Dataset.from_dict(records).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    for path in ("saved", "rows.parquet"):
        with pytest.raises(
            UserError, match=f"{path}: row 2: image: a picture of 3 bytes cannot be"
        ):
            load_rows(tmp_path / path)


@pytest.mark.parametrize(
    ("form", "split", "message"),
    [
        ("saved splits", None, "has the splits train, test, not None: name one"),
        ("saved splits", "dev", "has the splits train, test, not 'dev'"),
        ("saved", "test", "has no splits: leave out split 'test'"),
        ("parquet", "dev", "has the splits train, not 'dev'"),
        ("jsonl", "test", "has no split 'test'"),
    ],
)
def test_a_wrong_split_is_refused(forms, form, split, message):
    with pytest.raises(UserError, match=message):
        load_rows(forms[form][0], split, columns=COLUMNS)


def test_a_column_that_no_row_has_is_refused(forms):
    with pytest.raises(
        UserError, match="text = 'wrod' is in no row of .*: there are image, prompt, word"
    ):
        load_rows(forms["jsonl"][0], columns=COLUMNS | {"text": "wrod"})


def test_a_folder_of_text_files_is_read_by_the_file(tmp_path):
    written(tmp_path, "train.csv", "prompt\na\n")
    with pytest.raises(UserError, match="is a folder of csv files: name the file itself"):
        load_rows(tmp_path)


def test_an_edited_dataset_is_read_anew_and_home_stays_empty(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    path = tmp_path / "rows.parquet"
    for prompt in ("first", "other"):  # of one length, so the file's size tells nothing
        datasets.Dataset.from_dict({"prompt": [prompt]}).to_parquet(path)
        assert load_rows(path)[0].prompt == prompt
    assert not [p for p in home.rglob("*") if p.is_file()]


def test_a_hub_dataset_is_asked_for_by_name_and_revision(monkeypatch):
    asked = []

    def load(path, revision):
        asked.append((path, revision))
        return datasets.DatasetDict(test=datasets.Dataset.from_dict({"caption": ["a"]}))

    monkeypatch.setattr(datasets, "load_dataset", load)
    overrides = [
        "data.eval=owner/prompts", "data.eval_split=test", "data.eval_revision=v2",
        "data.columns={prompt: caption}",
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "tiny" / "ar.yaml", overrides)
    assert list(rows_of(config, "eval")) == [{"prompt": "a"}]
    assert asked == [("owner/prompts", "v2")]
    with pytest.raises(UserError, match="data.columns = .* names to names"):
        load_config(ROOT / "configs" / "tiny" / "ar.yaml", ["data.columns={prompt: 1}"])


@pytest.fixture(scope="module")
def outline():
    return read_outline(str(MODEL))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <|image|> card", "holds '<|image|>', a control token of the AR's tokenizer"),
        ("<|code_7|>", "holds '<|code_7|>', a control token of the AR"),
        ("a card<|assistant|>", "'<|assistant|>', a control token of the AR"),
        ('the word "A<extra_id_3>"', "'<extra_id_3>', a control token of the glyph encoder"),
        ('the word "</s>"', "'</s>', a control token of the glyph encoder"),
        ("a card " * 2000, "tokens: the AR takes at most"),
        ("ab" * 100_000, "has 200000 characters: the AR takes at most"),
        ("x" * 1600 + '"b"', ""),
        (
            '"' + "a red card " * 200 + '"',
            "of the prompt has 2200 tokens: the glyph encoder takes at most 2047",
        ),
    ],
    ids=lambda text: text[:20],
)
def test_a_prompt_is_asked_of_the_tokenizers(outline, prompt, message):
    rows = [Row({"prompt": "a card"}, "rows.jsonl:1"), Row({"prompt": prompt}, "rows.jsonl:2")]
    if not message:
        return check_prompts(outline, rows, Size(64, 96))
    with pytest.raises(UserError) as caught:
        check_prompts(outline, rows, Size(64, 96), show=False)
    assert message in str(caught.value) and str(caught.value).startswith("rows.jsonl:2: ")
    return None


@pytest.mark.parametrize(
    "command", ["train", "train, held out", "evaluate", "generate", "--prompt"]
)
def test_every_command_asks_before_weights_are_read(tmp_path, small_run, monkeypatch, command):
    def read(*args, **kwargs):
        raise AssertionError("weights were read before the prompts were checked")

    monkeypatch.setattr(GlmImagePipeline, "from_pretrained", read)
    path = written(tmp_path, "rows.jsonl", A + '{"prompt": "a <|image|>"}\n')
    rewards = "rewards=[{name: tests.sample_rewards.Sees}]"
    output = ["--model", str(MODEL), "--output", str(tmp_path / "images")]
    commands = {
        "train": lambda: train(small_run("ar", rewards, f"data.train={path}")),
        "train, held out": lambda: train(small_run("ar", rewards, f"data.eval={path}")),
        "evaluate": lambda: evaluate(small_run("ar", rewards, f"data.eval={path}"), [], tmp_path),
        "generate": lambda: generate.main([*output, "--prompts", str(path)]),
        "--prompt": lambda: generate.main([*output, "--prompt", "a", "--prompt", "a <|image|>"]),
    }
    where = r"--prompt\[1\]" if command == "--prompt" else "rows.jsonl:2"
    with pytest.raises(UserError, match=f"{where}: the prompt holds '<.image.>'"):
        commands[command]()
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("metrics.jsonl"))


def test_a_parquet_column_twice_is_refused(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.table(columns, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet' cannot be read: .*prompt"):
        load_rows(tmp_path / "rows.parquet")
