"""The short form of `tools.soak`: docs/reliability.md has the figures of longer ones."""

import pytest

from tools.soak import flips, main, provider


def test_flipped_bits_are_noticed_or_carry_nothing():
    for kind, counts in flips(12).items():
        assert set(counts) <= {"noticed", "the same"} and sum(counts.values()) == 12, (kind, counts)
        assert counts["noticed"] >= (5 if kind == "checkpoint" else 9), (kind, counts)


def test_every_call_of_the_provider_gets_its_own_answer():
    pytest.importorskip("inspect_ai")
    got = provider(300)
    assert set(got) <= {"own answer", "own error", "cancelled"} and sum(got.values()) == 300
    assert got["own answer"] > 200 and got["own error"] > 10


def test_mistakes_are_one_line(capsys):
    assert main(["flops"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
