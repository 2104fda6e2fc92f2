"""What stands beside trained weights: which part's they are, of which base, in what arithmetic."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from duet.configs.errors import UserError, first_line
from duet.configs.load import build
from duet.configs.policy_schema import Arithmetic
from duet.inference.model import base_fingerprint
from duet.inference.parts import PARTS, Part


@dataclass(frozen=True)
class Provenance:
    """All that full weights tell; an adapter tells its LoRA besides."""

    stage: Literal["ar", "decoder"]
    base_model: str  # where its base lay, for people
    base: str  # fingerprint of the weights that it was trained on: those of its own part
    arithmetic: Arithmetic  # that of the policy which training sampled with

    @property
    def part(self) -> Part:
        return PARTS[self.stage]


Kind = TypeVar("Kind", bound=Provenance)


def read_provenance(kind: type[Kind], path: Path, checkpoint: str | Path) -> Kind:
    """From its JSON. Raises UserError, naming the checkpoint, where it is not what was written."""
    try:
        return build(kind, json.loads(path.read_text()), path.name)
    except (OSError, ValueError, UserError) as error:
        raise damaged(checkpoint, error) from error


def require_base(told: Provenance, checkpoint: str | Path, model_path: str) -> None:
    """Raises UserError for a model whose part is not the one that was trained on."""
    component = told.part.component
    if base_fingerprint(model_path, component) != told.base:
        raise UserError(
            f"checkpoint {str(checkpoint)!r} was trained on another {component} than that of "
            f"{str(model_path)!r}: its base was {told.base_model!r}"
        )


def damaged(checkpoint: str | Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {str(checkpoint)!r} is missing or damaged ({first_line(error)}): "
        "give a folder that training wrote"
    )
