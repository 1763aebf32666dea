"""Does the fuzzer try what it says, and does it find a bug, make it small and tell how to see it again?"""

import math
import shlex
import threading
import time
from multiprocessing import active_children

import pytest
import torch

from triton_attention import dispatch, reference
from triton_attention.dispatch import Backend
from triton_attention.testing import fuzz
from triton_attention.testing.guards import GUARD_BYTES, POISON, GuardedMemory
from triton_attention.testing.trials import BOUNDARIES, TRIALS_OF_A_KIND, Lengths, draw, make

SMALL = ["--device", "cpu", "--largest-scores", "5000", "--each", "2"]
TRIALS = [draw(kind * TRIALS_OF_A_KIND + index, 5000) for kind in range(300) for index in range(2)]


def test_the_reference_is_right_on_random_problems(capsys):
    assert fuzz.main(["--backend", "reference", "--problems", "60", *SMALL]) == 0
    assert "60 right, 0 wrong, 0 refused" in capsys.readouterr().out


def plant(monkeypatch, run):
    """A backend "broken" that computes `run`."""
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, Backend("broken", lambda problem: [], run)))


def loses_a_key(inputs, problem):
    """The 21st key is not seen, where there is one."""
    if problem.seqlen_k <= 20:
        return reference.attention(inputs, problem)
    bias = torch.ones(1, 1, 1, problem.seqlen_k, dtype=torch.bool)
    bias[..., 20] = False
    if inputs.bias is not None:
        bias = inputs.bias.double().masked_fill(~bias, -math.inf)
    return reference.attention(inputs._replace(bias=bias), problem)


def wrong_gradient(inputs, problem):
    """dv is 10% too large."""
    v = inputs.v
    return reference.attention(inputs._replace(v=1.1 * v - 0.1 * v.detach()), problem)


def writes_outside(inputs, problem):
    out, lse = reference.attention(inputs, problem)
    scratch = out.new_empty(7)
    scratch.as_strided((1,), (1,), scratch.storage_offset() + 7).zero_()
    return out, lse


def reads_outside(inputs, problem):
    """The number before the keys."""
    k = inputs.k
    outside = k.detach().as_strided((1,), (1,), k.storage_offset() - 1).float()
    out, lse = reference.attention(inputs, problem)
    return out + outside.to(out.dtype), lse


def writes_an_input(inputs, problem):
    inputs.q.detach()[..., 0] = 0
    return reference.attention(inputs, problem)


def leaves_a_row(inputs, problem):
    out, lse = reference.attention(inputs, problem)
    result = out.new_empty(out.shape)
    result[:, :-1].copy_(out[:, :-1])
    return result, lse


def raises(inputs, problem):
    raise ZeroDivisionError("of\nsome kind")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (wrong_gradient, "dv: error"),
        (leaves_a_row, "out: error nan"),
        (reads_outside, "out: error nan"),
        (writes_outside, "memory around an output was written"),
        (writes_an_input, "an input, or memory around it, was written"),
        (raises, "ZeroDivisionError: of some kind"),
    ],
)
def test_bugs_are_found_told_in_a_line_and_made_small(monkeypatch, capsys, run, reason):
    plant(monkeypatch, run)
    assert fuzz.main(["--backend", "broken", "--problems", "1", *SMALL]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED "))
    assert reason in line
    assert "--sizes" in line


def test_the_line_shows_the_smallest_failure_again(monkeypatch, capsys):
    plant(monkeypatch, loses_a_key)
    assert fuzz.main(["--backend", "broken", "--problems", "40", *SMALL]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED ")]
    lengths = []
    for line in lines:
        command, _ = line.removeprefix("FAILED python -m triton_attention.testing.fuzz ").split("  # ")
        arguments = shlex.split(command)
        lengths.append(fuzz._sizes(arguments[arguments.index("--sizes") + 1])["seqlen_k"])
        assert fuzz.main([*arguments, "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert min(lengths) == sorted(lengths)[len(lengths) // 2] == 21  # other data may hide the bug from the last step
    assert len(lines) >= 5


def begins_early(inputs, problem):
    """Packed sequences of keys begin with the last key of the one before."""
    if problem.varlen:
        starts = inputs.cu_seqlens_k.clone()
        starts[1:-1] -= (starts[1:-1] > 0).int()
        inputs = inputs._replace(cu_seqlens_k=starts)
    return reference.attention(inputs, problem)


def test_what_one_sequence_sees_of_another_is_found(monkeypatch, capsys):
    plant(monkeypatch, begins_early)
    assert fuzz.main(["--backend", "broken", "--seed", "18000", "--problems", "36", *SMALL]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED ")]
    seeds = [int(line.split("--seed ")[1].split()[0]) for line in lines]
    assert len(seeds) >= 3
    assert all(draw(seed).packed for seed in seeds)


def test_one_problem_that_is_refused(capsys):
    assert fuzz.main(["--backend", "portable", "--device", "cpu", "--seed", "5"]) == 2
    assert "runs on CUDA and ROCm GPUs" in capsys.readouterr().out


def test_several_processes(capsys):
    """They share the kinds; their counts are added up."""
    assert fuzz.main(["--backend", "reference", "--problems", "12", "-n", "2", *SMALL]) == 0
    assert "right, 0 wrong, 0 refused" in capsys.readouterr().out


def test_a_process_that_dies_is_told_with_its_problem(capsys):
    """A kernel that writes elsewhere, or never ends, takes its process along."""

    def kill_one():
        while not any(child.is_alive() for child in active_children()):
            time.sleep(0.01)
        time.sleep(5)  # PyTorch loads
        active_children()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert fuzz.main(["--backend", "reference", "--seconds", "12", "-n", "2", *SMALL]) == 1
    killer.join()
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("FAILED ")]
    assert line.endswith("# the process ended with -9")
    assert "--seed " in line


def test_a_seed_is_one_problem():
    assert draw(12345) == draw(12345)
    one, two = make(draw(12345, 5000), "cpu"), make(draw(12345, 5000), "cpu")
    assert one.problem == two.problem
    assert all(map(torch.equal, one.buffers, two.buffers))


def all_shorter(trial):
    """Whether max_seqlen_q is more than the longest length."""
    return all(seqlen_q < trial.sizes.seqlen_q for seqlen_q, _ in Lengths.of(trial).of_each)


@pytest.mark.parametrize(
    "is_there",
    {
        "one key": lambda trial: trial.sizes.seqlen_k == 1,
        "many batch entries": lambda trial: trial.sizes.batch >= 40,
        "shared key heads": lambda trial: trial.sizes.group > 1 and trial.sizes.heads_kv > 1,
        "head dims that differ": lambda trial: trial.head_dim != trial.head_dim_v,
        "odd head dim": lambda trial: trial.head_dim % 8 != 0,
        "causal": lambda trial: trial.mask[:2] == (None, 0),
        "window": lambda trial: None not in trial.mask[:2],
        "top left": lambda trial: trial.mask.right is not None and trial.mask.top_left,
        "tiny": lambda trial: min(trial.magnitudes[:3]) < 1e-3,
        "huge": lambda trial: max(trial.magnitudes[:3]) > 1e3,
        "bool bias": lambda trial: trial.bias and trial.bias_dtype == torch.bool,
        "bias with -inf": lambda trial: trial.bias and trial.bias_dtype != torch.bool and trial.hidden,
        "huge bias": lambda trial: trial.bias and trial.magnitudes[3] > 1e3,
        "rows that are not aligned": lambda trial: trial.layouts[1].residue,
        "start that is not aligned": lambda trial: trial.layouts[1].start % trial.layouts[1].multiple,
        "space between rows": lambda trial: trial.layouts[2].extra,
        "heads outside of rows": lambda trial: trial.layouts[0].order == (0, 2, 1, 3),
        "expanded": lambda trial: trial.layouts[0].expanded,
        "last stride": lambda trial: trial.layouts[0].order[3] != 3,
        "zero scale": lambda trial: trial.softmax_scale == 0.0,
        "negative scale": lambda trial: trial.softmax_scale is not None and trial.softmax_scale < 0,
        "softcap": lambda trial: trial.softcap,
        "dropout": lambda trial: trial.dropout_p,
        "alibi": lambda trial: trial.alibi,
        "sink": lambda trial: trial.sink,
        "packed": lambda trial: trial.packed,
        "packed, empty": lambda trial: trial.packed and any(0 in pair for pair in Lengths.of(trial).of_each),
        "packed, one row": lambda trial: trial.packed and any(1 in pair for pair in Lengths.of(trial).of_each),
        "packed, all shorter": lambda trial: trial.packed and all_shorter(trial),
        "packed, rows that none has": lambda trial: trial.packed and any(Lengths.of(trial).unused),
        "packed, bias": lambda trial: trial.packed and trial.bias_needs_grad,
        "packed, dropout": lambda trial: trial.packed and trial.dropout_p,
    }.items(),
    ids=lambda item: item[0],
)
def test_every_feature_is_drawn(is_there):
    _, condition = is_there
    assert any(map(condition, TRIALS))


def test_inputs_lie_where_the_layout_says():
    for trial in TRIALS[:100]:
        inputs, problem, buffers = make(trial, "cpu")
        tensors = [tensor for tensor in inputs[:4] if tensor is not None]
        layouts = list(trial.layouts[: len(tensors)])
        if trial.packed:  # boundaries follow v, and q, k and v have no axis batch
            tensors[:3] = *(tensor[None] for tensor in tensors[:3]), *(x[None, None, None] for x in inputs[6:])
            layouts[3:3] = [BOUNDARIES] * 2
        for tensor, buffer, layout in zip(tensors, buffers, layouts, strict=True):
            assert tensor.untyped_storage().data_ptr() == buffer.data_ptr()
            start = tensor.storage_offset() * tensor.element_size()
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (last + 1) * tensor.element_size()
            assert start >= GUARD_BYTES
            assert buffer.numel() - end >= GUARD_BYTES
            assert all(tensor.stride(axis) == 0 or tensor.shape[axis] == 1 for axis in layout.expanded)
            assert (buffer[end:] == POISON).all()
        even = not any(layout.residue or layout.start % layout.multiple for layout in trial.layouts)
        if even and all(layout.order[3] == 3 for layout in trial.layouts):
            assert problem.aligned


def test_variants_do_not_depend_on_sizes():
    """Problems of a kind agree in everything that is compiled for."""
    for kind in range(50):
        trials = [draw(kind * TRIALS_OF_A_KIND + index, 5000) for index in range(5)]
        same = [
            (
                trial.dtype,
                trial.head_dim,
                trial.head_dim_v,
                trial.bias,
                trial.bias_dtype,
                trial.bias_needs_grad,
                trial.packed,
                trial.mask.left is None,
                trial.mask.right is None,
                *((layout.residue == 0, layout.start % layout.multiple == 0) for layout in trial.layouts),
            )
            for trial in trials
        ]
        assert len(set(same)) == 1


def test_guarded_memory_is_put_back():
    before = torch.empty, torch.zeros, torch.Tensor.new_empty
    with GuardedMemory() as memory:
        assert torch.empty(3, dtype=torch.float16).isnan().all()
        assert torch.empty((2, 3)).new_empty(4, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == -1).all()
        assert torch.equal(torch.zeros(2, 3), torch.tensor([[0.0] * 3] * 2))
        assert memory.intact()
    assert before == (torch.empty, torch.zeros, torch.Tensor.new_empty)
