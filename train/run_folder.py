"""How a run came about, in its folder: `config.yaml` resolved, and a line a start."""

import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import yaml

from duet.configs.schema import RunConfig

CONFIG_FILE = "config.yaml"
STARTS_FILE = "starts.jsonl"


def record_start(config: RunConfig, step: int) -> None:
    """One process calls it. `config.yaml` is the newest start's; `starts.jsonl` has every one's:
    time, command, `step` it goes on from, versions of all packages, and its config.
    """
    folder, told = Path(config.output_dir), json.loads(json.dumps(asdict(config)))
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "step": step,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "config": told,
    }
    with (folder / STARTS_FILE).open("a") as file:
        file.write(json.dumps(start) + "\n")


@cache
def _packages() -> dict[str, str]:
    """Versions by name, of the packages that this process could load when it began."""
    read = (found.metadata for found in distributions())
    return {told["Name"]: told["Version"] for told in read}
