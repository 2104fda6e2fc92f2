"""Adapters that are not what training wrote, or not of this base; what a fresh one binds to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from duet.configs.digests import SUMS, write_digests
from duet.configs.errors import UserError
from duet.configs.policy_schema import Arithmetic, LoraConfig
from duet.inference.adapter_files import AdapterInfo, check_adapter
from duet.inference.adapters import add_adapter, load_adapter, save_adapter
from duet.inference.fingerprint import fingerprint
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.parts import PARTS
from tests.conftest import MODEL

STAGES = ["ar", "decoder"]
CONFIG, INFO = "adapter_config.json", "duet_adapter.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """An adapter of each stage."""
    pipeline, folders = load_pipeline(str(MODEL)), {}
    for stage, part in PARTS.items():
        module, folder = part.module(pipeline), tmp_path_factory.mktemp(stage)
        add_adapter(module, part, 2, 4.0)
        base = base_fingerprint(str(MODEL), part.component)
        info = AdapterInfo(stage, str(MODEL), base, Arithmetic(), LoraConfig(2, 4.0))
        save_adapter(module, folder, info)
        folders[stage] = folder
    return folders


@pytest.fixture(scope="module")
def bare():
    """Modules that no adapter comes to stand on: all here are refused before."""
    return load_pipeline(str(MODEL))


def weights_path(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def weights(change):
    """Other tensors, with the metadata as it was."""

    def damage(folder: Path) -> None:
        path = weights_path(folder)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        changed = change(dict(sorted(tensors.items())))
        save_file({n: t.contiguous() for n, t in changed.items()}, path, metadata)

    return damage


def one(change):
    """Another first tensor."""

    def damage(tensors):
        name = next(iter(tensors))
        return tensors | {name: change(tensors[name].clone())}

    return weights(damage)


def spoil(value: float):
    def change(tensor):
        tensor[0, 0] = value
        return tensor

    return one(change)


def rename(old: str, new: str):
    return weights(lambda t: {n.replace(old, new): v for n, v in t.items()})


def config(**changed):
    """PEFT's config, where the stage keeps it."""

    def damage(folder: Path) -> None:
        path = folder / CONFIG
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | changed))
            return
        path = weights_path(folder)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        told = json.loads(metadata["lora_adapter_metadata"]) | changed
        save_file(load_file(path), path, metadata | {"lora_adapter_metadata": json.dumps(told)})

    return damage


def info(**changed):
    def damage(folder: Path) -> None:
        path = folder / INFO
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return damage


def on_weights(change):
    return lambda folder: change(weights_path(folder))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def drop(test):
    return weights(lambda t: {n: v for i, (n, v) in enumerate(t.items()) if not test(i, n)})


LORA = {"rank": 2, "alpha": 4.0}
# each with digests that agree with it, so that what it says must be found wrong itself
MALFORMED = {
    "NaN": spoil(float("nan")),
    "inf": spoil(float("inf")),
    "-inf": spoil(float("-inf")),
    "half of the keys": drop(lambda i, n: i % 4 < 2),
    "all A": drop(lambda i, n: "lora_B" in n),
    "all B": drop(lambda i, n: "lora_A" in n),
    "a key less": drop(lambda i, n: i == 0),
    "a layer less": drop(lambda i, n: ".0." in n and ("q_proj" in n or "to_q" in n)),
    "a block less": drop(lambda i, n: "layers.0." in n or "blocks.0." in n),
    "no keys": drop(lambda i, n: True),
    "a key more": weights(lambda t: t | {"extra.lora_A.weight": torch.zeros(2, 4)}),
    "a layer of another name": rename(".0.", ".99."),
    "keys of another prefix": weights(lambda t: {f"x.{n}": v for n, v in t.items()}),
    "keys of other kinds": rename("lora_A", "lokr_w1"),
    "keys with an adapter's name": rename("lora_A.weight", "lora_A.default.weight"),
    "bfloat16": weights(lambda t: {n: v.bfloat16() for n, v in t.items()}),
    "float16 in one": one(lambda v: v.half()),
    "float64": weights(lambda t: {n: v.double() for n, v in t.items()}),
    "integers": one(lambda v: v.int()),
    "another rank": weights(lambda t: {n: torch.zeros(4, v.shape[1]) if "_A" in n else torch.zeros(v.shape[0], 4) for n, v in t.items()}),
    "rank 1, which would broadcast": one(lambda v: v[:1]),
    "transposed": one(lambda v: v.T),
    "a vector": one(lambda v: v.flatten()),
    "a scalar": one(lambda v: v[0, 0]),
    "no values": one(lambda v: v[:, :0]),
    "another width": one(lambda v: v[:, :-1] if v.shape[0] == 2 else v[:-1]),
    "its config's rank": config(r=4),
    "its config's scale": config(lora_alpha=8.0),
    "its config's targets": config(target_modules=["to_q"]),
    "rslora": config(use_rslora=True),
    "dora": config(use_dora=True),
    "alpha by pattern": config(alpha_pattern={"q_proj": 99}),
    "rank by pattern": config(rank_pattern={"q_proj": 1}),
    "biases": config(bias="all"),
    "some layers": config(layers_to_transform=[0]),
    "transposed by config": config(fan_in_fan_out=True),
    "a new kind switched on": config(use_novelty=True),
    "another method": config(peft_type="LOHA"),
    "targets of no kind": config(target_modules=None),
    "told rank": info(lora={"rank": 4, "alpha": 4.0}),
    "told scale": info(lora=LORA | {"alpha": 5.0}),
    "told targets": info(lora=LORA | {"target_modules": ["nothing"]}),
    "no stage": info(stage=None),
    "another stage": info(stage="vae"),
    "another dtype": info(arithmetic={"dtype": "int8"}),
    "another base": info(base="0" * 64),
    "a base of no kind": info(base=7),
    "unknown key": info(novelty=1),
    "not JSON": lambda f: (f / INFO).write_text("{"),
    "a list": lambda f: (f / INFO).write_text("[]"),
    "cut short": on_weights(lambda p: p.write_bytes(p.read_bytes()[:-9])),
    "empty": on_weights(lambda p: p.write_bytes(b"")),
    "a header of garbage": on_weights(lambda p: p.write_bytes(b"\xff" * 99)),
    "a folder for weights": on_weights(lambda p: (p.unlink(), p.mkdir())),
    "no weights": on_weights(Path.unlink),
}  # fmt: skip
# what only the digests can tell
UNTOLD = {
    "a flipped byte": on_weights(flip),
    "another's weights": weights(lambda t: {n: v + 1 for n, v in t.items()}),
    "another arithmetic": info(arithmetic={"dtype": "bfloat16"}),
    "no list of digests": lambda f: (f / SUMS).unlink(),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*MALFORMED, *UNTOLD])
def test_a_malformed_adapter_is_refused(made, bare, stage, name, tmp_path):
    folder = Path(shutil.copytree(made[stage], tmp_path / "adapter"))
    if name in MALFORMED:
        MALFORMED[name](folder)
        write_digests(folder)
    else:
        UNTOLD[name](folder)
    with pytest.raises(UserError) as refused:
        check_adapter(folder, str(MODEL))
        load_adapter(load_pipeline(str(MODEL)), folder)  # widths and missing layers need the module
    assert len(str(refused.value).splitlines()) == 1 and str(folder) in str(refused.value)


def test_there_are_fifty_one():
    assert len(MALFORMED | UNTOLD) >= 51


@pytest.mark.parametrize("stage", STAGES)
def test_the_other_stages_adapter_is_not_taken(made, stage, tmp_path):
    folder = Path(shutil.copytree(made[stage], tmp_path / "adapter"))
    other = "decoder" if stage == "ar" else "ar"
    info(stage=other)(folder)
    write_digests(folder)
    with pytest.raises(UserError, match="another"):
        check_adapter(folder, str(MODEL))


def test_what_is_missing_is_named(made, tmp_path):
    folder = Path(shutil.copytree(made["ar"], tmp_path / "adapter"))
    told = json.loads((folder / INFO).read_text())
    for key in ("base", "lora"):
        del told[key]
    (folder / INFO).write_text(json.dumps(told))
    with pytest.raises(UserError, match="missing or damaged .*missing key"):
        check_adapter(folder, str(MODEL))  # with digests none is of an older Duet
    (folder / SUMS).unlink()
    with pytest.raises(UserError, match="written by an older Duet"):
        check_adapter(folder, str(MODEL))
    (folder / INFO).unlink()
    with pytest.raises(UserError, match="has no duet_adapter.json, .* not of Duet's training"):
        check_adapter(folder, str(MODEL))


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "copy"))


def test_a_base_is_known_by_its_weights_not_by_its_path(made, copied, tmp_path):
    for stage, folder in made.items():
        assert check_adapter(folder, str(copied)).stage == stage
    (tmp_path / "link").symlink_to(copied)
    check_adapter(made["ar"], str(tmp_path / "link"))
    component = copied / "transformer"
    whole, [path] = fingerprint(component), component.glob("*.safetensors")
    tensors = load_file(path)
    names = sorted(tensors)
    for i, half in enumerate((names[::2], names[1::2])):  # other shards, another order
        save_file({n: tensors[n] for n in half}, component / f"model-{i}.safetensors")
    path.unlink()
    assert fingerprint(component) == whole


def test_one_layer_trained_is_another_base(made, copied):
    [path] = (copied / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    name = "transformer_blocks.1.attn1.to_q.weight"
    tensors[name] += 1e-3 * torch.randn(tensors[name].shape)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="was trained on another transformer than that of"):
        check_adapter(made["decoder"], str(copied))
    with pytest.raises(UserError, match="another transformer"):
        load_adapter(load_pipeline(str(copied)), made["decoder"])
    check_adapter(made["ar"], str(copied))  # its own part is the same


@pytest.mark.parametrize(
    ("stage", "targets", "told"),
    [
        ("decoder", ["to_q", "to_kk"], "'to_kk' fits no layer; near it are 'to_k'"),
        ("ar", ["q_proj", "qkv"], "'qkv' fits model.visual.* which is not trained"),
        ("ar", ["embed_tokens"], "fits model.language_model.embed_tokens, which is not trained"),
        ("ar", ["mlp"], "fits .*mlp, which is not trained"),
        ("ar", ["all-linear"], "'all-linear' fits no layer"),
        ("ar", [""], "'' fits no layer"),
    ],
)
def test_every_target_binds(bare, stage, targets, told):
    part = PARTS[stage]
    with pytest.raises(UserError, match=told):
        add_adapter(part.module(bare), part, 2, 4.0, targets)
    assert not [n for n, _ in part.module(bare).named_parameters() if "lora" in n]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_bound_is_counted(stage):
    part, pipeline = PARTS[stage], load_pipeline(str(MODEL))
    module = part.module(pipeline)
    bound = add_adapter(module, part, 2, 4.0)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert (bound.layers, bound.parameters) == (len(trained) // 2, sum(p.numel() for p in trained))
