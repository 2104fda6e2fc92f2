"""duet plan of edits: what sources hold by hand, the row that decides, and what the page says."""

import json

import pytest

from duet.configs.load import load_config
from duet.inference.layout import Size
from duet.launch import cost
from duet.train.kinds import Datasets, Kinds
from duet.train.memory import phases, step_of
from tests.conftest import MODEL, ROOT

SOURCES = Size(64, 96), Size(64, 64)
EDITS = Kinds(False, SOURCES)
TOKENS = 2 * 3 + 2 * 2  # of the AR; the DiT has four times as many
SETTINGS = (
    "rollout.prompts_per_step=4",
    "rollout.num_generations=4",
    "rollout.batch_size=8",
    "optim.per_device_train_batch_size=8",
    "optim.gradient_accumulation_steps=1",
    "optim.steps_per_backward=0",
    "grpo.beta=0.1",
)


def planned(stage: str, kinds: Kinds, *overrides: str):
    """What each phase holds, and what it costs."""
    config = load_config(ROOT / "configs" / "tiny" / f"{stage}.yaml", [*SETTINGS, *overrides])
    step = step_of(config, MODEL, 1, Datasets(kinds, kinds))
    held = {phase.name: phase.held for phase in phases(config, step, 1)}
    return held, {found.phase: found for found in cost.costs(config, step)}


@pytest.fixture(scope="module")
def dit():
    return json.loads((MODEL / "transformer" / "config.json").read_text())


def kept_by_layers(dit, groups: int) -> int:
    """Keys and values of the sources in float32."""
    width = dit["num_attention_heads"] * dit["attention_head_dim"]
    return groups * dit["num_layers"] * 2 * 4 * TOKENS * width * 4


@pytest.fixture(scope="module")
def of_decoder():
    return {kinds: planned("decoder", kinds) for kinds in (Kinds(), EDITS)}


def test_the_decoder_holds_keys_and_values_of_each_group(dit, of_decoder):
    (text, _), (edits, _) = of_decoder.values()
    name = "keys, values of sources"
    two = kept_by_layers(dit, 2)  # batches and micro-batches of 8 are two groups
    assert edits["latents"][name] == edits["update"][name] == two
    assert not any(name in phase for phase in text.values())
    # nothing of a source is a sample's own: what attention reads is copied layer by layer
    more = {n: sum(edits[n].values()) - sum(text[n].values()) for n in text if n != "AR tokens"}
    for phase in ("latents", "old log-probs", "reference", "update"):
        assert more[phase] >= two, phase
    assert more["update"] > 3 * more["latents"], "backward goes through the sources' passes"
    assert edits["sources"]["VAE encode"] > 0 and "sources" not in text


def test_the_decoder_computes_a_pass_a_source(dit, of_decoder):
    (_, text), (_, edits) = of_decoder.values()
    assert edits["latents"].flops > text["latents"].flops
    assert edits["update"].flops > text["update"].flops
    assert edits["reference"].flops > text["reference"].flops
    with_one, with_two = (
        planned("decoder", Kinds(False, SOURCES[:1] * n))[1]["sources"].flops for n in (1, 2)
    )
    assert with_two == 2 * with_one, "a source of each group is encoded once"


def test_the_ar_reads_the_sources_of_each_prompt():
    """An edit writes no preview: by hand with so many tokens to read as a preview has, and more."""
    config = json.loads((MODEL / "vision_language_encoder" / "config.json").read_text())
    text_config = config["text_config"]
    head = (
        text_config.get("head_dim")
        or text_config["hidden_size"] // text_config["num_attention_heads"]
    )
    a_token = text_config["num_hidden_layers"] * 2 * text_config["num_key_value_heads"] * head * 4
    (text, spent), (edits, more) = (planned("ar", kinds) for kinds in (Kinds(), EDITS))
    preview = 247
    by_hand = 8 * a_token * (TOKENS - preview)
    assert edits["AR tokens"]["KV cache"] - text["AR tokens"]["KV cache"] == by_hand
