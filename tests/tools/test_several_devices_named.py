"""How commands take the names of several devices."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model
from fake_device import NearDevice, named_twice, opened_as

from layer_streamer.tools.cli import main
from layer_streamer.tools.command import add_devices


@pytest.mark.parametrize(
    "arguments", [["--device", "a", "--device", "b"], ["--device", "a,b"], ["--device", "a, b"]]
)
def test_devices_are_named_one_by_one_or_with_commas(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_devices(parser)
    assert parser.parse_args(arguments).device == ["a", "b"]
    assert parser.parse_args([]).device is None


def test_a_plan_with_a_draft_has_the_parts_of_each_device(tmp_path: Path, capsys: Any) -> None:
    path = byte_model(tmp_path / "model")
    with opened_as(lambda number: NearDevice()), named_twice():
        assert main(["plan", str(path), "--device", "cpu,cpu", "--draft", str(path)]) == 0
    table, _, document = capsys.readouterr().out.strip().rpartition("\n")
    first, second = json.loads(document)["device_parts"]
    assert first["draft"] > 0 == second["draft"] and table.count("device cpu: ") == 2


def test_a_batch_over_two_devices_has_the_lines_of_one(tmp_path: Path) -> None:
    path, source = byte_model(tmp_path / "model"), tmp_path / "in"
    prompts = ["Hello", "a longer prompt than that", "b", "Hello again"]
    source.write_text("".join(f"{json.dumps({'prompt': one})}\n" for one in prompts))
    found = []
    for number, (device, draft) in enumerate((("cpu", []), ("cpu,cpu", ["--draft", "self"]))):
        output = tmp_path / f"{number}"
        arguments = ["batch", str(path), str(source), str(output), "--max-new-tokens", "4"]
        with opened_as(lambda number: NearDevice()), named_twice():
            assert main([*arguments, "--device", device, "--temperature", "0", *draft]) == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        found.append({line["line"]: line["response"]["body"]["choices"] for line in lines})
    assert found[1] == found[0] and len(found[0]) == len(prompts)
