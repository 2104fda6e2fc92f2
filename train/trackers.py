"""The trackers of a run: installed, logged in, and each step in them once."""

import configparser
import importlib.util
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.train.resume import Start

_WANDB_URL = "https://api.wandb.ai"


def prepare_trackers(config: RunConfig) -> list[str]:
    """Check that each tracker is installed; wandb without a login goes offline."""
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers has {name!r}, which is not installed: pip install 'duet[{name}]'"
            )
    if "wandb" in config.train.trackers and not _wandb_login():
        os.environ.setdefault("WANDB_MODE", "offline")
    return list(config.train.trackers)


def tracker_arguments(config: RunConfig, start: Start) -> dict[str, dict[str, Any]]:
    """What each tracker is begun with, so that a resumed run goes on where its checkpoint is.

    tensorboard hides what was logged after it; wandb is told the run by its id.
    """
    arguments: dict[str, dict[str, Any]] = {}
    if "tensorboard" in config.train.trackers:
        arguments["tensorboard"] = {"purge_step": start.step + 1}
    if "wandb" in config.train.trackers:
        arguments["wandb"] = {"id": start.run_id, "resume": "allow"}
    return arguments


def _wandb_login() -> bool:
    """As wandb looks for one: a key, a token's file, or the server's line in a netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    token = os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if token and Path(token).is_file():
        return True
    named = os.environ.get("NETRC")
    files = [named] if named else ["~/.netrc", "~/_netrc"]
    return any(_knows(Path(f).expanduser(), _wandb_host()) for f in files)


def _knows(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_host() -> str:
    """The own server that the environment or the settings file names, else the public one."""
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(Path(folder).expanduser() / "settings")
    except (configparser.Error, UnicodeDecodeError):
        settings.clear()
    saved = settings.get("default", "base_url", fallback=_WANDB_URL)
    url = os.environ.get("WANDB_BASE_URL") or saved
    return urlsplit(url).hostname or url
