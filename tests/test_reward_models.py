"""Reward models: order under damage, independent computations, honest refusals."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput, score
from duet.rewards.clip import Clip, batches
from duet.rewards.long_prompts import pieces
from duet.rewards.registry import load_reward, load_rewards
from duet.rewards.source_consistency import kept_share
from duet.train.tiny.specimens import CARD, OFFLINE, row_for, specimens, table, write
from tests.conftest import CLIP, ROOT
from tests.pictures import CLEAN, DAMAGE, PICTURES, damaged

TINY = {"model": CLIP, "pretrained": None}
REWARDS = {c.metric_name: c for c in OFFLINE}


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    return write(tmp_path_factory.mktemp("specimens"))


@pytest.fixture
def scores(row):
    """A function: what a reward of the table says of pictures of the card."""

    def score_all(name, images):
        inputs = [RewardInput(i, CARD.prompt, row_for(name, row)) for i in images]
        return score(load_reward(REWARDS[name]), name, inputs, [len(inputs)])

    return score_all


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["fidelity", "quality", "source_consistency"])
def test_detail_rewards_fall_with_every_step_of_damage(scores, name, kind):
    steps = scores(name, damaged(CLEAN, kind))
    assert steps == sorted(steps, reverse=True) and steps[0] - steps[-1] > 0.02


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["alignment", "aesthetic", "ocr"])
def test_no_reward_is_raised_by_strong_damage(scores, name, kind):
    clean, *_, worst = scores(name, damaged(CLEAN, kind))
    assert worst <= clean


def test_a_wrong_word_lowers_ocr_and_a_wrong_colour_alignment(scores):
    names = ["clean", "wrong word", "missing word"]
    assert scores("ocr", [PICTURES[n] for n in names]) == [1, 0.75, 0]
    names = ["clean", "wrong background colour", "wrong shape colour"]
    right, *wrong = scores("alignment", [PICTURES[n] for n in names])
    assert right > max(wrong) + 0.1


@pytest.mark.parametrize("name", [n for n in REWARDS if n != "diversity"])
def test_neither_flat_colour_nor_noise_pays(scores, name):
    clean, *empty = scores(name, [PICTURES[n] for n in ("clean", "flat colour", "pure noise")])
    assert clean > np.nanmax(empty) + 0.2


def test_the_table_has_a_line_for_each_of_the_twelve_pictures(row):
    lines = table(row).splitlines()
    assert len(lines) == 2 + 12 and lines[2].startswith("| clean | 1.000 |")
    page = (ROOT / "rewards" / "COOKBOOK.md").read_text()
    printed = page[page.index("| picture | ocr |") :].splitlines()[:14]
    for ours, theirs in zip(map(cells, lines), map(cells, printed), strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:] == pytest.approx(theirs[1:], abs=0.003, nan_ok=True)
    assert [np.asarray(i).tobytes() for _, i in specimens()] == [
        np.asarray(i).tobytes() for i in PICTURES.values()
    ]


def cells(line: str) -> list[str | float]:
    """Of a table's line: its name, and numbers where these are."""
    parts = [part.strip() for part in line.strip("|").split("|")]
    number = re.compile(r"-?\d+\.\d+|nan")
    return [float(part) if number.fullmatch(part) else part for part in parts]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("duet.rewards.registry", {"torch", "open_clip", "transformers", "rapidocr", "httpx"}),
        ("duet.rewards.pickscore, duet.rewards.hpsv2", {"open_clip", "transformers"}),
        ("duet.rewards.ocr", {"torch", "rapidocr", "onnxruntime"}),
    ],
)
def test_a_library_is_imported_only_by_who_needs_it(modules, heavy):
    code = f"import sys, {modules}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name",
    ["alignment", "fidelity", "source_consistency", "diversity", "identity", "style", "edit_direction"],
)  # fmt: skip
def test_a_constructor_reads_no_weights_and_load_does(name):
    gone = RewardConfig(name, args={"model": "local-dir:gone", "pretrained": None})
    load_reward(gone)
    with pytest.raises(UserError, match="gone.*cannot be loaded"):
        load_rewards([gone])


def test_equal_towers_are_one():
    assert Clip(**TINY).tower is Clip(**TINY, batch_size=3).tower
    assert Clip(**TINY).tower is not Clip(**TINY, dtype="bfloat16").tower


@pytest.mark.parametrize("name", ["alignment", "fidelity", "source_consistency", "diversity"])
def test_batches_change_no_score(name, row):
    inputs = [RewardInput(i, CARD.prompt, row) for i in PICTURES.values()]
    whole, small = (
        load_reward(RewardConfig(name, args=TINY | {"batch_size": n}))(inputs) for n in (32, 5)
    )
    assert whole == pytest.approx(small, abs=1e-5)
    assert [len(b) for b in batches(inputs, 5)] == [5, 5, 2]


def test_words_beyond_the_towers_length_count():
    clip = Clip(**TINY)
    long = "a red card with a blue circle on the left, " * 12
    ends = [long + f"and the white word {word}. " for word in ("CHAP", "TONE")]
    short, *longer = clip.embed_texts(["a red card", *ends])
    assert not torch.equal(*longer)
    assert torch.stack(longer).norm(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert torch.allclose(short, clip.embed_texts(["a red card"])[0], atol=1e-6)


def fits(text):
    return len(text.split()) <= 6 and len(text) <= 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", ["one two three"]),
        (" kept as it is ", [" kept as it is "]),
        ("One two. Three four five. Six seven.", ["One two. Three four five.", "Six seven."]),
        ("一。" * 30, ["一。" * 15] * 2),
        ("x" * 100, ["x" * 25] * 4),
        ("", [""]),
    ],
)
def test_a_long_prompt_is_cut_at_the_border_of_a_sentence_or_a_word(text, expected):
    assert pieces(text, fits) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_tower_scores_nearly_the_same(dtype):
    inputs = [RewardInput(i, CARD.prompt, {}) for i in PICTURES.values()]
    full, half = (
        load_reward(RewardConfig("alignment", args=TINY | {"dtype": d}))(inputs)
        for d in ("float32", dtype)
    )
    assert full == pytest.approx(half, abs=0.05) and full != half


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8': allowed are float32, bfloat16, float16"),
        ({"batch_size": 0}, "batch_size 0: give a whole number >= 1"),
        ({"device": "tpuu"}, "device 'tpuu': allowed are"),
        ({"modle": "x"}, "cannot be built"),
    ],
)
@pytest.mark.parametrize("name", ["alignment", "hpsv2", "pickscore"])
def test_a_wrong_argument_is_refused_at_construction(name, args, message):
    with pytest.raises(UserError, match=message):
        load_reward(RewardConfig(name, args=args))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda:1': torch sees no GPU here"):
        load_reward(RewardConfig("alignment", args={"device": "cuda:1"}))


def third_of(gpus: int, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize("name", ["alignment", "pickscore", "pyiqa"])
def test_plain_cuda_is_the_gpu_that_auto_takes(name, monkeypatch):
    """With its number: weights and pixels go there from two threads."""
    third_of(4, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = {"metric": "niqe"} if name == "pyiqa" else {}
    for device, own in (("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:0", "cuda:0")):
        reward = load_reward(RewardConfig(name, args=args | {"device": device}))
        assert reward.device == torch.device(own)


@pytest.mark.parametrize(("gpus", "own"), [(4, 2), (1, 0)])
def test_ocr_reads_on_the_processes_own_gpu(gpus, own, monkeypatch):
    """As its sessions are asked for; there is none here that could be opened on a GPU. A process
    may see its own GPU alone."""
    third_of(gpus, monkeypatch)
    from rapidocr.inference_engine.onnxruntime import main, provider_config

    asked, session = [], main.InferenceSession

    def opened(path, sess_options, providers):
        asked.append(dict(providers)["CUDAExecutionProvider"]["device_id"])
        return session(path, sess_options=sess_options, providers=["CPUExecutionProvider"])

    def both():
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr("onnxruntime.get_available_providers", both)
    monkeypatch.setattr(provider_config, "get_available_providers", both)
    monkeypatch.setattr(provider_config, "get_device", lambda: "GPU")
    monkeypatch.setattr(main, "InferenceSession", opened)
    load_rewards([RewardConfig("ocr", args={"engine": "cuda"})])
    assert set(asked) == {own}


def test_a_plain_model_name_without_weights_is_refused():
    with pytest.raises(UserError, match="needs pretrained"):
        load_rewards([RewardConfig("alignment", args={"model": "ViT-B-32", "pretrained": None})])


@pytest.mark.parametrize("language", ["en", "german", "japan"])
def test_ocr_reads_by_language(language):
    args = REWARDS["ocr"].args | {"language": language}
    inputs = [
        RewardInput(CLEAN, CARD.prompt, {}),
        RewardInput(PICTURES["wrong word"], CARD.prompt, {}),
    ]
    assert load_reward(RewardConfig("ocr", args=args))(inputs) == [1, 0.75]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"det_size": "server"}, "det_size 'server': allowed are tiny, small, medium"),
        ({"engine": "gpu"}, "engine 'gpu': allowed are cpu, cuda"),
        ({"threads": 0}, "threads 0: give a whole number >= 1"),
    ],
)
def test_ocr_refuses_a_wrong_argument_at_construction(args, message):
    with pytest.raises(UserError, match=message):
        load_reward(RewardConfig("ocr", args=args))


def test_ocr_tells_by_load_what_cannot_be_had(monkeypatch):
    with pytest.raises(UserError, match="language 'klingon': allowed are af, arabic"):
        load_rewards([RewardConfig("ocr", args={"language": "klingon"})])
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="engine 'cuda': onnxruntime has CPUExecutionProvider"):
        load_rewards([RewardConfig("ocr", args={"engine": "cuda"})])

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("rapidocr.utils.download_file.DownloadFile.run", no_network)
    with pytest.raises(
        UserError, match="language 'korean' and det_size 'small' cannot be opened.*no network"
    ):
        load_rewards([RewardConfig("ocr", args={"language": "korean"})])


def test_source_consistency_forgives_a_local_edit_more_than_a_change_everywhere(scores):
    names = ["clean", "wrong word", "wrong shape colour", "wrong background colour", "pure noise"]
    same, word, shape, everywhere, noise = scores(
        "source_consistency", [PICTURES[n] for n in names]
    )
    assert same == pytest.approx(1, abs=1e-5)
    assert min(word, shape) > everywhere + 0.1 and everywhere > noise


def test_source_consistency_does_not_apply_without_a_source(row):
    reward = load_reward(REWARDS["source_consistency"])
    given = RewardInput(CLEAN, CARD.prompt, row)
    scores = reward([RewardInput(CLEAN, "", {}), given, RewardInput(CLEAN, "", {})])
    assert scores[::2] == [None, None] and scores[1] == pytest.approx(1, abs=1e-5)


def test_the_share_that_may_change_is_left_out():
    a = torch.nn.functional.normalize(torch.ones(1, 3, 2, 2), dim=1)
    b = a.clone()
    b[..., 0, 0] = torch.tensor([1.0, -1.0, 0.0]) / 2**0.5  # one patch of four: at a right angle
    assert kept_share(a, b, 0.25).item() == pytest.approx(1)
    assert kept_share(a, b, 0.0).item() == pytest.approx(0.75)
    with pytest.raises(UserError, match="changed_share 1: give a share >= 0 and < 1"):
        load_reward(RewardConfig("source_consistency", args={"changed_share": 1}))


def test_the_view_is_applied_to_the_rows_pictures_too(row):
    for name in ("fidelity", "source_consistency"):
        seen_low = load_reward(RewardConfig(name, args=TINY, view="low"))
        assert seen_low([RewardInput(CLEAN, CARD.prompt, row)]) == [pytest.approx(1, abs=1e-5)]


def test_diversity_is_zero_for_one_picture_over_and_over():
    diversity = load_reward(REWARDS["diversity"])
    assert diversity.whole_groups
    same = diversity([RewardInput(CLEAN, "", {})] * 4)
    assert same == pytest.approx([0] * 4, abs=1e-5)


def test_diversity_is_highest_for_the_odd_one_out_of_its_own_group():
    names = ["clean", "clean", "clean", "pure noise"]
    group = [RewardInput(PICTURES[n], "", {}) for n in names]
    diversity = load_reward(REWARDS["diversity"])
    one = score(diversity, "diversity", group, [4])
    assert one[3] == pytest.approx(3 * one[0], rel=1e-3) and one[0] > 0.1
    assert score(diversity, "diversity", group * 2, [4, 4]) == pytest.approx(one * 2)
    assert diversity(group[:1]) == [None]
