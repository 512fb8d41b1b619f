"""The kernel built with AddressSanitizer and UBSan passes its own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from popriskmin.step.kernels import cpu

SOURCE = Path(cpu.__file__).with_name("cpu.c")
COMPILER = shutil.which("gcc")
LIBRARIES = ("libasan.so", "libubsan.so")


def library(name):
    """Return the path of a sanitizer's runtime, or None where the compiler has none."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs gcc on Linux")
def test_under_both_sanitizers(tmp_path):
    preload = [library(name) for name in LIBRARIES]
    if not all(preload):
        pytest.skip("gcc has no sanitizers here")
    built = tmp_path / "sanitized.so"
    subprocess.run(
        [COMPILER, "-std=c11", "-O1", "-g1", "-DINLINE=static", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined", str(SOURCE), "-o", str(built), "-lm"], check=True)  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # Python and torch leak at exit, and allocate in their own way.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "POPRISKMIN_CPU_KERNEL": str(built),
    }
    tests = ["agrees", "instruction_set", "half_types", "nearest", "mixed_list", "insisting"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join(tests),
         *(str(Path(__file__).with_name(f"test_{part}.py")) for part in ("cpu", "cpu_codes", "eligible"))],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs gcc on Linux")
def test_the_sanitizers_would_notice(tmp_path):
    """A kernel that writes one element too far is caught: the test above can fail."""
    preload = [library(name) for name in LIBRARIES]
    if not all(preload):
        pytest.skip("gcc has no sanitizers here")
    for source in [SOURCE, *SOURCE.parent.glob("*.h")]:
        shutil.copy(source, tmp_path / source.name)
    header = tmp_path / "cpu_step.h"
    text = header.read_text()
    assert text.count("for (int64_t i = 0; i < n; i++, place++)") == 1
    header.write_text(text.replace("i < n; i++, place++", "i <= n; i++, place++"))
    built = tmp_path / "broken.so"
    subprocess.run(
        [COMPILER, "-std=c11", "-O0", "-DINLINE=static", "-fPIC", "-shared", "-pthread", "-fsanitize=address",
         str(tmp_path / "cpu.c"), "-o", str(built), "-lm"], check=True)  # fmt: skip
    code = """
import torch
from popriskmin import PRM
p = torch.nn.Parameter(torch.zeros(50_000))
p.grad = torch.ones_like(p)
PRM([p], fused=True).step()
"""
    environment = {**os.environ, "LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0",
                   "POPRISKMIN_CPU_KERNEL": str(built)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
