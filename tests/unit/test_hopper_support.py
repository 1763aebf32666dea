"""What does the Hopper backend refuse, and does it say everything that is wrong?"""

import pytest
import torch

from triton_attention.hopper import support
from triton_attention.problem import Bias, Mask, Problem

PROBLEM = Problem(
    batch=2,
    heads_q=4,
    heads_kv=2,
    seqlen_q=35,
    seqlen_k=40,
    head_dim=64,
    head_dim_v=64,
    dtype=torch.bfloat16,
    device=torch.device("cuda", 0),
    mask=Mask(),
    softmax_scale=0.125,
    softcap=0.0,
    bias=None,
    alibi=False,
    sink=False,
    dropout_p=0.0,
    deterministic=False,
    needs_grad=False,
    aligned=True,
)


class H100:  # classes, since Dynamo takes them for constants
    name, major, minor = "NVIDIA H100 80GB HBM3", 9, 0


class A100:
    name, major, minor = "NVIDIA A100-SXM4-80GB", 8, 0


class B200:
    name, major, minor = "NVIDIA B200", 10, 0


@pytest.fixture
def use_gpu(monkeypatch):
    def use(gpu):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

    monkeypatch.setattr(torch.version, "hip", None)
    use(H100)
    return use


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": torch.float16},
        {"head_dim": 8, "head_dim_v": 256},
        {"head_dim": 40, "head_dim_v": 88},
        {"seqlen_q": 1, "seqlen_k": 1},
        {"mask": Mask(5, 0, top_left=True)},
        {"softmax_scale": -1.0},
        {"bias": Bias((True, False, False, False), torch.float32, needs_grad=True)},
        {"bias": Bias((False, True, True, False), torch.bool, needs_grad=False)},
        {"deterministic": True, "needs_grad": True},
        {"sink": True, "needs_grad": True},
        {"softcap": 30.0},
        {"varlen": True, "bias": Bias((False, False, False, False), torch.bfloat16, needs_grad=False)},
        {"dropout_p": 0.1, "needs_grad": True},
        {"alibi": True, "needs_grad": True},
    ],
    ids=str,
)
def test_runs(use_gpu, fields):
    assert support.why_not(PROBLEM._replace(**fields)) == []


REASONS = [
    ({"dtype": torch.float32}, "computes in float16 and bfloat16, and the tensors are torch.float32"),
    ({"dtype": torch.float64}, "computes in float16 and bfloat16, and the tensors are torch.float64"),
    ({"head_dim": 59}, "takes head dims from 8 to 256 that are multiples of 8, and they are 59 and 64"),
    ({"head_dim_v": 4}, "takes head dims from 8 to 256 that are multiples of 8, and they are 64 and 4"),
    (
        {"aligned": False},
        "reads tiles whose rows start at multiples of 16 bytes, and in q, k, v or the bias some do not; contiguous "
        "tensors with a row length that is a multiple of 8 do",
    ),
]


@pytest.mark.parametrize(("fields", "reason"), REASONS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_reason(use_gpu, fields, reason):
    assert support.why_not(PROBLEM._replace(**fields)) == [reason]


def test_every_reason_at_once(use_gpu):
    use_gpu(A100)
    fields = {}
    for wrong, _ in REASONS:
        fields |= wrong
    reasons = support.why_not(PROBLEM._replace(**fields))
    assert len(reasons) == len(REASONS) - 1  # one for both dtypes and one for both head dims, and one for the GPU


@pytest.mark.parametrize(
    ("gpu", "words"), [(A100, "NVIDIA A100-SXM4-80GB has 8.0"), (B200, "NVIDIA B200 has 10.0")], ids=["older", "newer"]
)
def test_another_gpu_is_named(use_gpu, gpu, words):
    use_gpu(gpu)
    assert support.why_not(PROBLEM) == [f"runs on NVIDIA GPUs of compute capability 9.0, and {words}"]


def test_amd_gpus_are_cuda_devices_to_pytorch(use_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert support.why_not(PROBLEM) == [
        "runs on NVIDIA GPUs of compute capability 9.0, and this PyTorch is for AMD GPUs"
    ]


@pytest.mark.parametrize("device", ["cpu", "meta", "xpu"])
def test_only_cuda_is_asked_for_its_properties(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: pytest.fail("CUDA was initialised"))
    assert support.why_not(PROBLEM._replace(device=torch.device(device))) == [
        f"runs on NVIDIA GPUs of compute capability 9.0, and the tensors are on {device}"
    ]


def test_without_triton(use_gpu, monkeypatch):
    monkeypatch.setattr(support, "_TRITON_IS_INSTALLED", False)
    assert support.why_not(PROBLEM) == ["triton is not installed"]


@pytest.mark.parametrize("gpu", [H100, A100], ids=["H100", "A100"])
def test_traced_without_a_graph_break(use_gpu, gpu):
    use_gpu(gpu)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + len(support.why_not(PROBLEM)), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == (0 if gpu is H100 else 1)
    torch._dynamo.reset()
