"""The table of `benchmarks.device`: on a device where there is one, else its parts on the CPU."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks import device
from symhmm.chains.operator import chain_message

pytestmark = pytest.mark.cuda
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = (60, 3, 2)


def reference(length, batch, states):
    """Log-likelihood by the loop over steps, in double precision."""
    matrix, emission = (x.double() for x in device.tensors(length, batch, states))
    message = chain_message(matrix[None], emission, strategy="sequential")
    return (message.logsumexp(-1) - torch.tensor(states).double().log()).sum().item()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a CUDA device")
def test_without_a_device_it_says_what_is_missing(capsys):
    options = device.arguments([])
    device.main(options.seconds, options.device, device.SIZES)
    said = capsys.readouterr().out
    assert said.startswith("torch sees no CUDA device") and said.endswith("nothing was measured\n")


def test_a_table_of_one_size(capsys, monkeypatch):
    others = {"one": {"times": [40.0, 20.0, 30.0], "value": -1.5}, "another": {"left": "not installed: another"}}
    monkeypatch.setattr(device, "peers", lambda *_: others)
    device.main(0.0, DEVICE, [SIZE])
    head, _, title, _, mine, *rest = capsys.readouterr().out.splitlines()
    assert "GB/s" in head and title.startswith("T = 60, B = 3, K = 2: ")
    name, ratio, median, least, share, value = mine.split()
    assert name == "symhmm" and float(ratio) == 1 and float(median) >= float(least) > 0 and share.endswith("%")
    assert_close(float(value), reference(*SIZE), rtol=1e-4, atol=1e-2)
    one, another = rest[-2].split(), rest[-1].split()
    assert one[2:] == ["30.000", "20.000", "-1.50"]
    assert_close(float(one[1]) * float(median), 30.0, rtol=0.05, atol=0)
    assert another == ["another", "-", "not", "installed:", "another"]


def test_others_find_the_same_or_say_why_not():
    found = device.peers(SIZE, 0.0, DEVICE)
    assert list(found) == list(device.PEERS)
    for other in found.values():
        if "left" in other:
            assert other["left"].startswith(("not installed: ", "JAX sees no GPU"))
        else:
            assert min(other["times"]) > 0
            assert_close(other["value"], reference(*SIZE), rtol=1e-3, atol=1e-1)


def test_bytes_are_counted():
    # Read twice and written once: emission terms, their gradients; written and read: messages.
    assert device.traffic(500, 100, 16) == 5 * 4 * 500 * 100 * 16
    # 32 blocks of 32 steps: read once more, and 32 products in float64 written, read, shifted, written, as float32 written,
    # read twice and their gradients written.
    assert device.traffic(1000, 1, 5) == 6 * 4 * 1000 * 5 + 32 * 25 * (4 * 8 + 4 * 4)


def test_the_copy_is_timed():
    assert 1e8 < device.bandwidth(DEVICE, 2**22) < 1e14
