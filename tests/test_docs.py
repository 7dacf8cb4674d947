"""The documents tell the truth: every module and command is named, and what the README shows runs."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from click import Group
from PIL import Image
from torch import nn

from regraft.cli import main

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "regraft"
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
NAMES = sorted({p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")})
MODULES = [name for name in NAMES if not name.startswith("__")]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_rank_in_the_architecture(module: str) -> None:
    ranks = "".join(line for line in ARCHITECTURE.splitlines() if re.match(r"\| \d+ \|", line))
    assert f"`{module}`" in ranks


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_in_the_tree_of_the_readme(module: str) -> None:
    tree = README.split("src/regraft/\n")[1].split("```")[0]
    assert re.search(rf"\b{module}(\.py|/)", tree)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_is_documented_in_the_readme(command: str) -> None:
    assert f"`regraft {command}" in README
    found = main.commands[command]
    for name in found.commands if isinstance(found, Group) else ():
        assert name in README.split(f"`regraft {command}")[1].splitlines()[0]


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = [rng.integers(90 * (i % 2), 160 + 90 * (i % 2), (32, 32, 3)).astype(np.uint8) for i in range(16)]
    labels = ["dark" if i % 2 == 0 else "light" for i in range(16)]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    Image.fromarray(images[0]).save("cat.jpg")
    hidden = OrderedDict(hidden1=nn.Conv2d(3, 4, 3), act1=nn.ReLU(), hidden2=nn.Conv2d(4, 4, 3), act2=nn.ReLU())
    module = nn.Sequential(OrderedDict(**hidden, flat=nn.Flatten(), out=nn.Linear(64, 2)))
    torch.save(module.state_dict(), "model.ckpt")
    given = {"images": images, "labels": labels, "my_module": module, "batch": torch.zeros(2, 3, 8, 8)}
    code = README.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), given)
    lower, upper, backbone = given["lower"], given["upper"], given["backbone"]
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(upper(lower(x)), backbone.module(x))  # type: ignore[operator, attr-defined]


def test_the_groundwork_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = torch.rand(64, 28, 28), torch.arange(64) % 10

    def train(model: nn.Module) -> None:
        for _ in range(3):
            nn.functional.cross_entropy(model(images.flatten(1)), labels).backward()

    code = README.split("```python\n")[2].split("```")[0]
    exec(compile(code, "README.md", "exec"), {"images": images, "train": train})
    assert "266,610 trainable" in capsys.readouterr().out
