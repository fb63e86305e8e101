"""The check: tables as rows, errors and ranks of known values, failures, the fit, the last line of the tool."""

# ruff: noqa: E501  (the tables are their publishers')

from __future__ import annotations

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megagpt.errors import UserError
from megagpt.plan.check import Errors, at, failures, fit, is_seen, kendall_tau, summary, time_ratios
from megagpt.plan.machine import Constants
from megagpt.plan.rows.row import Row, Skipped
from megagpt.plan.rows.tables import read_table
from megagpt.plan.step import step_time

SURVEY = """source,model,params,layers,hidden,heads,seq,vocab,tp,pp,dp,zero_stage,sharding,gpus,gpu_type,global_batch,micro_batch,precision,recompute,iteration_time_s,tflops_per_gpu,mfu_pct,hfu_pct,mem_gb,tokens_per_s_per_gpu,tflops_kind,verified,note,check
Korthikanti et al. 2022 Table 5,GPT-3 175B,175e9,96,12288,96,2048,51200,8,8,1,0,none,64,A100-80GB,64,1,fp16,selective+sequence-parallel,13.75,,,,,,,yes,interleave=3,
Narayanan et al. 2021 Table 1,GPT 7.5B,7.5e9,36,4096,32,2048,51200,4,1,32,0,none,128,A100-80GB,512,16,fp16,full(uniform),,142,,,,,hardware(96Bslh^2),yes,,
somebody else,GPT,7.5e9,36,4096,32,2048,51200,4,1,32,0,none,128,A100-80GB,512,16,fp16,none,,142,,,,,model,yes,,
Narayanan et al. 2021 Table 1,GPT 7.5B,7.5e9,,,,2048,51200,4,1,32,0,none,128,A100-80GB,512,16,fp16,none,,142,,,,,model,yes,,
"""
NANOTRON = """model,nodes,gpus,micro_batch,grad_accum,global_batch,dp,pp,tp,zero,status,mfu_pct,tokens_per_s_per_gpu,tokens_per_s,memory_gb,flops_per_token_implied
8B,1,8,1,256,256,1,8,1,0,ok,41.0,6807.0,54456,62.5,
8B,1,8,1,256,256,1,1,8,0,ok,21.8,3616.0,28928,24.4,
8B,1,8,64,4,256,1,1,8,0,failed,,,,,
8B,8,64,1,128,256,2,8,4,0,ok,0.6,105.0,6720,17.5,
"""
VTRAIN = """Parameters (billion),# GPUs,global batch,micro batch,hidden size,attention heads,# layers,sequence length,tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)
18.4,256,1024,8,6144,48,40,2048,8,32,1,9603.6
"""


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, text in (("survey", SURVEY), ("nanotron", NANOTRON), ("vtrain", VTRAIN)):
        paths[name] = tmp_path / f"{name}.csv"
        paths[name].write_text(text, encoding="utf-8")
    return paths


def rows_of(path: Path) -> list[Row]:
    return [row for row in read_table(path) if isinstance(row, Row)]


def test_a_survey_says_what_its_sources_do(tables):
    korthikanti, narayanan = rows_of(tables["survey"])
    layout = korthikanti.job.layout
    assert (layout.recompute, layout.sequence_parallel, layout.virtual, layout.schedule) == (
        "selective",
        True,
        3,
        "interleaved",
    )
    assert korthikanti.step_s == 13.75 and not korthikanti.job.engine.flash
    # eq. 3 of the paper with 142 TFLOP/s a GPU: 96 B s l h² (1 + s / 6h + V / 16lh) / 128 / 142e12
    whole = 96 * 512 * 2048 * 36 * 4096**2 * (1 + 2048 / 6 / 4096 + 51200 / 16 / 36 / 4096)
    assert narayanan.step_s == pytest.approx(whole / 128 / 142e12)
    assert narayanan.job.layout.micro_batches == 1


def test_what_cannot_be_predicted_says_why(tables):
    whys = [row.why for row in read_table(tables["survey"]) if isinstance(row, Skipped)]
    assert whys == ["what its engine does is not known", "its model or its GPUs are not stated"]


def test_failures_and_sick_runs_are_told_apart(tables):
    first, second, failed, sick = rows_of(tables["nanotron"])
    assert (failed.failed, failed.step_s, failed.sick) == (True, None, False)
    assert sick.sick and not first.sick and not second.sick
    assert first.memory_gib == 62.5 and first.step_s == pytest.approx(256 * 4096 / 8 / 6807)


def test_out_of_memory_is_predicted(tables):
    assert failures(rows_of(tables["nanotron"])) == (1.0, 1.0)
    assert failures(rows_of(tables["vtrain"])) == (None, None)


def test_errors_and_ranks_of_known_values():
    errors = Errors.of([1.1, 0.8, 1.0])
    assert (errors.rows, errors.median, errors.bias) == (3, pytest.approx(10), pytest.approx(0))
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([2, 1, 3], [1.0, 1.01, 2.0], tie=0.02) == 1  # the first two are as good as equal


def test_a_runs_half_does_not_depend_on_what_was_measured(tables):
    (row,) = rows_of(tables["vtrain"])
    assert is_seen(row) == is_seen(replace(row, step_s=1.0))


def test_the_fit_finds_constants_that_made_the_times(tables):
    """Times made with half of the matrix rate are met far better after a fit than before."""
    truth = replace(Constants(), matrix=0.4, host_us=1500.0)
    base = [
        replace(row, memory_gib=None, failed=None) for name in ("survey", "vtrain") for row in rows_of(tables[name])
    ]
    made = []
    for n in range(1, 7):
        for row in base:
            layout = replace(row.job.layout, global_batch=row.job.layout.global_batch * n)
            job = replace(row.job, layout=layout)
            made.append(replace(row, job=job, step_s=step_time(at(replace(row, job=job), truth).job).seconds))
    fitted = fit(made, lambda line: None)["a100"]
    off = Errors.of(time_ratios(at(row, fitted) for row in made))
    assert off.median < 3 < Errors.of(time_ratios(at(row, Constants()) for row in made)).median


def test_a_table_of_no_known_form_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="of no known form"):
        read_table(tmp_path / "x.csv")


def test_a_row_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text(VTRAIN + "18.4,many,1024,8,6144,48,40,2048,8,32,1,9603.6\n", encoding="utf-8")
    with pytest.raises(UserError, match="has a row that cannot be read: ValueError"):
        read_table(tmp_path / "x.csv")


def run_tool(monkeypatch, capsys, *argv: object) -> str:
    monkeypatch.setattr(sys, "argv", ["plan_check.py", *map(str, argv)])
    monkeypatch.delenv("MEGAGPT_FACTS", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parents[2] / "tools" / "plan_check.py"), run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_last_line_is_json(tables, monkeypatch, capsys):
    said = run_tool(monkeypatch, capsys, "--rows", tables["nanotron"], tables["vtrain"])
    last = json.loads(said.splitlines()[-1])
    expected = ["rows", "median_error_percent", "p90_error_percent", "kendall_tau", "oom_precision", "oom_recall"]
    assert list(last) == expected
    assert last["rows"] == 3 and last["median_error_percent"] > 0 and last["oom_recall"] == 1.0


def test_no_failures_are_null(tables):
    found = summary(rows_of(tables["vtrain"]))
    assert found["oom_precision"] is None and found["oom_recall"] is None and found["kendall_tau"] is None
    assert not math.isnan(float(found["median_error_percent"] or math.nan))
