import copy
import json

import pytest
import torch

from ei_init import initialize
from model import build
from support import bench
from support.fast import accelerate

NARROW = [8, "P", 8, "P", 16, "P", 16, "P", 16, "P"]


def test_the_forms_start_from_the_same_parameters_and_train_apart():
    forms = bench.networks("vgg8", torch.rand(2, 3, 32, 32), T=2)
    plain, fast = forms["plain"], forms["fast"]
    assert type(plain.readout) is not type(fast.readout)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fast.parameters(), strict=True))
    assert plain.readout.w_ee is not fast.readout.w_ee


def test_a_run_measures_every_form(tmp_path, capsys):
    file = tmp_path / "bench.json"
    argv = ["--batch-size", "2", "--T", "2", "--seconds", "0.1", "--device", "cpu", "--json", str(file)]
    assert bench.main(argv) == 0
    result, out = json.loads(file.read_text()), capsys.readouterr().out
    assert {"plain", "fast", "bn", "dann"} <= set(result["forms"])
    for name, form in result["forms"].items():
        assert name in out
        assert len(form["train_s"]) == len(form["forward_s"]) == len(result["copy_rate"]) >= 1
        assert min(form["forward_s"]) > 0 and form["peak_bytes"] > 0


def test_arithmetic_is_counted_by_hand():
    model = build("vgg8", plan=[8, "P", 4, "P"], n_classes=10, T=2)
    initialize(model, torch.rand(3, 3, 32, 32))
    accelerate(model, torch.rand(3, 3, 32, 32))
    forward, training, unpadded, moved = bench.arithmetic(model, torch.rand(3, 3, 32, 32))
    first, first_local = 3 * 32**2 * (8 + 2) * 27, 3 * 32**2 * 8 * 2
    second, second_local = 2 * 3 * 16**2 * (4 + 1) * 72, 2 * 3 * 16**2 * 4
    readout = 2 * 3 * 10 * 4 * 8**2
    assert forward == first + first_local + second + second_local + readout
    assert training == 2 * first + 3 * (first_local + second + second_local + readout)
    inside = [(3 - 2 / size) ** 2 / 9 for size in (32, 16)]  # a border position has one of three rows in the padding
    wanted = 2 * first * inside[0] + 3 * (first_local + second * inside[1] + second_local + readout)
    assert unpadded == pytest.approx(wanted, rel=1e-5)
    values = 3 * 32**2 * (3 + 8) + 6 * 8 * 32**2 * 2 + 6 * 8 * (32**2 + 16**2)  # circuit, LIF, pooling
    values += 6 * 16**2 * (8 + 4) + 6 * 4 * 16**2 * 2 + 6 * 4 * (16**2 + 8**2) + 6 * (4 * 8**2 + 10)
    assert moved == 3 * 4 * values


def test_peak_memory_is_what_is_held_at_once():
    def work():
        a = torch.zeros(1000, 1000)
        b = a + 1  # 8 MB are held here
        del a
        return b * 2  # and here

    assert bench.peak_memory(work, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_fast_keeps_at_most_0_6_of_what_plain_keeps():
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    plain = build("vgg8", plan=[32, "P", 64, "P"])
    initialize(plain, x)
    fast = copy.deepcopy(plain)
    assert not accelerate(fast, x)
    contenders = [bench.Contender(model, x, y) for model in (fast, plain)]
    peaks = [bench.peak_memory(c.train, torch.device("cpu")) for c in contenders]
    assert peaks[0] < 0.6 * peaks[1]


def test_profile_names_operations(capsys):
    assert bench.main(["--profile", "--batch-size", "2", "--T", "1", "--device", "cpu"]) == 0
    assert "conv" in capsys.readouterr().out


def test_scaling_draws_and_lists_every_point(tmp_path, capsys, monkeypatch):
    points = [(T, dict(arch="vgg8", T=T, plan=NARROW), 2) for T in (1, 2, 3)]
    monkeypatch.setattr(bench, "sweeps", lambda args: {name: points for name in "abc"})
    assert bench.main(["--scaling", "--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.count("R^2") == 3
    lines = (tmp_path / "new" / "scaling.csv").read_text().splitlines()
    assert lines[0] == "sweep,value,median_ms,min_ms,max_ms" and len(lines) == 10
    assert (tmp_path / "new" / "scaling.png").stat().st_size > 1000 and (tmp_path / "new" / "scaling.pdf").exists()


def test_sweeps_change_one_thing_at_a_time():
    sizes = [size for points in bench.sweeps(bench.parse(["--batch-size", "1"])).values() for *_, size in points]
    assert min(sizes) >= 2  # for E-I Init
    for name, points in bench.sweeps(bench.parse([])).items():
        assert len({str({k: v for k, v in o.items() if k != "plan"} | {"T": 0}) for _, o, _ in points}) == 1
        assert len({size for *_, size in points}) == (5 if name == "batch size" else 1)
        if name == "circuits":
            assert all(sum(n != "P" for n in options["plan"]) == value for value, options, _ in points)


@pytest.mark.parametrize(
    "argv",
    [
        *[["--arch", "vgg9"], ["--batch-size", "0"], ["--T", "x"], ["--seconds", "0"]],
        *[["--device", "nothing"], ["--json", "/no/such/folder/x.json"], ["--out", "/dev/null/x", "--scaling"]],
    ],
)
def test_bad_input_is_one_line(argv, capsys):
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
