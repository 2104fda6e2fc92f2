"""Prior tokens of the decoder's groups: where they come from, and the cache on the disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.row import Row
from duet.configs.rows import load_rows
from duet.configs.schema import RunConfig
from duet.inference.engine import Engine
from duet.inference.model import Unread, load_pipeline
from duet.train import prior_making, priors, scoring, setup
from duet.train.prior_cache import ROWS, PriorCache
from duet.train.prior_stamp import differences, make_stamp
from duet.train.prior_tokens import make_priors
from duet.train.prompts import draw_groups
from duet.train.stages import DecoderStage
from tests import forked
from tests.conftest import MODEL, ROOT, SIZE, train

TINY = ROOT / "configs" / "tiny"
SMALL = [
    "rollout.prompts_per_step=2",
    "rollout.num_generations=2",
    "rollout.priors_per_prompt=2",
    "optim.per_device_train_batch_size=4",
    "optim.lr_scheduler_type=constant",
    "sampling.num_inference_steps=6",
    "train.trackers=[]",
    "rewards=[{name: duet.train.tiny.hackable.Sharpness}]",
]


def write_rows(path: Path, count: int) -> list[dict]:
    """Prompts of which the first has a picture too."""
    lines = (TINY / "prompts" / "train.jsonl").read_text().splitlines()[:count]
    rows = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    shutil.copy(TINY / "prompts" / "train" / "000.png", path.with_name("reference.png"))
    rows[0]["image"] = "reference.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A user's folder: two parts' rows in rows.jsonl and their priors in cache."""
    folder = tmp_path_factory.mktemp("made")
    write_rows(folder / "rows.jsonl", ROWS + 2)
    prior_making.fill_cache(config_of(folder))
    return folder


def named(folder: Path, *overrides: str) -> list[str]:
    """Overrides that make the tiny decoder's config a small run in that folder."""
    return [
        *SMALL,
        f"data.train={folder}/rows.jsonl",
        f"output_dir={folder}/run",
        f"rollout.prior_cache={folder}/cache",
        *overrides,
    ]


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return load_config(TINY / "decoder.yaml", named(folder, *overrides))


@pytest.fixture
def copied(made, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(made, tmp_path / "copied")


@pytest.fixture
def unread(monkeypatch):
    """Weights may not be read: neither the model's nor a reward's."""

    def refuse(*args):
        raise AssertionError("weights are read")

    for module, name in (
        (setup, "load_pipeline"),
        (scoring, "load_rewards"),
        (prior_making, "load_pipeline"),
    ):
        monkeypatch.setattr(module, name, refuse)


def told(work, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_run_with_a_cache_is_the_run_without_one(tmp_path, monkeypatch):
    """To the bit, for as many epochs as the cache has priors; resumed besides. Without the AR."""
    write_rows(tmp_path / "rows.jsonl", 3)
    config = config_of(tmp_path, "train.max_steps=3", "train.save_steps=1")
    prior_making.fill_cache(config)
    plain = f"output_dir={tmp_path}/plain", "rollout.prior_cache=null", "train.max_steps=3"
    expected = train(config_of(tmp_path, *plain))  # two epochs of three rows
    loaded, true = [], load_pipeline

    def load(*args):
        loaded.append(true(*args))
        return loaded[-1]

    monkeypatch.setattr(setup, "load_pipeline", load)
    train(config_of(tmp_path, "train.max_steps=2"))
    found = train(config_of(tmp_path, "train.max_steps=3", "train.resume=latest"))
    assert all(isinstance(p.vision_language_encoder, Unread) for p in loaded) and loaded
    (ours,), (theirs,) = ((p / "adapter").glob("*.safetensors") for p in (found, expected))
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(v.abs().max() > 0 for k, v in ours.items() if "lora_B" in k)
    both = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("run", "plain"))
    for one, other in zip(*both, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert all(one[key] == other[key] for key in ("loss", "grad_norm", "reward", "ratio/mean"))


def test_a_group_has_the_prior_of_its_epoch(made, pipeline):
    """What sampling would draw for it; after the last one the first again."""
    config = config_of(made)
    engine = Engine.of(pipeline, config, progress=False)
    rows, stage = load_rows(made / "rows.jsonl"), DecoderStage(engine, config)
    groups = [g for step in range(4) for g in draw_groups(rows, 0, step, len(rows), 2)]
    given = {
        (g.epoch, g.index): r.prior for g, r in zip(groups, stage.requests(groups), strict=True)
    }
    assert len(given) == 4 * len(rows)
    sampled = make_priors(
        engine, SIZE, "auto", rows=[g.row for g in groups], seeds=[(g.fixed_seed,) for g in groups]
    )
    changed = 0
    for group, own in zip(groups, sampled, strict=True):
        prior = given[group.epoch, group.index]
        assert torch.equal(prior, given[group.epoch % 2, group.index])
        if group.epoch < 2:
            assert torch.equal(prior, own.tokens[0])
            changed += not torch.equal(prior, given[1 - group.epoch, group.index])
    assert changed > len(rows), "a prompt's two priors are different ones"


def test_sources(engine):
    row = Row({"prompt": "a red card", "image": str(TINY / "prompts/train/000.png")})
    plain = Row({"prompt": "a red card"})
    encoded, drawn = (
        make_priors(engine, SIZE, source, [row], [(5, 6)])[0].tokens
        for source in ("reference", "sampled")
    )
    assert len(encoded) == 1 and len(drawn) == 2
    both = make_priors(engine, SIZE, "auto", [plain, row, plain], [(5, 6)] * 3)
    for one, other in zip(both, (drawn, encoded, drawn), strict=True):
        assert torch.equal(one.tokens, other)


STALE = {
    "seed=1": "seed is 1 and was 0",
    "sampling.height=96": "sampling.height is 96 and was 64",
    "sampling.width=64": "sampling.width is 64 and was 96",
    "sampling.temperature=0.5": "sampling.temperature is 0.5 and was 1.0",
    "sampling.top_k=5": "sampling.top_k is 5 and was 0",
    "sampling.top_p=0.5": "sampling.top_p is 0.5 and was 0.9",
    "rollout.priors=sampled": "rollout.priors is 'sampled' and was 'auto'",
    "rollout.priors_per_prompt=3": "rollout.priors_per_prompt is 3 and was 2",
    "model.dtype=bfloat16": "model.dtype is 'bfloat16' and was 'float32'",
    "train.mixed_precision=bf16": "train.mixed_precision is 'bf16' and was 'no'",
}


@pytest.mark.parametrize("override", STALE)
def test_other_settings_are_refused(override, made, unread):
    for work in (train, prior_making.fill_cache):
        line = told(work, config_of(made, override))
        assert f"is stale: {STALE[override]}" in line
        assert line.endswith("`duet priors CONFIG rollout.prior_cache=ANOTHER_FOLDER`")


def other_prompt(lines):
    lines[4] = json.dumps({"prompt": "a card of another kind"})


def one_more(lines):
    lines.append(lines[-1])


def other_order(lines):
    lines[5], lines[6] = lines[6], lines[5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_prompt, "1 rows have changed, such as {rows}:5"),
        (other_order, "2 rows have changed, such as {rows}:6"),
        (one_more, f"data.train has {ROWS + 3} rows and had {ROWS + 2}"),
    ],
)
def test_other_rows_are_refused(change, reason, copied, unread):
    rows = copied / "rows.jsonl"
    lines = rows.read_text().splitlines()
    change(lines)
    rows.write_text("\n".join(lines))
    assert reason.format(rows=rows) in told(train, config_of(copied))


def test_another_reference_picture_is_refused(copied, unread):
    """By its content: its name is the same."""
    shutil.copy(TINY / "prompts" / "train" / "001.png", copied / "reference.png")
    assert f"1 rows have changed, such as {copied}/rows.jsonl:1" in told(train, config_of(copied))


def test_what_priors_are_not_made_from_may_change(copied):
    """Other columns, the decoder's settings, places of files."""
    rows = [json.loads(line) for line in (copied / "rows.jsonl").read_text().splitlines()]
    (copied / "moved.jsonl").write_text("".join(json.dumps(r | {"text": "X"}) + "\n" for r in rows))
    shutil.copytree(copied / "cache", copied / "elsewhere")
    changes = [
        f"data.train={copied}/moved.jsonl",
        f"rollout.prior_cache={copied}/elsewhere",
        "sampling.guidance_scale=2",
        "model.offload=phase",
        "rollout.num_generations=4",
        "train.max_steps=1",
        "lora.rank=4",
    ]
    assert train(config_of(copied, *changes)).name == "checkpoint-1"


def test_another_ar_is_refused_and_another_decoder_is_not(copied, monkeypatch, unread):
    model = shutil.copytree(MODEL, copied / "model")
    config = config_of(copied, f"model.path={model}")
    for component, name in (
        ("transformer", "diffusion_pytorch_model"),
        ("vision_language_encoder", "model"),
    ):
        path = model / component / f"{name}.safetensors"
        weights = load_file(path)
        largest = max(weights, key=lambda n: weights[n].numel())
        weights[largest] = weights[largest] * 1.5
        save_file(weights, path, {"format": "pt"})
        if component == "transformer":
            with pytest.raises(AssertionError, match="weights are read"):
                train(config)
    assert told(train, config).count("stale") == 1
    assert f"the AR of model.path = {str(model)!r} has other weights" in told(train, config)


def test_another_adapter_of_the_ar_is_refused(made):
    config, rows = config_of(made), load_rows(made / "rows.jsonl")
    stamp = make_stamp(config, rows, "ab")
    assert list(differences(stamp, stamp, config, rows)) == []
    [line] = differences(stamp | {"adapter": "cd"}, stamp, config, rows)
    assert line == "the AR of model.adapters = [] is another"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *((n, h) for n in ("priors-000001.safetensors", "stamp.json") for h in (cut, flip)),
        *((n, Path.unlink) for n in ("priors-000001.safetensors", "stamp.json", "SHA256SUMS")),
    ],
)
def test_a_damaged_cache_is_told_with_its_file(name, harm, copied, unread):
    harm(copied / "cache" / "priors" / name)
    for work in (train, prior_making.fill_cache):
        line = told(work, config_of(copied))
        assert "is damaged" in line and name in line and "`duet priors CONFIG`" in line


def test_a_part_that_is_lost_during_the_run_is_told(copied, engine):
    stage = DecoderStage(engine, config_of(copied))
    rows = load_rows(copied / "rows.jsonl")
    groups = draw_groups(rows, 0, 0, len(rows), 2)
    for harm in (cut, Path.unlink):
        harm(copied / "cache" / "priors" / "priors-000001.safetensors")
        assert "priors-000001.safetensors' cannot be read" in told(stage.requests, groups)


class Interrupted(Exception):
    pass


def test_an_interrupted_making_goes_on(made, tmp_path, monkeypatch):
    shutil.copy(made / "rows.jsonl", tmp_path), shutil.copy(made / "reference.png", tmp_path)
    config, true, written = config_of(tmp_path), PriorCache.write, []

    def write(cache, part, priors):
        if len(written) == 1:
            raise Interrupted
        true(cache, part, priors)
        written.append(part)

    monkeypatch.setattr(PriorCache, "write", write)
    with pytest.raises(Interrupted):
        prior_making.fill_cache(config)
    assert written == [0] and not (tmp_path / "cache" / "priors").exists()
    assert "holds no finished prior tokens: make them with `duet priors CONFIG`" in told(
        train, config
    )
    other = told(prior_making.fill_cache, config_of(tmp_path, "sampling.top_p=0.5"))
    assert "which was begun, is stale: sampling.top_p is 0.5 and was 0.9" in other
    written.clear()
    monkeypatch.setattr(
        PriorCache, "write", lambda *args: (true(*args), written.append(args[1]))[0]
    )
    prior_making.fill_cache(config)
    assert written == [1]
    assert contents(tmp_path / "cache/priors") == contents(made / "cache/priors")


def test_a_damaged_part_of_an_interrupted_making_is_made_again(made, tmp_path, copied):
    partial = (copied / "cache" / "priors").rename(copied / "cache" / ".priors.partial")
    cut(partial / "priors-000000.safetensors")
    (partial / "priors-000001.safetensors").unlink()
    prior_making.fill_cache(config_of(copied, "model.offload=phase"))
    assert contents(copied / "cache/priors") == contents(made / "cache/priors")


def test_a_cache_that_stands_is_left_as_it_is(copied, unread, capsys):
    before = contents(copied / "cache" / "priors")
    priors.main([str(TINY / "decoder.yaml"), *named(copied)])
    out = capsys.readouterr()
    assert "there already" in out.err and out.out.split() == [
        "prior",
        "tokens:",
        f"{copied}/cache/priors",
    ]
    told(prior_making.fill_cache, config_of(copied, "seed=9"))
    assert contents(copied / "cache" / "priors") == before


@pytest.mark.parametrize(
    ("stage", "overrides", "reason"),
    [
        ("ar", ["rollout.prior_cache=gone"], "stage = 'ar': only the decoder's groups"),
        ("decoder", [], "rollout.prior_cache = null: name the folder to fill"),
        ("decoder", ["rollout.prior_cache=README.md"], "is a file: name a folder"),
    ],
)
def test_nothing_to_fill_is_told(stage, overrides, reason, unread):
    assert reason in told(priors.main, [str(TINY / f"{stage}.yaml"), *overrides])
    assert not Path("gone").exists()


def test_a_row_without_the_reference_that_is_asked_for_is_told(made, unread):
    for work in (train, prior_making.fill_cache):
        line = told(work, config_of(made, "rollout.priors=reference"))
        assert line.startswith(f"{made}/rows.jsonl:2 has no image to encode")


def test_a_disk_that_is_full_is_told_and_what_is_made_is_kept(copied, monkeypatch):
    partial = (copied / "cache" / "priors").rename(copied / "cache" / ".priors.partial")
    (partial / "priors-000001.safetensors").unlink()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    line = told(prior_making.fill_cache, config_of(copied))
    assert "priors-000001.safetensors' (No space left on device): what was made is kept" in line
    assert (partial / "priors-000000.safetensors").is_file()
    assert not (partial / "priors-000001.safetensors").exists()


def test_two_processes_share_the_making(made, tmp_path):
    """And make the very files of one."""
    for name in ("rows.jsonl", "reference.png"):
        shutil.copy(made / name, tmp_path)
    arguments = [str(TINY / "decoder.yaml"), *named(tmp_path)]
    done = forked.run("duet.train.priors", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cache/priors") == contents(made / "cache/priors")
