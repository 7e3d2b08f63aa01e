"""What the GPU kernels compile to, without a GPU: `python bench/gpu_audit.py`.

Launches every Triton kernel through the functions that users reach, with a driver that pretends to be a GPU and stops
before the launch, so what is read here is the code a GPU would run: registers, spills, shared memory, and the width of
global loads and stores. Exits with 1 unless, for every kernel, op, dtype and architecture, nothing spills, one binary
serves all sizes, temperatures, strides and alignments, and loops over the vocabulary move 128 bits an access and no
byte more than the op needs.

What is launched of kernels/triton/<family>.py stands in bench/audit/<family>.py; see load_family.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import types
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ARCHS = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "triton"
FAMILIES = Path(__file__).resolve().parent / "audit"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LARGEST_GRID_YZ = 65535


@dataclass
class Audit:
    """One kernel of one op in one dtype on one architecture."""

    op: str
    kernel: str
    dtype: str
    arch: int
    binaries: int
    registers: int
    spills: int  # loads from and stores to local memory
    shared: int  # bytes a block
    loads: dict[
        int, int
    ]  # of the loop that moves most an access (of the whole kernel if none moves any): {bits: how many}
    stores: dict[int, int]
    instructions: float | None  # of the same loop, per element
    bytes_moved: list  # by each loop that moves 128 bits an access: (read, written) for a column of the vocabulary
    bytes_needed: list | None  # the same by the family's model
    problems: list[str] = field(default_factory=list)


class PretendGPU:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # kernels are cached by device, hence one device for each architecture

    def get_current_stream(self, device):
        return 0


@dataclass
class Launch:
    kernel: str
    grid: tuple
    binary: object
    options: dict  # compile-time arguments that were given by name


@contextmanager
def compile_only(arch):
    """Inside, launches compile for arch and stop there. Yields the list of launches that grows."""
    launches = []
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **options):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(kernel.__name__, grid, binary, options))
        return binary

    driver = triton.runtime.driver
    with mock.patch.object(driver, "_active", PretendGPU(arch)), mock.patch.object(JITFunction, "run", record):
        yield launches


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_kernels(path):
    """The kernel file at path, as part of a package, since it may import its neighbours."""
    package = types.ModuleType("audited")
    package.__path__ = [str(path.parent)]
    with mock.patch.dict(sys.modules, {"audited": package}):
        return importlib.import_module(f"audited.{path.stem}")


def load_family(name):
    """bench/audit/<name>.py, or None: what is launched of the kernel file of that name, and what is required of it.

    launches(ops, dtype) -> {op: [(function, args), ...]}: calls that differ in all that must not matter, the ordinary
        one first. Where an option chooses between binaries, name one op for each, as in "op[option]". What they launch
        of other files' kernels is those files' business.
    bytes_needed(dtype) -> {op: {kernel: [(read, written), ...]}}: of kernels with loops over the vocabulary. Those have
        to move 128 bits an access, and just these bytes for a column: one pair for each loop. A second read would show.
        The kernel is compiled with LANES and ROLL, and a turn of the loop takes LANES * ROLL columns.
    DTYPES: those that launches is called with (fp32, bf16, fp16).
    """
    path = FAMILIES / f"{name}.py"
    return load(path, f"audit_of_{name}") if path.exists() else None


def disassemble(cubin):
    """(resource usage, [(address, instruction)]) of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    code = [(int(a, 16), line) for a, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", text)]
    return usage, code


def loops(code):
    """Bodies of the innermost loops: from the target of a backward branch to the branch."""
    spans = []
    for address, line in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    innermost = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[line for address, line in code if first <= address <= last] for first, last in innermost]


def widths(body, opcode):
    """{bits: how many} of the accesses named opcode (LDG, LDGSTS and STG carry the width in their name)."""
    found = {}
    for line in body:
        access = re.search(rf"\b{opcode}\.(\S+)", line)
        if access:
            bits = re.search(r"\b(?:[US]?(8|16)|(64|128|256))\b", access[1])
            bits = int(bits[1] or bits[2]) if bits else 32
            found[bits] = found.get(bits, 0) + 1
    return found


def inspect(op, dtype, arch, launches, needed=None):
    """launches: all of one kernel. needed: see load_family."""
    kernel, options = launches[0].kernel, launches[0].options
    binaries = list({id(launch.binary): launch.binary for launch in launches}.values())
    usage, code = disassemble(binaries[0].asm["cubin"])
    accesses = [(widths(body, r"LDG(?:STS)?"), widths(body, "STG"), len(body)) for body in loops(code)]
    accesses = [x for x in accesses if x[0]]
    # The loop over aligned rows is the one without narrow accesses; the others treat ends and unaligned rows.
    # A backward pass also has one that only reads, for rows whose statistics it computes again.
    best = max(accesses, key=lambda x: (min((*x[0], *x[1])), bool(x[1]), sum(x[0].values())), default=None)
    if best is None:
        lines = [line for _, line in code]
        best = (widths(lines, r"LDG(?:STS)?"), widths(lines, "STG"), 0)
    columns = options["LANES"] * options["ROLL"] / (32 * options["num_warps"]) if "ROLL" in options else 1
    moved = [
        tuple(sum(bits * n for bits, n in x.items()) / 8 / columns for x in loop[:2])
        for loop in accesses
        if min((*loop[0], *loop[1])) >= 128
    ]
    reads, writes, size = best
    elements = sum(bits * n for bits, n in reads.items()) / (dtype.itemsize * 8)
    audit = Audit(
        op=op,
        kernel=kernel,
        dtype=str(dtype).removeprefix("torch."),
        arch=arch,
        binaries=len(binaries),
        registers=usage["REG"],
        spills=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for _, line in code),
        shared=binaries[0].metadata.shared,
        loads=reads,
        stores=writes,
        instructions=round(size / elements, 1) if size else None,
        bytes_moved=moved,
        bytes_needed=needed,
    )
    if audit.spills or usage["STACK"] or usage["LOCAL"]:
        audit.problems.append(f"spills: {audit.spills} accesses to local memory, stack of {usage['STACK']} bytes")
    if needed and min((*reads, *writes)) < 128:
        audit.problems.append(f"accesses narrower than 128 bits in the best loop: {reads} {writes}")
    elif needed and sorted(moved) != sorted(needed):
        audit.problems.append(f"wide loops move {moved} bytes a column (read, written) where {needed} are needed")
    if audit.binaries != 1:
        audit.problems.append(f"{audit.binaries} binaries where one should serve")
    return audit


def audit_op(op, calls, dtype, arch, kernels, needed):
    """Audits of those of the kernels that calls launch. needed: {kernel: bytes}."""
    with compile_only(arch) as launches:
        for function, args in calls:
            function(*args)
    audits = []
    for kernel in dict.fromkeys(launch.kernel for launch in launches if launch.kernel in kernels):
        of_kernel = [launch for launch in launches if launch.kernel == kernel]
        audits.append(inspect(op, dtype, arch, of_kernel, needed.get(kernel)))
        if any(max(launch.grid[1:], default=0) > LARGEST_GRID_YZ for launch in of_kernel):
            audits[-1].problems.append("grid too large in y or z")
    if set(needed) - {a.kernel for a in audits}:
        raise SystemExit(f"{op}: bytes_needed names what it does not launch: {sorted(needed)}")
    return audits


def kernels_of(module):
    """Names of the Triton kernels that a file holds: functions named *_kernel; the others are inlined into them."""
    return {name for name, f in vars(module).items() if isinstance(f, JITFunction) and name.endswith("_kernel")}


def audit(archs=ARCHS, families=None, dtypes=DTYPES):
    """Audits of every kernel x op x dtype x architecture, of the files of kernels/triton named in families (all).

    Raises if a file that has kernels has no bench/audit/<file>.py, or if that launches fewer than the file has.
    """
    audits = []
    for path in sorted(KERNELS.glob("[!_]*.py")):
        if families and path.stem not in families:
            continue
        module = load_kernels(path)
        kernels = kernels_of(module)
        if not kernels:
            continue
        family = load_family(path.stem)
        if family is None:
            raise SystemExit(f"{path.name} has kernels but no bench/audit/{path.name}: {sorted(kernels)}")
        found = []
        for arch in archs:
            for dtype in (x for x in getattr(family, "DTYPES", DTYPES) if x in dtypes):
                needed = family.bytes_needed(dtype) if hasattr(family, "bytes_needed") else {}
                for op, calls in family.launches(module, dtype).items():
                    found += audit_op(op, calls, dtype, arch, kernels, needed.get(op, {}))
        if set(dtypes) >= set(DTYPES) and archs and kernels - {a.kernel for a in found}:
            raise SystemExit(f"{path.name}: never launched: {sorted(kernels - {a.kernel for a in found})}")
        audits += found
    return audits


def table(audits):
    def pairs(loops):
        return " ".join(f"{read:g}+{written:g}" for read, written in loops)

    def moves(a):
        return (" + ".join(f"{n} x {bits}" for bits, n in sorted(x.items())) or "-" for x in (a.loads, a.stores))

    head = ("op", "kernel", "dtype", "arch", "binaries", "regs", "spills", "shared", "loads", "stores")
    head += ("instr/elem", "bytes", "needed")
    rows = [
        (
            *(a.op, a.kernel.strip("_").removesuffix("_kernel"), a.dtype, f"sm_{a.arch}"),
            *(a.binaries, a.registers, a.spills, a.shared, *moves(a), a.instructions or "-"),
            *((pairs(a.bytes_moved) or "-", pairs(a.bytes_needed)) if a.bytes_needed else ("-", "-")),
        )
        for a in audits
    ]
    size = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(f"{x!s:<{n}}" for x, n in zip(row, size, strict=True)).rstrip() for row in (head, *rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, such as 90")
    parser.add_argument("--family", nargs="+", help="files of kernels/triton, such as log_probs (all)")
    parser.add_argument("--dtype", nargs="+", help="such as bfloat16 (all)")
    parser.add_argument("--json", type=Path, help="also write the audits to this file")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled. Unset it.")
    audits = audit(args.arch, args.family, [getattr(torch, name) for name in args.dtype] if args.dtype else DTYPES)
    print(table(audits))
    print(
        "\nloads, stores (accesses x bits), instr/elem: of the loop over 16-byte aligned rows, else of the whole kernel"
    )
    print("bytes: read + written for a column of the vocabulary, by each loop over aligned rows")
    if args.json:
        args.json.write_text(json.dumps([asdict(a) for a in audits], indent=1))
    problems = [f"{a.op} {a.kernel} {a.dtype} sm_{a.arch}: {problem}" for a in audits for problem in a.problems]
    print(
        "\n".join(problems)
        or f"{len(audits)} binaries: no spills, 128-bit accesses over the vocabulary, one for all sizes"
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
