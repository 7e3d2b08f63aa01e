"""What the GPU kernels compile to, without a GPU: `python bench/gpu_audit.py`.

Launches every Triton kernel through the functions that users reach, with a driver that pretends to be a GPU and stops
before the launch, so what is read here is the code a GPU would run: registers, spills, shared memory, and the width of
global loads and stores. Exits with 1 unless, for every op, dtype and architecture, nothing spills, the loop over the
vocabulary moves 128 bits an access, and one binary serves every V, temperature, stride and alignment.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
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
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LARGEST_GRID_YZ = 65535


@dataclass
class Audit:
    """One op in one dtype on one architecture."""

    op: str
    dtype: str
    arch: int
    binaries: int
    registers: int
    spills: int  # loads from and stores to local memory
    shared: int  # bytes a block
    loads: dict[int, int]  # of the loop over aligned rows: {bits: instructions}
    stores: dict[int, int]
    instructions: float  # of the same loop, per element
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


@contextmanager
def compile_only(arch):
    """Inside, launches compile for arch and stop there. Yields the list of (kernel name, grid, binary) that grows."""
    launches = []
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **options):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        launches.append((kernel.__name__, grid, binary))
        return binary

    driver = triton.runtime.driver
    with mock.patch.object(driver, "_active", PretendGPU(arch)), mock.patch.object(JITFunction, "run", record):
        yield launches


def load(path):
    spec = importlib.util.spec_from_file_location(f"audited_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_probs_ops(ops, dtype):
    """{op: [launches that differ in all that must not matter]}; the first launch is the ordinary one."""

    def rows(V, n=3, skip=0):
        return torch.zeros(n * V + skip, dtype=dtype)[skip:].view(n, V)

    sliced = torch.zeros(2, 4, 40, dtype=dtype)[:, :-1]
    far = torch.zeros(1, 8, dtype=dtype).expand(2, 70_000, 8)
    cases = [(rows(4096), 1.0), (rows(151_936), 0.7), (rows(50_257), 1), (rows(1), 2.0), (rows(16), 1 / 3)]
    cases += [(rows(1000, skip=1), 1.0), (rows(17, n=1), 0.1), (sliced, 1.0), (far, 1.0)]
    launches = {name: [] for name in vars(ops) if name.startswith("token_log_probs") and not name.endswith("_")}
    for logits, temperature in cases:
        tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        x = torch.zeros(tokens.shape)
        in_place = logits.clone()
        calls = {
            "token_log_probs": (logits, tokens, temperature),
            "token_log_probs_and_entropy": (logits, tokens, temperature),
            "token_log_probs_backward": (x, logits, tokens, x, temperature),
            "token_log_probs_and_entropy_backward": (x, x, logits, tokens, x, x, temperature),
        }
        for name, args in calls.items():
            launches[name].append((getattr(ops, name), args))
            if name.endswith("backward"):
                args = tuple(in_place if arg is logits else arg for arg in args)
                launches[name].append((getattr(ops, name + "_"), args))
    return launches


FAMILIES = {"log_probs": log_probs_ops}


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


def inspect(op, dtype, arch, binaries):
    usage, code = disassemble(binaries[0].asm["cubin"])
    accesses = [(widths(body, r"LDG(?:STS)?"), widths(body, "STG"), len(body)) for body in loops(code)]
    accesses = [x for x in accesses if x[0]]
    # The loop over aligned rows is the one without narrow accesses; the others treat ends and unaligned rows.
    # A backward pass also has one that only reads, for rows whose statistics it computes again.
    best = max(accesses, key=lambda x: (min((*x[0], *x[1])), bool(x[1]), sum(x[0].values())), default=({0: 0}, {}, 0))
    reads, writes, size = best
    elements = sum(bits * n for bits, n in reads.items()) / (dtype.itemsize * 8)
    audit = Audit(
        op=op,
        dtype=str(dtype).removeprefix("torch."),
        arch=arch,
        binaries=len(binaries),
        registers=usage["REG"],
        spills=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for _, line in code),
        shared=binaries[0].metadata.shared,
        loads=reads,
        stores=writes,
        instructions=round(size / elements, 1) if elements else 0.0,
    )
    if audit.spills or usage["STACK"] or usage["LOCAL"]:
        audit.problems.append(f"spills: {audit.spills} accesses to local memory, stack of {usage['STACK']} bytes")
    if min((*reads, *writes)) < 128:
        audit.problems.append(f"accesses narrower than 128 bits in the best loop: {reads} {writes}")
    if op.endswith("backward") and not writes:
        audit.problems.append("no stores in the best loop")
    if audit.binaries != 1:
        audit.problems.append(f"{audit.binaries} binaries where one should serve")
    return audit


def audit(archs=ARCHS, dtypes=DTYPES):
    """Audits of every op x dtype x architecture. Raises if a file or a kernel of kernels/triton is left out."""
    audits = []
    for path in sorted(KERNELS.glob("[!_]*.py")):
        module = load(path)
        kernels = {name for name, f in vars(module).items() if isinstance(f, JITFunction) and name.endswith("_kernel")}
        if kernels and path.stem not in FAMILIES:
            raise SystemExit(f"{path.name} has kernels but no entry in FAMILIES: {sorted(kernels)}")
        launched = set()
        for arch in archs if kernels else ():
            for dtype in dtypes:
                for op, calls in FAMILIES[path.stem](module, dtype).items():
                    with compile_only(arch) as launches:
                        for function, args in calls:
                            function(*args)
                    binaries = list({id(binary): binary for _, _, binary in launches}.values())
                    result = inspect(op, dtype, arch, binaries)
                    if any(max(grid[1:], default=0) > LARGEST_GRID_YZ for _, grid, _ in launches):
                        result.problems.append("grid too large in y or z")
                    launched |= {name for name, _, _ in launches}
                    audits.append(result)
        if archs and kernels != launched:
            raise SystemExit(f"{path.name}: never launched: {sorted(kernels - launched)}")
    return audits


def table(audits):
    def moves(a):
        return (" + ".join(f"{n} x {bits}" for bits, n in sorted(x.items())) or "-" for x in (a.loads, a.stores))

    head = ("op", "dtype", "arch", "binaries", "regs", "spills", "shared", "loads", "stores", "instr/elem")
    rows = [
        (*(a.op, a.dtype, f"sm_{a.arch}", a.binaries, a.registers, a.spills, a.shared), *moves(a), a.instructions)
        for a in audits
    ]
    size = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(f"{x!s:<{n}}" for x, n in zip(row, size, strict=True)).rstrip() for row in (head, *rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities, such as 90")
    parser.add_argument("--json", type=Path, help="also write the audits to this file")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled. Unset it.")
    audits = audit(args.arch)
    print(table(audits))
    print("\nloads, stores, instr/elem: of the vocabulary loop over 16-byte aligned rows; accesses x bits, per thread")
    if args.json:
        args.json.write_text(json.dumps([asdict(a) for a in audits], indent=1))
    problems = [f"{a.op} {a.dtype} sm_{a.arch}: {problem}" for a in audits for problem in a.problems]
    print("\n".join(problems) or f"{len(audits)} binaries: no spills, 128-bit accesses, one for all sizes")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
