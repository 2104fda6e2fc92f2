"""The script for a GPU: its shapes are the real ones, and it runs whole at reduced size."""

import re

from duet.launch.real_size import main


def test_it_runs_whole_at_reduced_size(capsys):
    main(["--small", "--device", "cpu", "--group", "4"])
    printed = capsys.readouterr().out
    assert printed.count("the gate passes") == 2 and printed.count("mean_ratio") == 2
    assert len(re.findall(r"  (rollout|replay|update): .* planned \d\.\d\d GiB", printed)) == 6
