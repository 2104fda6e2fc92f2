"""Full weights in a folder: which are refused, and which go onto a model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duet.configs.digests import SUMS, write_digests
from duet.configs.errors import UserError
from duet.configs.policy_schema import Arithmetic
from duet.inference.adapters import add_adapter
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.parts import PARTS
from duet.inference.provenance import Provenance
from duet.inference.trained import averaged, check_trained, load_trained
from duet.inference.weights import INFO, restore_weights, save_weights
from tests.conftest import MODEL, train

STAGES = ["ar", "decoder"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """Full weights of each stage: those of the base."""
    pipeline, folders = load_pipeline(str(MODEL)), {}
    for stage, part in PARTS.items():
        folders[stage] = tmp_path_factory.mktemp(stage) / "weights"
        base = base_fingerprint(str(MODEL), part.component)
        told = Provenance(stage, str(MODEL), base, Arithmetic())
        save_weights(part.module(pipeline), folders[stage], told)
    return folders


@pytest.fixture(scope="module")
def bare():
    """A model that none of the weights here come to stand on."""
    return load_pipeline(str(MODEL))


def tensors(change):
    """Other tensors: what `change` makes of all, by name."""

    def damage(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        changed = change(dict(sorted(load_file(path).items())))
        save_file({n: t.contiguous() for n, t in changed.items()}, path, {"format": "pt"})

    return damage


def first(change):
    """Another first tensor."""
    return tensors(lambda t: t | {next(iter(t)): change(t[next(iter(t))].clone())})


def info(**changed):
    def damage(folder: Path) -> None:
        told = json.loads((folder / INFO).read_text())
        (folder / INFO).write_text(json.dumps(told | changed))

    return damage


def on_file(change):
    return lambda folder: change(next(folder.glob("*.safetensors")))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# each with digests that agree with it, and what is told of it
MALFORMED = {
    "NaN": (first(lambda v: v.fill_(float("nan"))), "not finite"),
    "inf": (first(lambda v: v.fill_(float("inf"))), "not finite"),
    "a key less": (tensors(lambda t: dict(list(t.items())[1:])), "stands on one side only"),
    "a key more": (tensors(lambda t: t | {"more": torch.zeros(1)}), "stands on one side only"),
    "no keys": (tensors(lambda t: {}), "no safetensors|one side only"),
    "another shape": (first(lambda v: v[..., :-1]), "another shape"),
    "a shape that would broadcast": (first(lambda v: v[:1]), "another shape"),
    "bfloat16": (tensors(lambda t: {n: v.bfloat16() for n, v in t.items()}), "not float32"),
    "a name in two files": (
        on_file(lambda p: shutil.copy(p, p.with_name("more.safetensors"))),
        "stands in two files",
    ),
    "cut short": (on_file(lambda p: p.write_bytes(p.read_bytes()[:-9])), "damaged"),
    "empty": (on_file(lambda p: p.write_bytes(b"")), "damaged"),
    "no weights": (on_file(Path.unlink), "no safetensors"),
    "another base": (info(base="0" * 64), "was trained on another"),
    "no stage": (info(stage="vae"), "stage = 'vae'"),
    "an adapter's key": (info(lora={"rank": 2}), "unknown key 'duet_weights.json.lora'"),
    "not JSON": (lambda f: (f / INFO).write_text("{"), "damaged"),
}
# what only the digests can tell
UNTOLD = {
    "a flipped byte": (on_file(flip), "its digest differs"),
    "another arithmetic": (info(arithmetic={"dtype": "bfloat16"}), "its digest differs"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no list of digests": (lambda f: (f / SUMS).unlink(), "SHA256SUMS cannot be read"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*MALFORMED, *UNTOLD])
def test_malformed_weights_are_refused(written, bare, stage, name, tmp_path):
    folder = Path(shutil.copytree(written[stage], tmp_path / "weights"))
    damage, told = (MALFORMED | UNTOLD)[name]
    damage(folder)
    if name in MALFORMED:
        write_digests(folder)
    with pytest.raises(UserError, match=told) as refused:
        check_trained(folder, str(MODEL))
        load_trained(bare, folder)  # names and shapes need the module
    assert len(str(refused.value).splitlines()) == 1 and str(folder) in str(refused.value)


@pytest.mark.parametrize("stage", STAGES)
def test_full_weights_know_their_part(written, bare, stage, tmp_path):
    for checkpoint in (written[stage], written[stage].parent):
        assert check_trained(checkpoint, str(MODEL)).stage == stage
    other = next(s for s in STAGES if s != stage)
    with pytest.raises(UserError, match="stands on one side only"):
        restore_weights(PARTS[other].module(bare), written[stage])
    tuned = load_pipeline(str(MODEL))
    add_adapter(PARTS[stage].module(tuned), PARTS[stage], 2, 4.0)
    with pytest.raises(UserError, match=f"the {stage} has an adapter already"):
        load_trained(tuned, written[stage])
    with pytest.raises(UserError, match="holds no average: it was trained without `average`"):
        averaged(written[stage].parent)


def test_large_weights_lie_in_several_files(written, tmp_path):
    """As stock writes them: shards and an index."""
    module, folder = load_pipeline(str(MODEL)).transformer, tmp_path / "weights"
    shutil.copytree(written["decoder"], folder)
    next(folder.glob("*.safetensors")).unlink()
    module.save_pretrained(folder, max_shard_size="3MB")
    write_digests(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_pipeline(str(MODEL), "bfloat16")
    load_trained(loaded, folder)
    expected, found = module.state_dict(), loaded.transformer.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_full_tuning_in_low_precision_needs_autocast(small_run):
    with pytest.raises(UserError, match="train.mixed_precision = 'no' .* 'bf16' or 'fp16' with"):
        train(small_run("ar", "tuning=full", "model.dtype=bfloat16"))
