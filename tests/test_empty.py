"""A part without its weights: no memory for them until what spreads it makes room."""

import pytest
import torch
from torch.nn import Embedding, Linear, Sequential

from duet.inference.empty import build_empty, make_room, weights_of
from duet.inference.filling import Plain
from duet.inference.model import load_pipeline
from duet.inference.parts import PARTS
from duet.inference.weights import fill_weights
from tests.conftest import MODEL


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(str(MODEL))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_built_empty_and_filled_is_the_loaded_one(pipeline, name):
    part = PARTS[name]
    module, loaded = build_empty(str(MODEL), part), part.module(pipeline)
    assert all(p.is_meta and not p.requires_grad for p in module.parameters())
    make_room(module, torch.device("cpu"))
    fill_weights(module, weights_of(str(MODEL), part), Plain())
    assert not module.training and type(module) is type(loaded)
    for kind in ("named_parameters", "named_buffers"):
        own, theirs = dict(getattr(module, kind)()), dict(getattr(loaded, kind)())
        assert own.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    if name == "ar":
        told, theirs = (m.generation_config.to_dict() for m in (module, loaded))
        assert told == theirs


def test_room_is_made_for_one_module_alone():
    """So that engines part it before the next one takes memory."""
    with torch.device("meta"):
        module = Sequential(Linear(2, 3), Embedding(4, 5))
    module.register_parameter("own", torch.nn.Parameter(torch.empty(6, device="meta")))
    module.register_buffer("kept", torch.arange(7.0))
    make_room(module, torch.device("cpu"), recurse=False)
    assert [n for n, p in module.named_parameters() if not p.is_meta] == ["own"]
    assert torch.equal(module.kept, torch.arange(7.0))
