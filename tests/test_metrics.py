"""Metrics: JSON lines and TensorBoard events that other programs read, each step once; speeds by formula."""

import contextlib
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.data.batch import TokenBatch
from dit_jax.deltas.tree import init_lora
from dit_jax.errors import DitError
from dit_jax.models.decoder import forward, init_params, unembed
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.optimize import speed
from dit_jax.runtime import metrics
from dit_jax.runtime.event_file import EventFile, masked_crc32c

CONFIG = DecoderConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    scan_layers=False,  # XLA counts the body of a scan once
)


def read_events(folder):
    """(step, wall time, {tag: value}) of the one event file in a folder, read with TensorBoard's own schema."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    crc32c = pytest.importorskip("tensorboardX.crc32c").crc32c
    (file,) = folder.glob("*tfevents*")
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for part, at in ((data[:8], 8), (data[12 : 12 + length], 12 + length)):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack("<I", data[at : at + 4])[0] == masked
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    return [
        (e.step, e.wall_time, {v.tag: v.simple_value for v in e.summary.value}) for e in events[1:]
    ]


def lines(folder, name="train"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------ files


def test_checksum_of_the_standard():
    # RFC 3720, B.4, masked as TFRecord files have it
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0)):
        assert masked_crc32c(data) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_event_files_are_read_by_another_program(tmp_path):
    with contextlib.closing(EventFile(tmp_path / "events.out.tfevents.1", 5.5)) as events:
        events.write(0, 6.25, {"a/loss": 1.5, "a/ü": -2.0})
        events.write(2**33, 7.0, {"a/loss": math.inf})
        events.write(300, 8.0, {})
    assert read_events(tmp_path) == [
        (0, 6.25, {"a/loss": 1.5, "a/ü": -2.0}),
        (2**33, 7.0, {"a/loss": math.inf}),
        (300, 8.0, {}),
    ]


def test_both_files_hold_the_same(tmp_path):
    with metrics.Metrics(tmp_path, "train") as writer:
        writer.write(0, {"loss": jnp.float32(2.5), "grad_norm": np.float64(1)})
        writer.write(1, {"loss": 1.25})
        writer.flush()
        assert len(lines(tmp_path)) == len(read_events(tmp_path / "tensorboard" / "train")) == 2
    records = lines(tmp_path)
    assert [(r["step"], r["loss"]) for r in records] == [(0, 2.5), (1, 1.25)]
    assert read_events(tmp_path / "tensorboard" / "train") == [
        (0, records[0]["time"], {"train/loss": 2.5, "train/grad_norm": 1.0}),
        (1, records[1]["time"], {"train/loss": 1.25}),
    ]


def test_a_resumed_run_has_the_curve_once(tmp_path):
    with metrics.Metrics(tmp_path, "train") as writer:
        for step in range(6):
            writer.write(step, {"loss": 10 + step})
    first = lines(tmp_path)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"step": 6, "ti')  # a kill in the middle of a line
    with metrics.Metrics(tmp_path, "train", lambda step: step < 4) as writer:
        for step in range(4, 8):
            writer.write(step, {"loss": 20 + step})
    expected = [10.0, 11.0, 12.0, 13.0, 24.0, 25.0, 26.0, 27.0]
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == list(enumerate(expected))
    assert lines(tmp_path)[:4] == first[:4]  # with their own times
    events = read_events(tmp_path / "tensorboard" / "train")
    assert [(step, values["train/loss"]) for step, _, values in events] == list(enumerate(expected))
    assert events[0][1] == first[0]["time"]

    with metrics.Metrics(tmp_path, "train", lambda step: step < 4):  # killed before its first step
        pass
    assert len(lines(tmp_path)) == len(read_events(tmp_path / "tensorboard" / "train")) == 4

    with metrics.Metrics(tmp_path, "train"):  # a new start keeps nothing
        pass
    assert lines(tmp_path) == [] == read_events(tmp_path / "tensorboard" / "train")


@pytest.mark.parametrize(
    "record",
    ["[1]", '{"step": -1, "time": 1}', '{"step": 2, "time": 1, "loss": "a"}', '{"step": 2, "time": null}',
     '{"step": 2, "time": 1, "loss": 1e300}', '{"step": 2, "time": 1, "\\ud800": 1}'],
)  # fmt: skip
def test_records_end_where_one_is_damaged(tmp_path, record):
    (tmp_path / "train.jsonl").write_text('{"step": 1, "time": 1, "loss": 1}\n' + record + "\n")
    with metrics.Metrics(tmp_path, "train", lambda step: step < 9):
        pass
    assert len(lines(tmp_path)) == len(read_events(tmp_path / "tensorboard" / "train")) == 1


def test_only_one_process_writes(tmp_path):
    with metrics.Metrics(tmp_path, "train", enabled=False) as writer:
        writer.write(0, {"loss": 1.0})
        writer.flush()
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DitError, match="something of that name is in the way"):
        metrics.Metrics(tmp_path / "file", "train")


# ------------------------------------------------------------------ speed


def batch_of(lengths, scored):
    weight = np.zeros((len(lengths), 8), np.float32)
    for row, count in enumerate(scored):
        weight[row, :count] = 0.5
    unused = np.zeros((len(lengths), 8), np.int32)
    return TokenBatch(unused, np.array(lengths, np.int32), unused, unused, weight)


def test_work_counts_no_padding_and_adds_up():
    work = speed.count_work(batch_of([3, 5], [1, 2]))
    assert work == speed.Work(tokens=8, scored=3, squares=34, diffs=0, steps=1)
    half = speed.count_work(batch_of([3, 5, 0], [1, 2, 0]), share=0.5, diffs=2, steps=4)
    assert half == speed.Work(tokens=16, scored=6, squares=68, diffs=2, steps=4)
    assert work.plus(half) == speed.Work(24, 9, 102, 2, 5)


@pytest.mark.parametrize(("rows", "length"), [(4, 64), (1, 1024)])
def test_model_flops_are_those_that_xla_counts(rows, length):
    scored = 8
    params = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    lora = jax.eval_shape(lambda: init_lora(CONFIG, jax.random.key(0), 1))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def loss(lora, params, tokens):
        hidden = forward(params, CONFIG, tokens, deltas=(lora,))[:, :scored]
        return jnp.sum(jnp.square(unembed(params, CONFIG, hidden)))

    compiled = jax.jit(jax.grad(loss)).lower(lora, params, tokens).compile()
    work = speed.Work(rows * length, rows * scored, rows * length**2, 0, 1)
    # XLA also counts norms, softmax and the factors, and leaves out the gradient below the first layer.
    counted = compiled.cost_analysis()["flops"]
    assert speed.train_flops(CONFIG, work) == pytest.approx(counted, rel=0.04)


def test_rates_follow_from_work_time_and_ceiling(monkeypatch, tmp_path):
    clock = iter([100.0, 102.0, 105.0, 109.0, 110.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(speed, "matmul_flops", lambda dtype: {"float32": 1e9}[dtype])
    meter = speed.Meter(CONFIG)
    meter.add(speed.Work(tokens=10, scored=1, squares=4, steps=2))
    meter.add(speed.Work(tokens=10, scored=1, squares=4, steps=2))
    first = meter.lap()
    assert first["compiled"] == 1.0 and "diffs_per_hour" not in first
    assert first["step_seconds"] == 0.5 and first["tokens_per_second"] == 10.0
    flops = speed.train_flops(CONFIG, speed.Work(20, 2, 8, 0, 4))
    assert first["mfu"] == pytest.approx(flops / 2.0 / 1e9)
    meter.add(speed.Work(tokens=8, diffs=5, steps=1))
    second = meter.lap()  # from 105, when the first lap was over
    assert "compiled" not in second
    assert second["tokens_per_second"] == 2.0 and second["diffs_per_hour"] == 5 * 900
    assert second["process_peak_bytes"] > 2**20


def test_the_ceiling_is_a_plausible_number():
    assert 1e9 < speed.matmul_flops("float32") < 1e14


def test_devices_of_one_cpu_count_once():
    assert speed.count_devices(None) == 1
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    assert speed.count_devices(mesh) == 1


# ------------------------------------------------------------------ profiles


def test_a_profile_holds_the_steps_of_its_range(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with speed.Profile(tmp_path, (2, 4)) as profile:
        for step in range(6):
            profile.step(step)
            calls.append(step)
    assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]
    assert str(tmp_path) in capsys.readouterr().out

    calls.clear()
    with pytest.raises(ZeroDivisionError), speed.Profile(tmp_path, (1, 9)) as profile:
        profile.step(3)  # resumed in the middle of the range
        _ = 1 / 0
    assert calls == ["start", "stop"]

    calls.clear()
    with speed.Profile(tmp_path) as profile:
        for step in range(3):
            profile.step(step)
    assert calls == []


def test_a_profile_of_one_number_is_one_line(tmp_path):
    with pytest.raises(DitError, match=r"two step numbers, not \(5,\): write profile=10,13"):
        speed.Profile(tmp_path, (5,))


def test_a_profile_leaves_a_trace(tmp_path):
    with speed.Profile(tmp_path / "trace", (0, 1)) as profile:
        profile.step(0)
        profile.step(1, jnp.ones(3) + 1)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
