"""R-Drop's options beside the Trainer's on a script's command line, as docs/trainer.md has them."""

import json
import re
from pathlib import Path

import pytest

from regdrop import RDropConfig

PAGE = Path(__file__).parents[3] / "docs" / "trainer.md"


@pytest.fixture
def parser():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M)
    [block] = [block for block in blocks if "HfArgumentParser" in block]
    names = {"RDropConfig": RDropConfig}
    exec(compile(block, PAGE.name, "exec"), names)
    return names["parser"]


@pytest.mark.parametrize("options", [{"alpha": "auto", "alpha_max": 8.0}, {"alpha": 0.5}, {}])
def test_options_are_read_from_the_command_line_and_from_files(parser, tmp_path, options):
    expected, out = RDropConfig(**options), str(tmp_path)
    command = ["--output_dir", out, "--rdrop", json.dumps(options)]
    _, script = parser.parse_args_into_dataclasses(command)
    assert script.options() == expected
    file = tmp_path / "options.json"
    for given in (options, json.dumps(options)):
        # YAML holds JSON.
        file.write_text(json.dumps({"output_dir": out, "rdrop": given}), encoding="utf-8")
        for read in (parser.parse_json_file, parser.parse_yaml_file):
            assert read(file)[1].options() == expected


def test_without_options_they_are_the_default(parser, tmp_path):
    _, script = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert script.options() == RDropConfig()
