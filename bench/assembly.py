"""What a compiled kernel's texts say: how wide it loads, whether it uses tensor cores, where addresses may overflow.

TTIR is Triton's first intermediate representation, PTX NVIDIA's assembly, SASS its machine code, AMDGCN AMD's assembly.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

__all__ = [
    "Access", "accesses", "amd_resources", "coarse_dots", "dots", "executed", "float_atomics", "instructions",
    "matrix_units", "overflows", "premature", "ptxas_resources", "serialised", "unfenced",
]  # fmt: skip

MAX_BLOCK = 1024
"""The number of a program times a block size up to this counts rows, and those fit into the int32 that counts them."""

MATRIX_UNITS = r"(wgmma)\.mma_async|(tcgen05)\.mma|(mma\.sync)|(v_mfma)_|(v_wmma)_"


class Access(NamedTuple):
    """A load or store in PTX."""

    kind: Literal["load", "store"]
    bits: int
    """That one thread accesses at once."""
    parameters: frozenset[int]
    """Numbers of the kernel's parameters that the address is computed from."""


def accesses(ptx: str) -> list[Access]:
    """All loads from and stores to global memory whose address comes from a parameter; not those of constant tables."""
    sources: dict[str, set[str]] = {}
    found: list[tuple[Literal["load", "store"], int, list[str]]] = []
    for statement in re.sub(r"//.*|\.loc\b.*", "", ptx).split(";"):
        match = re.search(r"(?:^|\s)(?:@!?%p\d+\s+)?([a-z][\w.:]+)\s+([^;]*)$", statement.strip(), re.DOTALL)
        if match is None:
            continue
        operation, operands = match.groups()
        if operation.startswith("cp.async.c"):
            _, address, size = re.findall(r"\[[^]]*\]|0x\w+", operands)[:3]
            found.append(("load", 8 * int(size, 16), registers(address)))
        elif operation.startswith(("ld.global", "st.global")):
            vector, bits = re.search(r"(?:\.v(\d))?\.[bfsu](\d+)$", operation).groups()
            address = registers(re.search(r"\[[^]]*\]", operands)[0])
            found.append(("load" if operation[0] == "l" else "store", int(vector or 1) * int(bits), address))
        elif operation.startswith("ld.param") or not operation.startswith(("ld.", "st.")):
            results = re.match(r"\{[^}]*\}|[^,]*", operands)[0]
            origin = operands[len(results) :]
            for register in registers(results):
                sources.setdefault(register, set()).update(registers(origin), re.findall(r"_param_(\d+)", origin))
    reached = [(kind, bits, closure(address, sources)) for kind, bits, address in found]
    parameters = [
        (kind, bits, frozenset(int(name) for name in names if name.isdecimal())) for kind, bits, names in reached
    ]
    return [Access(kind, bits, numbers) for kind, bits, numbers in parameters if numbers]


def registers(text: str) -> list[str]:
    """The general registers in a piece of PTX; predicates are no part of an address."""
    return re.findall(r"%r\w*\d+", text)


def closure(names: Iterable[str], sources: Mapping[str, Iterable[str]]) -> set[str]:
    """All that the names are computed from, themselves included."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(sources.get(name, ()))
    return seen


class Values:
    """The values in a function's TTIR: the line that defines each, and the values that it is computed from.

    Regions side by side use the same names, so that a value is called by its name and its line.
    """

    def __init__(self, ttir: str) -> None:
        self.definitions: dict[str, str] = {}
        self.sources: dict[str, set[str]] = {}
        self.offsets: list[tuple[str, str]] = []
        """The lines that add to an address, and what they add."""
        scopes: list[dict[str, str]] = [{}]
        carried: list[list[str]] = [[]]  # by each region, and out of it
        for number, line in enumerate(re.sub(r" loc\(#\w+\)", "", ttir).splitlines()):
            line = line.strip()
            names = re.findall(r"%[\w.$-]+", line)
            used = [scopes[-1].get(name, name) for name in names]
            if line.startswith("}"):
                scopes.pop()
                carried.pop()
            if line.startswith("scf.yield"):
                for value in carried[-1]:
                    self.sources[value].update(used)
            if "tt.addptr" in line:
                self.offsets.append((line, used[2]))
            if line.endswith("{"):
                scopes.append(dict(scopes[-1]))
            counter = re.findall(r"scf\.for (%[\w.$-]+)", line)
            values = {name: f"{name}:{number}" for name in re.findall(r"(%[\w.$-]+)(?::\d+)? =", line)}
            for name, value in values.items():
                header = line.split("iter_args")[0] if name in counter else line
                self.definitions[value] = line
                used = set(re.findall(r"%[\w.$-]+", header)) - set(values)
                self.sources[value] = {scopes[-1].get(name, name) for name in used}
            for scope in scopes[-2:] if line.endswith("{") else scopes[-1:]:
                scope.update(values)
            if line.endswith("{"):
                carried.append([value for name, value in values.items() if name not in counter])

    def definition(self, value: str) -> str:
        """The line that defines a value; none does an argument's."""
        return self.definitions.get(value, "")


def overflows(ttir: str) -> list[str]:
    """The lines of a kernel's TTIR in which an address is computed in less than 64 bits.

    An offset has to be int64, and so has every product that goes into it, but for a program's number times a block
    size. A product that is widened when it has already overflowed is as wrong as an offset that is not wide.
    """
    values = Values(ttir)
    computed = {name: used for name, used in values.sources.items() if "tt.load" not in values.definition(name)}
    wrong = set()
    for line, offset in values.offsets:
        if not line.endswith(("i64", "i64>")) and "arith.constant" not in values.definition(offset):
            wrong.add(line)
        for value in closure([offset], computed):
            product = values.definition(value)
            if "arith.muli" in product and product.endswith(("i32", "i32>")) and not counts_rows(value, values):
                wrong.add(product)
    return sorted(wrong)


def counts_rows(product: str, values: Values) -> bool:
    """Whether a product is of a program's number and a block size."""
    factors = [values.definition(value) for value in values.sources[product]]
    blocks = [int(size) for factor in factors for size in re.findall(r"arith\.constant (\d+) : i32", factor)]
    return len(blocks) == 1 and blocks[0] <= MAX_BLOCK and any("tt.get_program_id" in factor for factor in factors)


def dots(ttir: str) -> int:
    """How many matrix products there are in a kernel's TTIR."""
    return len(re.findall(r"\btt\.dot\b", ttir))


def coarse_dots(ttir: str) -> int:
    """How many of them multiply float32 matrices in TF32, of ten bits, once."""
    return len(re.findall(r"\btt\.dot\b.* inputPrecision = tf32 : tensor<[\dx]+xf32>", ttir))


def float_atomics(ttir: str) -> int:
    """How many atomic sums of floating-point numbers there are, whose order, and so whose last digit, is by chance."""
    return len(re.findall(r"\btt\.atomic_rmw fadd\b", ttir))


def premature(ptx: str) -> bool:
    """Whether a kernel may read or write global memory, or end, before it has waited for the last launch.

    It must not end either: what is launched after it waits for its end, and takes all before it to have ended too.
    """
    ptx = re.sub(r"//.*|\.(?:loc|global)\b .*", "", ptx)  # constant tables too
    wait = re.search(r"\bgriddepcontrol\.wait\b", ptx)
    # Before any branch it is on each way through the kernel.
    other = re.search(r"\b(?:ld|st|atom|red)\b[\w.:]*\.global\b|\bcp\.async\.[bc]|\b(?:bra|ret|exit)\b", ptx)
    return wait is None or (other is not None and other.start() < wait.start())


def matrix_units(assembly: str) -> str | None:
    """The instruction by which matrices are multiplied, or None."""
    found = {next(filter(None, groups)) for groups in re.findall(MATRIX_UNITS, assembly)}
    return ", ".join(sorted(found)) or None


def unfenced(ptx: str) -> bool:
    """Whether Blackwell's tensor cores may read shared memory before what threads have copied there is visible to them.

    PTX asks for a fence between the two. Hopper's do without: NVIDIA's CUTLASS has none in its loop of such copies.
    """
    return "tcgen05.mma" in ptx and "fence.proxy.async" not in ptx


def ptxas_resources(log: str) -> tuple[int, int]:
    """The registers of a thread and the bytes that it spills, as `ptxas -v` reports them."""
    return (
        int(re.search(r"Used (\d+) registers", log)[1]),
        sum(int(number) for number in re.findall(r"(\d+) bytes spill", log)),
    )


def serialised(log: str) -> bool:
    """Whether ptxas says that it has asynchronous matrix products wait for each other."""
    return "wgmma.mma_async instructions are serialized" in log


def instructions(sass: str) -> int:
    """How many instructions SASS has; NOPs are none, and neither is what follows the end, a branch to itself."""
    code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?) *;", sass, re.MULTILINE)
    padding = len(re.findall(r"^(\.L_x_\d+):\s+/\*[0-9a-f]+\*/\s+BRA `\(\1\)", sass, re.MULTILINE))
    return sum(not line.startswith("NOP") for line in code) - padding


def executed(sass: str, trips: int) -> int:
    """How many instructions of SASS a warp of a row kernel executes, whose loops all make so many trips.

    The branch for rows whose squares overflow is left out, since no usual row takes it: what it skips has many maxima,
    and loads nothing.
    """
    places: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            places[label[1]] = len(code)
        if (instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?) *;", line)) and not instruction[1].startswith("NOP"):
            code.append(instruction[1])
    times = [1] * len(code)
    for end, instruction in enumerate(code):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        begin = places.get(branch[1], len(code)) if branch else len(code)
        if begin < end:
            times[begin : end + 1] = [trips * (time > 0) for time in times[begin : end + 1]]
        elif begin == end:  # what follows the end
            times[end] = 0
        elif branch and overflow(code[end + 1 : begin]):
            times[end + 1 : begin] = [0] * (begin - end - 1)
    return sum(times)


def overflow(code: Sequence[str]) -> bool:
    """Whether some SASS is what `kernels.tiles.unit` does with rows whose squares overflow."""
    return sum("FMNMX" in line for line in code) >= 8 and not any("LDG" in line for line in code)


def amd_resources(amdgcn: str) -> tuple[int, int, int]:
    """The registers of a thread, the bytes that it spills and the bits of its widest load, by the assembly itself."""
    number = {name: int(value) for name, value in re.findall(r"\.(\w+_count): +(\d+)", amdgcn)}
    widths = [int(words or 1) for words in re.findall(r"(?:global|buffer)_load_(?:dwordx?|b)(\d*)", amdgcn)]
    spilled = 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"])
    return number["vgpr_count"], spilled, 32 * max(widths, default=0)
