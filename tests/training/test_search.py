"""`search`: the frontier it finds, and the choice it makes under a budget."""

import dataclasses
import itertools

import pytest
import torch
from vits import Shape

import t5fx
from t5fx.errors import NothingRewrittenError, TrainingError
from t5fx.training.search import _frontier, _Option

SHAPE = Shape(depth=3, heads=2, head_dim=8, grid=(8, 8))
CANDIDATES = [{"neighborhood": 0, "coarse": 0}, {"neighborhood": 3, "coarse": 4}]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SHAPE.model().eval()


def look(model, **settings):
    data = [SHAPE.images(), SHAPE.images()]
    example = (SHAPE.images(),)
    return t5fx.search(model, example, data=data, candidates=CANDIDATES, **settings)


def test_the_choice_keeps_its_budget_and_its_loss_is_what_the_model_has(model):
    state = {name: p.clone() for name, p in model.state_dict().items()}
    images = [SHAPE.images(), SHAPE.images()]
    example = (SHAPE.images(),)
    result = t5fx.search(model, example, data=images, candidates=CANDIDATES, budget=0.9)
    costs = [p.cost for p in result.points]
    assert costs == sorted(costs)
    chosen = next(p for p in result.points if p.config == result.config)
    assert chosen.cost <= 0.9 * result.softmax
    assert all(p.loss >= chosen.loss for p in result.points if p.cost <= 0.9 * result.softmax)
    lin = t5fx.linearize(model, example, config=result.config).eval()
    sites = t5fx.report(lin).sites
    before = sum(site.flops_before for site in sites)
    spent = sum(s.flops_after if s.status == "rewritten" else s.flops_before for s in sites)
    assert (spent, before) == (chosen.cost, result.softmax)
    with torch.no_grad():
        pairs = [(lin(x), model(x)) for x in images]
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]
    assert chosen.loss == pytest.approx(1 - float(sum(cosines) / 2), abs=1e-5)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert "*" in str(result)


def test_a_wished_loss_is_kept_for_the_least_cost(model):
    result = look(model, loss=1.0)
    assert result.config == result.points[0].config
    kept = look(model, loss=1e-12).config
    with pytest.raises(NothingRewrittenError):
        t5fx.linearize(model, (SHAPE.images(),), config=kept)


def test_frontier_of_random_tables_is_that_of_all_choices():
    """No choice of any is better in both than a point of the frontier is in one."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        numbers = torch.rand(3, 3, 2, generator=generator).tolist()
        options = {
            str(i): {j: _Option(cost, 2.0, loss) for j, (cost, loss) in enumerate(site)}
            for i, site in enumerate(numbers)
        }

        def value(choice, options=options):
            chosen = [options[k][i] if i is not None else None for k, i in choice.items()]
            return sum(o.cost if o else 2.0 for o in chosen), sum(
                o.loss if o else 0 for o in chosen
            )

        every = [
            value(dict(zip(options, choice, strict=True)))
            for choice in itertools.product([None, 0, 1, 2], repeat=3)
        ]
        for choice in _frontier(options, 100):
            cost, loss = value(choice)
            assert not any(c < cost - 1e-9 and e < loss - 1e-9 for c, e in every)


def test_measured_costs(model, monkeypatch):
    from t5fx.analysis.measure import Cost, Spread
    from t5fx.training import search

    asked = []

    def cost(shape, settings, device):
        asked.append((shape, settings["neighborhood"]))
        return Cost(2.0, 0.5 + settings["neighborhood"], Spread(1, 1, 1))

    monkeypatch.setattr(search, "measured_cost", cost)
    result = look(model, budget=0.5, cost="measure")
    assert (result.unit, result.softmax) == ("s", 6.0)
    assert {(shape.batch, shape.tokens, shape.grid) for shape, _ in asked} == {
        (SHAPE.batch, 65, (8, 8))
    }
    assert result.points[0].cost == 1.5


@pytest.mark.extras
def test_aligned_candidates_and_a_picture(model, tmp_path):
    result = look(model, budget=1.0, align=20)
    assert result.points[0].loss < look(model, budget=1.0).points[0].loss
    result.draw(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_wrong_settings(model):
    for wrong, message in (
        ({}, "expected one of budget= .* got neither"),
        ({"budget": 1, "loss": 1}, "got both"),
        ({"budget": 0}, "budget: expected a number above 0"),
        ({"budget": 1e-6}, "budget: expected a share that at least one choice stays within"),
        ({"budget": 1, "cost": "seconds"}, "cost: expected 'flops' or 'measure'"),
    ):
        with pytest.raises(TrainingError, match=message):
            look(model, **wrong)
    with pytest.raises(TrainingError, match="data: expected batches"):
        t5fx.search(model, (SHAPE.images(),), data=[], budget=1)
    none = dataclasses.replace(t5fx.LinearizeConfig(), exclude=("*",))
    with pytest.raises(NothingRewrittenError):
        look(model, budget=1, config=none)
