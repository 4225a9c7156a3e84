"""Many runs: a sweep file → variants → matched widths → a plan → runs → their status.

design    the sweep file, checked, as variants of its base experiment
matching  one width of each variant solved, so that its size or cost is the baseline's
plan      rows, counts, what is done already, and what the rest will take
manifest  runs/sweeps/<name>.json: the rows and their runs, for all that comes after
local     runs them on this machine
status    how far they are
"""
