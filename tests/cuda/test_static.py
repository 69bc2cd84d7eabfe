"""The CUDA kernels as compiled, where no GPU is at hand: they use what was planned for them.

tests/cuda/plans.py has the plans. The second half breaks kernels on purpose: each check finds them.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from dataclasses import replace

import pytest

from tests.cuda import static
from tests.cuda.occupancy import MULTIPROCESSORS, RESERVED_SHARED, resident_blocks
from tests.cuda.plans import LOAD_128, PLANS, STORE_128, Plan, plan_of

each_source = pytest.mark.parametrize("source", static.sources(), ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def architectures():
    """Those that this nvcc can compile for."""
    try:
        return [arch for arch in static.ARCHITECTURES if arch in static.known_architectures()]
    except static.MissingToolError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def built(architectures):
    return static.compile_all(static.sources(), architectures)


@pytest.fixture(scope="session")
def kernels_of(built, architectures):
    """`kernels_of(source)`: its kernels on every architecture."""

    def kernels(source):
        cubins = [built[source, arch] for arch in architectures]
        for cubin in cubins:
            if isinstance(cubin, static.CompileError):
                raise cubin
        return [kernel for cubin in cubins for kernel in static.kernels(cubin)]

    return kernels


@pytest.fixture(scope="session")
def disassembler(architectures):
    try:
        static.nvdisasm()
    except static.MissingToolError as reason:
        pytest.skip(f"instructions are not checked: {reason}")


@each_source
def test_every_kernel_has_a_plan(source, kernels_of):
    assert not {kernel.name for kernel in kernels_of(source) if plan_of(kernel.name) is None}


def test_every_plan_is_of_a_kernel(kernels_of):
    names = {kernel.name for source in static.sources() for kernel in kernels_of(source)}
    used = {plan_of(name) for name in names}
    assert not [plan.kernels for plan in PLANS if plan not in used]


@each_source
def test_resources_are_within_the_plan(source, kernels_of):
    """Registers, no spills, shared memory, threads, resident warps."""
    planned = [(kernel, plan_of(kernel.name)) for kernel in kernels_of(source)]
    faults = [static.resource_faults(kernel, plan) for kernel, plan in planned if plan]
    assert not list(itertools.chain.from_iterable(faults))


@each_source
def test_instructions_are_those_planned(source, kernels_of, disassembler):
    """Wide accesses; no local memory, float atomics or float64."""
    planned = [(kernel, plan_of(kernel.name)) for kernel in kernels_of(source)]
    faults = [static.instruction_faults(kernel, plan) for kernel, plan in planned if plan]
    assert not list(itertools.chain.from_iterable(faults))


@each_source
def test_the_comment_at_the_top_says_what_is_planned(source, kernels_of):
    """It need not name every number, but names no other."""
    top = re.match(r"(?://.*\n)*", source.read_text())[0].replace("\n//", "")
    plans = [plan for kernel in kernels_of(source) if (plan := plan_of(kernel.name))]
    assert {*map(int, re.findall(r"(\d+) registers", top))} <= {plan.registers for plan in plans}
    assert {*map(int, re.findall(r"(\d+) resident warps", top))} <= {plan.warps for plan in plans}


def test_attention_has_at_most_24_instantiations(kernels_of, architectures):
    """They are most of what the device compiler works on."""
    names = [
        (kernel.arch, kernel.name)
        for source in static.sources()
        for kernel in kernels_of(source)
        if re.match(r"attention_(any|decode|prefill)\b", kernel.name)
    ]
    counts = Counter(arch for arch, _ in names)
    assert set(counts) == set(architectures)
    assert max(counts.values()) <= 24, sorted(names)


def test_inline_ptx_is_in_one_file():
    files = [*static.sources(), *(static.ROOT / "csrc").rglob("*.h")]
    found = {path.name for path in files if re.search(r"\basm\b", path.read_text())}
    assert found == {"ptx.h"}


# ---- The checks find what they are for ----------------------------------------------------------

PLANTED = """
#include "cuda/ptx.h"
#include <stdio.h>
using namespace gemma2;
using namespace gemma2::cuda;
namespace planted {
struct Tile { float at[256]; };

template <typename T>
__global__ void __launch_bounds__(128) good_kernel(const uint4* x, T* out) {
  store(reinterpret_cast<uint4*>(out) + threadIdx.x, load_once(x + threadIdx.x));
}
__global__ void unbounded_kernel(float* x) { x[threadIdx.x] = 1; }
__global__ void __launch_bounds__(1024) spilling_kernel(const float* x, float* out) {
  float v[128];
  for (int round = 0; round < 2; ++round) {
#pragma unroll
    for (int i = 0; i < 128; ++i) v[i] = load(x + i * 1024 + threadIdx.x);
    sync_block();
#pragma unroll
    for (int i = 0; i < 128; ++i) store(out + i * 1024 + threadIdx.x, v[i] * v[127 - i]);
    sync_block();
  }
}
__global__ void __launch_bounds__(128) indexed_kernel(const int* x, int* out) {
  int v[16];
  for (int i = 0; i < 16; ++i) v[i] = x[i];
  for (int i = 0; i < 16; ++i) v[x[i + 16]] += x[i + 32];
  out[threadIdx.x] = v[x[99]];
}
__global__ void __launch_bounds__(128) narrow_kernel(const float* x, float* out) {
  store(out + threadIdx.x, load(x + threadIdx.x));
}
__global__ void __launch_bounds__(128) global_atomic_kernel(float* x) { atomicAdd(x, 1.5f); }
__global__ void __launch_bounds__(128) returning_atomic_kernel(double* x) {
  x[threadIdx.x + 1] = atomicAdd(x, 1.5);
}
__global__ void __launch_bounds__(128) shared_atomic_kernel(const float* x, float* out) {
  float& sum = static_shared<float>();
  sum = 0;
  sync_block();
  atomicAdd(&sum, x[threadIdx.x]);
  sync_block();
  out[threadIdx.x] = sum;
}
__global__ void __launch_bounds__(128) integer_atomic_kernel(int* x) { atomic_add(x, 1); }
__global__ void __launch_bounds__(128) double_kernel(float* x) {
  x[threadIdx.x] = static_cast<float>(x[threadIdx.x] * 1.1);
}
__global__ void __launch_bounds__(128) stopping_kernel(int* x) {
  if (x[threadIdx.x] < 0) GEMMA2_STOP("below zero");
  x[threadIdx.x] = 1;
}
template <bool kDynamic>
__global__ void __launch_bounds__(256) shared_kernel(float* x) {
  Tile& tile = kDynamic ? dynamic_shared<Tile>() : static_shared<Tile>();
  tile.at[threadIdx.x] = x[threadIdx.x];
  sync_block();
  x[threadIdx.x] = tile.at[255 - threadIdx.x];
}
template __global__ void good_kernel<bf16_t>(const uint4*, bf16_t*);
template __global__ void good_kernel<float>(const uint4*, float*);
template __global__ void shared_kernel<false>(float*);
template __global__ void shared_kernel<true>(float*);
}  // namespace planted
"""

GENEROUS = Plan("*", threads=128, registers=255, warps=1)


@pytest.fixture(scope="session")
def planted(architectures, tmp_path_factory):
    """`planted(name)`: that kernel of PLANTED on every architecture."""
    source = tmp_path_factory.mktemp("planted") / "planted.cu"
    source.write_text(PLANTED)
    built = static.compile_all([source], architectures)
    kernels = {}
    for result in built.values():
        if isinstance(result, static.CompileError):
            raise result
        for kernel in static.kernels(result):
            kernels.setdefault(kernel.name, []).append(kernel)
    return lambda name: kernels[f"planted {name}"]


def test_names_are_readable(planted):
    assert {kernel.name for kernel in planted("good<bf16>")} == {"planted good<bf16>"}
    assert static.shortened(
        "void gemma2::cuda::(anonymous namespace)::f_kernel<(int)2, float>(int)"
    ) == ("f<2, f32>")
    assert static.with_operator("rms_norm", "add_rms_norm<f32>") == "add_rms_norm<f32>"
    assert static.with_operator("attention_any", "any<64>") == "attention_any<64>"


def test_a_good_kernel_has_no_fault(planted):
    plan = replace(GENEROUS, registers=16, warps=64)
    for kernel in planted("good<f32>"):
        assert (kernel.threads, kernel.spills, kernel.stack, kernel.shared) == (128, 0, 0, 0)
        assert static.resource_faults(kernel, plan) == []


@pytest.mark.parametrize(
    ("name", "plan", "fault"),
    [
        ("good<f32>", replace(GENEROUS, registers=4), "registers, not 4"),
        ("good<f32>", replace(GENEROUS, threads=256), "128 threads, not 256"),
        ("good<f32>", replace(GENEROUS, dynamic_shared=64), "memory is not used, 64 bytes"),
        ("unbounded", GENEROUS, "no __launch_bounds__"),
        ("spilling", replace(GENEROUS, threads=1024, stack=10**4), "bytes of spills"),
        ("spilling", replace(GENEROUS, launched=256, warps=64), "32 resident warps, not"),
        ("indexed", GENEROUS, "bytes of stack, not 0"),
        ("shared<false>", replace(GENEROUS, threads=256), "1024 bytes of static shared memory"),
        ("shared<true>", replace(GENEROUS, threads=256), "memory is used, 0 bytes are planned"),
    ],
)  # fmt: skip
def test_resources_beyond_the_plan_are_found(planted, name, plan, fault):
    for kernel in planted(name):
        assert fault in "\n".join(static.resource_faults(kernel, plan)), kernel


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("spilling", "local memory"),
        ("indexed", "local memory"),
        ("global_atomic", "float atomic"),
        ("returning_atomic", "float atomic"),
        ("shared_atomic", "compare and swap"),
        ("double", "float64"),
        ("narrow", "no LDG"),
        ("narrow", "no STG"),
    ],
)
def test_instructions_that_no_kernel_should_have_are_found(planted, disassembler, name, fault):
    plan = replace(GENEROUS, expects=(LOAD_128, STORE_128))
    for kernel in planted(name):
        assert fault in "\n".join(static.instruction_faults(kernel, plan)), kernel


@pytest.mark.parametrize("name", ["good<bf16>", "integer_atomic", "shared<true>"])
def test_instructions_without_fault_are_let_be(planted, disassembler, name):
    wide = (LOAD_128, STORE_128) if name == "good<bf16>" else ()
    for kernel in planted(name):
        assert static.instruction_faults(kernel, replace(GENEROUS, expects=wide)) == []


def test_a_plan_can_allow_what_is_forbidden(planted, disassembler):
    """printf's arguments lie on the stack."""
    allowing = replace(GENEROUS, stack=64, allows=("STL",))
    for kernel in planted("stopping"):
        assert "local memory" in "\n".join(static.instruction_faults(kernel, GENEROUS))
        assert static.instruction_faults(kernel, allowing) == []
        assert static.resource_faults(kernel, allowing) == []


def test_warps_are_those_of_the_blocks_that_are_launched(planted):
    (kernel,) = (k for k in planted("good<f32>") if k.arch == 90)
    assert kernel.warps(GENEROUS) == 64
    assert kernel.warps(replace(GENEROUS, launched=32)) == 32  # as many as there may be blocks


def test_dynamic_shared_memory_counts(planted):
    (kernel,) = (k for k in planted("shared<true>") if k.arch == 80)
    half = replace(GENEROUS, threads=256, dynamic_shared=80 * 1024)
    assert kernel.blocks(half) == 2
    assert kernel.warps(half) == 16


HEADER = """
#include <cstring>
#include <climits>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int arch, warps, shared_sm, registers_sm, threads, registers, shared;
  while (scanf("%d %d %d %d %d %d %d", &arch, &warps, &shared_sm, &registers_sm, &threads, &registers,
               &shared) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = registers_sm;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = shared_sm;
    device.numSms = 100;
    device.sharedMemPerBlockOptin = shared_sm - RESERVED;
    device.reservedSharedMemPerBlock = RESERVED;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = 0;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = shared_sm - RESERVED;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, shared))
      return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_the_toolkits_header(architectures, tmp_path):
    source = tmp_path / "header.cpp"
    source.write_text(HEADER)
    program = tmp_path / "header"
    static.run(static.nvcc(), "-std=c++17", f"-DRESERVED={RESERVED_SHARED}", "-o", program, source)
    cases = [
        (arch, threads, registers, shared)
        for arch, sm in MULTIPROCESSORS.items()
        for threads in (32, 64, 96, 128, 160, 256, 384, 512, 1024)
        for registers in (16, 32, 33, 40, 48, 64, 65, 96, 128, 168, 255)
        for shared in (0, 1, 1000, 8192, 20000, 48 * 1024, 99 * 1024, sm.shared_per_block)
        if shared <= sm.shared_per_block
    ]
    lines = []
    for arch, *launch in cases:
        sm = MULTIPROCESSORS[arch]
        lines.append(" ".join(map(str, (arch, sm.warps, sm.shared, sm.registers, *launch))))
    answers = subprocess.check_output([program], input="\n".join(lines), text=True).split()
    ours = [resident_blocks(MULTIPROCESSORS[arch], *launch) for arch, *launch in cases]
    wrong = [
        (case, mine, int(theirs))
        for case, mine, theirs in zip(cases, ours, answers, strict=True)
        if mine != int(theirs)
    ]
    assert not wrong
    assert len({*ours}) > 10
