import threading

import torch

from quanttune.quant import ScratchPool


def test_the_buffer_is_reused_and_grows():
    pool = ScratchPool()
    first = pool.get((4, 8), torch.float32)
    again = pool.get((2, 2), torch.float32)
    assert again.data_ptr() == first.data_ptr() and again.is_contiguous()
    assert pool.nbytes() == 4 * 8 * 4
    assert tuple(pool.get((100,), torch.float32).shape) == (100,)
    assert pool.nbytes() == 400


def test_kinds_do_not_share():
    pool = ScratchPool()
    single, half = pool.get((8,), torch.float32), pool.get((8,), torch.bfloat16)
    assert single.data_ptr() != half.data_ptr()
    single.fill_(1)
    half.fill_(2)
    assert (single == 1).all()


def test_threads_do_not_share():
    pool = ScratchPool()
    mine = pool.get((8,), torch.float32)
    other = []
    thread = threading.Thread(target=lambda: other.append(pool.get((8,), torch.float32)))
    thread.start()
    thread.join()
    assert other[0].data_ptr() != mine.data_ptr()


def test_a_buffer_made_in_inference_mode_works_outside():
    pool = ScratchPool()
    with torch.inference_mode():
        pool.get((8,), torch.float32).fill_(1)
    pool.get((8,), torch.float32).fill_(2)


def test_clear():
    pool = ScratchPool()
    pool.get((8,), torch.float32)
    pool.clear()
    assert pool.nbytes() == 0
