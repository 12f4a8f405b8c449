"""Forwards that are taken up where a change begins: the same outputs, fewer layers run."""

import pytest
import torch

from quanttune.tests.host import models


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def small_model():
    """Not held by dynamic loading, which would compute with other weights than the module's."""
    from quanttune.host.build import resident

    return resident(models.small_model())


def replay_of(model):
    from quanttune.host.observe import ForwardRecord
    from quanttune.host.replay import Replay

    record = ForwardRecord()
    arguments = models.inputs(model)
    with record.recording(model.model.diffusion_model):
        for _ in range(2):
            models.forward(model, arguments)
    return Replay(record, model)


def changed(module):
    """A context in which the module's weight is another one."""
    from contextlib import contextmanager

    @contextmanager
    def swap():
        weight = module._parameters["weight"]
        module._parameters["weight"] = torch.nn.Parameter(weight * 1.5, requires_grad=False)
        try:
            yield
        finally:
            module._parameters["weight"] = weight

    return swap()


def test_every_layer_gives_what_the_whole_forward_gives():
    from quanttune.host.quantize import quantizable_layers

    model = small_model()
    replay = replay_of(model)
    assert replay.kept == 2
    layers = quantizable_layers(model.model)
    unet = model.model.diffusion_model
    moved = 0
    for name in layers:
        with changed(unet.get_submodule(name)):
            whole = replay.record.again(1, model, replay.options)
            assert torch.equal(replay.again(1, [name]), whole), name
        moved += not torch.equal(whole, replay.record.calls[1][2].to(whole))
    assert moved > len(layers) // 2, "changes that nothing shows would prove nothing"
    assert not any("forward" in m.__dict__ for m in unet.modules())


def test_blocks_before_the_change_do_not_run():
    model = small_model()
    replay = replay_of(model)
    unet = model.model.diffusion_model
    ran = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "input_blocks.0.0":
            module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    replay.again(0, ["out.2"])
    assert ran == ["out.2"]
    ran.clear()
    replay.again(0, ["input_blocks.0.0"])
    assert len(ran) > 5


def test_several_layers_begin_at_the_first_and_unknown_ones_at_the_start():
    model = small_model()
    replay = replay_of(model)
    places = [replay._first(0, names) for names in (["out.2"], ["out.2", "middle_block.1.proj_in"],
                                                    ["middle_block.1.proj_in"], ["nowhere"])]
    assert places[0] > places[1] == places[2] > places[3] == 0


def test_a_layer_that_is_reached_in_another_way_counts_from_the_start():
    """Block a is used without being called: nobody knows when, so that nothing can be skipped."""
    from quanttune.host import replay as module

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, **_):
            return self.c(self.b(torch.nn.functional.linear(x, self.a.weight)))

    replay, unet = replay_of(small_model()), Around()
    replay.record.again = lambda index, patcher, options: unet(torch.ones(2, 4))
    replay.blocks = module.blocks_of(unet)
    replay._known = [replay._watch(0)]
    assert replay._first(0, ["c"]) == 1
    assert replay._first(0, ["a", "c"]) == replay._first(0, ["a"]) == 0


def test_too_little_memory_in_the_middle(monkeypatch):
    from quanttune.host.replay import Replay

    def fails(self, index):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Replay, "_watch", fails)
    assert replay_of(small_model()).kept == 0


def test_a_model_that_writes_into_earlier_outputs_runs_whole():
    """Block b writes into what block a gave, which the end reads again."""
    from quanttune.host import replay as module

    class Writing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(4, 4) for _ in range(3))
            self.adds = _AddsInPlace(self.b)
            del self.b

        def forward(self, x, **_):
            first = self.a(x)
            second = self.adds(first)
            return self.c(second) + first

    model = small_model()
    replay = replay_of(model)
    unet = Writing()
    replay.record.again = lambda index, patcher, options: unet(torch.ones(2, 4))
    replay.blocks = module.blocks_of(unet)
    replay._known = [replay._watch(0)]
    assert not replay._exact()
    unet.adds.in_place = False
    replay._known = [replay._watch(0)]
    assert replay._exact()


class _AddsInPlace(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_place = inner, True

    def forward(self, x):
        y = self.inner(x)
        if self.in_place:
            x.add_(1.0)
        return y


def test_without_memory_forwards_run_whole(monkeypatch):
    from quanttune.host import replay as module

    monkeypatch.setattr(module, "SHARE", 0.0)
    model = small_model()
    replay = replay_of(model)
    assert replay.kept == 0
    assert torch.equal(replay.again(0, ["out.2"]), replay.record.again(0, model, replay.options))
