"""Pictures, pages and tables of operating points and routes."""

from mmsnnet.visualization.pareto import pareto_figure, plot_pareto
from mmsnnet.visualization.routes import draw_route, plot_routes
from mmsnnet.visualization.table import operating_points_table, print_table

__all__ = ["draw_route", "operating_points_table", "pareto_figure", "plot_pareto", "plot_routes", "print_table"]
