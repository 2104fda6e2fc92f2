"""Configs: every shipped file loads; every kind of mistake gets its own clear line."""

from pathlib import Path

import pytest

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.quotes import quoted_spans

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny" / "ar.yaml"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_shipped_config_loads(path):
    stage = load_config(path).stage
    assert stage == {"hacking": "decoder"}.get(path.stem, path.stem)


def test_overrides_reach_nested_keys_and_read_exponents_as_numbers():
    config = load_config(TINY, ["optim.learning_rate=1e-4", "train.resume=latest", "seed=7"])
    assert (config.optim.learning_rate, config.train.resume, config.seed) == (1e-4, "latest", 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1", "unknown key 'optim.learning_rat': did you mean 'learning_rate'?"),
        ("stages=ar", "did you mean 'stage'?"),
        ("stage=both", "stage = 'both' is not allowed: choose one of 'ar', 'decoder'"),
        ("optim.learning_rate=fast", "optim.learning_rate = 'fast' must be of type float"),
        ("optim.learning_rate=.nan", "must be finite"),
        ("seed=1.5", "seed = 1.5 must be of type int"),
        ("seed=-1", "seed = -1 is out of range: allowed is 0 to 2**32 - 1"),
        ("eval.rewards=[{name: alignment}]", "every name once: an evaluation has the trained"),
        ("seed=true", "seed = True must be of type int"),
        ("sampling.height=70", "sampling.height = 70 is out of range: allowed is a multiple of 32"),
        ("sampling.top_p=0", "sampling.top_p = 0.0 is out of range"),
        ("sampling.temperature=0", "> 0 to train the AR"),
        ("rewards=[]", "at least one reward"),
        ("rewards=ocr", "rewards = 'ocr' must be a list"),
        ("train=5", "train = 5 must be a mapping"),
        ("seed.deep=1", "reaches into a value that has no keys"),
        ("seed", "is not section.key=value"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(UserError) as caught:
        load_config(TINY, [override])
    assert message in str(caught.value)


def test_a_window_that_reaches_the_last_step_is_refused():
    with pytest.raises(UserError, match="the last step follows the ODE"):
        load_config(TINY.with_name("decoder.yaml"), ["sde.window_size=12"])


def test_quoted_spans_follow_the_pipelines_own_rule():
    from diffusers import GlmImagePipeline

    prompt = 'say \'one\' and \u201ctwo\u201d and "three" and 「四」, it\'s "five"'
    assert quoted_spans(prompt) == GlmImagePipeline.get_glyph_texts(None, prompt)[0]
    assert set(quoted_spans("\u201ctwo\u201d 「四」")) == {"two", "四"}
