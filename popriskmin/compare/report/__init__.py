"""What the runs of a comparison say: figures, intervals, tables, plots and the page."""
