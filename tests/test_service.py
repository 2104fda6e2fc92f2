"""The reward service: `remote` rewards of a real server process."""

import base64
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput, score
from duet.rewards.registry import load_reward, load_rewards
from duet.rewards.service.remote import Remote
from duet.rewards.service.wire import decode_scores, encode_scores
from tests.bad_server import bad_server, nobody, reply
from tests.conftest import CLIP, ROOT

TOKEN = "correct horse"
TOWER = {"args": {"model": CLIP, "pretrained": None}}
SAMPLES = "tests.sample_rewards."
QUICK = {"timeout_seconds": 0.5, "retries": 1, "backoff_seconds": 0.05}


@contextmanager
def serving(folder, *rewards, token=None, options=()):
    """A server process of its own; yields its address when it is ready, and the process."""
    config = folder / "rewards.yaml"
    config.write_text(yaml.safe_dump({"rewards": list(rewards)}))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment |= {"DUET_REWARDS_TOKEN": token} if token else {}
    command = [
        sys.executable,
        "-m",
        "duet.launch.cli",
        "rewards",
        "serve",
        str(config),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        while httpx.get(f"{url}/health").status_code == 503:
            time.sleep(0.05)
        yield url, process
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of everything, with a token and a bound of 1 MiB."""
    light = ("Sees", "SeesEdit", "HasSource", "Rank", "Alone", "Waits")
    rewards = [{"name": "alignment", **TOWER}, {"name": "fidelity", **TOWER}]
    rewards += [{"name": SAMPLES + name} for name in light]
    rewards += [{"name": "tests.bad_rewards.Raises"}]
    folder = tmp_path_factory.mktemp("server")
    options = ("--max-body-mib", "1")
    with serving(folder, *rewards, token=TOKEN, options=options) as (address, _):
        yield address


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("DUET_REWARDS_TOKEN", TOKEN)


@pytest.fixture
def inputs(rows):
    """Pictures that differ from their rows' reference `image`."""
    pictures = [Image.open(r["image"]).convert("RGB").rotate(3) for r in rows[:6]]
    return [RewardInput(p, r["prompt"], r) for p, r in zip(pictures, rows, strict=False)]


def remote(url, name, **args):
    config = RewardConfig("remote", args={"url": url, "reward": name, **args}, label=name)
    return load_rewards([config])[name]


def post(url, name, body, token=TOKEN):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.post(f"{url}/score/{name}", content=body, headers=headers, timeout=20)


def sample(**changes):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    return {
        "prompt": "a",
        "row": {"seconds": 0},
        "image": image,
        "pictures": {},
        "sources": [],
    } | changes


def body(*samples):
    return json.dumps({"version": 3, "samples": samples})


@pytest.mark.parametrize("name", ["alignment", "fidelity"])
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_scores_are_the_local_ones_bit_for_bit(url, inputs, name, image_format):
    local = load_rewards([RewardConfig(name, **TOWER)])[name](inputs)
    assert remote(url, name, image_format=image_format)(inputs) == local
    assert len(set(local)) > 1


@pytest.mark.parametrize("view", ["full", "low", "high"])
def test_prompt_row_and_its_pictures_travel_as_the_view_shows_them(url, inputs, view):
    local = load_reward(RewardConfig(SAMPLES + "Sees", view=view))(inputs)
    args = {"url": url, "reward": "Sees", "batch_size": 4}
    assert load_reward(RewardConfig("remote", args=args, view=view))(inputs) == local
    assert len(set(local)) == len(inputs)


def test_none_travels_and_a_source_picture_too(url, inputs, caplog):
    edits = [replace(i, row={**i.row, "source": i.row["image"]}) for i in inputs[:2]]
    scores = remote(url, "HasSource")([*edits, inputs[2]])
    assert scores == [1, 1, None]
    assert not caplog.records


@pytest.mark.parametrize("view", ["full", "low", "high"])
def test_an_edits_sources_masks_and_boxes_travel(url, inputs, view):
    """Of whatever shape, and with the style named among them."""
    wide = Image.new("RGB", (240, 80), "teal")
    more = {"keep": [[3, 3, 60, 40]], "style": 0, "subjects": [[9, 9, 99, 70], [0, 0, 20, 30]]}
    edits = [
        replace(i, row={"prompt": "x", "sources": [wide, i.image], **more}) for i in inputs[:2]
    ]
    local = load_reward(RewardConfig(SAMPLES + "SeesEdit", view=view))(edits)
    args = {"url": url, "reward": "SeesEdit"}
    assert load_reward(RewardConfig("remote", args=args, view=view))(edits) == local
    assert len(set(local)) == 2


def test_what_failed_and_what_does_not_apply_travel_apart():
    told = json.dumps(encode_scores([0.5, None, math.nan])).encode()
    number, none, failed = decode_scores(told, 3)
    assert (number, none) == (0.5, None) and math.isnan(failed)


def test_a_peer_of_another_version_is_told_in_one_line():
    old = reply(
        b'{"ready": true, "authorised": true, "rewards": {"Sees": {"whole_groups": false}}}'
    )
    with bad_server(old) as (address, _), pytest.raises(UserError) as told:
        remote(address, "Sees", **QUICK)
    assert "the health page is in version 1 of the wire form, and here it is 3" in str(told.value)


def test_whole_groups_stay_whole(url, inputs):
    reward = remote(url, "Rank", whole_groups=True, batch_size=1)
    assert sorted(score(reward, "Rank", inputs, [4, 2])) == [0, 0, 1, 1, 2, 3]


def test_health_tells_names_and_whether_the_token_is_right(url):
    page = httpx.get(f"{url}/health").json()
    assert page["ready"] is True and page["authorised"] is False
    assert page["rewards"]["Rank"] == {"whole_groups": True}
    assert page["rewards"]["alignment"] == {"whole_groups": False}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{url}/health", headers=headers).json()["authorised"] is True


@pytest.mark.parametrize("wrong", [None, "", "correct", "correct horses", "Correct horse"])
def test_a_wrong_token_is_refused_and_told_as_the_users_mistake(url, inputs, monkeypatch, wrong):
    assert post(url, "Sees", body(sample()), wrong).status_code == 401
    if wrong == "":
        return
    monkeypatch.delenv("DUET_REWARDS_TOKEN")
    if wrong:
        monkeypatch.setenv("DUET_REWARDS_TOKEN", wrong)
    reward = Remote(url, "Sees")
    with pytest.raises(UserError, match="DUET_REWARDS_TOKEN"):
        reward.load()
    with pytest.raises(UserError, match="refuses the token of DUET_REWARDS_TOKEN"):
        reward(inputs)


def test_the_tokens_variable_may_have_another_name(url, inputs, monkeypatch):
    monkeypatch.delenv("DUET_REWARDS_TOKEN")
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    assert remote(url, "Alone", token_env="MY_TOKEN")(inputs) == [1] * 6
    monkeypatch.setenv("MY_TOKEN", "")
    with pytest.raises(UserError, match="MY_TOKEN holds no token"):
        remote(url, "Alone", token_env="MY_TOKEN")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_bound_is_refused(url, chunked):
    large = b" " * (3 * 2**20)
    pieces = (large[i : i + 65536] for i in range(0, len(large), 65536))
    answer = post(url, "Alone", pieces if chunked else large)
    assert answer.status_code == 413 and "1048576 bytes" in answer.json()["error"]
    fits = body(sample()) + " " * 2**19
    assert post(url, "Alone", fits).json() == {"version": 3, "scores": [1]}


def black(side):
    """A PNG of a square in few bytes."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


MALFORMED = {
    "not JSON": (lambda: "{", "not JSON"),
    "binary": (lambda: bytes(range(256)), "not JSON"),
    "a list": (lambda: "[]", "the request must be an object of samples"),
    "no samples": (lambda: body(), "samples is empty"),
    "NaN": (lambda: '{"version": 3, "samples": [NaN]}', "NaN is no JSON"),
    "deeply nested": (lambda: "[" * 100_000, "not JSON"),
    "a sample is a string": (lambda: body("a"), "samples[0] must be an object of prompt"),
    "surplus field": (lambda: body(sample(), sample(x=1)), "samples[1] must be an object of"),
    "prompt is a number": (lambda: body(sample(prompt=1)), "samples[0].prompt must be of type str"),
    "not base64": (lambda: body(sample(image="?")), "samples[0].image is no base64 PNG"),
    "no picture": (lambda: body(sample(image="AAAA")), "samples[0].image is no base64 PNG"),
    "half a picture": (lambda: body(sample(image=sample()["image"][:60])), "is no base64 PNG"),
    "row picture is null": (lambda: body(sample(pictures={"image": None})), "samples[0].pictures.image"),
    "row picture of another key": (lambda: body(sample(pictures={"../x": "AAAA"})), "allowed are image, source"),
    "a path of the server": (lambda: body(sample(row={"image": "/etc/passwd"})), "samples[0].row has 'image'"),
    "a path among sources": (lambda: body(sample(row={"sources": ["/etc/passwd"]})), "samples[0].row has 'sources'"),
    "boxes to keep": (lambda: body(sample(row={"keep": [[0, 0, 1, 1]]})), "samples[0].row has 'keep'"),
    "the place of a style": (lambda: body(sample(row={"style": 0})), "samples[0].row has 'style'"),
    "sources are text": (lambda: body(sample(sources="a")), "samples[0].sources must be of type list"),
    "no picture among sources": (lambda: body(sample(sources=["AAAA"])), "samples[0].sources[0] is no base64 PNG"),
    "sources without subjects": (lambda: body(sample(sources=[sample()["image"]])), "samples[0].row.subjects must be a list of one box or null"),
    "a subject out of its source": (lambda: body(sample(sources=[sample()["image"]], row={"subjects": [[0, 0, 9, 8]]})), "samples[0].row.subjects[0] = [0, 0, 9, 8] reaches out"),
    "decompression bomb": (lambda: body(sample(image=black(20000))), "too large"),
    "many large pictures": (lambda: body(*[sample(image=black(2048))] * 20), "samples[16].image of 2048 x 2048 pixels is too much"),
    "an old client": (lambda: '{"samples": []}', "the request is in version 1 of the wire form, and here it is 3: run the same"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_422_with_one_clear_line(url, name):
    make, reason = MALFORMED[name]
    answer = post(url, "Alone", make())
    assert answer.status_code == 422, answer.text
    assert reason in answer.json()["error"] and "\n" not in answer.text


def test_another_reward_is_404(url):
    answer = post(url, "nonsense", body(sample()))
    assert answer.status_code == 404 and "served are alignment, fidelity" in answer.json()["error"]


def test_a_reward_that_raises_is_one_line_and_the_server_lives_on(url, inputs, caplog):
    answer = post(url, "Raises", body(sample()))
    assert answer.status_code == 500
    assert answer.json() == {"error": "reward 'Raises' raised KeyError: 'no\\nweights'"}
    assert np.isnan(remote(url, "Raises", **QUICK)(inputs)).all()
    assert "KeyError" in caplog.text
    assert post(url, "Alone", body(sample())).json() == {"version": 3, "scores": [1]}


def test_requests_for_one_reward_queue(url):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(url, "Alone", body(sample())), range(6)))
    assert [a.json() for a in answers] == [{"version": 3, "scores": [1]}] * 6


def test_another_reward_need_not_wait_and_who_hung_up_is_not_scored(url):
    slow = body(sample(row={"seconds": 1}))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, url, "Waits", slow)
        time.sleep(0.2)
        start = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            headers = {"Authorization": f"Bearer {TOKEN}"}
            httpx.post(f"{url}/score/Waits", content=slow, headers=headers, timeout=0.1)
        assert post(url, "Alone", body(sample())).status_code == 200
        assert time.monotonic() - start < 0.7
        assert waiting.result().json() == {"version": 3, "scores": [1]}
        start = time.monotonic()
        assert post(url, "Waits", body(sample())).json() == {"version": 3, "scores": [1]}
        assert time.monotonic() - start < 0.7


def test_the_next_endpoint_takes_over_when_the_first_is_killed(tmp_path, inputs, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    reward = {"name": SAMPLES + "Sees"}
    with (
        serving(tmp_path / "a", reward) as (first, process),
        serving(tmp_path / "b", reward) as (second, _),
    ):
        args = {"url": [first, second], "reward": "Sees", "batch_size": 2, **QUICK}
        client = load_rewards([RewardConfig("remote", args=args)])["remote"]
        local = load_reward(RewardConfig(SAMPLES + "Sees"))(inputs)
        assert client(inputs) == local and not caplog.records
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert client(inputs) == local
        [warning] = caplog.messages
        assert "0 of 6 samples are not scored" in warning and first in warning
        caplog.clear()
        assert client(inputs) == local and not caplog.records  # the second is tried first now
        assert client.endpoints.urls == [second, first]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"reward": "nonsense"}, "does not serve 'nonsense': served are alignment, fidelity"),
        ({"reward": "Rank"}, "whole_groups = False is not what the server says: set it to True"),
    ],
)
def test_load_refuses_what_no_endpoint_serves(url, args, message):
    with pytest.raises(UserError, match=message):
        load_rewards([RewardConfig("remote", args={"url": url, "reward": "Sees", **QUICK, **args})])


def test_load_refuses_when_nobody_answers():
    with nobody() as silent, pytest.raises(UserError, match=f"no server: {silent}: ConnectError"):
        remote(silent, "Sees", **QUICK)


def test_load_is_content_with_one_endpoint(url, inputs, caplog):
    with nobody() as silent:
        reward = remote([silent, url], "Alone", **QUICK)
    assert f"{silent}: ConnectError" in caplog.text
    caplog.clear()
    assert reward(inputs) == [1] * 6 and not caplog.records
