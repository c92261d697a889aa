"""Reading compiled GPU programs: counts against a program counted by hand, arguments against the real ones."""

import json

import jax
import pytest

from benchmarks import compiled, ours, run, workload
from benchmarks.hlo import Kernel, Program
from dit_jax.runtime.xla_flags import has_cuda_plugin

TEXT = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused_slice (p0: f32[3,8,16], p1: s32[]) -> f32[1,8,16] {
  %p0 = f32[3,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%fused_write (p0: f32[3,4,16], p1: f32[4,16], p2: s32[]) -> f32[3,4,16] {
  %p0 = f32[3,4,16]{2,1,0} parameter(0)
  %p1 = f32[4,16]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,4,16]{2,1,0} bitcast(%p1)
  ROOT %write = f32[3,4,16]{2,1,0} dynamic-update-slice(%p0, %row, %p2, %zero, %zero)
}

%fused_product (p0: bf16[4,8], p1: bf16[8,2]) -> f32[4,2] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[8,2]{1,0} parameter(1)
  ROOT %dot = f32[4,2]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[3,8,16], f32[4,8], f32[3,4,16])) -> (s32[], f32[3,8,16], f32[4,8], f32[3,4,16]) {
  %state = (s32[], f32[3,8,16]{2,1,0}, f32[4,8]{1,0}, f32[3,4,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = f32[3,8,16]{2,1,0} get-tuple-element(%state), index=1
  %h = f32[4,8]{1,0} get-tuple-element(%state), index=2
  %out = f32[3,4,16]{2,1,0} get-tuple-element(%state), index=3
  %own = f32[1,8,16]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(f)/slice"}
  %kernel = f32[8,16]{1,0} bitcast(%own)
  %gemm = (f32[4,16]{1,0}, s8[33554432]{0}) custom-call(%h, %kernel), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/product"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %y = f32[4,16]{1,0} get-tuple-element(%gemm), index=0
  %new = f32[3,4,16]{2,1,0} fusion(%out, %y, %i), kind=kLoop, calls=%fused_write, metadata={op_name="jit(f)/write"}
  ROOT %next = (s32[], f32[3,8,16]{2,1,0}, f32[4,8]{1,0}, f32[3,4,16]{2,1,0}) tuple(%i, %w, %h, %new)
}

%condition (state.1: (s32[], f32[3,8,16], f32[4,8], f32[3,4,16])) -> pred[] {
  %state.1 = (s32[], f32[3,8,16]{2,1,0}, f32[4,8]{1,0}, f32[3,4,16]{2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (a: f32[3,8,16], b: bf16[4,8], c: bf16[8,2]) -> f32[4,2] {
  %a = f32[3,8,16]{2,1,0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %c = bf16[8,2]{1,0} parameter(2)
  %start = (s32[], f32[3,8,16]{2,1,0}, f32[4,8]{1,0}, f32[3,4,16]{2,1,0}) tuple(%a)
  %loop = (s32[], f32[3,8,16]{2,1,0}, f32[4,8]{1,0}, f32[3,4,16]{2,1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = f32[4,2]{1,0} fusion(%b, %c), kind=kCustom, calls=%fused_product, metadata={op_name="jit(f)/head"}
}
"""  # noqa: E501


def test_kernels_bytes_and_flops_are_those_counted_by_hand():
    assert Program(TEXT).kernels() == [
        # One slice of the stacked array is read, and one row of the stacked result written.
        Kernel(3, 0.0, 4 * (8 * 16 + 8 * 16) + 4, "jit(f)/slice"),
        # Without the library's scratch space.
        Kernel(3, 2 * 4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16), "jit(f)/product"),
        Kernel(3, 0.0, 4 * (4 * 16 + 4 * 16) + 4, "jit(f)/write"),
        Kernel(1, 2 * 4 * 8 * 2, 2 * (4 * 8 + 8 * 2) + 4 * 4 * 2, "jit(f)/head"),
    ]


def test_loops_of_unknown_length_run_as_often_as_said():
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert [kernel.times for kernel in Program(text).kernels(trips=20)] == [20, 20, 20, 1]


def test_a_kernel_takes_its_slowest_part():
    chip = compiled.CHIPS["h200"]
    assert compiled.seconds(Kernel(2, chip.flops, 1.0, ""), "h200") == 2.0
    assert compiled.seconds(Kernel(1, 1.0, 3 * chip.bandwidth, ""), "h200") == 3.0
    assert compiled.seconds(Kernel(5, 1.0, 1.0, ""), "h200") == pytest.approx(5 * compiled.LAUNCH)


class Called(Exception):
    pass


@pytest.mark.parametrize("scan", ["yes", "no"])
@pytest.mark.parametrize("suite", ["diffs", "train", "ask"])
def test_the_arguments_are_those_of_the_benchmark(suite, scan, tmp_path, monkeypatch):
    flags = ["--suite", suite, "--model", "tiny-2layers", "--platform", "cpu", "--diffs", "4"]
    flags += ["--batch", "4", "--scan-layers", scan, "--new-tokens", "3"]
    work = run.make_workload(run.parse(flags))
    seen = {}

    def called(*args, **options):
        seen["args"], seen["options"] = args, options
        raise Called

    from dit_jax.models import decode as generate
    from dit_jax.train import dit

    monkeypatch.setattr(ours, "finetune_many", called)
    monkeypatch.setattr(dit, "train_step", called)
    monkeypatch.setattr(generate, "generate", called)
    workload.write(work, tmp_path)
    program = ours.make(*workload.read(tmp_path), tmp_path, "ours", "")
    with pytest.raises(Called):
        program.run()
    monkeypatch.undo()
    _, args, options = compiled.abstract_program(work)

    def shapes(tree):
        return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree) if hasattr(x, "shape")]

    assert shapes(args) == shapes(seen["args"])
    if suite == "ask":
        assert shapes(options["deltas"]) == shapes(seen["options"]["deltas"])
        assert options["max_new_tokens"] == seen["options"]["max_new_tokens"]
    else:
        assert options["packed"] == seen["options"]["packed"]


def test_the_embedded_world_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "absent_devices", lambda machine: [None])
    with pytest.raises(SystemExit) as stop:
        compiled.main(["--suite", "diffs", "--model", "tiny", "--tokens", "world"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --tokens world is a suite for CPUs")


@pytest.mark.skipif(not has_cuda_plugin(), reason="the extra 'plan-gpu' is not installed")
def test_a_program_is_compiled_and_counted(capsys):
    flags = ["--suite", "train", "--model", "tiny-2layers", "--batch", "4", "--diffs", "4"]
    assert compiled.main([*flags, "--kernels", "3"]) == 0
    first, *places = capsys.readouterr().out.splitlines()
    numbers = json.loads(first)
    assert numbers["fits"] and numbers["kernels"] > 100 and len(places) == 3
    # The least is forward and backward through the base, 4N a token.
    linear = 2 * (2 * 128 * (4 + 2) * 32 + 3 * 128 * 256)
    assert 4 * linear * 4 * 32 / 1e12 < numbers["tflop"] < 40 * linear * 4 * 32 / 1e12
