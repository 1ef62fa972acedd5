"""Builds ``flr_kernels._C`` from csrc/: CUDA kernels and host twin where nvcc is, the host twin alone where only a C++
compiler is, nothing where neither is. Metadata is in pyproject.toml. See docs/extension.md.

Never imports torch, downloads or looks for a GPU. Environment: ``FLR_CUDA_ARCH_LIST`` (e.g. "8.0;9.0+PTX"),
``MAX_JOBS``, ``CUDA_HOME``, ``CXX``, ``CXXFLAGS``, ``FLR_REQUIRE_EXTENSION=1`` (fail instead of going without, or
without the CUDA half), ``FLR_PROJECT_URL`` (address of the repository, for links on the package index's page).
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
FILES = ("*.cpp", "*.cu"), ("*.h", "*.cuh")  # what is compiled, what is included
REQUIRED = os.environ.get("FLR_REQUIRE_EXTENSION", "") not in ("", "0")


def find_nvcc():
    """nvcc's path or None. CUDA_HOME, where set, is the only place looked at."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def architectures(nvcc):
    """Flags for nvcc, and the list the module exports: every architecture, and PTX of the newest for later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    asked = re.split(r"[;,\s]+", os.environ.get("FLR_CUDA_ARCH_LIST", "").strip("; ,"))
    if asked == [""]:
        asked = [a for a in ARCHITECTURES if a.replace(".", "") in known]
        asked[-1] += "+PTX"
    flags = []
    for name in asked:
        match = re.fullmatch(r"(\d+\.\d)(\+PTX)?", name)
        number = match[1].replace(".", "") if match else name
        if number not in known:
            raise SystemExit(f"FLR_CUDA_ARCH_LIST: expected some of {sorted(known, key=int)}, got {name!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[2]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, " ".join(asked)


def knows_hopper(nvcc):
    """Whether nvcc compiles for compute capability 9.0a, which it does since 12.0."""
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", shown)
    return release is None or int(release[1]) >= 12


def run_all(commands, folder, jobs):
    """Run ``{output: (command, inputs)}``, the last one after the others; with ninja only what is out of date."""
    ninja = shutil.which("ninja")
    if ninja is None:
        *first, last = [command for command, _ in commands.values()]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), first))
        subprocess.run(last, check=True)
        return
    escape = {ord(" "): "$ ", ord(":"): "$:", ord("$"): "$$"}
    lines = ["rule run", "  command = $line"]
    for output, (command, inputs) in commands.items():
        names = " ".join(str(path).translate(escape) for path in inputs)
        lines += [
            f"build {output.translate(escape)}: run {names}",
            f"  line = {shlex.join(command).replace('$', '$$')}",
        ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([ninja, "-C", str(folder), "-j", str(jobs)], check=True)


class BuildExtension(build_ext):
    def build_extension(self, extension):
        nvcc = find_nvcc()
        attempts = [nvcc, None] if nvcc and not REQUIRED else [nvcc]
        for attempt in attempts:
            try:
                found = self.compile(extension, attempt)
            except (subprocess.CalledProcessError, FileNotFoundError, ImportError) as error:
                print(f"flr: could not build {'the CUDA half' if attempt else 'the extension'}: {error}", flush=True)
                if REQUIRED:
                    raise SystemExit("flr: FLR_REQUIRE_EXTENSION is set, giving up") from error
                continue
            print(f"flr: built flr_kernels._C ({found})", flush=True)
            return
        print(
            "flr: going on without flr_kernels._C; the PyTorch reference serves its operations. See docs/extension.md"
        )

    def compile(self, extension, nvcc):
        import pybind11

        asked = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not asked.isdecimal():
            raise SystemExit(f"MAX_JOBS: expected a number of compilers, got {asked!r}")
        jobs = max(1, int(asked))
        flags, names = architectures(nvcc) if nvcc else ([], "")
        if nvcc is None and REQUIRED:
            print("flr: no nvcc: the CUDA half is left out", flush=True)
        folder = Path(self.build_temp).resolve() / "flr"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        fingerprint = runpy.run_path(str(ROOT / "flr_kernels/backends/source_hash.py"))["source_hash"](SOURCES)
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        defines = [f'-DFLR_SOURCE_HASH="{fingerprint}"', f'-DFLR_ARCHITECTURES="{names}"', *["-DFLR_CUDA"] * bool(nvcc)]
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "g++"]
        cxx = [*compiler, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        cxx += [*shlex.split(os.environ.get("CXXFLAGS", "")), "-c"]
        hopper = any(re.match(r"9\.0\b", name) for name in names.split()) and knows_hopper(nvcc)
        defines += ["-DFLR_SM90A"] * hopper
        headers = [path for end in FILES[1] for path in sorted(SOURCES.glob(end))]

        def cpp(name, *extra):
            source, output = SOURCES / f"{name}.cpp", str(folder / f"{name}.o")
            return output, ([*cxx, *extra, str(source), "-o", output], [source, *headers])

        commands = {}  # longest first
        linker = [*compiler, "-shared"]
        if nvcc:
            host = ["-ccbin", compiler[0]] if os.environ.get("CXX") else []
            gpu = [nvcc, *host, "-std=c++17", "-O3", "--cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            # setmaxnreg is of 9.0a alone: nothing later runs this code
            attention = ("factor_attention", "factor_attention_backward") if hopper else ()
            kernels = {name: ["-gencode=arch=compute_90a,code=sm_90a"] for name in attention}
            for name, targets in {**kernels, "group_advantage": [f"--threads={jobs}", *flags]}.items():
                source, output = SOURCES / f"{name}.cu", str(folder / f"{name}.cu.o")
                commands[output] = ([*gpu, *targets, "-c", str(source), "-o", output], [source, *headers])
            linker = [nvcc, *host, "-shared", "--cudart=static"]
        commands.update([cpp("bindings", *includes, *defines), cpp("group_advantage"), cpp("log_normaliser")])
        objects = list(commands)
        commands[str(target)] = ([*linker, *objects, "-o", str(target)], objects)
        run_all(commands, folder, jobs)
        return f"CUDA {names} and host" if nvcc else "host only: no nvcc found or it failed"


compiled, included = ([str(p.relative_to(ROOT)) for end in ends for p in sorted(SOURCES.glob(end))] for ends in FILES)
extension = Extension("flr_kernels._C", compiled, depends=included, optional=not REQUIRED)
readme, urls = (ROOT / "README.md").read_text(encoding="utf-8"), {}
if address := os.environ.get("FLR_PROJECT_URL"):
    page = runpy.run_path(str(ROOT / "scripts/index_readme.py"))
    readme, urls = page["absolute_links"](readme, address), page["project_urls"](address)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls=urls,
)
