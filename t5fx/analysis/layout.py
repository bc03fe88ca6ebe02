"""Where tokens come from: prefix, grid and suffix of each token axis, proved from the graph."""

from t5fx.analysis import rules_compute, rules_cut, rules_shape  # noqa: F401  (they register themselves)
from t5fx.analysis.meaning import Axes
from t5fx.analysis.tokens import Layout, layout_of

__all__ = ["Axes", "Layout", "layout_of"]
