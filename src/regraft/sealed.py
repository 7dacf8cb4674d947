"""Two files that belong together: tensors, and a JSON file that says what they are, every byte under a digest.

The JSON file is written last and an older one goes first, so that a save that is killed midway leaves nothing rather
than a mixture. Knows bytes and names; nothing of networks or heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from regraft.__version__ import __version__
from regraft.errors import ArtifactError
from regraft.files import digest_json, write_atomic


@dataclass(frozen=True)
class Kind:
    """What is kept: a word for it, its format's number, its two files, the command that makes it, and its verb."""

    word: str
    format: int
    manifest: str
    weights: str
    command: str
    again: str


def write_sealed(folder: Path, kind: Kind, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write both files into `folder`; facts: JSON values beside the format and the digests."""
    data = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    (folder / kind.manifest).unlink(missing_ok=True)
    write_atomic(folder / kind.weights, [data])
    weights = {"file": kind.weights, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": kind.format, "regraft": __version__, **facts, "weights": weights}
    write_atomic(folder / kind.manifest, [_render(manifest)])


def read_manifest(folder: Path, kind: Kind) -> dict[str, Any]:
    """The JSON file, checked byte for byte against its own digest. Raises ArtifactError where it is not whole."""
    path = folder / kind.manifest
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(
            f"{folder} must hold a finished {kind.word}, and its {kind.manifest} cannot be read ({e.strerror}): run "
            f"`{kind.command}` to the end first."
        ) from e
    try:
        manifest: dict[str, Any] = json.loads(data)
        whole = _render({k: v for k, v in manifest.items() if k != "digest"}) == data
    except (ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ArtifactError(
            f"{path} must be as it was written; it was changed or damaged: restore it, or {kind.again} anew."
        )
    if manifest.get("format") != kind.format:
        raise ArtifactError(
            f"{path} must have format {kind.format}; found {manifest.get('format')}: use the regraft that wrote it."
        )
    return manifest


def read_tensors(folder: Path, kind: Kind, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the manifest was written for. Raises ArtifactError where they are others."""
    path, stated = folder / kind.weights, manifest["weights"]
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(f"{path} must be there beside {kind.manifest}: {e.strerror}.") from e
    if len(data) != stated["bytes"] or hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise ArtifactError(
            f"{path} must be the file that {kind.manifest} was written for; its digest differs: it was damaged or "
            f"belongs to another {kind.word}: restore it, or {kind.again} anew."
        )
    return safetensors.torch.load(data)


def _render(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps({**manifest, "digest": digest_json(manifest)}, indent=1, allow_nan=False).encode("ascii") + b"\n"
