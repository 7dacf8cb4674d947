"""The names that users may rely on: listed once, importable, documented, and cheap until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import regraft
from conftest import SOURCES

HEAVY = {"torch", "numpy", "PIL", "timm", "sklearn", "simplejpeg", "safetensors", "huggingface_hub"}


def test_every_public_name_is_listed_once_and_leads_home():
    assert len(regraft.__all__) == len(set(regraft.__all__))
    assert set(regraft.__all__) == {*regraft._HOME, "__version__"}
    assert dir(regraft) == sorted(regraft.__all__)


@pytest.mark.parametrize("name", sorted(regraft._HOME))
def test_every_public_name_can_be_had_and_says_what_it_is(name):
    thing = getattr(regraft, name)
    assert thing.__module__ == f"regraft.{regraft._HOME[name]}"
    assert thing.__doc__
    assert thing.__doc__.strip()[0].isupper()


def test_type_checkers_are_told_the_same_homes():
    tree = ast.parse(Path(regraft.__file__).read_text())
    told = {
        alias.name: node.module.removeprefix("regraft.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == regraft._HOME


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'registry'"):
        regraft.registry  # noqa: B018
    assert regraft.nn.fold_batchnorm


@pytest.mark.parametrize(
    "program",
    [
        "import regraft",
        "import regraft.cli",
        "from regraft.cli import main; main(['--help'], standalone_mode=False)",
        "from regraft.cli import main; main(['fit', '--help'], standalone_mode=False)",
        "from regraft.cli import main; main(['cache', 'prune', '--help'], standalone_mode=False)",
    ],
)
def test_import_and_help_load_nothing_heavy(program):
    code = f"import sys\n{program}\nprint(*{HEAVY!r} & sys.modules.keys(), file=sys.stderr)"
    environment = {"PYTHONPATH": str(SOURCES), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.strip() == ""
