"""The table that the tools of ``tools/model_converters`` print."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmsnnet.converters.released import Conversion


def conversion_table(conversion: Conversion) -> Table:
    """One row for each pair of patterns, then dropped and added tensors."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("from", overflow="fold")
    table.add_column("to", overflow="fold")
    table.add_column("tensors", justify="right", no_wrap=True)
    rows = [(*patterns, count) for patterns, count in conversion.mapped.items()]
    rows += [(pattern, "(dropped)", count) for pattern, count in conversion.dropped.items()]
    rows += [("(added)", pattern, count) for pattern, count in conversion.added.items()]
    for source, target, count in rows:
        table.add_row(Text(source), Text(target), str(count))
    return table
