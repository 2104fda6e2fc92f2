"""Processes that are gone or hang: how long the others wait, and what they say."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from duet.inference.lost import Lost, named, naming_the_lost, wait_at_most
from duet.inference.processes import BACKEND, joined

# as torch 2.14 has them
CLOSED = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed"
TIMED_OUT = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 9ms"


class Asked(Exception):
    pass


@pytest.mark.parametrize(("gpus", "backend"), [(True, "cuda:nccl,cpu:gloo"), (False, "gloo")])
def test_objects_are_sent_by_gloo_on_gpus_too(monkeypatch, gpus, backend):
    """In NCCL nobody hears that another one is gone; accelerate's own choice is NCCL alone."""

    def init(**given):
        raise Asked(given["backend"])

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    monkeypatch.setattr(dist, "init_process_group", init)
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (started | {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(Asked, match=f"^{backend}$"):
            joined("auto", timedelta(1))
    finally:
        AcceleratorState._reset_state(True)


@pytest.fixture
def one_of_three(tmp_path):
    """Process 1, on its own: the store is there, as with torchrun, and nobody else is."""
    store = dist.FileStore(str(tmp_path / "store"), 3)
    # gloo would wait for the others at once
    dist.init_process_group("fake", store=store, rank=1, world_size=3)
    yield dist.group.WORLD.get_group_store()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "error",
    [RuntimeError(CLOSED), RuntimeError(TIMED_OUT), dist.DistBackendError("NCCL communicator")],
)
def test_a_lost_process_is_named(one_of_three, monkeypatch, error):
    monkeypatch.setattr("duet.inference.lost.ROLL_CALL_SECONDS", 0)
    told = "^process 0, 2 is gone or hangs: its own lines"
    with pytest.raises(Lost, match=told) as ended, naming_the_lost():
        raise error
    assert ended.value.status == 2 and ended.value.__cause__ is error
    one_of_three.set("duet/left/2", "")  # the other one that is left says so
    assert str(named(error)).startswith("process 0 is gone")


@pytest.mark.parametrize("error", [RuntimeError("a shape"), ValueError(CLOSED), KeyError("x")])
def test_what_is_of_no_other_process_stays_itself(error):
    assert named(error) is error
    with pytest.raises(type(error)) as ended, naming_the_lost():
        raise error
    assert ended.value is error


@pytest.mark.parametrize("backend", ["gloo", BACKEND.replace("nccl", "fake")])
def test_every_group_sends_objects_by_gloo_and_waits_as_long_as_the_run(backend, tmp_path):
    """NCCL needs a GPU: "fake" stands for it, and brings back nothing."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        # as DeepSpeed and hybrid sharding do
        for group in (dist.group.WORLD, dist.new_group([0])):
            wait_at_most(7)
            told = [None]
            dist.all_gather_object(told, "an object", group)
            assert told == ["an object"]
            gloo = group._get_backend(torch.device("cpu"))
            assert (gloo.name(), gloo.options._timeout) == ("gloo", timedelta(seconds=7))
    finally:
        dist.destroy_process_group()
