"""PickScore and HPSv2.1 on tiny weights of the same form, against computations of their own."""

import json

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput
from duet.rewards.registry import load_reward, load_rewards
from tests.conftest import CLIP
from tests.pictures import CLEAN, PICTURES

TINY = {"model": CLIP, "pretrained": None}


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory):
    """A CLIP of transformers with random weights and the processor for it."""
    folder = tmp_path_factory.mktemp("pick")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=size
        | {
            "vocab_size": len(words),
            "eos_token_id": 1,
            "bos_token_id": 0,
            "max_position_embeddings": 77,
        },
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(1)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def test_pickscore_is_the_models_own_logit(pick_folder):
    """CLIPModel.forward computes scale * cosine by itself, for every image with every text."""
    reward = load_reward(
        RewardConfig(
            "pickscore",
            args={"model": pick_folder, "processor": pick_folder, "batch_size": 2, "device": "cpu"},
        )
    )
    images, prompts = (
        [CLEAN, PICTURES["strong noise"], PICTURES["flat colour"]],
        ["a cat", "two dogs and a bird", "b " * 40],
    )
    ours = reward([RewardInput(i, p, {}) for i, p in zip(images, prompts, strict=True)])
    processor, model = (
        CLIPProcessor.from_pretrained(pick_folder),
        CLIPModel.from_pretrained(pick_folder).eval(),
    )
    for one, image, prompt in zip(ours, images, prompts, strict=True):
        inputs = processor(
            text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=77
        )
        assert one == pytest.approx(model(**inputs).logits_per_image.item(), abs=1e-4)
    assert len({round(s, 3) for s in ours}) == 3
    long = [RewardInput(CLEAN, "b " * 99 + end, {}) for end in ("cat", "dog")]
    assert len(set(reward(long))) == 2, "words beyond the tower's length count"


@pytest.fixture(scope="module")
def hps_args(tmp_path_factory):
    """A tiny open_clip model known by name, and its weights in the form of HPS_v2.1_compressed.pt."""
    folder = tmp_path_factory.mktemp("hps")
    tower = {"width": 32, "layers": 2, "heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    config = {
        "embed_dim": 16,
        "vision_cfg": vision,
        "text_cfg": tower | {"context_length": 77, "vocab_size": 49408},
    }
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(2)
    state = {"state_dict": open_clip.create_model("tiny-hps", pretrained=None).state_dict()}
    torch.save(state, folder / "hps.pt")
    return {"model": "tiny-hps", "checkpoint": str(folder / "hps.pt"), "device": "cpu"}


def test_hpsv2_is_the_cosine_of_the_checkpoints_embeddings(hps_args):
    ours = load_reward(RewardConfig("hpsv2", args=hps_args))(
        [RewardInput(CLEAN, "a cat", {}), RewardInput(PICTURES["blur"], "a dog", {})]
    )
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-hps", pretrained=None)
    model.load_state_dict(torch.load(hps_args["checkpoint"])["state_dict"])
    model.eval()
    for one, image, prompt in zip(ours, (CLEAN, PICTURES["blur"]), ("a cat", "a dog"), strict=True):
        a = model.encode_image(preprocess(image)[None])[0]
        b = model.encode_text(open_clip.get_tokenizer("tiny-hps")([prompt]))[0]
        assert one == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-5)
        assert -1 <= one <= 1


def test_hpsv2_without_a_checkpoint_has_it_from_the_hub(hps_args, monkeypatch):
    path = hps_args["checkpoint"]
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *asked: asked == ("xswu/HPSv2", "HPS_v2.1_compressed.pt") and path,
    )
    sample = [RewardInput(CLEAN, "a cat", {})]
    had = load_reward(RewardConfig("hpsv2", args={"model": "tiny-hps", "device": "cpu"}))
    assert had(sample) == load_reward(RewardConfig("hpsv2", args=hps_args))(sample)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            RewardConfig("pickscore", args={"model": "/gone", "processor": "/gone"}),
            "pickscore model '/gone' cannot be loaded",
        ),
        (RewardConfig("hpsv2", args={"checkpoint": "/gone.pt"}), "/gone.pt.*cannot be loaded"),
        (RewardConfig("hpsv2"), "hpsv2: HPS_v2.1_compressed.pt cannot be had"),
        (RewardConfig("aesthetic", args=TINY | {"head": "gone.pth"}), "'gone.pth': no such file"),
        (
            RewardConfig("aesthetic", args=TINY | {"head": "pyproject.toml"}),
            "'pyproject.toml' cannot be read",
        ),
    ],
)
def test_missing_weights_are_told_by_load(config, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_reward(config)
    with pytest.raises(UserError, match=message):
        load_rewards([config])
