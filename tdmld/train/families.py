"""The model families. A family is a row here, never a path to code."""

from tdmld.train.decodertable import DECODERS
from tdmld.train.errors import SpecError
from tdmld.train.family import Family
from tdmld.train.resnet import ResNet

FAMILIES: dict[str, Family] = {family.name: family for family in (*DECODERS, ResNet())}


def family_of(name: str) -> Family:
    """The family of this name; SpecError when there is none."""
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise SpecError("family", f"unknown model family {name!r}", f"use one of {known}")
    return FAMILIES[name]
