"""Configs: every shipped file loads; every kind of mistake gets its own clear line."""

from pathlib import Path

import pytest

from duet.configs.load import load_config
from duet.configs.quotes import quoted_spans
from duet.configs.turns import turns

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny" / "ar.yaml"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_shipped_config_loads(path):
    parts = list(turns(load_config(path)))
    known = {"hacking": ["decoder"], "both": ["decoder", "ar"]}
    assert sorted(parts) == sorted(known.get(path.stem, [path.stem.removeprefix("edits_")]))


def test_overrides_reach_nested_keys_and_read_exponents_as_numbers():
    config = load_config(TINY, ["optim.learning_rate=1e-4", "train.resume=latest", "seed=7"])
    assert (config.optim.learning_rate, config.train.resume, config.seed) == (1e-4, "latest", 7)


def test_quoted_spans_follow_the_pipelines_own_rule():
    from diffusers import GlmImagePipeline

    prompt = 'say \'one\' and \u201ctwo\u201d and "three" and 「四」, it\'s "five"'
    assert quoted_spans(prompt) == GlmImagePipeline.get_glyph_texts(None, prompt)[0]
    assert set(quoted_spans("\u201ctwo\u201d 「四」")) == {"two", "四"}
