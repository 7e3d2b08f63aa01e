"""Builds fastrlhf._C: one shared object for every Python >= 3.10 and every torch >= 2.10 (stable ABI of both).

The hot files are compiled once for each instruction set, into namespaces of their own, and the processor chooses at run
time (csrc/cpu/capability.cpp). Nothing here depends on the machine that builds, except that x86 gets the x86 builds.
"""

import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = [
    "csrc/ops.cpp",
    "csrc/module.cpp",
    "csrc/cpu/capability.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/log_probs.cpp",
    "csrc/cpu/lm_head.cpp",
    "csrc/cpu/full_kl.cpp",
    "csrc/cpu/layers.cpp",
    "csrc/cpu/packed_linear.cpp",
    "csrc/cpu/paged_attention.cpp",
    "csrc/cpu/sampling.cpp",
    "csrc/cpu/kl.cpp",
    "csrc/cpu/advantages.cpp",
    "csrc/cpu/losses.cpp",
    "csrc/cpu/masked.cpp",
    "csrc/cpu/preferences.cpp",
]
HOT_SOURCES = [
    "csrc/cpu/kernels/log_probs.cpp",
    "csrc/cpu/kernels/lm_head.cpp",
    "csrc/cpu/kernels/full_kl.cpp",
    "csrc/cpu/kernels/layers.cpp",
    "csrc/cpu/kernels/packed_linear.cpp",
    "csrc/cpu/kernels/paged_attention.cpp",
    "csrc/cpu/kernels/sampling.cpp",
    "csrc/cpu/kernels/kl.cpp",
    "csrc/cpu/kernels/advantages.cpp",
    "csrc/cpu/kernels/losses.cpp",
    "csrc/cpu/kernels/masked.cpp",
]
HEADERS = [str(path) for path in sorted(Path("csrc").rglob("*.h"))]

TORCH_2_10 = "0x020A000000000000"
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
# fma where it is written and nowhere else: an op must not round differently because another output is asked for.
FLAGS += ["-ffp-contract=off"]
CAPABILITIES = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    # -Wno-*uninitialized: GCC 12 warns about the undefined lanes inside its own avx512fintrin.h.
    CAPABILITIES["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    CAPABILITIES["avx512_bf16"] = [*CAPABILITIES["avx512"], "-mavx512bf16"]


def stop(what: str, remedy: str):
    sys.exit(f"\nfastrlhf cannot be built: {what}\nRemedy: {remedy}\n")


def torch_folder() -> Path:
    """Where torch is, without importing it: only its headers and libraries are needed."""
    try:
        import importlib.util

        spec = importlib.util.find_spec("torch")
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        stop(
            "torch is not installed in the environment that builds.",
            "install torch >= 2.10 first (https://pytorch.org/get-started), then `pip install --no-build-isolation .`",
        )
    folder = Path(spec.origin).parent
    # By version: the headers of the stable ABI are older than what is used of them here.
    version = re.search(r"__version__\s*(?::.*?)?=\s*['\"]((\d+)\.(\d+)[^'\"]*)", (folder / "version.py").read_text())
    if version is None or (int(version[2]), int(version[3])) < (2, 10):
        stop(
            f"the torch in {folder} is {version[1] if version else 'of unknown version'}, older than 2.10.",
            "upgrade to torch >= 2.10 (`pip install --upgrade torch`).",
        )
    return folder


def check_compiler(command: str) -> None:
    if shutil.which(command) is None:
        stop(
            f"no C++ compiler: `{command}` was not found.",
            "install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; macOS: `xcode-select "
            "--install`) or name yours in the environment variable CXX.",
        )


class BuildKernels(build_ext):
    def build_extension(self, ext):
        torch = torch_folder()
        compiler = self.compiler
        cxx = os.environ.get("CXX") or (getattr(compiler, "compiler_cxx", None) or ["c++"])[0]
        check_compiler(cxx.split()[0])
        includes = [str(torch / "include"), *compiler.include_dirs, *self.include_dirs]
        macros = [("TORCH_TARGET_VERSION", TORCH_2_10)]
        if "avx512" in CAPABILITIES:
            macros.append(("FASTRLHF_HAVE_X86_BUILDS", None))

        jobs = [(source, "common", [], []) for source in SOURCES]
        for name, flags in CAPABILITIES.items():
            hot_macros = [("FASTRLHF_CAPABILITY", name), (f"FASTRLHF_CAPABILITY_{name.upper()}", None)]
            jobs += [(source, name, flags, hot_macros) for source in HOT_SOURCES]

        def compile_one(job):
            source, name, flags, extra = job
            return compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, name),
                macros=macros + extra,
                include_dirs=includes,
                extra_postargs=FLAGS + flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [o for some in pool.map(compile_one, jobs) for o in some]
        # Linked beside its place and moved there: a process that has the old file mapped keeps it whole.
        target = self.get_ext_fullpath(ext.name)
        compiler.link_shared_object(
            objects,
            f"{target}.new",
            libraries=["torch", "torch_cpu", "c10"],
            library_dirs=[str(torch / "lib")],
            build_temp=self.build_temp,
            target_lang="c++",
        )
        os.replace(f"{target}.new", target)


class BuildPython(build_py):
    def run(self):
        super().run()
        # Python reads .pth files in the folder of the packages itself; an editable installation is put together there.
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.copy_file("fastrlhf/compat/fastrlhf.pth", folder)


setup(
    ext_modules=[
        Extension("fastrlhf._C", SOURCES + HOT_SOURCES, depends=HEADERS, language="c++", py_limited_api=True),
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
