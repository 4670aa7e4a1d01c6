"""For how many processes a machine is looked at."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from pipeline.preflight.survey import Gpu, Launch, Machine
from tools.preflight import main

GIB = 1 << 30
CONFIG = Path(__file__).parents[3] / "launch/configs/llama2_70b_32k.yaml"


@pytest.mark.parametrize(
    ("gpus", "words", "processes"), [(3, (), 3), (0, (), 8), (3, ("--nproc", "2"), 2), (0, ("--nproc", "2"), 2)]
)
def test_one_a_gpu_unless_told(gpus: int, words: tuple[str, ...], processes: int) -> None:
    machine = Machine((Gpu("A100", 80 * GIB, 79 * GIB, 8.0),) * gpus, 500 * GIB, "this machine", 8 * GIB)
    with (
        mock.patch("tools.preflight.read_machine", return_value=machine),
        mock.patch("tools.preflight.survey", return_value=[]) as survey,
    ):
        assert main(["--config", str(CONFIG), *words]) == 0
    assert survey.call_args.args[1:3] == (Launch(processes, 1), machine)
