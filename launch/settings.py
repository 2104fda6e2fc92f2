"""duet settings: every setting of a run, with its type, range, default and meaning."""

import argparse

from duet.configs.listing import text


def main(arguments: list[str]) -> None:
    argparse.ArgumentParser(prog="duet settings", description=__doc__).parse_args(arguments)
    print(text())
