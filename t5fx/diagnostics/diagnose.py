"""`diagnose`: runs a model once and looks at what its attention sites get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from t5fx.api import check_call, linearize, report
from t5fx.backend.adapters import adapter, has_adapter
from t5fx.config import LinearizeConfig
from t5fx.diagnostics.attention import key_shift, node_attention, softmax_attention
from t5fx.diagnostics.places import Layout, Query
from t5fx.diagnostics.result import Diagnosis, Maps, SiteDiagnosis
from t5fx.errors import ConfigError, T5Error
from t5fx.kernels import TTT
from t5fx.pipeline import build
from t5fx.runtime.lookup import is_linearized, nodes_in
from t5fx.training.nodes import kept
from t5fx.training.students import attention, instead
from t5fx.wrappers import uncompiled

#: Why a node was not measured.
IDLE = "not run in this call"


@torch.inference_mode(False)
def diagnose(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: LinearizeConfig | None = None,
    sites: str | Sequence[str] | None = None,
    queries: Sequence[Query] | None = None,
) -> Diagnosis:
    """Measure the attention sites of a model in one call: shifted keys, and where queries look.

    The two diagnostics of "Linearizing Vision Transformer with Test-Time Training" (arXiv
    2605.02772). The key shift |mean of k| / mean of |k| says how much of the keys is a constant,
    to which softmax is blind and a TTT node without a key norm is not. The maps have the attention
    probabilities of chosen queries beside the node's implicit attention d o_i / d v_j on the same
    queries, keys and values.

    The model runs once, in eval mode and without gradients: a linearized one, or one compiled with
    backend="t5", as it is, with its TTT nodes; any other with its softmax attention. The latter is
    copied and the copy linearized, so that its maps show what `linearize` gives before training.

    Args:
        model: as for `linearize`. It stays as it is.
        args: as for `linearize`.
        kwargs: as for `linearize`.
        config: what stands for the sites of a model that is not linearized; the default is
            LinearizeConfig(min_tokens=0), for which every site counts, whatever it costs.
        sites: of which sites there are maps: names or patterns (as of fnmatch) of the modules that
            own them. None is the first, the middle and the last site, () is none.
        queries: for which tokens there are maps: positions, or places on the grid as tuples of
            fractions, (0.5, 0.5) being the middle, wherever a site's grid is. None is the first
            prefix token, if there is one, the middle of the grid and a place halfway from there
            to its beginning.

    Returns:
        A `Diagnosis`, which prints as a table and has `.save(folder)`.

    Raises:
        NothingRewrittenError: no site of the model can be linearized.
        ConfigError: a config for a model that is linearized already.
        T5Error: a pattern that no site has, a query that is no token; and what `linearize` raises.
    """
    arguments, keywords = check_call(model, args, kwargs)
    if queries is not None and not queries:
        raise T5Error("queries: expected at least one token, got none; sites=() asks for no maps")
    module = uncompiled(model)
    with kept(module):
        module.eval()
        linear, trained = _linear_form(module, arguments, keywords, config)
    nodes = nodes_in(linear)
    chosen = _chosen(list(nodes), sites)
    watched = {key: _Watched(node, trained, key in chosen) for key, node in nodes.items()}
    order: list[str] = []

    def watch(key: str) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            order.append(key)
            return watched[key](*args, **kwargs)

        return forward

    with kept(linear), torch.no_grad(), instead(nodes, {key: watch(key) for key in nodes}):
        linear.eval()
        with torch.compiler.set_stance("force_eager"):
            linear(*arguments, **keywords)
    found = [watched[key].diagnosis(key, queries) for key in dict.fromkeys(order)]
    idle = [SiteDiagnosis(key, IDLE) for key in nodes if key not in order]
    skipped = [SiteDiagnosis(site.fqn, site.reason or "") for site in report(linear).skipped]
    return Diagnosis(type(module).__name__, trained, (*found, *idle, *skipped))


def _linear_form(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: LinearizeConfig | None,
) -> tuple[nn.Module, bool]:
    """A linearized form of a model, and whether the model itself runs with those nodes."""
    trained = is_linearized(module) or has_adapter(module)
    if trained and config is not None:
        raise ConfigError(
            f"config: expected none for a {type(module).__name__} that is linearized, whose own "
            f"nodes are measured, got one"
        )
    if is_linearized(module):
        return module, True
    if trained:
        new = adapter(module)
        options = new.linearize_config
        return build(module, args, kwargs, options, new.nodes(), inplace=False), True
    config = config or LinearizeConfig(min_tokens=0)
    return linearize(module, args, kwargs, config=config), False


def _chosen(keys: list[str], sites: str | Sequence[str] | None) -> set[str]:
    """The keys of the sites that get maps."""
    if sites is None:
        return {keys[0], keys[len(keys) // 2], keys[-1]}
    found: set[str] = set()
    for pattern in (sites,) if isinstance(sites, str) else sites:
        owned = {key for key in keys if fnmatchcase(key.rpartition(".")[0], pattern)}
        if not owned:
            names = ", ".join(dict.fromkeys(repr(key.rpartition(".")[0]) for key in keys))
            raise T5Error(f"sites: expected names or patterns of {names}, got {pattern!r}")
        found |= owned
    return found


@dataclass
class _Watched:
    """A node, and what came by; a site that runs several times in a call is one.

    runs: whether the node itself runs, or the softmax attention in its place. keeps: whether the
    first item of the first call's queries, keys and values is kept.
    """

    node: TTT
    runs: bool
    keeps: bool
    shifts: list[Tensor] = field(default_factory=list)
    layout: Layout | None = None
    inputs: tuple[Tensor, Tensor, Tensor] | None = None
    key_mask: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Sequence[int] = (),
        prefix: int = 0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        self.shifts.append(key_shift(k, None if key_mask is None else key_mask[:, None]).mean(0))
        if self.layout is None:
            self.layout = Layout.of(q.shape[2], grid, prefix)
            if self.keeps:
                self.inputs = (q[:1], k[:1], v[:1])
                self.key_mask = None if key_mask is None else key_mask[:1]
        if self.runs:
            return TTT.forward(self.node, q, k, v, grid, prefix, key_mask)
        return attention(self.node)(q, k, v, key_mask=key_mask)

    def diagnosis(self, key: str, queries: Sequence[Query] | None) -> SiteDiagnosis:
        assert self.layout is not None
        shift = torch.stack(self.shifts).mean(0).tolist()
        return SiteDiagnosis(
            key, layout=self.layout, key_shift=tuple(shift), maps=self._maps(queries)
        )

    def _maps(self, queries: Sequence[Query] | None) -> Maps | None:
        if self.inputs is None:
            return None
        assert self.layout is not None
        layout, (q, k, v) = self.layout, self.inputs
        tokens = tuple(layout.token(query) for query in queries or layout.defaults)
        mask = self.key_mask
        heads = None if mask is None else mask[:, None]
        softmax = softmax_attention(q, k, self.node.scale, tokens, heads)
        prefix = layout.prefix if layout.grid else 0
        place: dict[str, Any] = {"grid": layout.grid, "prefix": prefix, "key_mask": mask}
        node = node_attention(self.node, q, k, v, tokens, **place)
        return Maps(tokens, softmax[0].cpu(), node[0].cpu())
