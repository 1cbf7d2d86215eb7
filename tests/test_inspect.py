"""The rules of tools/inspect_gpu.py on canned machine code, and what `variants()` of kernels/*.py promise."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def load_tool():
    spec = importlib.util.spec_from_file_location("inspect_gpu", ROOT / "tools" / "inspect_gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["inspect_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = load_tool()

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Z4goodv:
  REG:28 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z5spillv:
  REG:255 STACK:48 SHARED:0 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	.section	.text._Z4goodv,"ax",@progbits
.text._Z4goodv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R4, R4, 1 ;
        /*0030*/               @P1 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0040*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0050*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/                   EXIT ;
        /*0070*/                   NOP;
	.section	.text._Z5spillv,"ax",@progbits
        /*0000*/                   STL.64 [R1], R2 ;
        /*0010*/                   LDL.64 R2, [R1] ;
        /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   EXIT ;
"""


def machine(**opcodes):
    """Opcodes as keywords, with _ for the dots."""
    return tool.Machine(32, 0, 0, Counter({name.replace("_", "."): n for name, n in opcodes.items()}))


def rules(failures):
    return [rule for rule, _ in failures]


def read(resources=RESOURCES, sass=SASS):
    kernels = tool.parse_resources(resources)
    for name, opcodes in tool.parse_sass(sass).items():
        kernels[name].opcodes = opcodes
    return kernels


def test_reading():
    good, spill = read().values()
    assert (good.registers, good.stack, good.shared) == (28, 0, 1024)
    assert sum(good.opcodes.values()) == 7, "NOP is padding"
    assert (good.count("LDG"), good.wide("LDG"), good.count("STG"), good.wide("STG")) == (1, 1, 2, 1)
    assert good.count("UIADD3") == 1, "uniform predicates are predicates"
    assert (spill.stack, spill.count("LDL"), spill.count("STL")) == (48, 1, 1)


def test_good_kernel_passes():
    assert tool.judge(read()["_Z4goodv"], tool.Intent()) == []


def test_spilling_kernel_fails():
    assert rules(tool.judge(read()["_Z5spillv"], tool.Intent())) == ["spills", "stack", "narrow"]
    assert rules(tool.judge(machine(LDL=1), tool.Intent(streaming=False))) == ["spills"]


@pytest.mark.parametrize(
    ("opcode", "passes"),
    [("LDG.E.128", True), ("STG.E.128", True), ("LDGSTS.E.BYPASS.128", True), ("LDG.E.ENL2.256", True),
     ("UTMALDG.2D", True), ("LDG.E.64", False), ("LDG.E", False), ("LDS.128", False)],
)  # fmt: skip
def test_streaming_kernel_needs_16_byte_accesses(opcode, passes):
    code = tool.Machine(opcodes=Counter({opcode: 2, "LDG.E.CONSTANT": 4}))
    assert rules(tool.judge(code, tool.Intent())) == ([] if passes else ["narrow"])
    assert tool.judge(code, tool.Intent(streaming=False)) == []


def test_meant_instructions_must_be_there():
    intent = tool.Intent(streaming=False, needs=("HGMMA", "UTMALDG"))
    assert rules(tool.judge(machine(HMMA_16816=8), intent)) == ["missing", "missing"]
    assert tool.judge(machine(HGMMA_64x128x16_F32=8, UTMALDG_2D=2), intent) == []


@pytest.mark.parametrize("code", ["C7508", "C7510", "C7515"])
def test_serialised_wgmma_fails(code):
    log = f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert rules(tool.judge(machine(HGMMA=1), tool.Intent(streaming=False), log)) == ["wgmma"]


def test_registers_that_setmaxnreg_counts_on():
    intent = tool.Intent(streaming=False, registers=(96, 168))
    code = machine(USETMAXREG_DEALLOC=1)
    code.registers = 168
    assert tool.judge(code, intent) == []
    code.registers = 160
    assert rules(tool.judge(code, intent)) == ["registers"]
    (found,) = tool.declared_intents("// inspect: kernel needs=HGMMA registers=96,168\n")
    assert found == ("kernel", tool.Intent(streaming=False, needs=("HGMMA",), registers=(96, 168)))


def test_record():
    code = tool.Machine(64, 0, 0, Counter({"HGMMA.64x64x16": 8, "WARPGROUP.DEPBAR.LE": 2, "FADD": 70}))
    kept = tool.record(code, tool.Intent(elements=8), shared=4096)
    assert (kept["registers"], kept["shared"], kept["instructions"]) == (64, 4096, 80)
    assert (kept["per_element"], kept["hgmma"], kept["depbar_per_hgmma"]) == (10.0, 8, 0.25)


def test_intent_of_cuda_kernels():
    declared = tool.declared_intents(
        "// inspect: attention needs=HGMMA,UTMALDG\n"
        "// inspect: copy_rows streaming elements=4\n"
        "int x;  // inspect: not_at_the_start\n"
    )
    assert [name for name, _ in declared] == ["attention", "copy_rows"]
    intent = lambda name: tool.cuda_intent(name, declared)  # noqa: E731
    assert intent("attention<64>") == tool.Intent(False, ("HGMMA", "UTMALDG"), None)
    assert intent("copy_rows") == tool.Intent(True, (), 4)
    assert intent("draw_vectorised<true>") == tool.Intent(True, (), None)
    assert intent("advance_steps") == tool.Intent(False, (), None)


def test_summary_and_status(capsys):
    checks = [
        tool.Check("cuda", "good", "sm_90", [], tool.record(machine(FADD=1), tool.Intent())),
        tool.Check("triton", "bad", "sm_80", [("compile", "CompilationError: no")]),
    ]
    assert tool.report(checks, None) == 1
    printed = capsys.readouterr().out
    assert "FAIL triton bad sm_80: compile: CompilationError: no" in printed and "remedy" in printed


def test_the_table_of_records_has_a_row_for_each_kernel():
    kept = tool.record(tool.Machine(40, 0, 0, Counter({"LDG.E.128": 2, "STG.E": 1})), tool.Intent(elements=4))
    wider = tool.record(tool.Machine(64, 0, 0, Counter({"LDG.E.128": 3})), tool.Intent())
    checks = [tool.Check("cuda", "copy", "sm_80", [], wider), tool.Check("cuda", "copy", "sm_90", [], kept)]
    checks.append(tool.Check("triton", "attention", "sm_90a", [], wider))
    *head, copy, attention = tool.records(checks, "commit 0123").rstrip().splitlines()
    assert "commit 0123" in "".join(head) and "registers 80/90" in head[-2]
    assert copy == "| cuda `copy` | 64/40 | 0 | 3 | 0.8 | 2/2 | 0/1 | 0 | - |"
    assert attention.startswith("| triton `attention` | -/64 |")


def test_missing_nvcc_is_said(tmp_path):
    """The tool never passes quietly over what it could not compile."""
    env = {key: value for key, value in os.environ.items() if key != "CUDACXX"}
    env.update(PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    command = [sys.executable, str(ROOT / "tools" / "inspect_gpu.py"), "--only", "no such kernel"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1
    assert "nvcc" in done.stdout or "not installed" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 passed, 1 failed"


def test_every_cuda_unit_is_found():
    names = {path.stem for path in tool.cuda_units()}
    assert {"normal", "sampler_step", "diffuse"} <= names
    assert {80, 90, 100} <= set(tool.cmake_archs())


# ---- variants -----------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_variants_describe_their_kernels(path):
    variants = tool.triton_variants(path.stem)
    assert variants or not tool.has_kernel(path.stem), f"{path.name} has kernels but no variants()"
    names = [variant["name"] for variant in variants]
    assert len(set(names)) == len(names), "names repeat"
    for variant in variants:
        arguments = list(variant["fn"].arg_names)
        assert list(variant["signature"]) == arguments, f"{variant['name']}: signature names other arguments"
        constants = {name for name, kind in variant["signature"].items() if kind == "constexpr"}
        assert set(variant["constexprs"]) == constants, variant["name"]
        assert set(variant["divisible"]) <= set(arguments) - constants, variant["name"]
        assert isinstance(variant["enable_fp_fusion"], bool) and variant["num_warps"] in (1, 2, 4, 8, 16)


@needs_triton
@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_launched_kernel_has_a_variant(path):
    """A kernel that is launched but never compiled ahead of time escapes the inspection."""
    text = path.read_text()
    inspected = {variant["fn"].__name__ for variant in tool.triton_variants(path.stem)}
    launched = {name for name in tool.jitted(text) if f"{name}[" in text}
    assert launched <= inspected
