"""Malformed configs: each is refused in one line that names the setting and its value."""

import datetime
import os
import subprocess
import sys

import pytest

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.schema import RewardConfig
from duet.launch import rewards
from duet.train.setup import prepare
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny" / "decoder.yaml"
DEEP = "[" * 2000 + "]" * 2000
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)


def refusal(path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    told = str(caught.value)
    assert "\n" not in told and len(told) < 600, "one line"
    return told


# one override, and what its line says: the setting with its value, what is allowed
OVERRIDES = {
    # beyond their range
    "seed=-1": "seed = -1 is out of range: allowed is 0 to 4,294,967,295",
    "seed=4294967296": "seed = 4294967296 is out of range",
    "sampling.height=0": "sampling.height = 0 is out of range: allowed is 32 to 8,192, a multiple of 32",
    "sampling.height=70": "sampling.height = 70 is out of range",
    "sampling.height=1000000000": "sampling.height = 1000000000 is out of range",
    "sampling.width=-32": "sampling.width = -32 is out of range",
    "sampling.width=33": "sampling.width = 33 is out of range",
    "sampling.temperature=-0.1": "sampling.temperature = -0.1 is out of range: allowed is 0 to 100",
    "sampling.temperature=1e9": "sampling.temperature = 1000000000.0 is out of range",
    "sampling.top_k=-1": "sampling.top_k = -1 is out of range",
    "sampling.top_k=1000000000": "sampling.top_k = 1000000000 is out of range",
    "sampling.top_p=0": "sampling.top_p = 0.0 is out of range: allowed is 0 < x <= 1",
    "sampling.top_p=1.01": "sampling.top_p = 1.01 is out of range",
    "sampling.num_inference_steps=0": "sampling.num_inference_steps = 0 is out of range: allowed is 1 to 999",
    "sampling.num_inference_steps=1000": "sampling.num_inference_steps = 1000 is out of range",
    "sampling.guidance_scale=-1": "sampling.guidance_scale = -1.0 is out of range",
    "sampling.guidance_scale=1e300": "sampling.guidance_scale = 1e+300 is out of range",
    "rollout.num_generations=1": "rollout.num_generations = 1 is out of range: allowed is 2 to 10,000",
    "rollout.num_generations=1000000000": "rollout.num_generations = 1000000000 is out of range",
    "rollout.prompts_per_step=0": "rollout.prompts_per_step = 0 is out of range",
    "rollout.prompts_per_step=1000000000": "rollout.prompts_per_step = 1000000000 is out of range",
    "rollout.batch_size=0": "rollout.batch_size = 0 is out of range",
    "rollout.batch_size=-4": "rollout.batch_size = -4 is out of range",
    "sde.noise_level=-0.1": "sde.noise_level = -0.1 is out of range",
    "sde={kind: cps, noise_level: 1.5}": "sde.noise_level = 1.5 is out of range: allowed is 0 to 1 for cps",
    "sde.window_size=0": "sde.window_size = 0 is out of range",
    "sde.window_size=999": "sde.window_size = 999 is out of range",
    "sde.window_start_max=-1": "sde.window_start_max = -1 is out of range",
    "sde.window_start_max=999999": "sde.window_start_max = 999999 is out of range",
    "grpo.epsilon=0": "grpo.epsilon = 0.0 is out of range: allowed is 0 < x < 1",
    "grpo.epsilon=1": "grpo.epsilon = 1.0 is out of range",
    "grpo.epsilon_high=0": "grpo.epsilon_high = 0.0 is out of range",
    "grpo.beta=-1": "grpo.beta = -1.0 is out of range: allowed is 0 to 1e+06",
    "grpo.beta=1e308": "grpo.beta = 1e+308 is out of range",
    "grpo.num_iterations=0": "grpo.num_iterations = 0 is out of range",
    "grpo.num_iterations=100000": "grpo.num_iterations = 100000 is out of range",
    "grpo.importance_sampling_cap=0.5": "grpo.importance_sampling_cap = 0.5 is out of range",
    "lora.rank=0": "lora.rank = 0 is out of range",
    "lora.rank=1000000": "lora.rank = 1000000 is out of range",
    "lora.alpha=0": "lora.alpha = 0.0 is out of range",
    "lora.alpha=-8": "lora.alpha = -8.0 is out of range",
    "lora.dropout=1": "lora.dropout = 1.0 is out of range: allowed is 0 <= x < 1",
    "lora.dropout=-0.1": "lora.dropout = -0.1 is out of range",
    "optim.learning_rate=0": "optim.learning_rate = 0.0 is out of range",
    "optim.learning_rate=-1e-4": "optim.learning_rate = -0.0001 is out of range",
    "optim.learning_rate=1e9": "optim.learning_rate = 1000000000.0 is out of range",
    "optim.weight_decay=-1": "optim.weight_decay = -1.0 is out of range",
    "optim.adam_beta1=1": "optim.adam_beta1 = 1.0 is out of range",
    "optim.adam_beta2=-0.1": "optim.adam_beta2 = -0.1 is out of range",
    "optim.adam_epsilon=0": "optim.adam_epsilon = 0.0 is out of range: allowed is 0 < x <= 1",
    "optim.warmup_steps=-1": "optim.warmup_steps = -1 is out of range",
    "optim.warmup_ratio=1": "optim.warmup_ratio = 1.0 is out of range",
    "optim={warmup_ratio: 0.1, warmup_steps: 5}": "optim.warmup_ratio = 0.1 is out of range: allowed is 0 where optim.warmup_steps = 5",
    "optim.max_grad_norm=0": "optim.max_grad_norm = 0.0 is out of range",
    "optim.per_device_train_batch_size=0": "optim.per_device_train_batch_size = 0 is out of range",
    "optim.gradient_accumulation_steps=0": "optim.gradient_accumulation_steps = 0 is out of range",
    "optim.gradient_accumulation_steps=99999999": "optim.gradient_accumulation_steps = 99999999 is out",
    "train.max_steps=0": "train.max_steps = 0 is out of range: allowed is 1 to 1,000,000",
    "train.max_steps=10000000000": "train.max_steps = 10000000000 is out of range",
    "train.save_steps=0": "train.save_steps = 0 is out of range",
    "train.save_total_limit=0": "train.save_total_limit = 0 is out of range",
    "train.logging_images_steps=-1": "train.logging_images_steps = -1 is out of range",
    "train.max_not_scored=1.5": "train.max_not_scored = 1.5 is out of range: allowed is 0 to 1",
    "eval.images_per_prompt=0": "eval.images_per_prompt = 0 is out of range",
    "eval.images_per_prompt=1000000": "eval.images_per_prompt = 1000000 is out of range",
    "eval.bootstrap_samples=0": "eval.bootstrap_samples = 0 is out of range",
    "eval.confidence=1": "eval.confidence = 1.0 is out of range: allowed is 0 < x < 1",
    "watch.window=0": "watch.window = 0 is out of range",
    "watch.drop=0": "watch.drop = 0.0 is out of range",
    "rewards=[{name: ocr, weight: 1e308}]": "reward 'ocr'.weight = 1e+308 is out of range",
    "rewards=[{name: ocr, weight: -1e30}]": "reward 'ocr'.weight = -1e+30 is out of range",
    # numbers that are none
    "optim.learning_rate=1e999": "optim.learning_rate = '1e999' must be finite",
    "optim.learning_rate=.inf": "optim.learning_rate = inf must be finite",
    "optim.learning_rate=-.inf": "optim.learning_rate = -inf must be finite",
    "optim.learning_rate=.nan": "optim.learning_rate = nan must be finite",
    f"optim.learning_rate={10**400}": "must be finite",
    f"seed={10**400}": "seed = an integer of 1,329 bits is out of range",
    f"seed={'9' * 5000}": "a number of 5,000 digits is beyond reason",
    f"seed=0x{'f' * 5000}": "seed = an integer of 20,000 bits is out of range",
    f"optim.learning_rate=0x{'f' * 5000}": "optim.learning_rate = an integer of 20,000 bits must be finite",
    # another type
    "seed=1.5": "seed = 1.5 must be of type int",
    "seed=true": "seed = True must be of type int",
    "seed=null": "seed = None must be of type int",
    "seed=": "seed = None must be of type int",
    "seed=one": "seed = 'one' must be of type int",
    "seed=[1]": "seed = [1] must be of type int",
    "seed={a: 1}": "seed = {'a': 1} must be of type int",
    "seed=1e3": "seed = '1e3' must be of type int",
    f"seed={'x' * 10_000}": "... (10,002 characters) must be of type int",
    "seed=2024-13-45": "seed = '2024-13-45' must be of type int",
    "seed=2024-01-02": "seed = '2024-01-02' must be of type int",
    "seed=2024-01-02T03:04:99Z": "seed = '2024-01-02T03:04:99Z' must be of type int",
    "optim.learning_rate=fast": "optim.learning_rate = 'fast' must be of type float",
    "optim.learning_rate=false": "optim.learning_rate = False must be of type float",
    "optim.learning_rate=[1e-4]": "optim.learning_rate = ['1e-4'] must be of type float",
    "optim.learning_rate=1e-4e": "optim.learning_rate = '1e-4e' must be of type float",
    "watch.stop=maybe": "watch.stop = 'maybe' must be of type bool",
    "watch.stop=1": "watch.stop = 1 must be of type bool",
    "output_dir=5": "output_dir = 5 must be of type str",
    "output_dir=null": "output_dir = None must be of type str",
    "output_dir=[runs]": "output_dir = ['runs'] must be of type str",
    "model=tiny": "model = 'tiny' must be a mapping of keys",
    "optim=null": "optim = None must be a mapping of keys",
    "optim=[]": "optim = [] must be a mapping of keys",
    "rewards=ocr": "rewards = 'ocr' must be a list",
    "rewards={name: ocr}": "rewards = {'name': 'ocr'} must be a list",
    "rewards=[ocr]": "rewards[0] = 'ocr' must be a mapping of keys",
    "rewards=[{name: 5}]": "rewards[0].name = 5 must be of type str",
    "rewards=[{name: ocr, args: []}]": "rewards[0].args = [] must be of type dict",
    "rewards=[{name: ocr, weight: heavy}]": "rewards[0].weight = 'heavy' must be of type float",
    "lora.target_modules=to_q": "lora.target_modules = 'to_q' must be a list",
    "lora.target_modules=[1]": "lora.target_modules[0] = 1 must be of type str",
    "train.trackers=tensorboard": "train.trackers = 'tensorboard' must be a list",
    # not one of the choices
    "stages=ar": "stages = 'ar' must be a list",
    "stages=[ar]": "stages[0] = 'ar' must be a mapping of keys",
    "stages=[{part: ar}]": "missing key 'stages[0].steps'",
    "stages=[{part: vae, steps: 1}]": "stages[0].part = 'vae' is not allowed",
    "stages=[{part: ar, steps: 0}]": "stages[].steps = 0 is out of range",
    "stages=[{part: ar, steps: 1, optim: {lr: 1}}]": "unknown key 'stages[0].optim.lr'",
    "stages=[{part: ar, steps: 1}]": "give either stage (ar or decoder) or stages",
    "stage=both": "stage = 'both' is not allowed: choose one of 'ar', 'decoder'",
    "stage=[ar]": "stage = ['ar'] is not allowed",
    "stage=null": "give either stage (ar or decoder) or stages (a list of turns)",
    "model.dtype=float64": "model.dtype = 'float64' is not allowed",
    "model.device=tpu": "model.device = 'tpu' is not allowed",
    "sde.kind=ode": "sde.kind = 'ode' is not allowed",
    "grpo.loss_type=ppo": "grpo.loss_type = 'ppo' is not allowed",
    "grpo.scale_rewards=all": "grpo.scale_rewards = 'all' is not allowed: choose one of 'group', 'batch', 'none'",
    "grpo.scale_rewards=1": "grpo.scale_rewards = 1 is not allowed",
    "grpo.old_logprobs=both": "grpo.old_logprobs = 'both' is not allowed",
    "optim.lr_scheduler_type=cosinus": "optim.lr_scheduler_type = 'cosinus' is not allowed: choose one of 'constant', 'linear', 'cosine'",
    "train.mixed_precision=fp8": "train.mixed_precision = 'fp8' is not allowed",
    "train.trackers=[mlflow]": "train.trackers[0] = 'mlflow' is not allowed",
    "rewards=[{name: ocr, view: left}]": "rewards[0].view = 'left' is not allowed",
    # unknown or missing keys
    "optim.learning_rat=1": "unknown key 'optim.learning_rat': did you mean 'learning_rate'?",
    "stags=ar": "unknown key 'stags': did you mean 'stage",
    "rewards=[{nam: ocr}]": "unknown key 'rewards[0].nam': did you mean 'name'?",
    "rewards=[{}]": "missing key 'rewards[0].name'",
    "model={}": "missing key 'model.path'",
    # text that names nothing, names twice
    'output_dir=""': "output_dir = '' is out of range: allowed is text, not empty",
    'output_dir="  "': "output_dir = '  ' is out of range",
    'model.path=""': "model.path = '' is out of range",
    'data.train=""': "data.train = '' is out of range",
    'train.resume=""': "train.resume = '' is out of range",
    'rewards=[{name: ""}]': "reward ''.name = '' is out of range",
    'lora.target_modules=[""]': "lora.target_modules = [''] is out of range",
    "lora.target_modules=[to_q, to_q]": "lora.target_modules = ['to_q', 'to_q'] is out of range: allowed is every name once",
    "train.trackers=[wandb, wandb]": "train.trackers = ['wandb', 'wandb'] is out of range",
    "rewards=[]": "rewards = [] is out of range: allowed is at least one reward",
    "rewards=[{name: ocr}, {name: ocr}]": "rewards = ['ocr', 'ocr'] is out of range: allowed is every name once",
    "watch.rewards=[{name: ocr}, {name: ocr}]": "watch.rewards = ['ocr', 'ocr'] is out of range",
    "eval.rewards=[{name: ocr}]": "rewards and eval.rewards = ['ocr', 'fidelity', 'ocr'] is out of range",
    r'output_dir="a\0b"': "holds a NUL or half a surrogate pair",
    r'output_dir="\ud800"': "holds a NUL or half a surrogate pair",
    r'rewards=[{name: ocr, args: {"a\0": 1}}]': "holds a NUL or half a surrogate pair",
    # what JSON cannot hold
    "rewards=[{name: ocr, args: {limit: .nan}}]": "reward 'ocr'.args.limit = nan is nothing that JSON holds",
    "rewards=[{name: ocr, args: {limit: [.inf]}}]": "reward 'ocr'.args.limit[0] = inf is nothing that JSON holds",
    f"rewards=[{{name: ocr, args: {{limit: {10**400}}}}}]": "reward 'ocr'.args.limit = an integer of 1,329 bits is nothing that JSON holds",
    "rewards=[{name: ocr, args: {1: a}}]": "key '1' is not text: put it in quotes",
    "rewards=[{name: ocr, args: {on: a}}]": "key 'on' is not text: put it in quotes",
    "rewards=[{name: ocr, args: {a: !!set {b}}}]": "tag 'tag:yaml.org,2002:set' is not read",
    "rewards=[{name: ocr, args: {a: !!binary aGk=}}]": "tag 'tag:yaml.org,2002:binary' is not read",
    # YAML
    "seed=!!python/object/apply:os.system [id]": "tag 'tag:yaml.org,2002:python/object/apply:os.system' is not read",
    "seed=!!int x": "tag 'tag:yaml.org,2002:int' is not read",
    "seed=!mine 1": "tag '!mine' is not read",
    "optim={learning_rate: 1, learning_rate: 2}": "key 'learning_rate' stands twice",
    "rewards=[{name: ocr, args: {a: 1, a: 2}}]": "key 'a' stands twice",
    f"rewards={DEEP}": "nested deeper than 20 levels",
    f"rewards={DEEP[:2000]}": "nested deeper than 20 levels",
    "optim={learning_rate: 1": "line 1, column",
    "seed=1\n--- \n2": "line 2, column 1: but found another document",
    "seed=*gone": "found undefined alias",
    "seed=&a [*a]": "an alias stands for what it stands in",
    "seed='open": "line 1, column",
    "seed=a: b: c": "line 1, column",
    "seed=@at": "line 1, column",
    "seed=\x07": "special characters are not allowed",
    "optim={? [a, b] : c}": "is not text: put it in quotes",
    # override syntax
    "seed": "override 'seed' is not section.key=value",
    "=1": "override '=1' is not section.key=value",
    "": "override '' is not section.key=value",
    ".seed=1": "override '.seed=1' is not section.key=value",
    "optim..learning_rate=1": "override 'optim..learning_rate=1' is not section.key=value",
    "optim.=1": "override 'optim.=1' is not section.key=value",
    "seed.deep=1": "override 'seed.deep' reaches into a value that has no keys",
    "rewards[0].weight=1": "a list is given whole, as rewards='[{name: ocr, weight: 0.5}]'",
    "rewards.0.weight=1": "override 'rewards.0.weight' reaches into a value that has no keys; a list is given whole",
}  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda o: ascii(o)[1:60])
def test_an_override_is_refused(override):
    assert OVERRIDES[override] in refusal(TINY, override)


# a file's bytes, and what its line says
FILES = {
    b"": "holds no mapping",
    b"# nothing\n": "holds no mapping",
    b"- stage: ar\n": "holds no mapping",
    b"ar\n": "holds no mapping",
    b"null\n": "holds no mapping",
    b"stage: ar\n---\nstage: ar\n": "line 2, column 1: but found another document",
    b"stage: ar\nseed: 1\nseed: 2\n": "line 3, column 1: key 'seed' stands twice",
    b"optim: {}\nstage: ar\noptim: {}\n": "line 3, column 1: key 'optim' stands twice",
    b"stage: ar\noptim:\n  adam_beta1: 0.5\n  adam_beta1: 0.9\n": "line 4, column 3: key 'adam_beta1' stands twice",
    b"rewards:\n  - name: ocr\n    name: fidelity\n": "line 3, column 5: key 'name' stands twice",
    b"a: &a {x: 1}\nb: {<<: *a, <<: *a}\n": "key '<<' stands twice",
    b"1: x\n": "key '1' is not text",
    b"null: x\n": "key 'null' is not text",
    b"yes: x\n": "key 'yes' is not text",
    b"stage:\tar\n\tseed: 1\n": "line 1, column 7: found character",
    b"\tstage: ar\n": "found character '\\t' that cannot start any token",
    b"stage: ar\n seed: 1\n": "line 2, column",
    b"stage: [ar\n": "line 2, column",
    b"stage: \xff\xfe\n": "is not UTF-8: byte 7",
    "stage: ar\n".encode("utf-16"): "is not UTF-8",
    b"stage: a\x00r\n": "special characters are not allowed",
    b"%YAML 3.0\n---\nstage: ar\n": "found incompatible YAML document",
    b"stage: !!python/name:os.system\n": "is not read: write plain values",
    LAUGHS.encode(): "stands for more than 10,000 values",
    MERGES.encode(): "stands for more than 10,000 values",
    b"a: &a\n  b: *a\n": "an alias stands for what it stands in",
    b"a: " + DEEP.encode(): "nested deeper than 20 levels",
    b"".join(b"- " for _ in range(2000)) + b"x": "nested deeper than 20 levels",
    b"stage: ar # " + b"x" * 200_000: "is larger than 131,072 bytes",
    b"stage: ar\n": "missing key 'model'",
    b"stage: ar\nmodel: {path: x}\nrewards: []\noutput_dir: x\n": "missing key 'data'",
}  # fmt: skip


@pytest.mark.parametrize("content", FILES, ids=lambda c: ascii(c)[2:50])
def test_a_file_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    told = refusal(path)
    assert FILES[content] in told


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refusal(tmp_path / "pipe")
    assert "is no file" in refusal(tmp_path)
    assert "is no file" in refusal("/dev/zero")
    assert "No such file" in refusal(tmp_path / "gone.yaml")
    assert "cannot be read" in refusal("a\0b")
    assert "too long" in refusal("x" * 5000)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{name: ocr, name: fidelity}", "key 'name' stands twice"),
        (DEEP, "nested deeper than 20 levels"),
        ("{name: ocr, weight: 1e308}", "reward 'ocr'.weight = 1e+308 is out of range"),
        ("{name: ocr, args: {a: .nan}}", "reward 'ocr'.args.a = nan is nothing that JSON holds"),
        ('""', "reward ''.name = '' is out of range"),
    ],
    ids=lambda text: text[:30],
)
def test_a_reward_on_the_command_line_is_read_as_strictly(reward, message):
    with pytest.raises(UserError) as caught:
        rewards.main(["score", "x.png", "--prompt", "x", "--reward", reward])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_reader_that_goes_is_no_traceback():
    command = f"{sys.executable} -m duet.launch.cli settings | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("stage  (ar | decoder | null; default null)\n", "")


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 2), {1}, b"x", (1,), {1: 2}, object()])
def test_args_that_json_cannot_hold_are_refused_however_they_came(value):
    with pytest.raises(UserError, match=r"reward 'ocr'\.args\.a = .* is nothing that JSON holds"):
        RewardConfig("ocr", args={"a": value})


def test_what_is_right_stays_right(tmp_path):
    """Anchors, merge keys, a date as a folder's name, a BOM, CRLF, the last override."""
    text = TINY.read_text().replace("output_dir: runs/decoder", "output_dir: 2024-01-02")
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    config = load_config(path, ["seed=1", "seed=2", "grpo.scale_rewards=true"])
    assert (config.output_dir, config.seed, config.grpo.scale_rewards) == ("2024-01-02", 2, "group")
    assert config.eval.rewards[1].args["model"] == config.rewards[1].args["model"]
    assert load_config(path, ["grpo.scale_rewards=no"]).grpo.scale_rewards == "none"


UNTRAINABLE = {
    ("ar", "sampling.temperature=0"): "sampling.temperature = 0.0 is out of range: allowed is > 0",
    ("decoder", "sde.noise_level=0"): "sde.noise_level = 0.0 is out of range: allowed is > 0",
    ("decoder", "sde.window_size=12"): "the last step follows the ODE",
    ("decoder", "watch.stop=true"): "watch.stop = True is out of range: allowed is false without",
}


@pytest.mark.parametrize(("stage", "override"), UNTRAINABLE)
def test_what_only_training_needs_is_refused_by_training_alone(stage, override):
    config = load_config(TINY.with_name(f"{stage}.yaml"), [override])  # an evaluation may have it
    with pytest.raises(UserError, match=UNTRAINABLE[stage, override]):
        prepare(config)
