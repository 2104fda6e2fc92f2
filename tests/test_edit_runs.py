"""Rows that edit: what is checked before a run, training of both stages, evaluation, generation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.row import Row
from duet.configs.rows import load_rows
from duet.inference import decoder, generate, prompt
from duet.inference.engine import Engine
from duet.inference.layout import Positions
from duet.inference.request import Request
from duet.train import evaluate, gate, prior_making, update
from duet.train.prompts import draw_groups
from duet.train.stages import DecoderStage
from tests.conftest import MODEL, ROOT, SIZE, train
from tests.pictures import CLEAN

SHARPNESS = "rewards=[{name: duet.train.tiny.hackable.Sharpness}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A user's folder: text rows and edits of one and of two sources, in one file."""
    folder = tmp_path_factory.mktemp("data")
    CLEAN.save(folder / "card.png")
    CLEAN.resize((130, 100)).save(folder / "other.png")
    CLEAN.rotate(180).save(folder / "wanted.png")
    rows = [
        {"prompt": "a red card"},
        {"prompt": 'change the word to "HAT"', "source": "card.png"},
        {"prompt": "the circle of the first on the second", "sources": ["card.png", "other.png"]},
        {"prompt": "turn it around", "sources": ["other.png"], "image": "wanted.png"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def edit_run(small_run, data):
    """A run of seconds on that file; a function of more overrides."""

    def make(stage: str, *overrides: str):
        return small_run(
            stage,
            f"data.train={data}/rows.jsonl",
            f"data.eval={data}/rows.jsonl",
            "rollout.prompts_per_step=4",
            "rollout.num_generations=2",
            "optim.per_device_train_batch_size=4",
            "optim.gradient_accumulation_steps=2",
            "sampling.num_inference_steps=3",
            "sampling.top_p=0.9",
            "sde.window_start_max=0",
            "grpo.beta=0.01",
            "optim.gradient_checkpointing=true",
            "train.max_steps=1",
            SHARPNESS,
            *overrides,
        )

    return make


def metrics_of(config) -> list[dict]:
    return [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").open()]


@pytest.fixture
def losses(monkeypatch) -> list:
    """What every loss of a run is given."""
    given, true = [], update.policy_loss

    def look(actions, config, counts):
        given.append((actions, counts))
        return true(actions, config, counts)

    monkeypatch.setattr(update, "policy_loss", look)
    return given


def test_the_ar_trains_on_text_and_edits(edit_run, losses):
    """The gain reaches an edit's six tokens, which stand last in its row, and nothing else."""
    level = "grpo.importance_sampling_level=sequence"
    train(config := edit_run("ar", "grpo.old_logprobs=trainer", level))
    [metrics] = metrics_of(config)
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1 and metrics["kl"] == 0
    assert 0 < metrics["sampling/sampling_logp_difference/max"] < 1e-4
    taken = torch.cat([actions.taken.sum(1) for actions, _ in losses])
    assert sorted(taken.tolist()) == [6] * 6 + [253] * 2
    for actions, counts in losses:
        assert torch.equal(counts.sample, actions.taken.sum(1))
        assert counts.batch == (6 * 6 + 2 * 253) / 2
        assert not actions.logprobs[~actions.taken].any() and not actions.old[~actions.taken].any()
        assert bool(actions.taken[:, -6:].all())


@pytest.mark.parametrize(
    "more",
    [
        ["optim.steps_per_backward=1"],
        ["tuning=full", "average={decay: 0.9}"],
    ],
    ids=["step by step", "full"],
)
def test_the_decoder_trains_on_text_and_edits(edit_run, more):
    train(config := edit_run("decoder", *more))
    [metrics] = metrics_of(config)
    assert metrics["ratio/min"] == pytest.approx(1, abs=1e-4)
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < metrics["grad_norm"] < 1e4 and metrics["updates/skipped"] == 0


def test_the_gate_covers_an_edit(edit_run, monkeypatch):
    """A leak into the unconditional pass tells in no argument of the DiT, but in the picture."""
    true = decoder.velocity

    class Leaky:
        def __init__(self, dit, seen):
            self.dit, self.seen = dit, seen

        def __call__(self, **kwargs):
            return self.dit(**(kwargs | {"kv_caches": self.seen.sources}))

    monkeypatch.setattr(decoder, "velocity", lambda d, x, t, s, g: true(Leaky(d, s), x, t, s, g))
    with pytest.raises(UserError, match="the engine's picture differs from GlmImagePipeline's"):
        train(edit_run("decoder"))


def test_the_gate_covers_an_edits_positions(engine, data, monkeypatch):
    rows = load_rows(data / "rows.jsonl")
    gate.check_edit(engine, rows[2].prompt, rows[2].sources, SIZE, "float32")

    def cumulative(is_source, sources):
        count = len(is_source)
        return Positions(torch.arange(count).expand(3, -1), count)

    monkeypatch.setattr(prompt, "prompt_positions", cumulative)
    with pytest.raises(UserError, match="the AR's own positions are others"):
        gate.check_edit(engine, rows[2].prompt, rows[2].sources, SIZE, "float32")


def test_a_cache_of_priors_holds_the_sources_tokens(
    edit_run, data, pipeline, tmp_path, monkeypatch
):
    """A run with it needs no AR: it asks what one without it would."""
    folder = shutil.copytree(data, tmp_path / "data")
    names = [f"data.train={folder}/rows.jsonl", f"rollout.prior_cache={tmp_path}/cache"]
    config = edit_run("decoder", *names)
    prior_making.fill_cache(config)
    rows = load_rows(folder / "rows.jsonl")
    engine = Engine.of(pipeline, config, progress=False)
    groups = draw_groups(rows, config.seed, 0, 4, 2)
    plain = DecoderStage(engine, edit_run("decoder")).requests(groups)
    with monkeypatch.context() as unread:
        unread.setattr(Engine, "encode_prior", None)
        cached = DecoderStage(engine, config).requests(groups)
        rollouts = engine.rollout(cached, range(2))
    for one, other, rollout in zip(plain, cached, rollouts, strict=True):
        assert torch.equal(one.prior, other.prior) and torch.equal(rollout.prior[0], one.prior)
        pairs = zip(one.source_tokens or (), other.source_tokens or (), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert len(one.sources) == len(other.source_tokens or ())
    CLEAN.rotate(90).save(folder / "other.png")
    with pytest.raises(UserError, match="2 rows have changed, such as .*rows.jsonl:3"):
        prior_making.fill_cache(config)


def test_evaluation_draws_edits_and_shows_their_sources(data, tmp_path, monkeypatch):
    drawn, true = [], Engine.decode

    def decode(self, requests, *rest):
        drawn.extend(len(request.sources) for request in requests)
        return true(self, requests, *rest)

    monkeypatch.setattr(Engine, "decode", decode)
    small = [f"data.eval={data}/rows.jsonl", "sampling.num_inference_steps=1", "eval.rewards=[]"]
    more = [SHARPNESS, "eval.bootstrap_samples=10", "eval.images_per_prompt=1"]
    config = str(ROOT / "configs" / "tiny" / "decoder.yaml")
    evaluate.main([config, *small, *more, "--output", str(tmp_path / "report")])
    pictures = sorted((tmp_path / "report" / "base").glob("*.png"))
    assert len(pictures) == 4 and {Image.open(p).size for p in pictures} == {(96, 64)}
    report = tmp_path / "report"
    found = json.loads((report / "results.json").read_text())
    assert [len(paths) for paths in found["sources"]] == drawn == [0, 1, 2, 1]
    assert Image.open(report / found["sources"][2][1]).size == (130, 100)
    page = (report / "index.html").read_text()
    assert page.count("<figcaption>source 1<") == 3 and page.count("<figcaption>source 2<") == 1
    assert len(found["rows"][0]["images"]) == 4


def drawn(tmp_path, *arguments: str) -> list[tuple[int, int]]:
    """Sizes of what `generate` writes in one denoising step."""
    out = tmp_path / "out"
    generate.main(["--model", str(MODEL), "--steps", "1", "--output", str(out), *arguments])
    return [Image.open(path).size for path in sorted(out.glob("*.png"))]


def test_generate_edits(data, tmp_path):
    """Each prompt edits all of --image; in a file each row its own, beside rows of text."""
    images = ["--image", str(data / "other.png"), "--image", str(data / "card.png")]
    one = [*images, "--prompt", "swap the two"]
    assert drawn(tmp_path / "a", *one) == [(128, 96)], "the first source's size"
    assert drawn(tmp_path / "b", *one, "--height", "64", "--width", "64") == [(64, 64)]
    rows = ["--prompts", str(data / "rows.jsonl")]
    assert drawn(tmp_path / "c", *rows) == [(96, 64), (96, 64), (96, 64), (128, 96)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a.png"], "--image = 'a.png': say what to make of it with --prompt"),
        (["--image", "a.png", "--prompt", "x"], r"--prompt\[0\]: sources\[0\] .*a.png' does not"),
    ],
)
def test_generate_refuses_before_weights_are_read(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("duet.inference.model.load_pipeline", None)
    with pytest.raises(UserError, match=message):
        drawn(tmp_path, *arguments)
    assert not (tmp_path / "out").exists()


def test_pictures_that_a_dataset_holds_are_sources(tmp_path, engine):
    """Lists of pictures, as `datasets` keeps them in parquet and in a saved one."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "sources": datasets.List(datasets.Image())}
    )
    table = {"prompt": ["swap them"], "sources": [[CLEAN, CLEAN.resize((64, 64))]]}
    made = datasets.Dataset.from_dict(table, features)
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        [row] = load_rows(path)
        ready = engine.ready(Request(row.prompt, (1,), SIZE, row.sources))
        assert [picture.size for picture in ready.sources] == [(96, 64), (64, 64)]


def test_one_source_and_a_list_of_one_are_alike():
    assert Row({"source": "a.png"}).sources == Row({"sources": ["a.png"]}).sources == ("a.png",)
    assert Row({"prompt": "a card"}).sources == ()
