"""The benchmark: what it measures, and what it makes of the numbers."""

import pytest
import torch

from model import build
from support import bench

CPU, ARGV = torch.device("cpu"), ["--batch-size", "4", "--T", "2", "--device", "cpu"]
FORMS = "plain,fast,fast bf16,homeostasis,homeostasis bf16,bn,bn bf16,dann,dann bf16".split(",")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(bench, "build", lambda arch, **options: build(arch, width=0.1, **options))


def test_the_forms_start_from_the_same_weights_train_apart_and_fast_takes_less_memory():
    x = torch.rand(32, 3, 32, 32)
    forms = bench.networks(x, "vgg8", T=2)
    assert list(forms) == FORMS and forms["dann"].T == 1
    plain, fast = (bench.Contender(forms[name], x) for name in ("plain", "fast"))
    assert type(plain.model.readout) is not type(fast.model.readout)
    before = [p.clone() for p in fast.model.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, plain.model.parameters(), strict=True))
    peak = bench.peak_memory(plain.train, CPU)
    assert all(torch.equal(p, q) for p, q in zip(before, fast.model.parameters(), strict=True))
    assert not torch.equal(before[0], next(plain.model.parameters()))
    assert bench.peak_memory(fast.train, CPU) < 0.6 * peak


def test_a_run_prints_every_form(capsys):
    assert bench.main([*ARGV, "--seconds", "1e-9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vgg8, batch 4, T = 2, cpu, ") and lines[1].startswith("1 rounds: median")
    assert [line[:16].strip() for line in lines[4:13]] == FORMS
    assert all(int(line.split()[-1]) >= 1 for line in lines[4:13]) and "1.00" not in lines[5]


def test_a_ratio_is_the_median_of_the_rounds_ratios(capsys):
    contender = bench.Contender(build("mlp", width=0.1), torch.rand(4, 3, 32, 32))
    times = {"fast": [1.0, 1.0, 1.0, 10.0, 10.0], "plain": [2.0, 2.0, 9.0, 30.0, 5.0]}  # 2, 2, 9, 3, 0.5; medians 5 : 1
    times = {(name, kind): ms for name, ms in times.items() for kind in ("train", "forward")}
    bench.show(dict(plain=contender, fast=contender), times, CPU)
    plain = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("plain"))
    assert plain[:6] == ["plain", "5", "(2", "to", "30)", "2.00"]


def test_peak_memory_is_what_is_held_at_once():
    peak = bench.peak_memory(lambda: (torch.zeros(1000, 1000) + 1) * 2, CPU)  # two of the three matrices of 4 MB
    assert peak == pytest.approx(8e6 / 2**20, rel=0.01)


@pytest.mark.parametrize("argv", [["--arch", "vgg9"], ["--T", "x"], ["--seconds", "0"], ["--authors", "/no/such"]])
def test_bad_input_is_one_line(argv, capsys):
    assert bench.main([*ARGV, *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
