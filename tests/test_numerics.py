"""The numbers that features are made of are chosen once and say who made them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from regraft.errors import BackboneError
from regraft.numerics import CPU_BATCH, CPU_FLOAT32_BATCH, Numerics, pick_numerics


def chosen_with(**environment: str) -> Numerics:
    """What a process chooses on the CPU under these variables of the environment."""
    program = (
        "import json; from regraft.numerics import pick_numerics; print(json.dumps(pick_numerics('cpu').to_json()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return Numerics(**json.loads(done.stdout))


def test_bfloat16_is_chosen_where_the_processor_has_it_and_float32_elsewhere() -> None:
    has = bool(torch.cpu._is_avx512_bf16_supported())
    assert pick_numerics("cpu").precision == ("bfloat16" if has else "float32")
    assert not pick_numerics("cpu").emulated


def test_precision_that_is_asked_for_is_kept_and_emulated_where_need_be() -> None:
    assert pick_numerics("cpu", "float32").precision == "float32"
    assert not pick_numerics("cpu", "float32").emulated
    half = pick_numerics("cpu", "bfloat16")
    assert (half.precision, half.emulated) == ("bfloat16", pick_numerics("cpu").precision == "float32")


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_instructions_that_are_forbidden_are_not_used_and_named(variable: str) -> None:
    limited = chosen_with(**{variable: "AVX2"})
    assert limited.precision == "float32"
    assert limited.kernels.endswith("limited to AVX2")
    assert limited.kernels != pick_numerics("cpu").kernels
    assert limited.batch == CPU_FLOAT32_BATCH


def test_other_kernels_of_torch_have_another_name() -> None:
    assert chosen_with(ATEN_CPU_CAPABILITY="default").kernels != chosen_with().kernels


def test_kernels_name_the_version_of_torch() -> None:
    assert torch.__version__ in pick_numerics("cpu").kernels


def test_small_batches_are_for_native_bfloat16_alone() -> None:
    assert pick_numerics("cpu", "float32").batch == CPU_FLOAT32_BATCH
    half = pick_numerics("cpu", "bfloat16")
    assert half.batch == (CPU_FLOAT32_BATCH if half.emulated else CPU_BATCH)


def test_all_facts_are_in_the_json() -> None:
    numerics = pick_numerics("cpu")
    assert Numerics(**json.loads(json.dumps(numerics.to_json()))) == numerics


def test_unknown_device_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(BackboneError, match=r"must be auto, cpu or cuda; found 'tpu'"):
        pick_numerics("tpu")


def test_missing_accelerator_is_refused_and_passed_over_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackboneError, match=r"cuda is not available here: choose cpu or auto"):
        pick_numerics("cuda")
    assert pick_numerics("auto") == pick_numerics("cpu")
