"""python -m kvmix.bench: rows, lists that multiply, the averages, and wrong command lines. No speed is asserted."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

import tiny
from kvmix.bench import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tiny.write_model(tmp_path_factory.mktemp("bench") / "tiny.gguf", n_embd=64, n_ff=64).path
    return str(path)


def run(model: str, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main([model, "-t", "1", *flags]) == 0
    return capsys.readouterr().out


def rows(model: str, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(model, capsys, *flags, "-o", "jsonl").splitlines()]


def test_lists_multiply(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(model, capsys, "-p", "8,16", "-n", "2", "-d", "0,300", "--kv", "f16,k4v3", "-b", "64,256", "-r", "1")
    assert len(found) == 3 * 2 * 2 * 2
    tests = {(r["n_prompt"], r["n_gen"]) for r in found}
    assert tests == {(8, 0), (16, 0), (0, 2)}
    assert {(r["type_k"], r["type_v"]) for r in found} == {("f16", "f16"), ("q4", "q3")}
    assert {r["n_batch"] for r in found} == {64, 256}
    pairs = rows(model, capsys, "-p", "0", "-n", "1", "-ctk", "q8_0,q4", "-ctv", "q2", "-r", "1")
    assert [r["kv"] for r in pairs] == ["k8v2", "k4v2"]


def test_a_packed_depth_takes_fewer_bytes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    f16, packed = rows(model, capsys, "-p", "0", "-n", "1", "-d", "1500", "--kv", "f16,k4v2", "-r", "1")
    assert packed["bits"] < 0.6 * f16["bits"]
    assert packed["kv_bytes"] < f16["kv_bytes"]


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_averages(model: str, capsys: pytest.CaptureFixture[str], n_parallel: int) -> None:
    for row in rows(model, capsys, "-p", "300", "-n", "4", "-r", "3", "-d", "200", "-np", str(n_parallel)):
        n = row["n_prompt"] or row["n_gen"]
        assert len(row["samples_ns"]) == 3
        assert row["samples_ts"] == pytest.approx([n_parallel * n * 1e9 / ns for ns in row["samples_ns"]])
        assert row["avg_ts"] == pytest.approx(statistics.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(statistics.stdev(row["samples_ts"]))
        assert row["n_parallel"] == n_parallel


def test_formats_say_the_same(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("-p", "8", "-n", "2", "-r", "2", "-d", "3")
    lines = run(model, capsys, *flags, "-o", "md").splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert ["pp8 @ d3" in lines[2], "tg2 @ d3" in lines[3]] == [True, True]
    listed = json.loads(run(model, capsys, *flags, "-o", "json"))
    table = list(csv.DictReader(io.StringIO(run(model, capsys, *flags, "-o", "csv"))))
    for a, b in zip(listed, table, strict=True):
        assert list(a) == list(b)
        assert len(json.loads(b["samples_ns"])) == 2
    assert json.loads(run(model, capsys, "-p", "0", "-n", "1", "-o", "json", "-r", "1"))[0]["stddev_ns"] == 0


def test_layers_of_their_own(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    row, other = rows(model, capsys, "-p", "1", "-n", "0", "-r", "1", "--kv", "k4v3;k4v3,0:k8v4")[:2]
    assert (row["type_k"], other["type_k"], other["kv"]) == ("q4", "mixed", "k8v4,1:k4v3")


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--devices"]) == 0
    assert "kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "many"], "'many' is not a whole number"),
        (["-r", "0"], "0 is not in 1..1000"),
        (["-o", "yaml"], "yaml"),
    ],
)
def test_wrong_command_lines(model: str, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([model, *flags])
    assert left.value.code == 2
    assert said in capsys.readouterr().err
