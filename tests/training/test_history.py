"""The losses of a run, read back."""

import pytest

from quanttune.quant import QuantTuneError
from quanttune.training.history import FILE, LossFile, StepRecord, read_losses

STEPS = [StepRecord(1, 0.5, 1e-3, -1, 2.0), StepRecord(2, 0.25, 1e-3, 0, 1.0)]


def test_what_was_written_is_read(tmp_path):
    LossFile(tmp_path, STEPS)
    assert read_losses(tmp_path) == STEPS


@pytest.mark.parametrize("text", [
    b"step,loss\n1,0.5\n", b"step,loss,rate,expert,gradient_norm\n1,x,0,0,0\n", b"\xff\xfe\0",
    b"step,loss,rate,expert,gradient_norm\n1,0.5\n", b'step,loss,rate,expert,gradient_norm\n"1,0.5',
    b"step,loss,rate,expert,gradient_norm\n" + b"9" * 5000 + b",0,0,0,0\n"])
def test_a_damaged_file(text, tmp_path):
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(QuantTuneError, match="loss.csv are damaged"):
        read_losses(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(QuantTuneError, match="cannot be read"):
        read_losses(tmp_path)
