"""What README.md tells people to type exists, and what it points at is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_first_screen_has_both_commands_and_a_picture() -> None:
    first = "\n".join(README.splitlines()[:25])
    assert "make demo" in first
    assert "make test" in first
    assert "![" in first


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z]+)", README))
    assert used
    assert used <= targets


def test_modules_exist() -> None:
    modules = set(re.findall(r"python -m ([a-z_.]+[a-z])", README)) - {"ray_jobs"}
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("stage", re.findall(r"^\| [a-z, ]+ \| `([a-z]+)`", README, re.MULTILINE))
def test_stages_of_the_table_exist(stage: str) -> None:
    assert (ROOT / "ray_jobs" / f"{stage}.py").is_file()


def test_tinyvlm_commands_exist() -> None:
    from tinyvlm import cli

    used = {shlex.split(command)[1] for command in COMMANDS if command.startswith("tinyvlm ")}
    used |= set(re.findall(r"`tinyvlm ([a-z]+)", README))
    known = subprocess.run([sys.executable, "-m", "tinyvlm.cli", "--help"], capture_output=True, text=True).stdout
    assert used
    assert cli.main
    for name in used:
        assert re.search(rf"\b{name}\b", known), name


def test_files_exist() -> None:
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= {name for name in re.findall(r"`([\w./]+\.(?:py|md|txt|toml|png))`", README) if "/" in name}
    named -= {"runs/demo/report.html", "runs/demo/summary.json"}
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_links_in_curl_example_are_ours() -> None:
    """The example must run as printed: its picture is in the repository."""
    curl = next(block for block in BLOCKS if "curl" in block)
    picture = re.search(r"base64 -w0 (\S+?)\)", curl)
    assert picture
    assert (ROOT / picture.group(1)).is_file()
