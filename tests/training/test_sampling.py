"""What a step draws depends on the seed and the step alone, and covers what it should."""

from collections import Counter

import pytest
import torch

from quanttune.training.sampling import ExampleOrder, TimestepSampler, edges_of, generator_of


def test_keys_give_independent_and_repeatable_draws():
    def draw(*key):
        return torch.randn(4, generator=generator_of(*key))

    assert torch.equal(draw(1, "noise", 2), draw(1, "noise", 2))
    assert not torch.equal(draw(1, "noise", 2), draw(1, "noise", 3))
    assert not torch.equal(draw(1, "noise", 2), draw(1, "order", 2))


def test_each_epoch_shows_every_example_once():
    order = ExampleOrder([[0, 1, 2, 3], [4, 5]], 2, seed=3)
    for epoch in range(3):
        seen = Counter(i for n in range(3) for i in order.batch(3 * epoch + n))
        assert seen == Counter(range(6))
    batches = [order.batch(n) for n in range(12)]
    assert all(set(b) <= {0, 1, 2, 3} or set(b) <= {4, 5} for b in batches), "shapes never mix"
    assert [order.batch(n) for n in range(12)] == batches
    assert len({tuple(b) for b in batches}) > 3, "epochs differ"


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_a_batch_is_always_full(size):
    order = ExampleOrder([[0, 1, 2, 3, 4]], size, seed=0)
    assert all(len(order.batch(n)) == size for n in range(9))


def sampler(**changes):
    settings = {"num_experts": 4, "num_timesteps": 1000, "span": (0.0, 1.0), "stratified": True,
                "seed": 0, **changes}
    return TimestepSampler(**settings)


def test_stratified_steps_visit_all_experts_in_turn():
    s = sampler()
    assert Counter(s.expert(i) for i in range(40)) == {0: 10, 1: 10, 2: 10, 3: 10}
    for step in range(20):
        t = s.timesteps(step, 3)
        assert (t.mul(4 / 1000).floor() == s.expert(step)).all()


def test_a_step_of_enough_samples_trains_all_experts():
    s = sampler()
    for step in range(8):
        assert s.expert(step, 3) is not None and s.expert(step, 4) is None
        experts = s.timesteps(step, 8).mul(4 / 1000).floor().long().tolist()
        assert Counter(experts) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert sampler(num_experts=1).expert(0, 8) == 0


def test_stratified_timesteps_are_spread_over_the_interval():
    t = sampler(num_experts=1).timesteps(3, 50).sort().values
    assert (t.div(20).floor() == torch.arange(50)).all()


@pytest.mark.parametrize("stratified", [True, False])
def test_a_focus_is_kept_to(stratified):
    s = sampler(span=(0.5, 0.9), stratified=stratified)
    t = torch.cat([s.timesteps(i, 4) for i in range(50)])
    assert t.min() >= 500 and t.max() <= 900
    assert s.active == [2, 3]
    if stratified:
        turns = Counter(s.expert(i) for i in range(32))
        assert turns == {2: 20, 3: 12}, "0.25 and 0.15 of the timesteps"


@pytest.mark.parametrize("count", [1, 4])
def test_a_focus_is_drawn_from_evenly_whatever_the_batch(count):
    s = sampler(num_experts=2, span=(0.4, 1.0))
    t = torch.cat([s.timesteps(i, count) for i in range(960 // count)])
    assert float((t < 500).float().mean()) == pytest.approx(1 / 6, abs=0.03)


def test_edges_follow_what_the_model_is_given():
    """A flow model's shift: half of the noise levels lie above the middle of its timesteps."""
    def shifted(t):
        share = t / 1000
        return 3 * share / (1 + 2 * share)

    assert edges_of(lambda t: t / 1000, 4, 1000) == ()
    assert edges_of(lambda t: t.floor() / 1000, 3, 1000) == pytest.approx((0, 0.334, 0.667, 1))
    edges = edges_of(shifted, 2, 1000)
    assert edges == pytest.approx((0, 0.25, 1), abs=1e-6)
    thirds = sampler(num_experts=3, edges=(0, 0.334, 0.667, 1))
    assert Counter(thirds.expert(i) for i in range(9)) == {0: 3, 1: 3, 2: 3}
    s = sampler(num_experts=2, edges=edges)
    for i in range(64):
        routed = shifted(s.timesteps(i, 1).double())
        assert int((routed * 2).floor()) == s.expert(i)
    assert Counter(s.expert(i) for i in range(32)) == {0: 8, 1: 24}


def test_the_shared_stage_draws_from_the_whole_span():
    t = torch.cat([sampler().timesteps(i, 8, shared=True) for i in range(20)])
    assert set(t.mul(4 / 1000).floor().tolist()) == {0, 1, 2, 3}


def test_the_last_timestep_is_below_T():
    assert all(sampler(num_timesteps=t).timesteps(i, 100).max() < t
               for t in (1, 1000) for i in range(20))
