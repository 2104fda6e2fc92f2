"""duet plan of edits: what sources hold by hand, the row that decides, and what the page says."""

import json
from dataclasses import dataclass

import pytest
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.policy_schema import Arithmetic, LoraConfig, SamplingConfig, SdeConfig
from duet.configs.row import Row
from duet.inference.layout import Size
from duet.inference.shapes import Scale
from duet.launch import cost, plan
from duet.train.kinds import Datasets, Kinds
from duet.train.made_up import Batch, Scoring
from duet.train.memory import Step, phases, step_of
from duet.train.workload import SOURCES, Subject, latents, update
from tests.conftest import MODEL, ROOT

EDIT = Size(64, 96), Size(64, 64)
DIT_TOKENS = 4 * (2 * 3 + 2 * 2)
SETTINGS = (
    "rollout.prompts_per_step=2",
    "rollout.num_generations=4",
    "rollout.batch_size=8",
    "optim.per_device_train_batch_size=8",
    "optim.gradient_accumulation_steps=1",
    "optim.steps_per_backward=0",
    "sampling.guidance_scale=1",
)


@dataclass(frozen=True)
class Planned:
    step: Step
    held: dict[str, dict[str, int]]  # bytes of each phase
    flops: dict[str, float]

    def total(self, phase: str) -> int:
        return sum(self.held[phase].values())


def config_of(stage: str):
    return load_config(ROOT / "configs" / "tiny" / f"{stage}.yaml", SETTINGS)


def planned(stage: str, kinds: Kinds) -> Planned:
    config = config_of(stage)
    step = step_of(config, MODEL, 1, Datasets(kinds, kinds))
    held = {phase.name: phase.held for phase in phases(config, step, 1)}
    return Planned(step, held, {found.phase: found.flops for found in cost.costs(config, step)})


def of_config(component: str) -> dict:
    return json.loads((MODEL / component / "config.json").read_text())


def test_the_decoder_holds_keys_and_values_of_each_groups_sources():
    """And what their passes keep for backward."""
    subject = Subject(MODEL, Arithmetic(), "decoder", LoraConfig(), False)
    sampling = SamplingConfig(height=64, width=96, guidance_scale=1.0)
    dit = of_config("transformer")
    a_token = dit["num_layers"] * 2 * dit["num_attention_heads"] * dit["attention_head_dim"] * 4
    by_hand = 2 * DIT_TOKENS * a_token
    text, edit = (
        update(subject, Scoring(sampling, SdeConfig(), 2, 1, 2, kinds))
        for kinds in (Kinds(), Kinds(False, EDIT))
    )
    assert text.held[SOURCES] == 0 and edit.held[SOURCES] == by_hand
    assert edit.held["activations"] > 1.5 * text.held["activations"]
    assert latents(subject, Batch(sampling, 2, 2, Kinds(False, EDIT))).kept[SOURCES] == by_hand


def test_the_ar_reads_sources_and_writes_no_preview():
    large = (Size(512, 512),) * 2
    text, edits, mixed = (
        planned("ar", kinds) for kinds in (Kinds(), Kinds(False, large), Kinds(True, large))
    )
    ar = of_config("vision_language_encoder")["text_config"]
    head = ar.get("head_dim") or ar["hidden_size"] // ar["num_attention_heads"]
    a_token = ar["num_hidden_layers"] * 2 * ar["num_key_value_heads"] * head * 4
    read, preview = 2 * 16 * 16, 13 * 19
    caches = [each.held["AR tokens"]["KV cache"] for each in (text, edits, mixed)]
    assert caches[1] - caches[0] == 8 * a_token * (read - preview)
    assert caches[2] == caches[1]
    for name in ("AR tokens", "old log-probs", "update"):
        assert edits.total(name) - text.total(name) > 0, name
        assert mixed.total(name) >= edits.total(name), name
    logits = [each.held["update"]["logits"] for each in (text, edits, mixed)]
    assert logits[1] * (preview + 6) == logits[0] * 6 and logits[2] == logits[0]
    assert edits.flops["AR tokens"] > 0 and edits.flops["update"] > text.flops["update"]


def test_a_source_of_the_released_model_holds_1_9_gib_a_group():
    """30 layers, 4,096 tokens of 4,096 numbers, keys and values, in bfloat16."""
    subject = Subject(Scale(), Arithmetic("bfloat16", "bf16"), "decoder", LoraConfig(), True)
    batch = Batch(SamplingConfig(), 8, 1, Kinds(False, (Size(1024, 1024),)))
    assert latents(subject, batch).kept[SOURCES] == 30 * 2 * 4096 * 4096 * 2


def row(*sizes: tuple[int, int]) -> Row:
    return Row({"prompt": "a card", "sources": [Image.new("RGB", size) for size in sizes]})


def test_the_row_with_the_most_source_tokens_decides():
    rows = [row((64, 64), (64, 64), (64, 64)), row((128, 128)), row((96, 64))]
    assert Kinds.of(rows, MODEL) == Kinds(False, (Size(128, 128),))
    assert Kinds.of([Row({"prompt": "a card"}), *rows], MODEL) == Kinds(True, (Size(128, 128),))
    assert Kinds.of([Row({"prompt": "a card"})], MODEL) == Kinds.of([], MODEL) == Kinds()
    assert Kinds.of(rows, Scale()).edit == (Size(512, 512),) * 3, "raised to the released bounds"
    with pytest.raises(UserError, match=r"row: sources\[1\]: a source of 10 x 10 pixels"):
        Kinds.of([row((64, 64), (10, 10))], MODEL)


def test_the_plan_says_which_edits_it_counts(tmp_path, monkeypatch, capsys):
    for name, size in (("a", (96, 64)), ("b", (64, 64))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    edits = tmp_path / "edits.jsonl"
    lines = [{"prompt": "a card"}, {"prompt": "both", "sources": ["a.png", "b.png"]}]
    edits.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(plan, "page", lambda *asked: [f"{asked[-1]}"])
    path = str(ROOT / "configs" / "tiny" / "both.yaml")
    plan.main([path, f"data.train={edits}", "data.eval=owner/captions", "train.eval_steps=5"])
    train, held_out, *pages = capsys.readouterr().out.splitlines()
    assert train.endswith("edits.jsonl': up to 2 sources of 2 x 3 and 2 x 2 tokens")
    assert held_out.endswith("'owner/captions': not counted, since it is not on this disk")
    assert pages == [f"{Datasets(Kinds(True, EDIT))}"] * 2
    plan.main([path])
    assert "prompts/train.jsonl': none" in capsys.readouterr().out
