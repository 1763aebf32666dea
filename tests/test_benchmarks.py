"""Does the benchmark tool measure what it says, and does it refuse to time wrong results?"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import compare, features, numerics, rows, run
from benchmarks.__main__ import main
from benchmarks.cases import GROUPS, Case, random_inputs
from benchmarks.correctness import reference
from benchmarks.providers import PROVIDERS, AttentionFunction, FlashAttention, Provider, Sdpa
from triton_attention import attention_varlen

CPU = torch.device("cpu")
SMOKE_PASSES = sum(len(case.passes) for case in GROUPS["smoke"])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Broken(Sdpa):
    """SDPA with something wrong in it; `break_` gets the function's arguments and its right result."""

    def __init__(self, name: str, break_) -> None:
        super().__init__(name, SDPBackend.MATH)
        self.break_ = break_

    def function(self, case: Case, device: torch.device) -> AttentionFunction:
        right = super().function(case, device)

        def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            return self.break_(q, k, v, bias, right(q, k, v, bias))

        return attention


def wrong_output(q, k, v, bias, out):
    return 1.05 * out


def wrong_dk(q, k, v, bias, out):
    return out + 0.05 * (k - k.detach()).sum()  # adds nothing to the output, but a constant to dk


def wrong_dbias(q, k, v, bias, out):
    return out if bias is None else out + 0.05 * (bias - bias.detach()).sum()


def nan(q, k, v, bias, out):
    return out * float("nan")


def raising(q, k, v, bias, out):
    raise RuntimeError("no memory,\n  say")


def not_implemented(q, k, v, bias, out):
    raise NotImplementedError("no backend runs this")


def measured(tmp_path: Path, providers: str, *options: str) -> tuple[int, list[rows.Row]]:
    """Exit status and rows of `python -m benchmarks run` on the CPU."""
    output = tmp_path / "rows.csv"
    arguments = ["--providers", providers, "--device", "cpu", "--seconds-per-case", "0.01", "--output", str(output)]
    status = main(["run", *arguments, *options])
    return status, rows.read_rows(output)


@pytest.fixture
def register(monkeypatch):
    def put(provider: Provider) -> None:
        monkeypatch.setitem(PROVIDERS, provider.name, provider)

    return put


# ------------------------------------------------------------------ cases


def test_flops_formula():
    case = Case("g", "n", batch=2, heads_q=6, heads_kv=3, seqlen_q=5, seqlen_k=7, head_dim=11)
    forward = 4 * 2 * 6 * 5 * 7 * 11
    assert case.flops("fwd") == forward
    assert case.flops("bwd") == case.flops("bwd_db") == 2.5 * forward
    assert case._replace(causal=True).flops("fwd") == forward / 2
    assert case._replace(causal=True).flops("bwd_db") == 1.25 * forward


def test_bias_shapes_follow_the_pattern():
    case = Case("g", "n", 2, 6, 3, 5, 7, 11)
    shapes = {"none": None, "1hqk": (1, 6, 5, 7), "b11k": (2, 1, 1, 7), "bhqk": (2, 6, 5, 7), "1h1k": (1, 6, 1, 7)}
    for bias, shape in shapes.items():
        assert case._replace(bias=bias).bias_shape == shape
    assert case.passes == ("fwd", "bwd")
    assert case._replace(bias="b11k").passes == ("fwd", "bwd", "bwd_db")


def test_groups_are_as_described():
    expected = {"main": 18, "gqa": 1, "short": 2, "matrix_bias": 2, "vector_bias": 2, "pair": 3, "odd": 5, "cross": 1}
    assert {group: len(cases) for group, cases in GROUPS.items() if group != "smoke"} == expected
    for case in GROUPS["main"]:
        assert (case.batch * case.seqlen_q, case.heads_q * case.head_dim) == (16384, 2048)
    every = [case for cases in GROUPS.values() for case in cases]
    assert len({(case.group, case.name) for case in every}) == len(every)
    for case in every:
        assert case.heads_q % case.heads_kv == 0
        assert not case.causal or case.seqlen_q == case.seqlen_k, f"{case} depends on the alignment of the mask"


def test_inputs_are_standard_normal_and_the_same_each_time():
    case = GROUPS["smoke"][-1]
    first, second = random_inputs(case, CPU), random_inputs(case, CPU)
    for name, one, other in zip(first._fields, first, second, strict=True):
        assert torch.equal(one, other), name
        assert 0.8 < one.float().std() < 1.2, name


# ------------------------------------------------------------------ run


def test_smoke_group(tmp_path, capsys):
    status, results = measured(tmp_path, "ours,sdpa_math")
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert [row["status"] for row in results] == ["ok"] * 2 * SMOKE_PASSES, printed
    cases = {case.name: case for case in GROUPS["smoke"]}
    for row in results:
        assert tuple(row) == rows.COLUMNS
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        case = cases[row["name"]]
        assert float(row["tflops"]) == pytest.approx(case.flops(row["pass"]) / float(row["p50_ms"]) / 1e9, rel=1e-4)
        share = float(row["tflops"]) / float(row["ceiling_tflops"])
        assert float(row["share_of_ceiling"]) == pytest.approx(share, rel=1e-3)
        assert {column: row[column] for column in Case._fields} == {c: str(x) for c, x in case._asdict().items()}
        for column in ("device", "torch", "triton", "cuda", "version", "commit", "date"):
            assert row[column], column
    assert f"/{2 * SMOKE_PASSES}" in printed  # progress
    assert "geometric mean of ours / best other" in printed


def test_match_passes_and_device_only_providers(tmp_path, capsys):
    others = [name for name in PROVIDERS if name not in ("ours", "sdpa_math")]
    status, results = measured(tmp_path, ",".join(others), "--match", "smoke gqa c.*l$", "--passes", "bwd")
    assert status == 0
    assert [(row["name"], row["pass"], row["provider"]) for row in results] == [
        ("gqa causal", "bwd", provider) for provider in others
    ]
    for row in results:
        assert row["status"] == "refused"
        assert "CUDA" in row["reason"]
        assert row["tflops"] == row["p50_ms"] == ""
    printed = capsys.readouterr().out
    assert "flash_attn.cute refused in 1: runs on CUDA devices only" in printed


@pytest.mark.parametrize(
    ("break_", "wrong_passes", "named"),
    [
        (wrong_output, {"fwd", "bwd", "bwd_db"}, {"fwd": "out:", "bwd": "dq:", "bwd_db": "dbias:"}),
        (wrong_dk, {"bwd", "bwd_db"}, {"bwd": "dk:", "bwd_db": "dk:"}),
        (wrong_dbias, {"bwd_db"}, {"bwd_db": "dbias:"}),
        (nan, {"fwd", "bwd", "bwd_db"}, {"fwd": "out:"}),
    ],
)
def test_wrong_results_get_no_time(tmp_path, register, break_, wrong_passes, named):
    register(Broken("broken", break_))
    status, results = measured(tmp_path, "broken", "--match", "1hqk|1h1k")
    assert status == 0  # another provider's mistake
    assert {row["pass"] for row in results} == {"fwd", "bwd", "bwd_db"}
    for row in results:
        assert row["status"] == ("wrong" if row["pass"] in wrong_passes else "ok"), row
        if row["status"] == "wrong":
            assert named.get(row["pass"], "") in row["reason"]
            assert row["p20_ms"] == row["p50_ms"] == row["p80_ms"] == row["tflops"] == row["share_of_ceiling"] == ""


def test_exit_status_when_ours_is_wrong(tmp_path, register, capsys):
    register(Broken("ours", wrong_output))
    status, results = measured(tmp_path, "ours,sdpa_math", "--match", "full", "--passes", "fwd")
    assert status == 1
    assert [row["status"] for row in results] == ["wrong", "ok"]
    assert "ours FAILED in 1" in capsys.readouterr().out


def test_smaller_case_is_checked_where_float64_would_not_fit(tmp_path, register, monkeypatch):
    monkeypatch.setattr("benchmarks.correctness._score_limit", lambda device: 0)
    register(Broken("broken", wrong_dk))
    _, results = measured(tmp_path, "sdpa_math,broken", "--match", "gqa|1hqk", "--passes", "bwd")
    assert len(results) == 6
    for row in results:
        assert row["status"] == {"sdpa_math": "ok", "broken": "wrong"}[row["provider"]]
    by_name = {row["name"]: row["reason"] for row in results if row["provider"] == "sdpa_math"}
    assert by_name["1hqk"] == "results checked on 2 x 32 tokens"


def test_failures_cost_one_row_each(tmp_path, register):
    register(Broken("raising", raising))
    register(Broken("refusing", not_implemented))
    status, results = measured(tmp_path, "raising,refusing,sdpa_math", "--match", "full")
    assert status == 0
    assert [(row["provider"], row["status"], row["reason"]) for row in results] == 2 * [
        ("raising", "error", "RuntimeError: no memory, say"),
        ("refusing", "refused", "no backend runs this"),
        ("sdpa_math", "ok", ""),
    ]


def test_a_killed_run_keeps_its_rows(tmp_path, register):
    calls = []

    def interrupt(q, k, v, bias, out):
        if q.shape[2] == 40:  # the second case
            raise KeyboardInterrupt
        calls.append(out)
        return out

    register(Broken("interrupted", interrupt))
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "interrupted")
    kept = rows.read_rows(tmp_path / "rows.csv")
    assert calls
    assert [(row["name"], row["pass"], row["status"]) for row in kept] == [("full", "fwd", "ok"), ("full", "bwd", "ok")]


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--providers", "ours,theirs"])
    assert "must be among ours,sdpa_flash" in capsys.readouterr().err
    assert main(["run", "--group", "smoke", "--match", "nothing", "--device", "cpu"]) == 2


# ------------------------------------------------------------------ correctness


def sdpa_results(case: Case, pass_name: str, inputs) -> dict[str, Tensor]:
    return PROVIDERS["sdpa_math"].prepare(case, pass_name, inputs).results()


@pytest.mark.parametrize("case", GROUPS["smoke"], ids=lambda case: case.name)
def test_every_batch_element_and_head_of_a_bias_gradient_counts(case):
    if case.bias == "none":
        assert "dbias" not in reference(case, random_inputs(case, CPU)).exact
        return
    inputs = random_inputs(case, CPU)
    expected = reference(case, inputs)
    right = sdpa_results(case, "bwd_db", inputs)["dbias"]
    assert expected.why_wrong({"dbias": right}) is None
    for axis, letter in enumerate(case.bias[:2]):
        if letter == "1":  # leave the first batch element or head out of the sum
            without = inputs.grad_out.clone()
            without.select(0 if axis == 0 else 2, 0).zero_()
            incomplete = sdpa_results(case, "bwd_db", inputs._replace(grad_out=without))["dbias"]
            assert expected.why_wrong({"dbias": incomplete}) is not None


def test_small_values_are_checked_too():
    """Late outputs of a causal case average many keys: an error there hides below the largest values."""
    case = Case("g", "n", 1, 1, 1, 1024, 1024, 64, causal=True)
    inputs = random_inputs(case, CPU)
    out = sdpa_results(case, "fwd", inputs)["out"]
    expected = reference(case, inputs)
    assert expected.why_wrong({"out": out}) is None
    late = out.clone()
    late[:, 768:] *= 0.8
    reason = expected.why_wrong({"out": late})
    assert reason is not None
    assert reason.startswith("out: largest error")


def test_a_wrong_shape_is_wrong():
    case = GROUPS["smoke"][0]
    inputs = random_inputs(case, CPU)
    out = sdpa_results(case, "fwd", inputs)["out"]
    assert "shape" in (reference(case, inputs).why_wrong({"out": out[..., :1]}) or "")


# ------------------------------------------------------------------ providers


def test_sdpa_reports_what_pytorch_answers():
    flash = Sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION)  # on the CPU it takes a bias, but gives it no gradient
    case = next(case for case in GROUPS["smoke"] if case.bias == "bhqk")
    assert flash.refusal(case, "bwd", CPU) is None
    assert "Flash attention kernel not used because" in (flash.refusal(case, "bwd_db", CPU) or "")


def test_a_package_that_is_not_installed_is_named():
    case = GROUPS["main"][0]
    missing = FlashAttention("flash_attn_9", "flash-attn-9")
    assert missing.why_not(case, "fwd", torch.device("cuda")) == "flash_attn_9 is not installed"
    elsewhere = FlashAttention("email", "flash-attn-9")
    assert elsewhere.why_not(case, "fwd", torch.device("cuda")) == "email is installed without flash_attn_func"


# ------------------------------------------------------------------ plot and compare


def row_of(case: Case, pass_name: str, milliseconds: float, **changes: str) -> rows.Row:
    row = dict.fromkeys(rows.COLUMNS, "")
    row |= {column: str(value) for column, value in case._asdict().items()}
    row |= {"provider": "ours", "pass": pass_name, "status": "ok", "device": "Some GPU", "torch": "2.11.0"}
    row |= {"p20_ms": f"{0.9 * milliseconds}", "p50_ms": f"{milliseconds}", "p80_ms": f"{1.2 * milliseconds}"}
    return row | {"tflops": f"{case.flops(pass_name) / milliseconds / 1e9}"} | changes


def write(path: Path, results: list[rows.Row]) -> str:
    lines = [",".join(rows.COLUMNS), *(",".join(row[column] for column in rows.COLUMNS) for row in results)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_plot_writes_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    results = [
        row_of(case, pass_name, 0.5 + number, provider=provider)
        for number, provider in enumerate(("ours", "sdpa_flash", "flex"))
        for case in GROUPS["matrix_bias"]
        for pass_name in case.passes[:2]
    ]
    refused = row_of(GROUPS["gqa"][0], "fwd", 1.0, status="refused", tflops="", p50_ms="")
    assert main(["plot", write(tmp_path / "some.csv", [*results, refused]), "--output", str(tmp_path / "out")]) == 0
    stems = ["some_matrix_bias_bwd", "some_matrix_bias_fwd"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")
    ]
    for stem in stems:
        assert (tmp_path / "out" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / "out" / f"{stem}.svg").read_text()
        for text in ("Some GPU", "torch 2.11.0", "sdpa_flash", GROUPS["matrix_bias"][0].name):
            assert text in svg


def test_compare_geometric_mean_and_worst(tmp_path, capsys):
    first, second, third, fourth = GROUPS["main"][:4]
    old = [row_of(first, "fwd", 8.0), row_of(second, "fwd", 1.0), row_of(third, "bwd", 3.0), row_of(fourth, "fwd", 1.0)]
    new = [row_of(first, "fwd", 1.0), row_of(second, "fwd", 2.0), row_of(third, "bwd", 3.0, status="wrong")]
    comparison = compare.compare(old, new)
    assert list(comparison.ratios.values()) == [8.0, 0.5]
    assert comparison.mean == pytest.approx(2.0)
    assert comparison.worst == f"main {second.name} fwd"
    assert comparison.not_timed == {f"main {third.name} bwd": "ok -> wrong", f"main {fourth.name} fwd": "ok -> absent"}

    arguments = [write(tmp_path / "old.csv", old), write(tmp_path / "new.csv", new)]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "2.000 of 2" in printed
    assert "WARNING" not in printed
    assert main(["compare", *arguments, "--provider", "flex"]) == 2


def test_compare_warns_of_another_device(tmp_path, capsys):
    case = GROUPS["main"][0]
    old = write(tmp_path / "old.csv", [row_of(case, "fwd", 1.0)])
    new = write(tmp_path / "new.csv", [row_of(case, "fwd", 1.0, device="Another GPU")])
    assert main(["compare", old, new]) == 0
    assert "WARNING: the devices differ" in capsys.readouterr().out


def test_a_foreign_csv_is_named(tmp_path):
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"foreign\.csv must be written by .* lacks the columns \['group'"):
        rows.read_rows(foreign)


def test_only_plot_needs_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import benchmarks.run, benchmarks.compare, benchmarks.__main__"
    )
    root = Path(run.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_numerics_by_rows_are_those_of_the_whole_matrix(monkeypatch):
    for case in (case for case in GROUPS["smoke"] if case.name in ("full", "1hqk", "bhqk causal")):
        inputs = random_inputs(case, CPU)
        whole = numerics.by_rows(case, inputs, torch.float64)
        monkeypatch.setattr(numerics, "_SCORES", 7 * case.batch * case.heads_q * case.seqlen_k)
        parts = numerics.by_rows(case, inputs, torch.float64)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor)
        monkeypatch.undo()


def test_numerics_of_every_kind_of_data(tmp_path, capsys):
    output = tmp_path / "numerics.csv"
    assert main(["numerics", "--device", "cpu", "--longest", "64", "--output", str(output)]) == 0
    with open(output, newline="") as file:
        table = list(csv.DictReader(file))
    ours = {(row["data"], row["dtype"], row["bias"], row["result"]): row for row in table if row["provider"] == "ours"}
    for (data, dtype, _, result), row in ours.items():
        finite = float(row["largest_error"]) < math.inf
        assert finite or dtype == "float16", (data, result)  # its logits end at 65,504
    assert {"normal", "equal logits", "v + 100", "half of the bias -inf"} < {key[0] for key in ours}
    assert {"out", "lse", "dq", "dk", "dv", "dbias"} == {key[3] for key in ours}
    assert any(row["provider"] == "sdpa_cudnn" and row["note"] == "runs on CUDA devices only" for row in table)
    assert "data equal logits, seqlen 64" in capsys.readouterr().out


# ------------------------------------------------------------------ features


def test_pairs_of_a_window_are_counted():
    seqlen, window = 9, 3
    seen = sum(1 for query in range(seqlen) for key in range(seqlen) if query - window <= key <= query)
    shape = features.Shape(1, seqlen, 1, 8, True)
    assert shape.pairs(window) == seen
    assert shape.pairs() == seqlen * (seqlen + 1) / 2
    assert shape._replace(causal=False).pairs() == seqlen**2


def test_every_feature_is_measured_against_the_plain_call(tmp_path):
    output = tmp_path / "features.csv"
    assert main(["features", "--device", "cpu", "--seconds-per-case", "0.01", "--output", str(output)]) == 0
    with open(output, newline="") as file:
        found = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["feature"] for row in found))
    assert names[:6] == ["plain", "softcap", "alibi", "sink", "dropout", "packed, equal"]
    assert len(names) == 8
    assert all(row["tflops"] and row["of_plain"] and not row["note"] for row in found)
    assert {row["pass"] for row in found} == {"fwd", "bwd"}


def test_flash_attention_3_is_measured_where_it_is_installed(tmp_path, monkeypatch):
    def flash_attn_varlen_func(*arguments, **keywords):
        return attention_varlen(*arguments, **keywords), None  # as releases do that return the lse

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    output = tmp_path / "features.csv"
    chosen = ["--seconds-per-case", "0.01", "--match", "^packed, 64 to 8192 .* d16 s32 causal$"]
    assert main(["features", "--device", "cpu", "--output", str(output), *chosen]) == 0
    with open(output, newline="") as file:
        found = [(row["feature"], row["provider"], row["pass"]) for row in csv.DictReader(file)]
    expected = [("plain", "ours"), ("packed, 64 to 8192", "ours"), ("packed, 64 to 8192", "flash_attn_interface")]
    assert found == [(*row, name) for row in expected for name in ("fwd", "bwd")]
