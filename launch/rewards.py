"""duet rewards list | score | serve: what rewards there are, try them, offer them by HTTP."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duet.configs.errors import UserError
from duet.configs.load import build, parse, read_tree
from duet.configs.pictures import read_picture
from duet.configs.row import Row, check_row, make_row
from duet.configs.row_files import parse_object
from duet.configs.schema import RewardConfig, RunConfig
from duet.configs.setting import shown
from duet.rewards.base import RewardInput, score
from duet.rewards.catalogue import catalogue
from duet.rewards.registry import load_rewards


@dataclass(frozen=True)
class RewardsConfig:
    """A YAML of rewards alone."""

    rewards: tuple[RewardConfig, ...]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="duet rewards", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="list | score | serve")
    commands.add_parser("list", help="names, and what each measures").set_defaults(run=_list)
    _add_score(commands.add_parser("score", help="a table of rewards of picture files"))
    _add_serve(commands.add_parser("serve", help="answer the `remote` reward of other processes"))
    options = parser.parse_args(arguments)
    options.run(options)


def _list(options: argparse.Namespace) -> None:
    lines = [("name", "from", "what it measures")]
    lines += [(e.name, e.origin, e.purpose) for e in catalogue()]
    print(_table(lines, markdown=False))


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--prompt", required=True, help="what they were to show")
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        help="as in a config: a name, or {name: ocr, args: {threads: 2}}; may be repeated",
    )
    parser.add_argument("--config", help="YAML whose `rewards` to take besides")
    parser.add_argument("--row", default="{}", help='JSON of the dataset\'s row: {"text": "CAT"}')
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    configs = [_reward(text, f"--reward[{i}]") for i, text in enumerate(options.reward)]
    configs += read_rewards(options.config) if options.config else []
    if not configs:
        raise UserError("no rewards: give --reward or --config (duet rewards list tells names)")
    _check_names(configs)
    row = _row(options.row, options.prompt)
    inputs = [RewardInput(read_picture(path), options.prompt, row) for path in options.images]
    columns = {
        name: score(reward, name, inputs, [len(inputs)])
        for name, reward in load_rewards(configs).items()
    }
    lines = [("image", *columns)]
    for path, scores in zip(options.images, zip(*columns.values(), strict=True), strict=True):
        lines.append((path, *("n/a" if s is None else f"{s:.4f}" for s in scores)))
    print(_table(lines, options.markdown))


def _reward(text: str, where: str) -> RewardConfig:
    tree = parse(f"{where} = {shown(text)}", text)
    return RewardConfig(tree) if isinstance(tree, str) else build(RewardConfig, tree, where)


def _row(text: str, prompt: str) -> Row:
    """A row of a dataset; paths are relative to the working directory."""
    record = {"prompt": prompt} | parse_object(text, f"--row = {text!r}")
    row = make_row(record, "--row", Path.cwd(), {})
    check_row(row)
    return row


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML of a run, or of `rewards` alone")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one and tells it")
    parser.add_argument("--host", default="127.0.0.1", help="interface (default: this machine)")
    parser.add_argument("--max-body-mib", type=int, default=64, help="largest request, in MiB")
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port = {options.port} is out of range: allowed is 0 to 65535")
    if options.max_body_mib < 1:
        raise UserError(f"--max-body-mib = {options.max_body_mib} is out of range: allowed is >= 1")
    configs = read_rewards(options.config)
    try:
        from duet.rewards.service.serve import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'duet[serve]'") from error
    serve(configs, options.host, options.port, options.max_body_mib * 2**20)


def read_rewards(path: str) -> tuple[RewardConfig, ...]:
    """The `rewards` of a run's YAML, or of a YAML that holds nothing else."""
    tree = read_tree(path)
    kind = RewardsConfig if set(tree) == {"rewards"} else RunConfig
    configs = build(kind, tree, "").rewards
    if not configs:
        raise UserError(f"config {path!r} has no rewards: give at least one")
    _check_names(configs)
    return configs


def _check_names(configs: Sequence[RewardConfig]) -> None:
    names = [config.metric_name for config in configs]
    if len(set(names)) < len(names):
        raise UserError(f"rewards = {names}: every name once: give a label")


def _table(lines: Sequence[Sequence[str]], markdown: bool) -> str:
    """The first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * w for w in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
