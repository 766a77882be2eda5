"""Pictures of numbers: they are the numbers that one would get today."""

from __future__ import annotations

import runpy
import warnings
from typing import Any
from xml.etree import ElementTree

import pytest
from paths import ROOT

PICTURES = ROOT / "docs" / "pictures"
BOTTOM, TOP = 0.13, 0.97
"""Of the picture's height, where 0 and 1 lie."""


@pytest.fixture(scope="module")
def drawing() -> dict[str, Any]:
    """The names in the script that draws experts.svg."""
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(PICTURES / "draw_experts.py"))


def drawn(policy: str) -> list[float]:
    """Hit rates of the points of one curve."""
    picture = ElementTree.parse(PICTURES / "experts.svg").getroot()
    height = float(picture.attrib["viewBox"].split()[3])
    (curve,) = [one for one in picture.iter() if one.attrib.get("id") == f"curve-{policy}"]
    words = next(iter(curve)).attrib["d"].split()
    heights = [float(word) for word in words[2::3]]
    return [(1 - y / height - BOTTOM) / (TOP - BOTTOM) for y in heights]


OTHERS = [pytest.param(at, marks=pytest.mark.slow) for at in range(10) if at != 3]


@pytest.mark.parametrize("at", [3, *OTHERS])
def test_the_picture_of_hits_is_what_the_simulator_says(drawing: dict[str, Any], at: int) -> None:
    texts, share = drawing["make_traces"](), drawing["SHARES"][at]
    for policy in drawing["CURVES"]:
        assert len(drawn(policy)) == len(drawing["SHARES"])
        rate = drawing["hit_rate"](*texts, policy, share)
        assert drawn(policy)[at] == pytest.approx(rate, abs=1e-4), policy
