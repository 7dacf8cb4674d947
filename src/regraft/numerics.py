"""The numbers that features are made of: device, precision, batch, memory layout and the kernels that ran.

The same picture gives other low bits on other kernels, so these facts are part of every key and of every saved model.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from regraft.errors import BackboneError

CPU_BATCH = 8
"""On two AVX512 cores 8 pictures run as fast as 32 with a tuned allocator, and a lone picture pays for 8, not 32."""
CPU_FLOAT32_BATCH = 16
"""Below 16 pictures and with one thread torch takes other float32 kernels (its `use_mkldnn` rule), with other last
bits."""
CUDA_BATCH = 64

Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Numerics:
    """How the frozen part is computed.

    batch: every batch is padded to this many pictures, so that features do not depend on their neighbours.
    emulated: bfloat16 without bfloat16 kernels: values are rounded to it, arithmetic is float32 (slow, same labels).
    kernels: what did the arithmetic: library, version, instruction set.
    """

    device: str
    precision: Precision
    batch: int
    kernels: str
    layout: str = "channels_last"
    emulated: bool = False

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)


def pick_numerics(device: str = "auto", precision: Precision | None = None) -> Numerics:
    """The fastest faithful numerics of this machine; `precision` fixes it, as a saved model does.

    Raises BackboneError when the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise BackboneError(f"The device must be auto, cpu or cuda; found {device!r}.")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise BackboneError("The device cuda is not available here: choose cpu or auto.")
        supported = torch.cuda.is_bf16_supported()
        kernels = f"torch {torch.__version__} {torch.cuda.get_device_name()}"
        return _numerics("cuda", CUDA_BATCH, kernels, supported, precision)
    supported, instructions = _cpu_bfloat16()
    batch = CPU_BATCH if supported and precision != "float32" else CPU_FLOAT32_BATCH
    return _numerics("cpu", batch, f"torch {torch.__version__} {instructions}", supported, precision)


def _numerics(device: str, batch: int, kernels: str, supported: bool, asked: Precision | None) -> Numerics:
    precision: Precision = asked or ("bfloat16" if supported else "float32")
    return Numerics(device, precision, batch, kernels, emulated=precision == "bfloat16" and not supported)


def _cpu_bfloat16() -> tuple[bool, str]:
    # oneDNN can be told to use less than the processor has; its kernels, and so the features, then differ.
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    has = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    allowed = limit in ("", "ALL", "DEFAULT") or "BF16" in limit or "AMX" in limit
    capability = torch.backends.cpu.get_cpu_capability()
    return has and allowed, f"{capability}{'+BF16' if has else ''}{' limited to ' + limit if limit else ''}"
