"""Does `make sanitize-gpu` count hazards rightly, and apart those of Triton's hand-overs to partitions?"""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "gpu/sanitize.py"
SPEC = importlib.util.spec_from_file_location("sanitize", PATH)
sanitize = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sanitize)

FORWARD = (sanitize.KERNELS / "forward.py").read_text().split("\n")
HEAD = FORWARD.index("def attention_fwd(") + 1
IF = FORWARD.index("    elif TILE.CONSUMERS == 2:", HEAD) + 1  # what Triton takes for the line of the calls
CALL = FORWARD.index("        gl.warp_specialize(", HEAD) + 1
CONSUME = next(line for line, text in enumerate(FORWARD, 1) if text.startswith("def consume("))

HAZARD = """========= Error: Race reported between Read access at attention_fwd+0x1a0 in forward.py:{}
=========     and Write access at attention_fwd+0x18ff0 in forward.py:{} [24 hazards]
=========     and Write access at attention_fwd+0x1fc70 in {} [24 hazards]
=========
"""
SUMMARY = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)\n"


@pytest.mark.parametrize("line", [HEAD, IF, CALL])
def test_hand_overs_are_counted_apart(line):
    output = HAZARD.format(HEAD, HEAD, f"/src/triton_attention/hopper/forward.py:{line}") * 2 + SUMMARY.format(2, 2, 0)
    assert (sanitize.count_summaries(output), sanitize.count_hand_overs(output)) == (0, 2)


def test_what_warpgroups_hand_each_other_is_counted_apart():
    dropout = (sanitize.KERNELS / "dropout.py").read_text().split("\n")
    store, load = (next(n for n, text in enumerate(dropout, 1) if word in text) for word in (").store(", ").load("))
    output = HAZARD.replace("forward.py", "dropout.py").format(load, store, f"dropout.py:{store}")
    assert sanitize.count_hand_overs(output + SUMMARY.format(1, 1, 0)) == 1


@pytest.mark.parametrize("place", [f"forward.py:{CONSUME}", f"channel.py:{HEAD}", "<unknown>"])
def test_another_hazard_is_an_error(place):
    output = HAZARD.format(HEAD, HEAD, f"forward.py:{IF}") + HAZARD.format(HEAD, IF, place) + SUMMARY.format(2, 2, 0)
    assert (sanitize.count_summaries(output), sanitize.count_hand_overs(output)) == (1, 1)


def test_what_is_not_shown_is_an_error():
    output = HAZARD.format(HEAD, HEAD, f"forward.py:{IF}") + SUMMARY.format(1, 7, 2)
    assert sanitize.count_summaries(output) == 8


def test_other_tools():
    assert sanitize.count_summaries("========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitize.count_summaries("========= ERROR SUMMARY: 1 error\n") == 1
    assert sanitize.count_summaries("all ran") is None
