"""The script for a GPU: its shapes are the real ones, and it runs whole at reduced size."""

import torch

from duet.launch.real_size import Scale, build_ar, build_dit, main


def count(module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e9


def test_the_shapes_are_those_of_the_checkpoint(pipeline):
    with torch.device("meta"):
        ar = build_ar(Scale(), pipeline.vision_language_encoder)
        assert 8.9 < count(ar.model.language_model) + count(ar.lm_head) < 9.2
        assert 6.9 < count(build_dit(Scale())) < 7.0


def test_it_runs_whole_at_reduced_size(capsys):
    main(["--small", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert printed.count("the gate passes") == 2 and printed.count("mean_ratio") == 2
