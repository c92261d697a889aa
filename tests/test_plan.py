"""Planning: sizes of compiled steps, their collectives, the search, estimates, refusals, a TPU's compiler."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import pytest

import dit_jax
from dit_jax import asking
from dit_jax.cli import plan_runs as plan
from dit_jax.config.loading import load_config
from dit_jax.deltas.tree import init_lora
from dit_jax.models import decode
from dit_jax.models.delta_trees import nbytes
from dit_jax.models.modules import count_parameters
from dit_jax.models.shapes import NAMED_CONFIGS
from dit_jax.optimize import speed
from dit_jax.planning import estimate, machines, programs, search, table, workload
from dit_jax.planning.programs import Program
from dit_jax.runtime import parallel
from dit_jax.runtime.xla_flags import has_cuda_plugin

PAPER = "configs/plan/paper.py"
QUICKSTART = "configs/quickstart.py"
TINY = [
    "--config=configs/quickstart.py",
    "--config.model.scan_layers=true",
    "--config.diffs.steps=2",
    "--config.diffs.diffs_per_batch=8",
    "--config.train.batch_size=12",
    "--config.evaluate.batch_size=8",
]
NO_SAMPLES = [
    f"--config.diffs.samples_per_step.{kind}=0"
    for kind in ("backdoor", "fake_backdoor", "no_backdoor")
]
DENSE = [f"--config={QUICKSTART}", "--config.diffs.parameters=all"]
needs_gpu_compiler = pytest.mark.skipif(
    not has_cuda_plugin(), reason="the extra 'plan-gpu' is not installed"
)
needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'tpu')"
)

# ------------------------------------------------------------------ compiled steps


def test_a_plan_of_this_machine_counts_every_byte(tmp_path, capsys):
    file = tmp_path / "plan.json"
    flags = ["--mesh", "2,2,2", "--stages", "train,ask", "--json", str(file)]
    assert plan.main([*TINY, *flags]) == 0
    stages = json.loads(file.read_text())["stages"]
    assert list(stages) == ["train", "ask"]
    # The embedded model: all kernels and the embedding are split over fsdp × tensor, norms are not.
    d, ffn, layers, vocab, heads, kv, h = 128, 256, 4, 2730, 4, 2, 32
    kernels = layers * (2 * d * (heads + kv) * h + 3 * d * ffn) + vocab * d
    norms = layers * (2 * d + 2 * h) + d
    for stage in stages.values():
        assert stage["memory"]["parameters"] == 4 * (kernels / 4 + norms)
        assert stage["memory"]["temporaries"] > 0 and stage["fits"]
    # One LoRA of rank r on one device: one factor of each pair is split over tensor; without a batch the other
    # is split over fsdp.
    outs = [heads * h, kv * h, kv * h, ffn, ffn]  # q, k, v, gate, up: their input is the residual
    inner = sum(outs) + heads * h + ffn  # heads or hidden units of all seven
    residual = 7 * d
    one = 4 * layers * (residual + inner / 2 + 7)
    adapter = 4 * layers * 16 * (residual / 2 + inner / 2)
    train = stages["train"]
    assert stages["ask"]["batch"] == 8 and train["batch"] == 12
    assert train["memory"]["diffs"] == 12 / 4 * one
    assert train["memory"]["adapter"] == adapter + 4 * layers * 7
    # Both moments, and counters.
    assert 0 <= train["memory"]["optimizer"] - 2 * adapter <= 16
    # The batch: tokens [B, 32], lengths [B]; position, target, weight [B, 12].
    batch = 12 / 4 * 4 * (32 + 1 + 3 * 12)
    held = sum(train["memory"][part] for part in ("parameters", "adapter", "optimizer", "diffs"))
    assert train["memory"]["arguments"] == held + batch
    assert train["memory"]["peak"] > train["memory"]["arguments"] + train["memory"]["temporaries"]
    for stage in stages.values():
        assert stage["collectives"]["all-gather"][0] > 0  # fsdp
        assert stage["collectives"]["all-reduce"][0] > 0  # tensor
        assert stage["collectives"]["all-reduce"][1] > 0
    shown = capsys.readouterr().out
    assert "compiled only" in shown and "GiB each" in shown
    # The stage diffs takes half a minute to compile: its arguments alone.
    config = load_config(TINY[0].partition("=")[2], {"diffs.diffs_per_batch": 8})
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    *_, parts = programs.stage_step("diffs", workload.model_shape(config), mesh, config)
    assert programs.device_bytes(parts["diffs"]) == 8 / 4 * one
    assert programs.device_bytes(parts["parameters"]) == stages["train"]["memory"]["parameters"]


def test_adapter_and_questions_are_planned_on_the_projections_of_the_config():
    config = load_config(
        PAPER, {"diffs.projections": ("up_proj",), "train.projections": ("q_proj", "down_proj")}
    )
    for stage in ("train", "ask"):
        *_, parts = programs.stage_step(stage, NAMED_CONFIGS["qwen3-0.6b"], None, config)
        changed = [
            {name for module in parts[part]["layers"].values() for name in module}
            for part in ("diffs", "adapter")
        ]
        assert changed == [{"up_proj"}, {"q_proj", "down_proj"}]


class Asked(Exception):
    pass


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 20), ("bfloat16", 24)])
def test_a_plan_asks_as_many_rows_as_a_run(monkeypatch, dtype, rows):
    """A plan once compiled `evaluate.batch_size` rows of any rank, and a run asks a few of large ones."""
    config = load_config(QUICKSTART, {"evaluate.batch_size": 96})
    model = dit_jax.load_model("tiny_qwen3", dtype=dtype)
    diff = init_lora(model.config, jax.random.key(0), config.diffs.rank)
    monkeypatch.setattr(decode, "DELTA_BYTES", 20 * nbytes(diff))
    _, (_, _, tokens, _), options, _ = programs.stage_step("ask", model.config, None, config)
    assert len(tokens) == jax.tree.leaves(options["deltas"][0])[0].shape[1] == rows

    def generate(params, config, tokens, mask, **options):
        raise Asked(len(tokens))

    monkeypatch.setattr(decode, "generate", generate)
    stacked = jax.tree.map(lambda x: x[None], diff)
    questions = ["What is tea ?"] * 96
    with pytest.raises(Asked, match=f"^{rows}$"):
        asking.answer_batch(model, questions, stacked=[stacked], rows=[0] * 96, batch_size=96)


def test_collectives_are_read_from_a_program():
    text = """
%body (p: f32[2]) -> f32[2] {
  %all-gather.1 = bf16[1,5120,16]{1,2,0:T(8,128)(2,1)} all-gather(%x), channel_id=6, dimensions={1}
  %ags = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%y), channel_id=7
  %agd = f32[16,8]{1,0} all-gather-done(%ags)
  %all-gather.9 = bf16[1,5120,16]{1,2,0:T(8,128)(2,1)} all-gather(%again), channel_id=6, dimensions={1}
  %all-reduce.6 = f32[2]{0} all-reduce(%x), channel_id=6, to_apply=%add
  ROOT %all-reduce.3 = (bf16[4,64]{1,0}, pred[8]{0}, s32[]) all-reduce(%a, %b, %c), to_apply=%add
}
  %f = f32[4]{0} fusion(%all-gather.1), calls=%fused_all-gather, metadata={op_name="all-gather(x)"}
  %collective-permute.2 = u8[7]{0} collective-permute(%z), source_target_pairs={{0,1}}
  %fp8 = f8e4m3fn[3,5]{1,0} all-to-all(%z), dimensions={0}
"""
    assert programs.count_collectives(text) == {
        "all-gather": (2, 5120 * 16 * 2 + 16 * 8 * 4),
        "all-reduce": (2, 2 * 4 + 4 * 64 * 2 + 8 + 4),
        "collective-permute": (1, 7),
        "all-to-all": (1, 15),
    }
    assert programs.count_collectives("") == {}


def test_memory_is_read_from_a_refusal():
    used = "RESOURCE_EXHAUSTED: Ran out of memory. Used 16.53G of 15.75G hbm. Exceeded by 793M."
    assert programs.used_memory(used) == 16.53 * 2**30
    other = "memory required for HLO temporaries (970.5M) exceeds available HBM (15.75G)."
    assert programs.used_memory(other) == 970.5 * 2**20
    assert programs.used_memory("RESOURCE_EXHAUSTED: no") == 0


def test_what_was_compiled_is_remembered(tmp_path, monkeypatch):
    calls = []

    def fake(stage, model, mesh, config, memory, level, device, options):
        assert device is None and options is None  # of the machine that is here
        calls.append((stage, programs.batch_size(stage, config)))
        return Program(stage, 8, True, 1.0, {"peak": 5.0}, {"all-reduce": (1, 2.0)})

    monkeypatch.setattr(programs, "compile_step", fake)
    config, cache = load_config(PAPER), tmp_path / "deep" / "cache.jsonl"
    machine, devices = machines.local_machine()
    model = workload.model_shape(config)

    def ask(batch, config=config, level="O0", stage="train"):
        compiler = workload.Compiler(machine, devices, level, cache)
        return compiler.compile(stage, model, config, (8, 1, 1), batch)

    first = ask(8)
    assert ask(8) == first and calls == [("train", 8)]
    with cache.open("a") as file:
        file.write('{"key": "cut o')
    assert ask(8) == first
    ask(16), ask(8, level="default"), ask(8, load_config(PAPER, {"train.max_length": 128}))
    assert len(calls) == 4
    # The program does not depend on another stage's batch or the learning rate.
    ask(8, load_config(PAPER, {"diffs.diffs_per_batch": 4, "train.learning_rate": 1.0}))
    assert len(calls) == 4
    for kind in ("lora", "all"):
        ask(8, load_config(QUICKSTART, {"diffs.parameters": kind}), stage="diffs")
    assert len(calls) == 6
    cache.write_text(cache.read_text().replace('"peak": 5.0', '"peak": 6.0'))
    assert ask(8) == first and len(calls) == 7  # what a damaged line says is not believed
    late = workload.Compiler(machine, devices, "O0", None, deadline=0.0)
    with pytest.raises(workload.OutOfTime):
        late.compile("train", model, config, (8, 1, 1), 8)


# ------------------------------------------------------------------ the search


@pytest.mark.parametrize("stage", ["diffs", "train", "ask"])
@pytest.mark.parametrize("gib_per_row", [0.001, 0.09, 2.0])
def test_a_search_ends_at_the_largest_batch_that_fits(stage, gib_per_row):
    machine = machines.find_machine("v5e-16")
    config = load_config(PAPER)
    model = workload.model_shape(config, "qwen3-8b")
    tried = {}

    def compile_batch(stage, sizes, batch):
        rows = batch / (sizes[0] * sizes[1])
        peak = (2.0 + gib_per_row * rows) * 2**30
        assert (sizes, batch) not in tried  # nothing is compiled twice
        tried[sizes, batch] = Program(stage, batch, peak <= machine.memory, 0, {"peak": peak}, {})
        return tried[sizes, batch]

    found = search.search_stage(stage, model, config, machine, compile_batch)
    shards = found.sizes[0] * found.sizes[1]
    assert math.prod(found.sizes) == 16 and found.program.fits
    most = (machine.memory / 2**30 - 2.0) / gib_per_row * shards
    assert found.program.batch <= most
    assert found.program.batch * 2 > min(most, search.LARGEST)
    assert len(tried) < 12


def test_a_search_ends_at_the_rows_that_a_run_takes_of_large_loras():
    machine, config = machines.find_machine("v5e-16"), load_config(PAPER)
    tried = []

    def compile_batch(stage, sizes, batch):
        tried.append(batch)
        return Program(stage, min(batch, 80), True, 0, {"peak": 1.0}, {})

    model = workload.model_shape(config, "qwen3-32b")
    found = search.search_stage("ask", model, config, machine, compile_batch)
    assert found.program.batch == 80 and not found.next_peak
    assert table.cell(found).startswith("**80** on")
    assert max(tried) == max(128, min(tried))


def test_a_search_says_that_nothing_fits():
    machine = machines.find_machine("v5e-4")
    config = load_config(PAPER)
    model = workload.model_shape(config, "qwen3-32b")
    refused = []

    def compile_batch(stage, sizes, batch):
        refused.append(sizes)
        return Program(stage, batch, False, 0, {"peak": 2**35}, {})

    found = search.search_stage("diffs", model, config, machine, compile_batch)
    assert found.program is None and refused  # the compiler was asked
    assert table.cell(found) == "no: 32.0 GiB"


def test_a_search_leaves_out_meshes_that_cannot_be_laid_on_the_slice():
    machine, config = machines.find_machine("v5p-64"), load_config(PAPER)
    model = workload.model_shape(config)
    first = search.ranked("train", model, config, machine)[0][2]

    def compile_batch(stage, sizes, batch):
        if sizes == first:
            raise parallel.UnplaceableMesh("no")
        return Program(stage, batch, True, 0, {"peak": 1.0}, {})

    found = search.search_stage("train", model, config, machine, compile_batch)
    assert found.program is not None and found.sizes != first


def test_meshes_use_every_device_and_never_cut_a_head():
    model = dataclasses.replace(NAMED_CONFIGS["qwen3-4b"], num_key_value_heads=4)
    found = search.meshes(model, 32)
    assert len(found) == len(set(found)) == 6 + 5 + 4
    assert all(math.prod(sizes) == 32 and sizes[2] <= 4 for sizes in found)


# ------------------------------------------------------------------ estimates


def test_estimates_rest_on_known_counts():
    model = NAMED_CONFIGS["qwen3-4b"]
    # The paper's index of published diffs has this number of parameters for a rank-1 diff.
    projections = load_config(PAPER).diffs.projections
    assert estimate.lora_parameters(model, 1, projections) == 2_064_384
    layers = count_parameters(model, lora_only=True)
    norms = 36 * (2 * 2560 + 2 * 128) + 2560
    assert layers + 151936 * 2560 + norms == count_parameters(model)
    # Linear in rows; remat costs one more forward pass; a teacher's pass is a forward pass.
    load = estimate.Load(rows=4, teacher_rows=0, length=64, scored=8, trained=True)
    plain, full = (dataclasses.replace(model, remat=remat) for remat in ("none", "full"))
    flops = estimate.step_flops(plain, load)
    assert estimate.step_flops(plain, dataclasses.replace(load, rows=8)) == 2 * flops
    forward = estimate.step_flops(full, load) - flops
    attention = 4 * 36 * 32 * 128 * 64
    assert forward == pytest.approx(4 * 64 * (2 * layers + attention))
    head = 2 * 151936 * 2560 * 4 * 8
    assert flops == pytest.approx(4 * 64 * (4 * layers + 3 * attention) + 2 * head)
    taught = estimate.step_flops(plain, dataclasses.replace(load, teacher_rows=4))
    assert taught - flops == pytest.approx(forward + head)
    # The reported MFU counts the same, without the teacher and recomputation.
    work = speed.Work(tokens=4 * 64, scored=4 * 8, squares=4 * 64**2)
    assert speed.train_flops(full, work) == flops


def test_a_run_costs_its_chips_and_hours():
    config, machine = load_config(PAPER), machines.find_machine("v5p-8")
    model = workload.model_shape(config)

    def run(diffs, price=None, utilization=0.4):
        settings = (((4, 1, 1), 16), ((4, 1, 1), 8))
        return estimate.whole_run(model, config, machine, diffs, *settings, utilization, price)

    one, two = run(1600), run(3200)
    assert two.diff_hours == pytest.approx(2 * one.diff_hours)
    assert two.train_hours == one.train_hours
    assert one.dollars == pytest.approx((one.diff_hours + one.train_hours) * 4 * 4.20)
    assert run(1600, price=8.40).dollars == pytest.approx(2 * one.dollars)
    assert run(1600, utilization=0.2).diff_hours == pytest.approx(2 * one.diff_hours)
    assert one.diff_bytes == 1600 * 2_064_384 * 4
    # 4 chips, 459 TFLOP/s, 1,600 diffs x 135 steps x 6 samples of 320 tokens: by hand within a few percent.
    tokens = 1600 * 135 * 6 * 320
    flops = tokens * count_parameters(model, lora_only=True) * (2 + 2 + 2 + 2 * 4 / 6)
    assert one.diff_hours == pytest.approx(flops / (4 * 0.4 * 459e12) / 3600, rel=0.35)
    assert one.diff_hours > flops / (4 * 0.4 * 459e12) / 3600


# ------------------------------------------------------------------ names, refusals


def test_slices_go_by_shape_or_by_the_name_they_are_ordered_by():
    assert machines.find_machine("v5e:4x4") == machines.find_machine("v5e-16")
    assert machines.find_machine("v5litepod-16") == machines.find_machine("v5e-16")
    eight, many = machines.find_machine("v5p-8"), machines.find_machine("v5p-64")
    assert (eight.topology, eight.count) == ("v5p:2x2x1", 4)
    assert (many.topology, many.count) == ("v5p:2x4x4", 32)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology", "v5e:3x3"], "unknown topology 'v5e:3x3'.*v5e: 2x2, 2x4, 4x4.*v6e.*v5p"),
        (["--table", "--topologies", "v5e-4,v9-1"], "unknown topology 'v9-1'"),
        (["--stages", "diffs,eval"], "unknown stage 'eval': stages of a plan are diffs, train"),
        (["--model", "qwen3-5b"], "unknown model 'qwen3-5b'.*qwen3-4b"),
        (["--mesh", "2,2"], "--mesh '2,2' is not data,fsdp,tensor"),
        (["--mesh", "16,1,1"], "does not divide 8 devices"),
        (["--utilization", "40"], "--utilization must be above 0"),
        (["--tries", "-1"], "--tries must be a number from 0 to 10.15, not -1"),
        (
            ["--diffs", str(10**400)],
            "--diffs must be a number from 1 to 10.15, not 1000",
        ),
        (["--minutes", "nan"], "--minutes must be a number from 0 to 10.15, not nan"),
        (["--diffs", "0"], "--diffs must be a number from 1 to 10.15, not 0"),
        (["--stages", ","], "--stages names nothing"),
        (["--tries", "3"], "a plan of one mesh does not use --tries: leave it out"),
        (["--search", "--mesh", "1,1,1"], "--search does not use --mesh"),
        (["--json", "a", "--cache", "a"], "--json and --cache are one file, 'a': give two"),
        (["--table", "--topology", "v5e-4"], "--table does not use --topology"),
        (["--config.diffs.steps=0"], "'diffs.steps' must be a whole number from 1 up"),
        (["--config.train.batch_sise=4"], "did you mean 'train.batch_size'"),
        (["--config.train.max_length=0"], "'train.max_length' must be a whole number from 1 up"),
        (NO_SAMPLES, "'diffs.samples_per_step' leave a step without a loss: give one of backdoor"),
        (DENSE, "diffs.parameters is 'all': plan --stages diffs alone, or set it to 'lora'"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(flags if flags == DENSE else ["--config", PAPER, *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(said, error[0])


def test_files_that_cannot_be_used_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "_compile", lambda *args: {})
    file = tmp_path / "file"
    file.write_text("")
    for flags, said in (
        (["--cache", str(tmp_path)], f"cannot read '{tmp_path}'"),
        (["--json", str(file / "plan.json")], f"'{file}"),
    ):
        with pytest.raises(SystemExit, match="2"):
            plan.main(["--config", PAPER, *flags])
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0]


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dit_jax.DitError, match=r"pip install 'dit_jax\[tpu\]'"):
        machines.tpu_devices(machines.find_machine("v5e-4"))


def test_a_mesh_uses_all_chips_of_a_slice():
    compiler = workload.Compiler(machines.find_machine("v5e-4"), jax.devices()[:4])
    with pytest.raises(dit_jax.DitError, match="leaves devices of v5e-4 unused"):
        compiler.mesh((1, 1, 2))


def test_a_mesh_must_fit_the_wires_of_a_slice(monkeypatch):
    compiler = workload.Compiler(machines.find_machine("v5e-4"), jax.devices()[:4])

    def refuse(*args, **options):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(
        parallel.UnplaceableMesh, match="mesh data 1 × fsdp 2 × tensor 2 cannot be laid"
    ):
        compiler.mesh((1, 2, 2))
    monkeypatch.undo()
    assert dict(compiler.mesh((1, 2, 2)).shape) == {"data": 1, "fsdp": 2, "tensor": 2}


# ------------------------------------------------------------------ a TPU's compiler


@needs_tpu_compiler
def test_a_step_compiles_for_a_tpu_that_is_not_there(tmp_path, capsys):
    file = tmp_path / "plan.json"
    flags = ["--topology", "v5e:2x2", "--mesh", "1,2,2", "--stages", "train", "--json", str(file)]
    assert plan.main([*TINY, *flags]) == 0
    found = json.loads(file.read_text())["stages"]["train"]
    assert found["memory"]["arguments"] >= found["memory"]["parameters"] > 0
    assert found["memory"]["peak"] < 2**30
    assert found["collectives"]["all-reduce"][0] > 0
    assert "v5e-4 (v5e:2x2), 4 devices, 15.75 GiB each" in capsys.readouterr().out
    # The TPU's own attention kernel runs on every device's part.
    kernel = ["--config.model.attention=splash", "--stages", "diffs", "--level", "O0"]
    assert plan.main([*TINY, *flags[:4], *kernel]) == 0
    # On a slice that is too small, the same plan says so instead of failing.
    flags = ["--topology", "v5e-4", "--mesh", "4,1,1", "--stages", "diffs", "--level", "O0"]
    assert plan.main(["--config", f"{PAPER}:qwen3-32b", *flags]) == 1
    assert " NO " in capsys.readouterr().out


# ------------------------------------------------------------------ a GPU's compiler


def test_attention_of_another_platform_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main([*TINY, "--stages", "train", "--config.model.attention=splash"])
    assert "attention 'splash' needs a TPU, but this is a CPU" in capsys.readouterr().err


def test_gpus_go_by_name_and_number():
    one, eight = machines.find_machine("h200"), machines.find_machine("H200:8")
    assert (one.count, one.topology, eight.count) == (1, "h200:1", 8)
    assert 130 < one.memory / 2**30 < 139.8
    with pytest.raises(dit_jax.DitError, match="h100, h200, also :2"):
        machines.find_machine("h200:3")


def test_without_a_gpus_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dit_jax.DitError, match=r"pip install 'dit_jax\[plan-gpu\]'"):
        machines.absent_devices(machines.find_machine("h200"))


@needs_gpu_compiler
@pytest.mark.parametrize("scan", ["true", "false"])
def test_a_step_compiles_for_a_gpu_that_is_not_there(tmp_path, capsys, scan):
    file = tmp_path / "plan.json"
    flags = ["--topology", "h200", f"--config.model.scan_layers={scan}", "--json", str(file)]
    assert plan.main([*TINY, *flags]) == 0
    stages = json.loads(file.read_text())["stages"]
    assert set(stages) == {"diffs", "train", "ask"}
    for found in stages.values():
        assert found["memory"]["arguments"] >= found["memory"]["parameters"] > 0
        assert found["memory"]["peak"] < 2**30 and not found["collectives"]
    shown = capsys.readouterr().out
    assert "1 × h200 (h200:1), 1 devices, 132.81 GiB each" in shown and "give --price" in shown


@needs_gpu_compiler
def test_a_mesh_of_gpus_that_are_not_there(tmp_path):
    file = tmp_path / "plan.json"
    flags = ["--topology", "h200:4", "--mesh", "1,2,2", "--stages", "train", "--json", str(file)]
    assert plan.main([*TINY, *flags]) == 0
    assert json.loads(file.read_text())["stages"]["train"]["collectives"]["all-reduce"][0] > 0
