"""The grid: models × data × settings × seeds, run as ordinary runs, with its tables, figures and the pick."""

from holdtrue.bench.cells import Cell, expand
from holdtrue.bench.estimate import Estimate, estimate_cells
from holdtrue.bench.grid import Bench, State, fill, look
from holdtrue.bench.pick import Pick, pick
from holdtrue.bench.results import Results, write_results
from holdtrue.bench.spec import Bounds, GridSpec, load_grid
from holdtrue.bench.summary import Table, summarize

__all__ = [
    "Bench",
    "Bounds",
    "Cell",
    "Estimate",
    "GridSpec",
    "Pick",
    "Results",
    "State",
    "Table",
    "estimate_cells",
    "expand",
    "fill",
    "load_grid",
    "look",
    "pick",
    "summarize",
    "write_results",
]
