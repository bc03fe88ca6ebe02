"""Report, configuration and the cost model."""

import json

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from vits import Shape

import t5fx
from t5fx.errors import ConfigError


def test_report_table_and_data():
    shape = Shape(depth=2)
    config = t5fx.LinearizeConfig(min_tokens=0, exclude=("blocks.1.*",))
    report = t5fx.explain(shape.model(), (shape.images(),), config=config)
    text = str(report)
    for part in ("blocks.0.attn", "1 + 3x4 + 0", "2 x 8", "skipped: excluded", "trainable params:"):
        assert part in text
    assert "1 of 2 attention sites rewritten" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["sites"][1]["reason"] == "excluded"
    assert report.counts() == {"excluded": 1}


def test_flops_and_break_even():
    """Softmax has 4 N^2 D, the node 18 N D^2: they meet at N = 4.5 D."""
    plain = t5fx.LinearizeConfig(neighborhood=0, coarse=0)
    for grid, status in (((5, 7), "skipped"), ((6, 6), "skipped"), ((5, 8), "rewritten")):
        shape = Shape(depth=1, class_token=False, grid=grid)  # D = 8: even at 36
        (site,) = t5fx.explain(shape.model(), (shape.images(),), config=plain).sites
        n, heads, batch = shape.tokens, shape.heads, shape.batch
        assert site.flops_before == 4 * n * n * 8 * heads * batch
        assert site.flops_after == 18 * n * 8 * 8 * heads * batch
        assert site.status == status
    shape = Shape(depth=1)
    (site,) = t5fx.explain(shape.model(), (shape.images(),), config=plain).sites
    assert "from 36 on" in site.detail
    fewer = t5fx.LinearizeConfig(min_tokens=13)
    assert t5fx.explain(Shape().model(), (Shape().images(),), config=fewer).rewritten
    more = t5fx.LinearizeConfig(min_tokens=14)
    assert not t5fx.explain(Shape().model(), (Shape().images(),), config=more).rewritten


def test_near_attention_counts():
    """With window and cells they meet at N = 4.5 D + 25 + 64, where there is no prefix."""
    for grid in ((5, 13), (6, 21)):
        shape = Shape(depth=1, class_token=False, grid=grid)
        (site,) = t5fx.explain(shape.model(), (shape.images(),)).sites
        n, heads, batch = shape.tokens, shape.heads, shape.batch
        keys = 25 + min(8, grid[0]) * 8
        assert site.flops_after == (18 * n * 8 * 8 + 4 * n * keys * 8) * heads * batch
        even = 36 + keys
        assert site.status == ("rewritten" if n > even else "skipped")


def test_the_measured_flops_of_the_node_are_the_reported_ones():
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(depth=1)
    images = shape.images()
    config = t5fx.LinearizeConfig(min_tokens=0, locality="none", dynamic=False)
    lin = t5fx.linearize(shape.model(), (images,), config=config)
    q = torch.randn(shape.batch, shape.heads, shape.tokens, shape.head_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lin.blocks[0].attn.t5(q, q, q, grid=shape.grid, prefix=1)
    assert counter.get_total_flops() == t5fx.report(lin).sites[0].flops_after


@pytest.mark.parametrize(
    "field",
    [
        {"inner": "mlp9"},
        {"inner_loss": "l3"},
        {"key_norm": "batch"},
        {"locality": "conv"},
        {"grid": (0, 3)},
        {"grid": (1, 2, 3, 4)},
        {"prefix": -1},
        {"min_tokens": 1.5},
        {"key_norm_eps": -1.0},
        {"seed": "0"},
        {"impl": "cuda"},
        {"overrides": {"*": {"seed": 3}}},
        {"overrides": {"*": {"inner": "mlp9"}}},
    ],
)
def test_wrong_configurations_are_refused(field):
    with pytest.raises(ConfigError, match=r"expected|cannot"):
        t5fx.LinearizeConfig(**field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner": "linear", "inner_loss": "l2"}, '^inner_loss: expected "dot"'),
        ({"inner": "none"}, "near attention alone: expected key_norm='none'"),
        (
            {"overrides": {"blocks.0": {"inner": "linear", "inner_loss": "l2"}}},
            r"^overrides\['blocks.0'\]: inner_loss",
        ),
        (
            {
                **{"inner": "none", "key_norm": "none", "locality": "none"},
                **{"neighborhood": 0, "coarse": 0},
            },
            "expected near attention with inner 'none'",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    config = t5fx.LinearizeConfig(**fields)
    for function in (t5fx.linearize, t5fx.explain):
        with pytest.raises(ConfigError, match=message):
            function(torch.nn.Identity(), (torch.ones(1),), config=config)
    with pytest.raises(BackendCompilerFailed, match=message.removeprefix("^")):
        torch.compile(torch.nn.Linear(1, 1), backend="t5", options=fields)(torch.ones(1))


def test_configuration_round_trip():
    config = t5fx.LinearizeConfig(grid=(3, 4), overrides={"blocks.0.*": {"inner": "mlp2"}})
    assert t5fx.LinearizeConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="version 1"):
        t5fx.LinearizeConfig.from_json(config.to_json().replace('"version": 1', '"version": 9'))
    with pytest.raises(ConfigError, match="unknown fields"):
        t5fx.LinearizeConfig.from_json('{"version": 1, "colour": 3}')
    with pytest.raises(ConfigError, match="JSON"):
        t5fx.LinearizeConfig.from_json("{")
    with pytest.raises(ConfigError, match="callable"):
        t5fx.LinearizeConfig(grid=lambda x: (1, 1)).to_json()
    assert config.at("blocks.0.attn").inner == "mlp2"
    assert config.at("blocks.1.attn").inner == "swiglu"


@pytest.mark.parametrize("read", [t5fx.explain, t5fx.linearize])
def test_a_pattern_that_matches_no_attention_is_told(read):
    shape = Shape(depth=2)
    config = t5fx.LinearizeConfig(
        min_tokens=0,
        include=("blocks.*", "encoder.*"),
        exclude=("blocks.1.*",),
        overrides={"blocks.[0]*": {"coarse": 4}, "block.0.*": {"coarse": 4}},
    )
    with pytest.warns(UserWarning, match="matches none") as told:
        read(shape.model(), (shape.images(),), config=config)
    shown = [str(w.message) for w in told if "matches none" in str(w.message)]
    assert [line.partition(":")[0] for line in shown] == ["include", "overrides"]
    assert "'encoder.*'" in shown[0] and "'block.0.*'" in shown[1]
    assert all("('blocks.0.attn', 'blocks.1.attn')" in line for line in shown)
