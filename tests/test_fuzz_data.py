"""A sample of the cases that benchmarks/fuzz_data.py makes, the same ones every time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parents[1] / "benchmarks" / "fuzz_data.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each case is a process that is forked")
def test_damaged_data_ends_in_success_or_one_sentence():
    pytest.importorskip("cv2", reason="needs OpenCV, which comes with mmcv")
    done = subprocess.run(
        [sys.executable, FUZZER, "--cases", "80"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "80 cases in" in done.stdout
    successes, sentences = (
        int(done.stdout.split(f" {kind}")[0].split()[-1]) for kind in ("success", "sentence")
    )
    assert successes > 10 and sentences > 30, "the mutations neither all matter nor all not"
