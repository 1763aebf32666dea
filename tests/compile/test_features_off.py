"""Does a feature that is off cost nothing? The plain kernels have no argument for it, and none of its code."""

import re

import pytest
import torch

from triton_attention.kernel import compile_launch
from triton_attention.testing.cases import CAUSAL, LENGTHS, Case
from triton_attention.testing.fake_device import TARGETS, launches

SM_90 = TARGETS["sm_90"]
PLAIN = Case(300, 304, 64, mask=CAUSAL, dtype=torch.bfloat16)
FEATURES = {  # a case, and the field of the forward's Spec that it sets
    "softcap": (PLAIN._replace(softcap=30.0), "SOFTCAP"),
    "alibi": (PLAIN._replace(alibi="h"), "ALIBI"),
    "sink": (PLAIN._replace(sink=True), "SINK"),
    "dropout": (PLAIN._replace(dropout_p=0.1), "DROPOUT"),
    "packed": (PLAIN._replace(seqlen_q=50, seqlen_k=61, lengths=LENGTHS), "VARLEN"),
}
PHILOX = re.compile(r"-766435501|3528531795")  # its first multiplier, as PTX may write it


def arguments_of(launch):
    """The types of what a kernel is given, one for each number, pointer or descriptor."""

    def leaves(kind):
        return (
            [leaf for part in kind for leaf in leaves(part)] if isinstance(kind, tuple) else [kind] * (kind is not None)
        )

    return [leaf for argument in launch.arguments for leaf in leaves(argument.type)]


@pytest.mark.parametrize("backend", ["portable", "hopper"])
@pytest.mark.parametrize(("case", "field"), FEATURES.values(), ids=FEATURES)
def test_the_plain_kernels_have_no_argument_for_it(backend, case, field):
    plain, with_it = (launches(each, SM_90, backend)[0] for each in (PLAIN, case))
    assert not getattr(plain.spec, field)
    assert getattr(with_it.spec, field)
    assert len(arguments_of(plain)) < len(arguments_of(with_it))


@pytest.mark.parametrize("backend", ["portable", "hopper"])
def test_the_plain_kernels_have_no_code_of_dropout(backend):
    """The feature that has most of it."""
    for launch in launches(PLAIN, SM_90, backend):
        assert not PHILOX.search(compile_launch(launch, SM_90).asm["ptx"])
    dropped, _ = FEATURES["dropout"]
    assert PHILOX.search(compile_launch(launches(dropped, SM_90, backend)[0], SM_90).asm["ptx"])
