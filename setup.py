"""Build the kernel for the CPU: a plain shared library, which needs a C compiler, but no headers of Python or torch.

Where it cannot be built the package is installed without it, and `popriskmin info` says so. The rest of the build is in
pyproject.toml.
"""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "popriskmin.step.kernels._cpu"

# Nothing that changes values: no -ffast-math. The two -fno- options only say that nobody reads errno or the
# floating-point exception flags; without them square roots and comparisons are not made into vector code.
COMPILE = ["-std=c11", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-pthread"]


class BuildKernel(build_ext):
    """Name the library plainly, for ctypes, and let a failed build pass with a warning."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file's name, which does not depend on the version of Python."""
        if fullname.rsplit(".", 1)[-1] == "_cpu":
            return os.path.join(*fullname.split(".")) + (".dll" if sys.platform == "win32" else ".so")
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export the functions of the kernel; there is no module to initialize."""
        return ["prm_step", "prm_abi", "prm_ask_ahead", "prm_best_level", "prm_use_pool", "prm_count_up"]


class AnyPython(bdist_wheel):
    """Tag the wheel for any Python 3: only the platform counts."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tags."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            NAME,
            sources=["popriskmin/step/kernels/cpu.c"],
            depends=[f"popriskmin/step/kernels/cpu_{part}.h" for part in ("codes", "step", "threads", "types")],
            extra_compile_args=COMPILE,
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPython},
)
