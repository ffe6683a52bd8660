"""Operating points as a picture and as a table."""

from mmsnnet.visualization.pareto import plot_pareto
from mmsnnet.visualization.table import operating_points_table, print_table

__all__ = ["operating_points_table", "plot_pareto", "print_table"]
